"""Hadamard rotation: spreads outlier features over their block before quantization.

The Walsh-Hadamard matrix in natural (Sylvester) order, divided by the square root of its size, is orthonormal and
its own inverse; being linear it commutes with the sum over ranks, so partials are rotated before encoding and the
sum is rotated back once.
"""

from __future__ import annotations

import torch

__all__ = ["hadamard"]


def hadamard(x: torch.Tensor, size: int) -> torch.Tensor:
    """Rotates every run of ``size`` neighbouring features.

    The additions run as butterflies with strides ``size / 2`` down to 1 and the factor ``size ** -0.5`` comes
    last: one fixed order, so that every backend rounds alike.

    Args:
        x: float32 ``[rows, features]``; ``features`` divides by ``size``.
        size: a power of two.

    Returns:
        float32 ``[rows, features]``.
    """
    rows = x.shape[0]
    stride = size // 2
    while stride:
        pairs = x.view(rows, -1, 2, stride)
        first, second = pairs[:, :, 0], pairs[:, :, 1]
        x = torch.stack((first + second, first - second), dim=2).view(rows, -1)
        stride //= 2
    return x * size**-0.5
