"""The numerical guard: one site found too noisy goes over to the plain collective, on all ranks at the same message."""

from __future__ import annotations

import itertools
import logging
import math
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from rank_pool import RankPool

from megacomp.collectives import SimulatedRanks
from megacomp.config import Guard as Settings
from megacomp.config import load
from megacomp.door import Door
from megacomp.guard import Guard, Verdict
from megacomp.policy import Site
from megacomp.telemetry import GuardSamples

NAMES = ("layers.0.attention", "layers.0.mlp")
STEPS, EVERY, BOUND = 7, 2, 15
BAD_FROM = 3
"""The step, counted from 1, whose messages and all later ones of the second site are bad; the fourth is sampled."""
SHAPE = (8, 64)
COMMUNICATIONS: dict[str, dict[str, Any]] = {
    "one_shot": {"algorithm": "one_shot"},
    "two_shot": {"algorithm": "two_shot", "gather_codec": "int8"},
    "reduce_scatter": {},
}


def _door(how: str, **more: Any) -> tuple[Door, dict[str, torch.nn.Module]]:
    communication = {"codec": "int8", "min_bytes": 0, **COMMUNICATIONS[how]}
    guard = {"every": EVERY, "min_sqnr_db": BOUND}
    section = {"communication": communication, "guard": guard, "backend": "reference", **more}
    door = Door(load({"megacomp": section})[0])
    layers: dict[str, torch.nn.Module] = {name: torch.nn.Identity() for name in NAMES}
    door.learn({layer: Site(name) for name, layer in layers.items()})
    return door, layers


def _message(step: int, name: str, rank: int, how: str) -> torch.Tensor:
    """What a rank brings. Bad ones all but cancel; of a reduce-scatter, in the share of the last rank alone."""
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(100 * step + 10 * NAMES.index(name) + rank))
    if name == NAMES[1] and step >= BAD_FROM:
        common = torch.randn(SHAPE, generator=torch.Generator().manual_seed(step))
        rows = slice(-1, None) if how == "reduce_scatter" else slice(None)
        x[rows] += 1e4 * (rank < 2) * (-1) ** rank * common[rows]
    return x


def _plain(how: str, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    if how == "reduce_scatter":
        result = x.new_empty(SHAPE[0] // group.size(), SHAPE[1])
        dist.reduce_scatter_tensor(result, x, group=group)
        return result
    result = x.clone()
    dist.all_reduce(result, group=group)
    return result


@torch.no_grad()
def _serve(door: Door, layers: dict[str, torch.nn.Module], how: str, group: dist.ProcessGroup) -> dict[str, Any]:
    """What one rank gets at each site, step by step: what came compressed or None, and the plain collective's."""
    got: dict[str, Any] = {name: [] for name in NAMES}

    def forward(layer: torch.nn.Module, step: int, name: str) -> None:
        x = _message(step, name, group.rank(), how)
        compressed = door("reduce_scatter" if how == "reduce_scatter" else "all_reduce", x, group)
        got[name].append((compressed, _plain(how, x, group)))

    for step, (name, layer) in itertools.product(range(1, STEPS + 1), layers.items()):
        door.inside(layer, forward, step, name)
    return got


class _Warnings(logging.Handler):
    """The lines this process warns with."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())

    def __enter__(self) -> _Warnings:
        logging.getLogger("megacomp").addHandler(self)
        return self

    def __exit__(self, *exception: object) -> None:
        logging.getLogger("megacomp").removeHandler(self)


def _found(door: Door, got: list[dict[str, Any]], lines: list[str]) -> dict[str, Any]:
    counters = door.telemetry.sites
    return {
        "got": got,
        "guard": {name: at.guard for name, at in counters.items()},
        "calls": {name: at.calls for name, at in counters.items()},
        "declined": {name: dict(at.declined) for name, at in counters.items()},
        "warnings": lines,
    }


def _real(how: str, more: dict[str, Any]) -> dict[str, Any]:
    assert dist.group.WORLD is not None
    door, layers = _door(how, **more)
    with _Warnings() as warnings:
        got = _serve(door, layers, how, dist.group.WORLD)
    return _found(door, [got], warnings.lines)


def _simulated(how: str, size: int) -> dict[str, Any]:
    door, layers = _door(how)
    simulated = SimulatedRanks(size, torch.device("cpu"))
    with _Warnings() as warnings:
        got = simulated.run(lambda rank: _serve(door, layers, how, simulated.groups[rank]))
    simulated.close()
    return _found(door, got, warnings.lines)


SAMPLED = range(EVERY, STEPS + 1, EVERY)
CAUGHT = next(step for step in SAMPLED if step >= BAD_FROM)


def _check(found: dict[str, Any]) -> None:
    """Of one process: the second site is compressed until the message that is caught, which is exact already."""
    good, bad = NAMES
    for got in found["got"]:
        assert [compressed is not None for compressed, _ in got[good]] == [True] * STEPS
        assert [compressed is not None for compressed, _ in got[bad]] == [step < CAUGHT for step in range(1, STEPS + 1)]
    assert found["calls"] == {good: STEPS, bad: CAUGHT - 1}
    assert found["declined"] == {good: {}, bad: {"guard": STEPS - CAUGHT + 1}}
    seen = found["guard"]
    assert (seen[good].samples, seen[good].switched_off) == (len(SAMPLED), None)
    assert 38 < seen[good].lowest_sqnr_db <= seen[good].last_sqnr_db < 50
    assert seen[bad].samples == CAUGHT // EVERY
    assert seen[bad].last_sqnr_db == seen[bad].lowest_sqnr_db < BOUND
    assert seen[bad].switched_off == f"SQNR {seen[bad].last_sqnr_db:.1f} dB, the bound is {BOUND} dB"


@pytest.mark.parametrize("how", COMMUNICATIONS)
@pytest.mark.parametrize("world_size", [2, 4])
def test_a_noisy_site_and_no_other_goes_over_on_all_ranks_at_once(ranks: RankPool, how: str, world_size: int) -> None:
    results = ranks.run(_real, how, {}, world_size=world_size)
    for found in results:
        _check(found)
        assert found["guard"] == results[0]["guard"]
    (line,) = results[0]["warnings"]
    assert all(word in line for word in (NAMES[1], results[0]["guard"][NAMES[1]].switched_off, f"{world_size} ranks"))
    assert not any(found["warnings"] for found in results[1:])


@pytest.mark.parametrize("how", ["one_shot", "two_shot"])
@pytest.mark.parametrize("size", [2, 4])
def test_simulated_ranks_decide_as_real_ones(ranks: RankPool, how: str, size: int) -> None:
    real = ranks.run(_real, how, {}, world_size=size)
    (simulated,) = ranks.run(_simulated, how, size, world_size=1)
    _check(simulated)
    assert {**simulated, "got": None} == {**real[0], "got": None}
    for rank, name in itertools.product(range(size), NAMES):
        pairs = zip(real[rank]["got"][0][name], simulated["got"][rank][name], strict=True)
        assert all(a is b is None or torch.equal(a, b) for one, other in pairs for a, b in zip(one, other, strict=True))


def test_the_guard_and_telemetry_share_a_sample(ranks: RankPool) -> None:
    alone = ranks.run(_real, "one_shot", {})[0]
    both = ranks.run(_real, "one_shot", {"telemetry": {"sqnr_every": EVERY}})[0]
    assert both["guard"] == alone["guard"] and both["calls"] == alone["calls"]


def _captured() -> tuple[dict[str, Any], float | None]:
    """What `_real` finds, guard and telemetry on, of tensors in the capture of a CUDA graph; and the telemetry's."""
    assert dist.group.WORLD is not None
    door, layers = _door("one_shot", telemetry={"sqnr_every": 1})
    capture = mock.patch("torch.cuda.is_current_stream_capturing", return_value=True)
    with _Warnings() as warnings, capture, mock.patch.object(torch.Tensor, "is_cuda", True):
        got = _serve(door, layers, "one_shot", dist.group.WORLD)
    return _found(door, [got], warnings.lines), door.telemetry.sites[NAMES[0]].sqnr_db


def test_nothing_is_sampled_inside_a_cuda_graph(ranks: RankPool) -> None:
    for found, sqnr_db in ranks.run(_captured):
        assert sqnr_db is None and found["warnings"] == []
        assert set(found["guard"].values()) == {GuardSamples()}
        assert found["calls"] == dict.fromkeys(NAMES, STEPS)


def _several_groups() -> list[list[bool]]:
    """A site that reduces over all four ranks and over halves, of which one is bad."""
    world, rank = dist.group.WORLD, dist.get_rank()
    assert world is not None
    halves = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    door, layers = _door("one_shot")
    compressed: list[list[bool]] = []

    def forward(layer: torch.nn.Module, group: dist.ProcessGroup, step: int, name: str) -> None:
        x = _message(step, name, group.rank(), "one_shot")
        compressed[-1].append(door("all_reduce", x, group) is not None)

    with torch.no_grad():
        for _ in range(STEPS):
            compressed.append([])
            bad = rank < 2
            door.inside(layers[NAMES[1]], forward, halves[not bad], BAD_FROM if bad else 1, NAMES[1])
            if len(compressed) % 3 == 0 and bad:  # one half has a message more, as experts may
                door.inside(layers[NAMES[1]], forward, halves[0], 1, NAMES[1])
            door.inside(layers[NAMES[1]], forward, world, 1, NAMES[1])
    return [[steps[0] for steps in compressed], [steps[-1] for steps in compressed]]


def test_groups_of_one_site_are_judged_apart(ranks: RankPool) -> None:
    results = ranks.run(_several_groups, world_size=4)
    for rank, (half, whole) in enumerate(results):
        assert half == [True] + [rank >= 2] * (STEPS - 1)
        assert whole == [True] * STEPS


def _gathered() -> tuple[list[bool], GuardSamples]:
    """Whether each of four activations came compressed; of the third, the last rank's part is more than int4 takes."""
    assert dist.group.WORLD is not None
    communication = {"codec": "int4", "min_bytes": 0, "collectives": ["all_gather"]}
    section = {"communication": communication, "guard": {"every": 1, "min_sqnr_db": 18}, "backend": "reference"}
    door, layer, rank = Door(load({"megacomp": section})[0]), torch.nn.Identity(), dist.get_rank()
    door.learn({layer: Site(NAMES[0])})
    compressed = []
    for step in range(4):
        x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(10 * step + rank))
        if (step, rank) == (2, 1):
            x[:, ::32] = 12
        with torch.no_grad():
            got = door.inside(layer, lambda _, x=x: door("all_gather", x, dist.group.WORLD))
        compressed.append(got is not None)
    return compressed, door.telemetry.sites[NAMES[0]].guard


def test_activations_that_are_gathered_are_judged_too(ranks: RankPool) -> None:
    one, other = ranks.run(_gathered)
    assert one == other and one[0] == [True, True, False, False]
    samples = one[1]
    assert samples.samples == 3 and samples.last_sqnr_db is not None
    assert samples.switched_off == f"SQNR {samples.last_sqnr_db:.1f} dB, the bound is 18 dB"


def _judge(exact: list[float], result: list[float], dtype: torch.dtype) -> Verdict | None:
    assert dist.group.WORLD is not None
    guard = Guard(Settings(every=1, min_sqnr_db=20))
    return guard.judge(torch.tensor(exact), torch.tensor(result).to(dtype), dist.group.WORLD)


def test_what_can_be_measured_and_what_cannot(ranks: RankPool) -> None:
    def judge(exact: list[float], result: list[float], dtype: torch.dtype = torch.float32) -> Verdict | None:
        (verdict,) = ranks.run(_judge, exact, result, dtype, world_size=1)
        return verdict

    nan, inf = math.nan, math.inf
    assert judge([3.0, 4.0], [3.0, 4.48]) == (pytest.approx(20.355, abs=1e-3), None)
    assert judge([3.0, 4.0], [3.0, 4.6]) == (pytest.approx(18.416, abs=1e-3), "SQNR 18.4 dB, the bound is 20 dB")
    assert judge([3e30, 4e30], [3e30, 4.4e30]) == (pytest.approx(21.938, abs=1e-3), None), "squares beyond float32"
    for value in (nan, inf, -inf):
        assert judge([3.0, 4.0], [3.0, value]) == (None, "NaN or Inf where the exact result is finite")
        assert judge([3.0, value], [nan, nan]) is None, "the model's own NaN is no fault of a codec"
    assert judge([7e4, 1.0], [inf, 1.0], torch.float16) is None, "nor is what fp16 cannot hold"
    assert judge([3.0, 4.0], [3.0, 4.0]) == judge([0.0, 0.0], [0.0, 0.0]) == (None, None), "no noise"
    assert judge([0.0, 0.0], [0.0, 0.1]) == (None, "noise where the exact result is zero, the bound is 20 dB")


def test_samples_add_up_and_a_switch_stays_off() -> None:
    samples = GuardSamples()
    for found in (30.0, None, 25.0, 27.0):
        samples = samples.with_sample(found, None)
    assert samples == GuardSamples(4, 27.0, 25.0)
    assert samples.with_sample(3.0, "why").with_sample(40.0, None) == GuardSamples(6, 40.0, 3.0, "why")
