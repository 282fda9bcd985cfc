"""What every layer is."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

__all__ = ["ParallelModule", "get_dummy_wgrad"]


def get_dummy_wgrad(*_: Any) -> None:
    raise NotImplementedError


class ParallelModule(torch.nn.Module):
    """The attributes that the forwards read, set as Transformer Engine's constructors set them."""

    tp_group: dist.ProcessGroup | None = None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        sequence_parallel: bool,
        tp_group: dist.ProcessGroup | None,
        tp_size: int,
        init_method: Any,
        bias: bool,
        return_bias: bool,
        params_dtype: torch.dtype,
        parallel_mode: str | None,
        device: str,
        ub_overlap_rs: bool = False,
        symmetric_ar_type: str | None = None,
        **_: Any,
    ) -> None:
        super().__init__()
        self.tp_size = tp_size if tp_group is None else dist.get_world_size(tp_group)
        self.set_tensor_parallel_group(tp_group)
        self.parallel_mode = parallel_mode
        self.in_features = in_features // (self.tp_size if parallel_mode == "row" else 1)
        self.out_features = out_features // (self.tp_size if parallel_mode == "column" else 1)
        self.sequence_parallel = self.tp_size > 1 and sequence_parallel
        self.ub_overlap_rs_fprop = parallel_mode == "row" and self.sequence_parallel and ub_overlap_rs
        self.symmetric_ar_type = symmetric_ar_type
        self.use_bias = bias
        self.return_bias = return_bias
        self.apply_bias = bias and not return_bias
        self.gemm_bias_unfused_add = parallel_mode == "row" and self.apply_bias
        self.weight = torch.nn.Parameter(
            torch.empty(self.out_features, self.in_features, dtype=params_dtype, device=device)
        )
        if init_method is not None:
            init_method(self.weight)
        self.bias: Any = torch.nn.Parameter(torch.zeros(self.out_features, dtype=params_dtype)) if bias else None

    def set_tensor_parallel_group(self, tp_group: dist.ProcessGroup | None) -> None:
        self.tp_group = tp_group
