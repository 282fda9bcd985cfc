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

import torch

__all__ = ["SCALES", "PowerOfTwoScale", "RealScale"]

SMALLEST_NORMAL = torch.finfo(torch.float32).tiny
"""Scales below this cannot be inverted in float32; their blocks become zero."""


@dataclass(frozen=True)
class PowerOfTwoScale:
    """An exponent of ``bits`` bits, biased by ``bias``; code ``2**bits - 1`` is NaN."""

    name: str
    bits: int
    bias: int

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
    return torch.where(scale.abs() >= SMALLEST_NORMAL, 1.0 / scale, 0.0)
