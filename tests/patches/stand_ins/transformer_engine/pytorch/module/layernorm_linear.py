"""A norm and the column-parallel linear layer behind it; inference only."""

from __future__ import annotations

from typing import Any

import torch

from transformer_engine.pytorch.distributed import gather_along_first_dim
from transformer_engine.pytorch.module.base import ParallelModule

__all__ = ["LayerNormLinear"]


class LayerNormLinear(ParallelModule):
    """y = norm(x) A^T + b, x gathered behind the norm."""

    def __init__(self, in_features: int, out_features: int, *, eps: float, normalization: str, **kwargs: Any) -> None:
        super().__init__(in_features, out_features, **kwargs)
        assert normalization == "RMSNorm"
        self.eps = eps
        self.layer_norm_weight = torch.nn.Parameter(torch.ones(in_features))

    def forward(
        self, inp: torch.Tensor, is_first_microbatch: bool | None = None, fp8_grad: bool | None = False
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        assert not torch.is_grad_enabled()
        assert self.parallel_mode == "column"
        normed = torch.nn.functional.rms_norm(inp, (inp.shape[-1],), self.layer_norm_weight, self.eps)
        total = normed
        if self.sequence_parallel:
            # The rows of all leading dimensions in one, as from 2.1.
            rows = normed.flatten(0, -2)
            total, handle = gather_along_first_dim(rows, self.tp_group, quantizer=None)
            assert handle is None and total.shape == (rows.shape[0] * self.tp_size, rows.shape[1])
            total = total.view(-1, *inp.shape[1:])
        out = torch.nn.functional.linear(total, self.weight, self.bias if self.apply_bias else None)
        return (out, self.bias) if self.return_bias else out
