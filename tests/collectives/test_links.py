"""The two links carry the same bits: gloo's messages between pairs, and the collectives NCCL is given."""

from __future__ import annotations

import pytest
import torch.distributed as dist
from collective_cases import CALLS, Case, assert_as_emulated, run_cases, same_bits
from rank_pool import RankPool

from megacomp.collectives import hops
from megacomp.collectives.links import CollectiveLink


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_links_agree(ranks: RankPool, world_size: int) -> None:
    cases = [
        Case(shape=(rows, 72), codec=codec, gather_codec="int8", algorithm=algorithm, chunks=chunks)
        for rows in (1, 2, world_size, 3 * world_size + 1, 12 * world_size - 1, 12 * world_size)
        for codec in ("mxfp4", {"preset": "int5", "rotation": 32})
        for algorithm in ("one_shot", "two_shot")
        for chunks in (1, 2, 5)
    ]
    cases += [
        Case(shape=(rows * world_size, 72), codec="nvfp4", collective=collective, chunks=chunks)
        for rows in (1, 7)
        for collective in ("reduce_scatter", "all_gather")
        for chunks in (1, 3)
    ]
    by_pairs = ranks.run(run_cases, cases, "default", world_size=world_size)
    by_collectives = ranks.run(run_cases, cases, "collective", world_size=world_size)
    assert_as_emulated(cases, by_pairs)
    for left, right in zip(by_pairs, by_collectives, strict=True):
        assert all(map(same_bits, left, right))


def _waits(case: Case) -> list[bool]:
    """Whether each collective of `case` was begun asynchronously."""
    begun: list[bool] = []
    usual = dist.all_to_all_single

    def noting(*args: object, async_op: bool, **kwargs: object) -> object:
        begun.append(async_op)
        return usual(*args, async_op=async_op, **kwargs)

    link_for = hops.link_for
    hops.link_for = lambda peers, device, lane: CollectiveLink(peers)
    dist.all_to_all_single = noting
    try:
        CALLS[case.collective](case.partial(dist.get_rank()), None, case.route())
    finally:
        hops.link_for, dist.all_to_all_single = link_for, usual
    return begun


@pytest.mark.parametrize(("chunks", "begun"), [(1, [False]), (3, [True, True, True])])
def test_only_what_overlaps_leaves_the_current_stream(ranks: RankPool, chunks: int, begun: list[bool]) -> None:
    case = Case(shape=(24, 64), algorithm="two_shot", chunks=chunks)
    assert ranks.run(_waits, case) == [begun] * 2
