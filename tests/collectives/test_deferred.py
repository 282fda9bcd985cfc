"""A partial that is not there yet is a tensor to everyone but a collective."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from rank_pool import RankPool

from megacomp import codecs, collectives
from megacomp.collectives import DeferredPartial, Route, SimulatedRanks, hops, materialized
from megacomp.collectives.links import CollectiveLink, link_for
from megacomp.config import load
from megacomp.door import Door
from megacomp.policy import Site

SHAPE = (2, 3, 64)


class Spied:
    """A deferred partial, and how it was taken: "tensor", "wire"."""

    def __init__(self, rank: int = 0, shape: tuple[int, ...] = SHAPE) -> None:
        generator = torch.Generator().manual_seed(rank)
        self.expected = torch.randn(shape, generator=generator).bfloat16()
        self.taken: list[str] = []
        self.x = DeferredPartial(self.expected, shape, self._compute, self._encode)

    def _compute(self) -> torch.Tensor:
        self.taken.append("tensor")
        return self.expected.clone()

    def _encode(self, codec: Any, wire: torch.Tensor) -> None:
        self.taken.append("wire")
        codec.encode(self.expected.view(-1, self.expected.shape[-1]), out=wire)


def test_what_it_is_needs_no_computation() -> None:
    spied = Spied()
    x = spied.x
    assert (x.shape, x.dtype, x.device, x.numel(), x.nbytes) == (SHAPE, torch.bfloat16, torch.device("cpu"), 384, 768)
    assert not x.requires_grad and spied.taken == []


@pytest.mark.parametrize(
    "operation",
    [
        lambda x: x + 1,
        lambda x: x.view(-1, 64).float(),
        lambda x: torch.cat([x, x]),
        lambda x: x.detach().clone(),
        lambda x: torch.nn.functional.linear(x, torch.ones(2, 64).bfloat16()),
        lambda x: x[1:, ..., :5].contiguous(),
        lambda x: torch.stack([x]).tolist(),
    ],
)
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_every_operation_meets_the_tensor(operation: Any, mode: Any) -> None:
    spied = Spied()
    with mode():
        got, expected = operation(spied.x), operation(spied.expected)
    if isinstance(got, torch.Tensor):
        assert type(got) is torch.Tensor
        assert torch.equal(got, expected)
    else:
        assert got == expected
    assert spied.taken == ["tensor"]


def test_what_is_written_to_it_stays() -> None:
    spied = Spied()
    spied.x.mul_(2)
    spied.x += 1
    assert torch.equal(spied.x + 0, spied.expected * 2 + 1) and spied.taken == ["tensor"]
    assert type(materialized(spied.x)) is torch.Tensor
    assert materialized(spied.expected) is spied.expected


def test_it_is_computed_once_for_parts_and_encoded_whole() -> None:
    codec = codecs.get("mxfp4", backend="reference")
    spied = Spied()
    rows = spied.expected.view(-1, 64)
    expected = codec.encode(rows)
    wire = torch.zeros_like(expected)
    spied.x.encode_rows(codec, range(6), wire)
    assert torch.equal(wire, expected) and spied.taken == ["wire"]
    for part in (range(2), range(2, 6)):
        spied.x.encode_rows(codec, part, wire[part.start : part.stop].fill_(7))
    assert torch.equal(wire, expected) and spied.taken == ["wire", "tensor"]
    # It is there now.
    spied.x.encode_rows(codec, range(6), wire)
    assert spied.taken == ["wire", "tensor"]


class Layer(torch.autograd.Function):
    """As frameworks call their collectives."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        assert type(x) is DeferredPartial
        return x + 1


def test_an_autograd_function_hands_it_on() -> None:
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        spied = Spied()
        with mode():
            assert torch.equal(Layer.apply(spied.x), spied.expected + 1)


CALLS: dict[str, Any] = {
    "one_shot": lambda x, route: collectives.all_reduce(x, None, route("one_shot")),
    "two_shot": lambda x, route: collectives.all_reduce(x, None, route("two_shot")),
    "reduce_scatter": lambda x, route: collectives.reduce_scatter(x, None, route("auto")),
    "norm": lambda x, route: torch.stack(
        collectives.all_reduce_norm(x, torch.ones(SHAPE), torch.ones(64), 1e-5, None, route("one_shot"))
    ),
    "plain": lambda x, route: (dist.all_reduce(x), x + 0)[1],
}


def _over_collectives(peers: Any, device: torch.device, channel: int) -> CollectiveLink:
    return CollectiveLink(peers)


def _collectives(link: Callable[..., Any]) -> dict[str, Any]:
    with mock.patch.object(hops, "link_for", link):
        return _taken()


def _taken() -> dict[str, Any]:
    codec = codecs.get("mxfp4", backend="reference")
    found = {}
    for name, call in CALLS.items():
        spied = Spied(dist.get_rank())

        def route(algorithm: Any) -> Route:
            return Route(codec, algorithm=algorithm)

        # On rank 0 alone: how a rank computes its partial is its own affair.
        got = call(spied.x if dist.get_rank() == 0 else spied.expected, route)
        found[name] = (torch.equal(got, call(Spied(dist.get_rank()).expected, route)), spied.taken)
    return found


# Between pairs every owner's rows are encoded for themselves; to a collective goes the wire of the whole product.
@pytest.mark.parametrize(("link", "parts"), [(link_for, "tensor"), (_over_collectives, "wire")], ids=["pairs", "whole"])
def test_collectives_take_it_to_the_wire(ranks: RankPool, link: Callable[..., Any], parts: str) -> None:
    first, second = ranks.run(_collectives, link)
    assert all(equal for equal, _ in (*first.values(), *second.values()))
    taken = {name: taken for name, (_, taken) in first.items()}
    assert taken == {
        "one_shot": ["wire"],
        "two_shot": [parts],
        "reduce_scatter": [parts],
        "norm": ["wire"],
        "plain": ["tensor"],
    }


def _alone() -> list[Any]:
    route = Route(codecs.get("mxfp4", backend="reference"))
    found = []
    for call in (collectives.all_reduce, collectives.reduce_scatter, collectives.all_gather):
        spied = Spied()
        got = call(spied.x, None, route)
        found.append((type(got) is torch.Tensor and torch.equal(got, spied.expected), spied.taken))
    return found


def test_alone_in_its_group(ranks: RankPool) -> None:
    assert ranks.run(_alone, world_size=1) == [[(True, ["tensor"])] * 3]


def _simulated() -> list[bool]:
    simulated = SimulatedRanks(2, torch.device("cpu"))
    route = Route(codecs.get("mxfp4", backend="reference"))
    try:
        deferred, plain = (
            simulated.run(lambda rank, take=take: collectives.all_reduce(take(rank), simulated.groups[rank], route))
            for take in (lambda rank: Spied(rank).x, lambda rank: Spied(rank).expected)
        )
    finally:
        simulated.close()
    return [torch.equal(*pair) for pair in zip(deferred, plain, strict=True)]


def test_simulated_ranks(ranks: RankPool) -> None:
    assert ranks.run(_simulated, world_size=1) == [[True, True]]


class Seen:
    def __init__(self) -> None:
        self.partials: list[torch.Tensor] = []

    def partial(self, site: Site, rank: int, world_size: int, x: torch.Tensor) -> None:
        self.partials.append(x)

    def total(self, site: Site, x: torch.Tensor) -> None:
        pass


@torch.no_grad()
def _observed() -> tuple[bool, list[str]]:
    seen = Seen()
    door = Door(load({"megacomp": {"communication": {"codec": "mxfp4"}, "backend": "reference"}})[0], seen)
    layer, spied = torch.nn.Identity(), Spied(dist.get_rank())
    door.learn({layer: Site("layers.0.mlp")})
    group = dist.group.WORLD
    assert door.inside(layer, lambda layer: door("all_reduce", spied.x, group)) is None
    (partial,) = seen.partials
    return type(partial) is torch.Tensor and torch.equal(partial, spied.expected.view(-1, 64)), spied.taken


def test_an_observer_sees_the_tensor(ranks: RankPool) -> None:
    assert ranks.run(_observed) == [(True, ["tensor"])] * 2
