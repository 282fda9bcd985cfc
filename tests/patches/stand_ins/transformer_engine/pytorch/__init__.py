"""The modules that Megatron-core builds on."""

import torch

from transformer_engine.pytorch import cpp_extensions, distributed, fp8, ops
from transformer_engine.pytorch.module import LayerNormLinear, Linear

__all__ = [
    "DotProductAttention",
    "GroupedLinear",
    "LayerNorm",
    "LayerNormLinear",
    "Linear",
    "RMSNorm",
    "cpp_extensions",
    "distributed",
    "fp8",
    "ops",
]


class GroupedLinear(torch.nn.Module):
    """Never built: Megatron-core inherits from it."""


class DotProductAttention(torch.nn.Module):
    """Never built: Megatron-core inherits from it."""


class LayerNorm(torch.nn.Module):
    """Never built: named in annotations."""


class RMSNorm(torch.nn.Module):
    """Never built: named in annotations."""
