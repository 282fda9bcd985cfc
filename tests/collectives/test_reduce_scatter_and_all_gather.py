"""reduce_scatter and all_gather over real ranks against an emulation in one process."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from collective_cases import CALLS, Case, assert_as_emulated, run_cases
from rank_pool import RankPool

from megacomp import codecs
from megacomp.collectives import Route

COLLECTIVES = ("reduce_scatter", "all_gather")


@pytest.mark.parametrize("link", ["default", "collective"])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_as_emulated(ranks: RankPool, world_size: int, link: str) -> None:
    cases = [
        Case(shape=(shares * world_size, *rest), codec=codec, collective=collective, chunks=chunks)
        for shares, *rest in ((3, 100), (2, 5, 64), (0, 64), (2, 0), (1, 1, 1))
        for codec in ("mxfp4", {"preset": "int4", "rotation": 32}, "int8")
        for collective in COLLECTIVES
        for chunks in (1, 2, "auto")
    ]
    assert_as_emulated(cases, ranks.run(run_cases, cases, link, world_size=world_size))


def test_dtypes_and_layouts(ranks: RankPool) -> None:
    cases = [
        Case(shape=(6, 4, 48), codec="int5", collective=collective, dtype=dtype, layout=layout, chunks=3)
        for collective in COLLECTIVES
        for dtype in (torch.bfloat16, torch.float16, torch.float32)
        for layout in ("contiguous", "transposed", "sliced")
    ]
    assert_as_emulated(cases, ranks.run(run_cases, cases, world_size=3))


def test_rows_of_all_gather_need_not_divide(ranks: RankPool) -> None:
    cases = [Case(shape=(7, 40), collective="all_gather", chunks=chunks) for chunks in (1, 2, 5)]
    assert_as_emulated(cases, ranks.run(run_cases, cases, world_size=3))


def _refusals() -> None:
    route = Route(codecs.get("mxfp4", backend="reference"))
    if dist.get_rank() == 0:
        for collective in COLLECTIVES:
            with pytest.raises(ValueError, match=r"\[rows, \.\.\., features\], not one of shape \[32\]"):
                CALLS[collective](torch.ones(32), None, route)
            with pytest.raises(ValueError, match=r"not torch\.int32"):
                CALLS[collective](torch.ones(2, 32, dtype=torch.int32), None, route)
        with pytest.raises(ValueError, match="2 equal shares; 3 rows do not divide"):
            CALLS["reduce_scatter"](torch.ones(3, 32), None, route)
    dist.barrier()


def test_bad_input_is_refused_before_anything_is_sent(ranks: RankPool) -> None:
    ranks.run(_refusals)
