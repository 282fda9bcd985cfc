"""The collectives as PyTorch operators, so that torch.compile and CUDA graphs pass through them.

``torch.ops.megacomp.all_reduce``, ``all_reduce_norm``, ``reduce_scatter`` and ``all_gather``: functional, the route
as its ``key``, the group by its name, "" being the default group; the world size, as in PyTorch's own functional
collectives, is an argument wherever the result's shape depends on it. The collectives call them only while something
compiles.
"""

from __future__ import annotations

import torch

from megacomp.collectives.all_gather import all_gather as _all_gather
from megacomp.collectives.all_reduce import all_reduce as _all_reduce
from megacomp.collectives.all_reduce_norm import all_reduce_norm as _all_reduce_norm
from megacomp.collectives.message import group_of
from megacomp.collectives.reduce_scatter import reduce_scatter as _reduce_scatter
from megacomp.collectives.route import route_from_key

__all__: list[str] = []


@torch.library.custom_op(
    "megacomp::all_reduce", mutates_args=(), schema="(Tensor x, str route, str group_name) -> Tensor"
)
def all_reduce(x: torch.Tensor, route: str, group_name: str) -> torch.Tensor:
    """The sum of every rank's ``x``."""
    return _all_reduce(x, group_of(group_name), route_from_key(route))


@all_reduce.register_fake
def _(x: torch.Tensor, route: str, group_name: str) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op(
    "megacomp::all_reduce_norm",
    mutates_args=(),
    schema="(Tensor x, Tensor residual, Tensor weight, float eps, Tensor? bias, str route, str group_name)"
    " -> (Tensor, Tensor)",
)
def all_reduce_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    bias: torch.Tensor | None,
    route: str,
    group_name: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum of every rank's ``x`` on top of ``residual``, and its norm."""
    return _all_reduce_norm(x, residual, weight, eps, group_of(group_name), route_from_key(route), bias=bias)


@all_reduce_norm.register_fake
def _(x: torch.Tensor, residual: torch.Tensor, *_: object) -> tuple[torch.Tensor, torch.Tensor]:
    contiguous = torch.contiguous_format
    return torch.empty_like(residual, memory_format=contiguous), torch.empty_like(x, memory_format=contiguous)


@torch.library.custom_op(
    "megacomp::reduce_scatter",
    mutates_args=(),
    schema="(Tensor x, str route, int world_size, str group_name) -> Tensor",
)
def reduce_scatter(x: torch.Tensor, route: str, world_size: int, group_name: str) -> torch.Tensor:
    """This rank's share of the sum of every rank's ``x``."""
    return _reduce_scatter(x, group_of(group_name), route_from_key(route))


@reduce_scatter.register_fake
def _(x: torch.Tensor, route: str, world_size: int, group_name: str) -> torch.Tensor:
    return x.new_empty((x.shape[0] // world_size, *x.shape[1:]))


@torch.library.custom_op(
    "megacomp::all_gather",
    mutates_args=(),
    schema="(Tensor x, str route, int world_size, str group_name) -> Tensor",
)
def all_gather(x: torch.Tensor, route: str, world_size: int, group_name: str) -> torch.Tensor:
    """Every rank's ``x``, one after the other."""
    return _all_gather(x, group_of(group_name), route_from_key(route))


@all_gather.register_fake
def _(x: torch.Tensor, route: str, world_size: int, group_name: str) -> torch.Tensor:
    return x.new_empty((world_size * x.shape[0], *x.shape[1:]))
