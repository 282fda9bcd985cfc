"""Scale formats: how a block's scale is stored, and which scale a block gets.

Three kinds:

* powers of two (``e8m0``, ``e5m0``): a biased exponent, the top code meaning NaN (OCP MX v1.0, section 5.4.1 for
  E8M0; arXiv 2411.09510 for the 5-bit exponent);
* ``bf16`` and ``fp16``: the scale itself, rounded to nearest;
* ``e4m3``: an FP8 E4M3 multiple of one float32 *row scale*, chosen so that the row's largest block scale is 448,
  E4M3's largest number (NVFP4's two levels, with the second one per row instead of per tensor, so that rows stay
  independent).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import triton
import triton.language as tl

from megacomp.kernels.packing import Packed

__all__ = ["SCALES", "PowerOfTwoScale", "RealScale"]

SMALLEST_NORMAL = tl.constexpr(2.0**-126)
"""Scales below this cannot be inverted in float32; their blocks become zero."""


@dataclass(frozen=True)
class PowerOfTwoScale(Packed):
    """An exponent of ``bits`` bits, biased by ``bias``; code ``2**bits - 1`` is NaN."""

    name: str
    bits: int
    bias: int
    power_of_two: ClassVar[bool] = True
    row_relative: ClassVar[bool] = False

    @property
    def nan_code(self) -> int:
        return 2**self.bits - 1

    def code_of_exponent(self, exponent: torch.Tensor) -> torch.Tensor:
        """int32 codes of int32 exponents, clamped to the range of the format."""
        return (exponent + self.bias).clamp(0, self.nan_code - 1)

    def value(self, code: torch.Tensor) -> torch.Tensor:
        """float32 scales of int32 codes: exact, subnormal 2**-127 and NaN included."""
        float32_exponent = code + (127 - self.bias)
        # 2**-127 is subnormal: a mantissa bit instead of an exponent.
        bits = (float32_exponent << 23).clamp(min=0x00400000)
        return torch.where(code == self.nan_code, torch.nan, bits.view(torch.float32))

    def reciprocal(self, code: torch.Tensor) -> torch.Tensor:
        """float32 ``1 / scale`` of int32 codes, exact; 0 for NaN."""
        float32_exponent = 127 + self.bias - code
        bits = (float32_exponent << 23).clamp(min=0x00400000)
        return torch.where(code == self.nan_code, 0.0, bits.view(torch.float32))


@dataclass(frozen=True)
class RealScale:
    """A floating-point scale stored as ``dtype``; with ``row_relative``, as a multiple of the row's own scale."""

    name: str
    dtype: torch.dtype
    row_relative: bool = False
    power_of_two: ClassVar[bool] = False

    @property
    def bits(self) -> int:
        return self.dtype.itemsize * 8

    @property
    def bits_dtype(self) -> torch.dtype:
        """The integers whose bits a wire's field holds."""
        return torch.uint8 if self.bits == 8 else torch.int16

    @property
    def nan_bits(self) -> int:
        """The one NaN a wire holds: positive and quiet."""
        return {torch.float8_e4m3fn: 0x7F, torch.bfloat16: 0x7FC0, torch.float16: 0x7E00}[self.dtype]

    @property
    def max_value(self) -> float:
        return torch.finfo(self.dtype).max

    def round(self, scale: torch.Tensor) -> torch.Tensor:
        """The bits of float32 scales as ``dtype``: to nearest, ties to even, saturating; never a negative zero.

        Bits, because a compiler may keep the unrounded value of a cast to fewer bits and back, and need not keep
        the sign of a zero.
        """
        rounded = scale.clamp(-self.max_value, self.max_value).to(self.dtype).view(self.bits_dtype)
        magnitude = rounded & (2 ** (self.bits - 1) - 1)
        return torch.where(magnitude == 0, 0, rounded)

    def value(self, bits: torch.Tensor) -> torch.Tensor:
        """float32 scales of their bits (or of tensors of ``dtype``); exact."""
        return bits.view(self.dtype).to(torch.float32)


SCALES: dict[str, PowerOfTwoScale | RealScale] = {
    scale.name: scale
    for scale in (
        PowerOfTwoScale("e8m0", bits=8, bias=127),
        PowerOfTwoScale("e5m0", bits=5, bias=15),
        RealScale("e4m3", torch.float8_e4m3fn, row_relative=True),
        RealScale("bf16", torch.bfloat16),
        RealScale("fp16", torch.float16),
    )
}
"""The scale formats by name."""


def floor_log2(magnitude: torch.Tensor) -> torch.Tensor:
    """int32 ``floor(log2(magnitude))`` of float32 magnitudes, read from the exponent field.

    Zero and subnormals give -127, below every exponent a scale can store; Inf and NaN give 128.
    """
    return (magnitude.view(torch.int32) >> 23) - 127


def safe_reciprocal(scale: torch.Tensor) -> torch.Tensor:
    """float32 ``1 / scale``; 0 where the scale is zero, subnormal or NaN."""
    return torch.where(scale.abs() >= SMALLEST_NORMAL.value, 1.0 / scale, 0.0)


@triton.jit
def exponent_code(exponent, scale: tl.constexpr):
    """Twin of ``PowerOfTwoScale.code_of_exponent``."""
    return tl.minimum(tl.maximum(exponent + scale.bias, 0), scale.nan_code - 1)


@triton.jit
def exponent_value(code, scale: tl.constexpr):
    """Twin of ``PowerOfTwoScale.value``."""
    bits = tl.maximum((code + (127 - scale.bias)) << 23, 0x00400000)
    return tl.where(code == scale.nan_code, 0x7FC00000, bits).to(tl.float32, bitcast=True)


@triton.jit
def exponent_reciprocal(code, scale: tl.constexpr):
    """Twin of ``PowerOfTwoScale.reciprocal``."""
    bits = tl.maximum(((127 + scale.bias) - code) << 23, 0x00400000)
    return tl.where(code == scale.nan_code, 0, bits).to(tl.float32, bitcast=True)


@triton.jit
def round_scale(value, scale: tl.constexpr):
    """Twin of ``RealScale.round``: int32 bits."""
    value = tl.minimum(tl.maximum(value, -scale.max_value), scale.max_value)
    bits = value.to(tl.int32, bitcast=True)
    if scale.name == "fp16":
        magnitude = value.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) & 0x7FFF
    elif scale.name == "bf16":
        bits = bits & 0x7FFFFFFF
        magnitude = (bits + ((bits >> 16) & 1) + 0x7FFF) >> 16
    else:
        # In the bits of the float32 (casts to FP8 need sm_89): normal numbers lose 20 bits of mantissa and the
        # difference of the biases, subnormals round by addition.
        bits = bits & 0x7FFFFFFF
        normal = ((bits + ((bits >> 20) & 1) + 0x7FFFF) >> 20) - ((127 - 7) << 3)
        subnormal = tl.fma(tl.abs(value), 2.0**9, 1.5 * 2.0**23).to(tl.int32, bitcast=True) - 0x4B400000
        magnitude = tl.where(tl.abs(value) >= 2.0**-6, normal, subnormal)
    return tl.where((value < 0) & (magnitude != 0), magnitude | 1 << (scale.bits - 1), magnitude)


@triton.jit
def scale_value(bits, scale: tl.constexpr):
    """Twin of ``RealScale.value``: float32 of int32 bits whose upper part may hold anything."""
    if scale.name == "fp16":
        return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    elif scale.name == "bf16":
        return (bits << 16).to(tl.float32, bitcast=True)
    else:
        magnitude = bits & 0x7F
        value = ((magnitude << 20) | ((bits & 0x80) << 24)).to(tl.float32, bitcast=True) * 2.0**120
        return tl.where(magnitude == 0x7F, float("nan"), value)


@triton.jit
def reciprocal_or_zero(scale):
    """Twin of ``safe_reciprocal``."""
    return tl.where(tl.abs(scale) >= SMALLEST_NORMAL, tl.div_rn(1.0, scale), 0.0)
