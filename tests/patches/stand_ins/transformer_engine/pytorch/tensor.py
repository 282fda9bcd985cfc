"""Tensors that are quantized already."""

import torch

__all__ = ["QuantizedTensor"]


class QuantizedTensor(torch.Tensor):
    """One of them; Megatron-core tells them apart by this class."""
