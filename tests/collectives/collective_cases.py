"""Collectives as cases: run by real ranks, and emulated in one process from a codec's encode and decode alone.

The emulation knows no rows shared out, chunks, links or workspaces: a codec works row by row, so none of these
may change a bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megacomp import codecs
from megacomp.collectives import Collective, Route, all_gather, all_reduce, hops, reduce_scatter
from megacomp.collectives.links import CollectiveLink

CALLS = {"all_reduce": all_reduce, "reduce_scatter": reduce_scatter, "all_gather": all_gather}


@dataclass(frozen=True)
class Case:
    """One call. `layout`: how the input lies in memory; `poison`: (rank, index, value) written into a partial."""

    shape: tuple[int, ...] = (13, 100)
    codec: Any = "mxfp4"
    gather_codec: Any = None
    algorithm: Any = "auto"
    chunks: Any = "auto"
    dtype: torch.dtype = torch.bfloat16
    collective: Collective = "all_reduce"
    layout: str = "contiguous"
    poison: tuple[tuple[int, tuple[int, ...], float], ...] = ()

    def route(self) -> Route:
        gather = self.gather_codec
        return Route(
            codecs.get(self.codec, backend="reference"),
            None if gather is None else codecs.get(gather, backend="reference"),
            self.algorithm,
            self.chunks,
        )

    def partial(self, rank: int) -> torch.Tensor:
        """What rank `rank` brings: normal values, a few features ten times larger."""
        x = torch.randn(self.shape, generator=torch.Generator().manual_seed(rank))
        if x.dim():
            x[..., ::17] *= 10
        x = x.to(self.dtype)
        for owner, index, value in self.poison:
            if owner == rank:
                x[index] = value
        if self.layout == "transposed":
            x = x.mT.contiguous().mT
        elif self.layout == "sliced":
            x = torch.stack((x, x), dim=-1)[..., 1]
        return x


def run_cases(cases: Sequence[Case], link: str = "default") -> list[torch.Tensor]:
    """In a rank: the result of each case. `link`: "collective" uses the accelerator's link."""
    usual = hops.link_for
    if link == "collective":
        hops.link_for = lambda peers, device, lane: CollectiveLink(peers)
    try:
        results = []
        for case in cases:
            x = case.partial(dist.get_rank())
            before = x.clone()
            results.append(CALLS[case.collective](x, None, case.route()))
            assert same_bits(x, before), "the input was written to"
        return results
    finally:
        hops.link_for = usual


def emulate(case: Case, world_size: int) -> list[torch.Tensor]:
    """The result of each rank, computed in this process."""
    partials = [case.partial(rank) for rank in range(world_size)]
    features = case.shape[-1]
    route = case.route()
    if world_size == 1 or partials[0].numel() == 0:
        wires = None
    else:
        wires = torch.stack([route.codec.encode(x.reshape(-1, features)) for x in partials])
    if case.collective == "all_gather":
        if wires is None:
            return [torch.cat(partials)] * world_size
        parts = [route.codec.decode(wire, features, case.dtype).view(case.shape) for wire in wires]
        return [torch.cat(parts)] * world_size
    if wires is None:
        total = partials[0]
    elif case.collective == "all_reduce" and case.algorithm == "two_shot":
        total = route.codec.decode_sum(wires, features, torch.float32)
        total = route.second_codec.decode(route.second_codec.encode(total), features, case.dtype)
    else:
        total = route.codec.decode_sum(wires, features, case.dtype)
    total = total.reshape(case.shape)
    if case.collective == "reduce_scatter":
        return list(total.chunk(world_size)) if total.numel() else [total[: len(total) // world_size]] * world_size
    return [total] * world_size


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Equal dtype, shape and bits; a NaN equals a NaN of the same bits only."""
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    as_integers = torch.int16 if left.dtype.itemsize == 2 else torch.int32
    return torch.equal(left.contiguous().view(as_integers), right.contiguous().view(as_integers))


def assert_as_emulated(cases: Sequence[Case], results: Sequence[Sequence[torch.Tensor]]) -> None:
    """results: per rank, per case."""
    for number, case in enumerate(cases):
        for rank, expected in enumerate(emulate(case, len(results))):
            assert same_bits(results[rank][number], expected), f"rank {rank} of {len(results)}: {case}"


def sqnr_db(result: torch.Tensor, exact: torch.Tensor) -> float:
    """Signal to noise in dB, in float64."""
    exact = exact.double()
    return float(10 * torch.log10(exact.square().sum() / (result.double() - exact).square().sum()))
