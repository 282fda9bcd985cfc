"""The module that multiplies by a quantized weight; the frameworks' parallel layers are made of it in `patches/`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from megacomp.collectives import DeferredPartial
from megacomp.gptq.shards import LinearShard, Order
from megacomp.kernels.dequant_gemm import Int4Pack, dequant_gemm, multiplies_codes
from megacomp.kernels.grouped_weight import GroupedWeight

__all__ = ["QuantizedLinear"]

_TENSORS = ("codes", "scales", "zeros", "word_groups", "input_index")


class QuantizedLinear(nn.Module):
    """y = x @ W (+ bias) for one rank's part of a quantized W: no communication.

    x: bf16, fp16 or fp32 [..., in_features]; y: of the same dtype [..., out_features]. Inference only: gradients do
    not pass.

    What it holds is a GroupedWeight's tensors, as buffers: packed codes, scales and zeros. `.to(dtype)`, `.half()` and
    the like leave their dtypes alone, which are those of the checkpoint.

    source: the folder the weight is from. order: of its features, "tp_aware" or "local".
    """

    codes: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, shard: LinearShard, source: Path) -> None:
        super().__init__()
        self.in_features = shard.in_features
        self.out_features = shard.out_features
        self.order: Order = shard.order
        self.source = source
        self.bits = shard.weight.bits
        self._int4pack = Int4Pack()
        for name in _TENSORS:
            self.register_buffer(name, getattr(shard.weight, name))
        self.register_buffer("bias", shard.bias)

    @property
    def grouped_weight(self) -> GroupedWeight:
        """The weight, where the buffers are now."""
        buffers: dict[str, Any] = {name: self._buffers[name] for name in _TENSORS}
        return GroupedWeight(bits=self.bits, **buffers)

    def forward(self, x: torch.Tensor, deferred: bool = False) -> torch.Tensor:
        """deferred: whether y may be a DeferredPartial, as it is where a kernel can encode it."""
        rows, weight = x.reshape(-1, x.shape[-1]), self.grouped_weight
        shape = (*x.shape[:-1], self.out_features)
        if deferred and self._encodes(rows, weight):
            return DeferredPartial(
                x,
                shape,
                lambda: dequant_gemm(rows, weight).view(shape),
                lambda codec, wire: codec.encode_product(rows, weight, wire),
            )
        y = dequant_gemm(rows, weight, int4pack=self._int4pack)
        return (y if self.bias is None else y + self.bias.to(y.dtype)).view(shape)

    def _encodes(self, rows: torch.Tensor, weight: GroupedWeight) -> bool:
        # A compiler does not follow tensors of a kind of their own.
        return self.bias is None and not torch.compiler.is_compiling() and multiplies_codes("auto", rows, weight)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}, "
            f"groups={len(self.grouped_weight.scales)}, order={self.order}"
        )

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> QuantizedLinear:
        # `fn` moves or casts; casting scales would change the weights.
        self._int4pack = Int4Pack()
        for name, buffer in self._buffers.items():
            if buffer is not None:
                moved = fn(buffer)
                self._buffers[name] = moved if name == "bias" else buffer.to(moved.device)
        return self
