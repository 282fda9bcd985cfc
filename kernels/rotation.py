"""Hadamard rotation: spreads outlier features over their block before quantization.

The Walsh-Hadamard matrix in natural (Sylvester) order, divided by the square root of its size, is orthonormal and
its own inverse; being linear it commutes with the sum over ranks, so partials are rotated before encoding and the
sum is rotated back once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

__all__ = ["hadamard"]


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
