"""y = x A^T + b, split by rows or columns."""

from __future__ import annotations

from typing import Any

import torch

from transformer_engine.pytorch.distributed import allreduce, gather_along_first_dim, reduce_scatter_along_first_dim
from transformer_engine.pytorch.module.base import ParallelModule

__all__ = ["Linear"]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weight: torch.Tensor, inp: torch.Tensor, bias: torch.Tensor | None, non_tensor_args: tuple[Any, ...]
    ) -> torch.Tensor:
        tp_group, tp_size, sequence_parallel, parallel_mode, is_grad_enabled = non_tensor_args
        # Under autograd nobody may ask torch in here: inside of the function gradients are off.
        assert not torch.is_grad_enabled()
        total = inp
        if parallel_mode == "column" and sequence_parallel:
            total, handle = gather_along_first_dim(inp, tp_group, quantizer=None)
            assert handle is None
            assert total.shape == (inp.shape[0] * tp_size, *inp.shape[1:]) and total.dtype == inp.dtype
        out = torch.nn.functional.linear(total, weight, bias)
        if total is not inp:
            # The real layer frees it, so it must be nobody else's.
            total.data = torch.Tensor()
        partial = out
        if parallel_mode == "row" and tp_size > 1:
            if sequence_parallel:
                out, handle = reduce_scatter_along_first_dim(out, tp_group)
                assert out.shape == (partial.shape[0] // tp_size, *partial.shape[1:])
            else:
                out, handle = allreduce(out, tp_group)
                assert out.shape == partial.shape
            assert handle is None, "the layer goes on with a reduction that is done"
            assert out.dtype == partial.dtype and out.is_contiguous()
        if is_grad_enabled:
            ctx.save_for_backward(inp, weight)
            ctx.parallel = non_tensor_args
        return out

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        inp, weight = ctx.saved_tensors
        tp_group, tp_size, sequence_parallel, parallel_mode, _ = ctx.parallel
        if parallel_mode == "row" and sequence_parallel:
            grad_output, _ = gather_along_first_dim(grad_output, tp_group)
        dgrad = grad_output @ weight
        work = None
        if parallel_mode == "column" and tp_size > 1:
            assert not sequence_parallel, "not needed here"
            dgrad, work = allreduce(dgrad, tp_group, async_op=True)
        wgrad = grad_output.flatten(0, -2).t() @ inp.flatten(0, -2)
        if work is not None:
            work.wait()
        return wgrad, dgrad, None, None


class Linear(ParallelModule):
    """A linear layer."""

    def forward(
        self,
        inp: torch.Tensor,
        is_first_microbatch: bool | None = None,
        fp8_output: bool | None = False,
        fp8_grad: bool | None = False,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        is_grad_enabled = torch.is_grad_enabled()
        assert self.tp_size == 1 or self.tp_group is not None, "TP group not initialized."
        arguments = (self.tp_group, self.tp_size, self.sequence_parallel, self.parallel_mode, is_grad_enabled)
        bias = self.bias if self.apply_bias and not self.gemm_bias_unfused_add else None
        if is_grad_enabled:
            out = _Linear.apply(self.weight, inp, bias, arguments)
        else:
            out = _Linear.forward(None, self.weight, inp, bias, arguments)
        if self.gemm_bias_unfused_add:
            out = out + self.bias
        return (out, self.bias) if self.return_bias else out
