"""GroupedWeight: an integer matrix whose rows share scales by group, laid out for a GEMM; packing and unpacking it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["WORD_BITS", "GroupedWeight", "dequantize", "expand_groups", "group_floats", "pack_codes", "unpack_codes"]

WORD_BITS = 32


@dataclass(frozen=True)
class GroupedWeight:
    """W[row, output] = scales[group(row), output] * (code[row, output] - zeros[group(row), output]).

    Rows are in the order of their groups, so that a GEMM walking down K meets one group after the other: no index is
    loaded per row, and a block of rows within one group needs one row of scales.

    codes: int32 ``[words, out_features]``, contiguous. Word ``w`` of a column holds the codes of the rows
        ``w * codes_per_word ...``, the first in its lowest bits. All rows of a word are of one group.
    scales: bf16, fp16 or fp32 ``[groups, out_features]``, as the checkpoint has them.
    zeros: uint8 ``[groups, out_features]``; None: ``2**(bits - 1)`` everywhere.
    bits: width of a code, 4 or 8.
    word_groups: int32 ``[words]``, not descending: the group of each word. None: every group has as many words.
    input_index: int32 ``[rows]``: the input feature each row multiplies. None: row ``k`` multiplies feature ``k``.

    Where a group's rows do not fill whole words, rows that are zero fill them up; their input is one of the group's.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    bits: int
    word_groups: torch.Tensor | None = None
    input_index: torch.Tensor | None = None

    @property
    def codes_per_word(self) -> int:
        return WORD_BITS // self.bits

    @property
    def rows(self) -> int:
        """Stored rows, those that fill up words included."""
        return self.codes.shape[0] * self.codes_per_word

    @property
    def out_features(self) -> int:
        return self.codes.shape[1]

    @property
    def group_size(self) -> int | None:
        """Rows of every group; None if they are not equal."""
        return self.rows // self.scales.shape[0] if self.word_groups is None else None


def pack_codes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 codes ``[rows, features]`` -> int32 words ``[rows * bits / 32, features]``, rows filling whole words."""
    words = codes.unflatten(0, (-1, WORD_BITS // bits)).to(torch.int32)
    packed = words[:, 0].clone()
    for slot in range(1, words.shape[1]):
        packed |= words[:, slot] << (slot * bits)
    return packed


def unpack_codes(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Reverses :func:`pack_codes`: int32 ``[words, features]`` -> uint8 ``[words * 32 / bits, features]``."""
    shifts = range(0, WORD_BITS, bits)
    return torch.stack([((words >> shift) & (2**bits - 1)).to(torch.uint8) for shift in shifts], dim=1).flatten(0, 1)


def dequantize(weight: GroupedWeight, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The dense matrix ``[rows, out_features]``, in the order of the stored rows.

    The difference of code and zero is exact, its product with the scale is rounded to float32, then to ``dtype``.
    """
    codes = unpack_codes(weight.codes, weight.bits).unflatten(0, (-1, weight.codes_per_word))
    scales, zeros = expand_groups(weight)
    return ((codes - zeros.unsqueeze(1)) * scales.unsqueeze(1)).flatten(0, 1).to(dtype)


def group_floats(weight: GroupedWeight) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and zeros of every group, float32 ``[groups, out_features]`` each."""
    scales = weight.scales.float()
    zeros = torch.full_like(scales, 2 ** (weight.bits - 1)) if weight.zeros is None else weight.zeros.float()
    return scales, zeros


def expand_groups(weight: GroupedWeight) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and zeros of every word, float32 ``[words, out_features]`` each."""
    scales, zeros = group_floats(weight)
    if weight.word_groups is not None:
        return scales[weight.word_groups], zeros[weight.word_groups]
    words = weight.codes.shape[0] // scales.shape[0]
    return scales.repeat_interleave(words, 0), zeros.repeat_interleave(words, 0)
