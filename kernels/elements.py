"""Element formats: the low-bit numbers of a block, and rounding to them.

A value ``y`` (already divided by its block's scale) becomes an integer *code* of ``bits`` bits, and a code
becomes a value again. Codes travel through this file as float32 tensors holding small integers: exact, and the
form that vectorizes best on a CPU. Sources: OCP Microscaling Formats (MX) v1.0, section 5.3, for FP4, FP6, FP8
and INT8; arXiv 2411.09510 for FP3, FP5 and the other integers.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from typing import ClassVar

import torch
import triton
import triton.language as tl

from megacomp.kernels.packing import Packed

__all__ = ["ELEMENTS", "FloatElement", "IntElement", "dequantize_codes", "quantize_codes", "round_to_element"]

ROUNDING = tl.constexpr(1.5 * 2.0**23)
"""Added to a float32 of magnitude below 2**22, rounds it to an integer, ties to even, which the lowest bits of the
sum then hold in two's complement."""

ROUNDING_BITS = tl.constexpr(0x4B400000)
"""The bits of ROUNDING."""


def _times(x: torch.Tensor, factor: float) -> torch.Tensor:
    """``x * factor``, without the instruction that a factor of one would cost."""
    return x if factor == 1.0 else x * factor


def _lesser(code: torch.Tensor, other: torch.Tensor | float) -> torch.Tensor:
    """The minimum of two codes, exactly. A CPU takes three instructions for it; for minimum, which passes NaN on, four
    and for clamp eight."""
    return other - torch.relu(other - code)


@dataclass(frozen=True)
class FloatElement(Packed):
    """A minifloat: sign, ``exponent_bits``, ``mantissa_bits``, subnormals, no code wasted on Inf.

    Attributes:
        exponent_bits: width of the exponent field.
        mantissa_bits: width of the mantissa field.
        native: the torch dtype with these very values, where one exists (the two FP8 formats).
    """

    exponent_bits: int
    mantissa_bits: int
    native: torch.dtype | None = None

    integer: ClassVar[bool] = False

    @property
    def name(self) -> str:
        return f"fp{self.bits}_e{self.exponent_bits}m{self.mantissa_bits}"

    @property
    def bits(self) -> int:
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def min_exponent(self) -> int:
        """Exponent of the smallest normal number (and of the subnormals): 1 - bias."""
        return 2 - 2 ** (self.exponent_bits - 1)

    @property
    def max_exponent(self) -> int:
        """Exponent of the largest number (``emax`` of the OCP specification)."""
        if self.native is torch.float8_e5m2:  # its top exponent is Inf and NaN, as in IEEE 754
            return 15
        return self.min_exponent + 2**self.exponent_bits - 2

    @property
    def max_value(self) -> float:
        """The largest representable magnitude."""
        if self.native is not None:
            return torch.finfo(self.native).max
        return 2.0**self.max_exponent * (2 - 2.0**-self.mantissa_bits)

    @property
    def top_step(self) -> float:
        """Distance between the two largest values: the coarsest step of the grid."""
        return 2.0 ** (self.max_exponent - self.mantissa_bits)

    @property
    def zero_code(self) -> float:
        """The code of zero."""
        return 0.0

    @property
    def sign_code(self) -> int:
        """The bit of a code that tells negative values."""
        return 1 << (self.bits - 1)

    @property
    def binades(self) -> tuple[tuple[float, float], ...]:
        """(step, first code) of each straight piece of the value-against-code curve.

        Subnormals share the first piece with the first normal binade.
        """
        first = self.min_exponent - self.mantissa_bits
        return tuple(
            (2.0 ** (first + binade), float(binade << self.mantissa_bits))
            for binade in range(max(1, 2**self.exponent_bits - 1))
        )

    def quantize(self, y: torch.Tensor) -> torch.Tensor:
        """Codes of ``y`` (float32, any shape), rounded to nearest, ties to even, saturating.

        The sign is the top bit of the code, set where ``y < 0`` (so -0.0 takes the code of +0.0).
        """
        magnitude = y.abs().clamp(max=self.max_value)
        if self.native is not None:
            code = magnitude.to(self.native).view(torch.uint8).to(torch.float32)
        else:
            # The code as a function of |y| is concave and piecewise linear, so it is the least of its pieces; a
            # piece rounded by itself rounds exactly where its binade does.
            code = reduce(
                _lesser,
                (torch.round(_times(magnitude, 1 / step)) + first for step, first in self.binades),
            )
        return code + torch.where(y < 0, float(self.sign_code), 0.0)

    def dequantize(self, codes: torch.Tensor) -> torch.Tensor:
        """Values (float32) of ``codes``; exact."""
        if self.native is not None:
            return codes.to(torch.uint8).view(self.native).to(torch.float32)
        negative = torch.floor(codes * (1 / self.sign_code))
        code = codes - negative * self.sign_code
        # The inverse curve bends upwards where a binade begins, which doubles the step.
        magnitude = _times(code, self.binades[0][0])
        for step, first in self.binades[1:]:
            magnitude = magnitude + _times(torch.relu(code - (first + 2.0**self.mantissa_bits)), step / 2)
        return magnitude * (1 - 2 * negative)


@dataclass(frozen=True)
class IntElement(Packed):
    """A signed integer in offset binary (code 0 is the lowest value).

    Attributes:
        bits: width of the code, 2 to 8.
        fraction_bits: binary places behind the point: 0 for plain integers, ``bits - 2`` for the MX integers,
            whose largest magnitude lies just below 2 (OCP MX v1.0, section 5.3.4: INT8 has a scale of 2^-6).
        symmetric_range: leave the lowest code unused, so that the range is symmetric (the MX integers).
    """

    bits: int
    fraction_bits: int = 0
    symmetric_range: bool = False

    integer: ClassVar[bool] = True

    @property
    def name(self) -> str:
        return f"int{self.bits}"

    @property
    def max_exponent(self) -> int:
        """``emax`` of the OCP specification: exponent of the largest magnitude's leading bit."""
        return self.bits - 2 - self.fraction_bits

    @property
    def max_value(self) -> float:
        """The largest positive value."""
        return (2.0 ** (self.bits - 1) - 1) * self.top_step

    @property
    def top_step(self) -> float:
        """Distance between neighbouring values."""
        return 2.0**-self.fraction_bits

    @property
    def zero_code(self) -> float:
        """The code of zero."""
        return 2.0 ** (self.bits - 1)

    @property
    def min_value(self) -> float:
        """The least value that is used."""
        return -self.max_value if self.symmetric_range else -self.zero_code * self.top_step

    def quantize(self, y: torch.Tensor) -> torch.Tensor:
        """Codes of ``y`` (float32, any shape), rounded to nearest, ties to even, saturating."""
        lowest, highest = float(self.symmetric_range), 2.0**self.bits - 1
        above = torch.relu(torch.round(_times(y, 1 / self.top_step)) + (self.zero_code - lowest))
        return _lesser(above + lowest if lowest else above, highest)

    def dequantize(self, codes: torch.Tensor) -> torch.Tensor:
        """Values (float32) of ``codes``; exact."""
        return _times(codes - self.zero_code, self.top_step)


_MICROSCALED: tuple[FloatElement | IntElement, ...] = (
    FloatElement(2, 0),
    FloatElement(1, 1),
    FloatElement(2, 1),
    FloatElement(1, 2),
    FloatElement(2, 2),
    FloatElement(3, 1),
    FloatElement(2, 3),
    FloatElement(3, 2),
    FloatElement(4, 3, torch.float8_e4m3fn),
    FloatElement(5, 2, torch.float8_e5m2),
    *(IntElement(bits, fraction_bits=bits - 2, symmetric_range=True) for bits in range(2, 9)),
)

ELEMENTS = {element.name: element for element in _MICROSCALED}
"""The elements of microscaled blocks by name: ``fp4_e2m1``, ``int8``..."""


@triton.jit
def quantize_codes(y, element: tl.constexpr):
    """Twin of ``quantize``: int32 codes of float32 ``y``, plus ROUNDING_BITS.

    The surplus is left in: it costs an instruction per value to take out here, and one per word behind the packing.
    A NaN takes any code.
    """
    if element.integer:
        code = _clamped_integer(y, element) + (ROUNDING + element.zero_code)
        return code.to(tl.int32, bitcast=True)
    else:
        sign = tl.where(y < 0, element.sign_code, 0)
        return _magnitude_code(tl.minimum(tl.abs(y), element.max_value), element) + sign


@triton.jit
def _clamped_integer(y, element: tl.constexpr):
    """``y`` in steps, within the element's range, not rounded yet: that changes neither end."""
    if element.top_step != 1.0:
        y = y * (1.0 / element.top_step)
    return tl.minimum(tl.maximum(y, element.min_value / element.top_step), element.max_value / element.top_step)


@triton.jit
def _magnitude_code(magnitude, element: tl.constexpr):
    """int32 code of a minifloat without sign, plus ROUNDING_BITS."""
    if len(element.binades) <= 3:
        code = _straight_piece(magnitude, element.binades[0][0], element.binades[0][1])
        for binade in tl.static_range(1, len(element.binades)):
            code = tl.minimum(code, _straight_piece(magnitude, element.binades[binade][0], element.binades[binade][1]))
        return code.to(tl.int32, bitcast=True)
    else:
        # Many binades: normal numbers round in the bits of the float32, subnormals by addition.
        dropped: tl.constexpr = 23 - element.mantissa_bits
        offset: tl.constexpr = (126 + element.min_exponent) << element.mantissa_bits
        bits = magnitude.to(tl.int32, bitcast=True)
        odd = (bits >> dropped) & 1
        normal = ((bits + odd + (2 ** (dropped - 1) - 1)) >> dropped) + (ROUNDING_BITS - offset)
        subnormal = _straight_piece(magnitude, element.binades[0][0], 0).to(tl.int32, bitcast=True)
        return tl.where(magnitude >= 2.0**element.min_exponent, normal, subnormal)


@triton.jit
def _straight_piece(magnitude, step: tl.constexpr, first: tl.constexpr):
    """``round(magnitude / step) + first + ROUNDING``."""
    # Multiplying by a power of two is exact, so fusing it with the addition rounds no differently; nor does adding
    # an even number before rounding, whereas an odd one would turn ties to odd.
    if first % 2 == 0:
        return tl.fma(magnitude, 1.0 / step, ROUNDING + first)
    else:
        return tl.fma(magnitude, 1.0 / step, ROUNDING) + first


@triton.jit
def dequantize_codes(codes, element: tl.constexpr):
    """Twin of ``dequantize``: float32 values of int32 codes, exact."""
    if element.integer:
        # The bits of 2**23 + code: no conversion instruction.
        value = (codes | 0x4B000000).to(tl.float32, bitcast=True) - (8388608.0 + element.zero_code)
        if element.top_step != 1.0:
            value = value * element.top_step
        return value
    else:
        # Exponent and mantissa in the place of a float32's: to the top, then down while the sign stays, and away with
        # its copies. The difference of the biases is a product, exact for subnormals too.
        bits = (codes << (32 - element.bits)) >> (8 - element.exponent_bits)
        bits = bits & (-(2**31) | (element.sign_code - 1) << (23 - element.mantissa_bits))
        return bits.to(tl.float32, bitcast=True) * 2.0 ** (126 + element.min_exponent)


@triton.jit
def round_to_element(y, element: tl.constexpr):
    """Twin of ``dequantize(quantize(y))``, whatever the sign of a zero."""
    if element.integer:
        y = (_clamped_integer(y, element) + ROUNDING) - ROUNDING
        if element.top_step != 1.0:
            y = y * element.top_step
        return y
    else:
        return dequantize_codes(quantize_codes(y, element) - ROUNDING_BITS, element)
