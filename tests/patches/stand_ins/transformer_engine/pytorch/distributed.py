"""Collectives as Transformer Engine wraps them: they answer (tensor, handle)."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

__all__ = [
    "CudaRNGStatesTracker",
    "activation_recompute_forward",
    "allreduce",
    "gather_along_first_dim",
    "reduce_scatter_along_first_dim",
]


class CudaRNGStatesTracker:
    """Never used: Megatron-core inherits from it."""


def activation_recompute_forward(*_: Any) -> None:
    raise NotImplementedError


def allreduce(
    inp: torch.Tensor, tp_group: dist.ProcessGroup | None = None, async_op: bool = False
) -> tuple[torch.Tensor, Any]:
    """The sum, in the place of `inp`."""
    if dist.get_world_size(tp_group) == 1:
        return inp, None
    handle = dist.all_reduce(inp, group=tp_group, async_op=async_op)
    return inp, handle


def reduce_scatter_along_first_dim(
    inp: torch.Tensor, tp_group: dist.ProcessGroup, async_op: bool = False
) -> tuple[torch.Tensor, Any]:
    """This rank's rows of the sum."""
    world_size = dist.get_world_size(tp_group)
    if world_size == 1:
        return inp, None
    assert inp.shape[0] % world_size == 0, "First dimension of the tensor should be divisible by tensor parallel size"
    output = inp.new_empty(inp.shape[0] // world_size, *inp.shape[1:])
    return output, dist.reduce_scatter_tensor(output, inp.contiguous(), group=tp_group, async_op=async_op)


def gather_along_first_dim(
    inp: torch.Tensor, process_group: dist.ProcessGroup, async_op: bool = False, quantizer: Any = None
) -> tuple[torch.Tensor, Any]:
    """The rows of every rank."""
    assert quantizer is None
    world_size = dist.get_world_size(process_group)
    if world_size == 1:
        return inp, None
    output = inp.new_empty(inp.shape[0] * world_size, *inp.shape[1:])
    return output, dist.all_gather_into_tensor(output, inp.contiguous(), group=process_group, async_op=async_op)
