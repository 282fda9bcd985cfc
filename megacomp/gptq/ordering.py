"""The order of rows and columns of quantized linears under tensor parallelism: functions of indices alone.

GPTQ with activation order gives every input feature the number of its group, `g_idx`, in no order. A GEMM wants groups
to be contiguous, so rows are sorted by group; what multiplies them must come in that order too. Two ways:

* TP-aware (arXiv 2402.04925), for a pair of linears W1 -> W2 with elementwise functions between: W1's columns are put
  in the order of W2's sorted rows, before either is split. A rank then makes exactly the features it consumes, in
  order, and nothing is gathered or permuted between the two. SwiGLU's gate and up both take W2's order.
* local, where features may not leave their rank (the output projection of attention: heads): a rank keeps its share,
  sorts its own rows, and gathers its own activation inside of the GEMM (`input_index`).

W is [in_features, out_features] throughout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from megacomp.kernels.grouped_weight import WORD_BITS, GroupedWeight, pack_codes

__all__ = ["Arrangement", "arrange", "concatenate_outputs", "group_weight", "share", "sort_by_group", "tp_aware_order"]


def sort_by_group(g_idx: torch.Tensor) -> torch.Tensor:
    """Input features in the order of their groups, int64 [in_features]; within a group as they were."""
    return torch.argsort(g_idx, stable=True)


def share(features: torch.Tensor, rank: int, ranks: int) -> torch.Tensor:
    """The equal part of `features` that is rank `rank`'s. Raises ValueError if `ranks` does not divide them."""
    if len(features) % ranks:
        raise ValueError(f"{ranks} ranks cannot take equal parts of {len(features)} features")
    part = len(features) // ranks
    return features[rank * part : (rank + 1) * part]


@dataclass(frozen=True)
class Arrangement:
    """The rows of a linear as a rank stores them, sorted by group, every word of codes within one group.

    inputs: int64 [rows]: the linear's input feature of each row.
    filler: bool [rows]: rows that only fill up a word; their weights are to be zero.
    groups: int64: the groups that occur, ascending; scales and zeros of no others are kept.
    word_groups: int32 [words]: the position of each word's group in `groups`; None: all have as many words.
    input_index: int32 [rows]: the position of each row's input among the features the rank is given; None: they come
        in the order of the rows.
    """

    inputs: torch.Tensor
    filler: torch.Tensor
    groups: torch.Tensor
    word_groups: torch.Tensor | None
    input_index: torch.Tensor | None


def arrange(g_idx: torch.Tensor, given: torch.Tensor, codes_per_word: int) -> Arrangement:
    """How to store the rows of a linear for a rank that is given some of its input features.

    g_idx: int [in_features], the group of each. given: int64, the input features in the order in which the rank's
    activation has them.
    """
    position = sort_by_group(g_idx[given])
    groups, counts = torch.unique_consecutive(g_idx[given][position], return_counts=True)
    ends = counts.cumsum(0)
    words = -(-counts // codes_per_word)
    rows, fillers = [], []
    for start, end, count in zip((ends - counts).tolist(), ends.tolist(), words.tolist(), strict=True):
        missing = count * codes_per_word - (end - start)
        rows.append(position[start:end])
        rows.append(position[start].expand(missing))
        fillers.append(torch.arange(end - start + missing, device=g_idx.device) >= end - start)
    stored, filler = torch.cat(rows), torch.cat(fillers)
    in_order = len(stored) == len(given) and torch.equal(stored, torch.arange(len(given), device=stored.device))
    equal = bool((words == words[0]).all())
    numbers = torch.arange(len(groups), dtype=torch.int32, device=words.device)
    return Arrangement(
        inputs=given[stored],
        filler=filler,
        groups=groups.long(),
        word_groups=None if equal else numbers.repeat_interleave(words),
        input_index=None if in_order else stored.int(),
    )


def tp_aware_order(g_idx: torch.Tensor, ranks: int, codes_per_word: int) -> torch.Tensor | None:
    """The order of W2's input features, and so of W1's columns, in which every rank takes an equal slice; or None.

    g_idx: of W2. A boundary between ranks may fall within a group, whose scales both then keep, but not within a word
    of codes: None is then the answer, as where groups do not fill whole words or `ranks` does not divide the features.
    """
    if len(g_idx) % ranks:
        return None
    order = sort_by_group(g_idx)
    changes = (g_idx[order].diff() != 0).nonzero().flatten() + 1
    boundaries = torch.arange(0, len(order) + 1, len(order) // ranks, device=order.device)
    # Words are counted from each rank's own start: a run of a group within a rank must have whole words.
    cuts = torch.unique(torch.cat([changes, boundaries])).tolist()
    if any((end - start) % codes_per_word for start, end in pairwise(cuts)):
        return None
    return order


def group_weight(
    codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, bits: int, rows: Arrangement
) -> GroupedWeight:
    """A rank's weight from what it reads of the checkpoint, in the order of `rows`.

    codes: uint8 [rows, outputs]. scales, zeros (uint8, or None for 2**(bits - 1)): [groups, outputs] of `rows.groups`.
    """
    symmetric = 2 ** (bits - 1)
    if rows.filler.any():
        # A row of zeros is one whose codes are the zero point.
        group = _group_of_row(rows, bits)
        points = torch.full_like(scales, symmetric, dtype=torch.uint8) if zeros is None else zeros
        codes = torch.where(rows.filler[:, None], points[group], codes)
    if zeros is not None and bool((zeros == symmetric).all()):
        zeros = None
    return GroupedWeight(
        codes=pack_codes(codes, bits),
        scales=scales.contiguous(),
        zeros=None if zeros is None else zeros.contiguous(),
        bits=bits,
        word_groups=rows.word_groups,
        input_index=rows.input_index,
    )


def concatenate_outputs(weights: Sequence[GroupedWeight], blocks: int = 1) -> GroupedWeight:
    """One weight of the outputs of several that multiply the same rows.

    blocks: with more than one, each weight's outputs are cut in so many equal blocks, and the result has the first
    block of each, then the second of each, and so on: Megatron's order of query, key and value heads.

    Raises ValueError if the weights differ in bits, groups or order of rows.
    """
    first = weights[0]
    for other in weights[1:]:
        same = (
            other.bits == first.bits
            and other.codes.shape[0] == first.codes.shape[0]
            and other.scales.shape[0] == first.scales.shape[0]
            and other.scales.dtype == first.scales.dtype
            and _equal(other.word_groups, first.word_groups)
            and _equal(other.input_index, first.input_index)
        )
        if not same:
            raise ValueError("they differ in bits, groups or order of rows")

    def joined(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.cat([tensor.unflatten(-1, (blocks, -1)) for tensor in tensors], dim=-1).flatten(-2)

    zeros = None
    if any(weight.zeros is not None for weight in weights):
        zeros = joined(
            [
                torch.full_like(weight.scales, 2 ** (weight.bits - 1), dtype=torch.uint8)
                if weight.zeros is None
                else weight.zeros
                for weight in weights
            ]
        )
    return GroupedWeight(
        codes=joined([weight.codes for weight in weights]),
        scales=joined([weight.scales for weight in weights]),
        zeros=zeros,
        bits=first.bits,
        word_groups=first.word_groups,
        input_index=first.input_index,
    )


def _equal(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return torch.equal(one, other)


def _group_of_row(rows: Arrangement, bits: int) -> torch.Tensor:
    """The position of each row's group in `rows.groups`, int64 [rows]."""
    if rows.word_groups is not None:
        return rows.word_groups.long().repeat_interleave(WORD_BITS // bits)
    return torch.arange(len(rows.groups), device=rows.groups.device).repeat_interleave(
        len(rows.inputs) // len(rows.groups)
    )
