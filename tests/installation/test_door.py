"""The door knows where it was called from: per thread and context, and not after it was closed."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from rank_pool import RankPool

from megacomp.config import load
from megacomp.door import Door
from megacomp.policy import Site

SECTION = {"megacomp": {"communication": {"min_bytes": 0}, "backend": "reference"}}


def _door(count: int) -> tuple[Door, list[torch.nn.Module]]:
    door = Door(load(SECTION)[0])
    layers: list[torch.nn.Module] = [torch.nn.Identity() for _ in range(count)]
    door.learn({layer: Site(f"layers.{i}.mlp", "mlp", i, count) for i, layer in enumerate(layers)})
    return door, layers


def _declined(door: Door) -> dict[str, Any]:
    return {name: dict(counters.declined) for name, counters in door.telemetry.sites.items()}


def _threads() -> dict[str, Any]:
    door, layers = _door(2)
    everyone_inside = threading.Barrier(2, timeout=30)

    def forward(layer: torch.nn.Module) -> None:
        everyone_inside.wait()
        assert door("all_reduce", torch.ones(2, 8), dist.group.WORLD) is None
        everyone_inside.wait()

    threads = [threading.Thread(target=door.inside, args=(layer, forward)) for layer in layers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return _declined(door)


def _carried_on() -> dict[str, Any]:
    """A layer that has its reduction done on another thread, as asyncio.to_thread does, by a copy of its context."""
    door, layers = _door(2)

    def reduce() -> None:
        door("all_reduce", torch.ones(2, 8), dist.group.WORLD)

    def forward(layer: torch.nn.Module) -> None:
        carried = contextvars.copy_context()
        # Whichever thread it is, and wherever this one goes meanwhile.
        door.inside(layers[1], lambda _: _in_thread(carried.run, reduce))

    door.inside(layers[0], forward)
    _in_thread(reduce)
    return {**_declined(door), "outside": door.telemetry.outside}


def _in_thread(function: Callable[..., None], *args: Any) -> None:
    thread = threading.Thread(target=function, args=args)
    thread.start()
    thread.join()


def test_threads_are_at_their_own_sites(ranks: RankPool) -> None:
    once_each = {"layers.0.mlp": {"single_rank": 1}, "layers.1.mlp": {"single_rank": 1}}
    assert ranks.run(_threads, world_size=1) == [once_each]


def test_a_context_takes_its_site_along(ranks: RankPool) -> None:
    found = {"layers.0.mlp": {"single_rank": 1}, "layers.1.mlp": {}, "outside": 1}
    assert ranks.run(_carried_on, world_size=1) == [found]


def _nested() -> dict[str, Any]:
    """A layer inside of another, then a layer that is no site inside of one that is."""
    door, (outer, inner) = _door(2)

    def reduce(layer: torch.nn.Module) -> None:
        door("all_reduce", torch.ones(2, 8), dist.group.WORLD)

    def forward(layer: torch.nn.Module) -> None:
        door.inside(inner, reduce)
        door.inside(torch.nn.Identity(), reduce)
        reduce(layer)

    door.inside(outer, forward)
    reduce(outer)
    return {**_declined(door), "outside": door.telemetry.outside}


def test_layers_nest(ranks: RankPool) -> None:
    assert ranks.run(_nested, world_size=1) == [
        {"layers.0.mlp": {"single_rank": 1}, "layers.1.mlp": {"single_rank": 1}, "outside": 2}
    ]


@torch.no_grad()
def _closed() -> dict[str, Any]:
    door, (layer,) = _door(1)

    def reduce(layer: torch.nn.Module) -> torch.Tensor | None:
        return door("all_reduce", torch.ones(2, 8), dist.group.WORLD)

    assert isinstance(door.inside(layer, reduce), torch.Tensor)
    door.close()
    assert door.inside(layer, reduce) is None
    return {name: (counters.calls, dict(counters.declined)) for name, counters in door.telemetry.sites.items()}


def test_a_closed_door_does_and_counts_nothing(ranks: RankPool) -> None:
    assert ranks.run(_closed) == [{"layers.0.mlp": (1, {})}] * 2


def _kept_alive() -> int:
    door, layers = _door(2)
    layers.clear()
    return len(door.sites)


def test_layers_are_not_kept_alive(ranks: RankPool) -> None:
    assert ranks.run(_kept_alive, world_size=1) == [0]
