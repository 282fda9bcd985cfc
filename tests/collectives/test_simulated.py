"""Collectives of ranks in one process against those of real ranks, bit for bit; and the turns such ranks take."""

from __future__ import annotations

from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import pytest
import torch
import torch.distributed as dist
from collective_cases import Case, run_cases, same_bits
from rank_pool import RankPool

from megacomp.collectives import (
    SimulatedRanks,
    all_gather,
    all_reduce,
    all_reduce_norm,
    reduce_scatter,
    simulated_all_reduce,
)
from megacomp.collectives.simulated import ring_sum
from megacomp.config import Config
from megacomp.door import Door
from megacomp.policy import Site

CODECS = ("mxfp4", "int8", {"preset": "int4", "rotation": 32, "scale_search": True})
CASES = [
    Case(codec=codec, gather_codec=gather, algorithm=algorithm, shape=shape, dtype=dtype, chunks=chunks, layout=layout)
    for number, codec in enumerate(CODECS)
    for algorithm, gather in (("one_shot", None), ("two_shot", None), ("two_shot", "int8"), ("auto", None))
    for shape, dtype, chunks, layout in (
        ((13, 100), torch.bfloat16, 3, "contiguous"),
        ((3, 5, 64), torch.float32, "auto", "transposed"),
        ((1, 7), torch.float16, 8, "sliced"),
        ((64,), torch.float32, 1, "contiguous"),
        ((0, 64), torch.float32, "auto", "contiguous"),
    )[: 5 if number == 0 else 2]
]
# The one that "auto" sends two-shot.
CASES.append(Case(shape=(4099, 128), dtype=torch.float32))


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_simulated_all_reduce_is_that_of_real_ranks(ranks: RankPool, world_size: int) -> None:
    results = ranks.run(run_cases, CASES, world_size=world_size)
    for number, case in enumerate(CASES):
        partials = [case.partial(rank) for rank in range(world_size)]
        simulated = simulated_all_reduce(partials, case.route())
        assert all(same_bits(of_rank[number], simulated) for of_rank in results), case


def test_one_partial_is_copied() -> None:
    x = torch.randn(3, 5).mT
    result = simulated_all_reduce([x], Case().route())
    assert same_bits(result, x) and result.is_contiguous() and result.data_ptr() != x.data_ptr()


SIZES = ((1,), (7,), (3, 5), (1001,), (2, 70001), (3_500_000,))
DTYPES = (torch.float32, torch.bfloat16, torch.int64)


def _parts(rank: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(rank)
    return [(100 * torch.randn(size, generator=generator)).to(dtype) for size in SIZES for dtype in DTYPES]


def _gloo_sums() -> list[torch.Tensor]:
    parts = _parts(dist.get_rank())
    for part in parts:
        dist.all_reduce(part)
    return parts if dist.get_rank() == 0 else []


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_ring_sum_is_gloos(ranks: RankPool, world_size: int) -> None:
    sums = ranks.run(_gloo_sums, world_size=world_size)[0]
    by_rank = [_parts(rank) for rank in range(world_size)]
    for number, expected in enumerate(sums):
        assert torch.equal(ring_sum([parts[number] for parts in by_rank]), expected), expected.shape


def test_ring_sum_of_nothing() -> None:
    assert ring_sum([torch.empty(0, 4)] * 3).shape == (0, 4)


@pytest.fixture
def three() -> Iterator[SimulatedRanks]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    schedule = SimulatedRanks(3, torch.device("cpu"))
    yield schedule
    schedule.close()
    dist.destroy_process_group()


def test_groups_are_those_of_torch_distributed(three: SimulatedRanks) -> None:
    all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

    def meet(rank: int) -> tuple[Any, ...]:
        group = three.groups[rank]
        summed = torch.tensor([1.0, rank])
        dist.all_reduce(summed, group=group)
        gathered = torch.empty(3, 2)
        all_gather(gathered, torch.tensor([[rank, 10.0 * rank]]), group=group)
        x = Case().partial(rank)
        in_place = all_reduce(x, group, Case().route(), out=x)
        assert in_place is x
        return dist.get_rank(group), dist.get_world_size(group), summed.tolist(), gathered.tolist(), x

    simulated = simulated_all_reduce([Case().partial(rank) for rank in range(3)], Case().route())
    for rank, (own, size, summed, gathered, x) in enumerate(three.run(meet)):
        assert (own, size, summed) == (rank, 3, [3, 3])
        assert gathered == [[0, 0], [1, 10], [2, 20]]
        assert same_bits(x, simulated)


def test_ranks_take_turns_in_their_order(three: SimulatedRanks) -> None:
    seen = []

    def life(rank: int) -> str:
        for step in range(3):
            seen.append((step, rank))
            assert three.exchange(rank, rank * 10, sum) == 30
        return f"rank {rank}"

    assert three.run(life) == ["rank 0", "rank 1", "rank 2"]
    assert seen == sorted(seen)


_STATE: ContextVar[str] = ContextVar("state", default="default")


def test_ranks_run_as_their_caller_does(three: SimulatedRanks) -> None:
    def state(rank: int) -> tuple[Any, ...]:
        return _STATE.get(), torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_num_threads()

    token, threads = _STATE.set("set"), torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        with torch.no_grad():
            assert three.run(state) == [("set", False, False, threads + 1)] * 3
    finally:
        torch.set_num_threads(threads)
        _STATE.reset(token)
    with torch.autocast("cpu", torch.float16):
        assert three.run(lambda rank: (torch.ones(2, 2) @ torch.ones(2, 2)).dtype) == [torch.float16] * 3
    assert three.run(lambda rank: torch.is_autocast_enabled("cpu")) == [False] * 3
    with torch.inference_mode():
        assert three.run(state) == [("default", False, True, threads)] * 3
    assert three.run(state) == [("default", True, False, threads)] * 3


@pytest.mark.parametrize("failing", [0, 1, 2])
@pytest.mark.parametrize("after", [0, 1])
def test_the_error_of_one_rank_ends_all(three: SimulatedRanks, failing: int, after: int) -> None:
    def life(rank: int) -> None:
        for step in range(3):
            if (rank, step) == (failing, after):
                raise KeyError(rank)
            dist.all_reduce(torch.ones(2), group=three.groups[rank])

    with pytest.raises(KeyError, match=str(failing)):
        three.run(life)
    assert three.run(lambda rank: rank) == [0, 1, 2]


@pytest.mark.parametrize("absent", [0, 1, 2])
def test_ranks_out_of_step_are_an_error(three: SimulatedRanks, absent: int) -> None:
    def life(rank: int) -> None:
        for _ in range(1 if rank == absent else 2):
            dist.all_reduce(torch.ones(2), group=three.groups[rank])

    with pytest.raises(RuntimeError, match="out of step"):
        three.run(life)


def test_what_simulated_ranks_cannot_do_is_an_error(three: SimulatedRanks) -> None:
    with pytest.raises(NotImplementedError, match="sums only"):
        three.run(lambda rank: dist.all_reduce(torch.ones(2), dist.ReduceOp.MAX, group=three.groups[rank]))
    x, route, layer = torch.ones(6, 32), Case().route(), torch.nn.Identity()
    door = Door(Config.model_validate({"communication": {"min_bytes": 0}, "backend": "reference"}))
    door.learn({layer: Site("here")})
    for call in (
        lambda group: reduce_scatter(x, group, route),
        lambda group: all_gather(x, group, route),
        lambda group: all_reduce_norm(x, x, torch.ones(32), 1e-6, group, route),
        lambda group: door.inside(layer, lambda _: door("reduce_scatter", x, group)),
    ):
        with torch.no_grad(), pytest.raises(ValueError, match="simulated ranks have all_reduce only"):
            three.run(lambda rank, call=call: call(three.groups[rank]))
    with pytest.raises(RuntimeError, match="only while all of them run"):
        dist.all_reduce(torch.ones(2), group=three.groups[0])
