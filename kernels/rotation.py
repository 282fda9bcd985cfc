"""Hadamard rotation: spreads outlier features over their block before quantization.

The Walsh-Hadamard matrix in natural (Sylvester) order, divided by the square root of its size, is orthonormal and
its own inverse; being linear it commutes with the sum over ranks, so partials are rotated before encoding and the
sum is rotated back once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from megacomp.kernels.tiles import log2

__all__ = ["hadamard", "rotate_pieces"]


LANES = 16
"""Butterflies shorter than this run inside a vector register of float32; split off so that the others stay whole."""


def hadamard(x: torch.Tensor, size: int) -> torch.Tensor:
    """Rotates every run of ``size`` neighbouring features.

    The additions run as butterflies with strides ``size / 2`` down to 1 and the factor ``size ** -0.5`` comes
    last: one fixed order, so that every backend rounds alike.

    Args:
        x: float32 ``[rows, features]``; ``features`` divides by ``size``.
        size: a power of two, at least 16.

    Returns:
        float32 ``[rows, features]``.
    """
    rows = x.shape[0]
    runs = x.view(rows, -1, size // LANES, LANES)
    runs = torch.stack(_butterflies(runs.unbind(2)), dim=2)
    lanes = torch.stack(_butterflies(runs.unbind(3)), dim=3)
    return lanes.view(rows, -1) * size**-0.5


def _butterflies(parts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The Walsh-Hadamard transform over a list of tensors, longest stride first."""
    parts = list(parts)
    stride = len(parts) // 2
    while stride:
        for first in range(len(parts)):
            if not first & stride:
                second = first + stride
                parts[first], parts[second] = parts[first] + parts[second], parts[first] - parts[second]
        stride //= 2
    return parts


@triton.jit
def rotate_pieces(pieces, size: tl.constexpr):
    """Twin of ``hadamard``, over pieces (see tiles.py): the tuple of float32 ``[blocks, length]``, rotated."""
    for stage in tl.static_range(log2(size)):
        pieces = _butterfly_stage(pieces, size >> (stage + 1))
    scaled = ()
    for piece in tl.static_range(len(pieces)):
        scaled = scaled + (pieces[piece] * size**-0.5,)
    return scaled


@triton.jit
def _butterfly_stage(pieces, stride: tl.constexpr):
    """Strides of whole blocks reach into other threads, those of whole pieces other tensors, the rest registers."""
    length: tl.constexpr = pieces[0].shape[1]
    block: tl.constexpr = len(pieces) * length
    apart: tl.constexpr = stride // length if stride < block else 0
    rotated = ()
    for piece in tl.static_range(len(pieces)):
        if stride >= block:
            rotated = rotated + (_butterfly(pieces[piece], stride // block * length),)
        elif stride < length:
            rotated = rotated + (_butterfly(pieces[piece], stride),)
        elif (apart & piece) != 0:
            rotated = rotated + (pieces[piece - apart] - pieces[piece],)
        else:
            rotated = rotated + (pieces[piece] + pieces[piece + apart],)
    return rotated


@triton.jit
def _butterfly(x, stride: tl.constexpr):
    """Sums and differences of the values ``stride`` apart in the flattened ``x``."""
    pairs = tl.reshape(x, (x.numel // (2 * stride), 2, stride))
    bits = pairs.to(tl.int32, bitcast=True)
    # The other of two values, from the sum of their bits: a sum along an axis costs one exchange, and no copy.
    other = (tl.sum(bits, 1, keep_dims=True) - bits).to(tl.float32, bitcast=True)
    sign = 1.0 - 2.0 * tl.arange(0, 2)
    return tl.reshape(tl.fma(pairs, tl.reshape(sign, (1, 2, 1)), other), x.shape)
