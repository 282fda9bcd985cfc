"""The calls by codec name do what the routes they stand for do."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from collective_cases import CALLS, Case, same_bits
from rank_pool import RankPool

from megacomp.codecs import CodecError
from megacomp.collectives import functional


def _both_ways() -> list[tuple[torch.Tensor, torch.Tensor]]:
    rank = dist.get_rank()
    pairs = []
    for case, options in (
        (Case(), {}),
        (Case(algorithm="two_shot", gather_codec="int8", chunks=3, codec="int4"), {"gather_codec": "int8"}),
        (Case(collective="reduce_scatter", shape=(4, 64), codec="int8"), {}),
        (Case(collective="all_gather", codec="nvfp4"), {}),
    ):
        if case.collective == "all_reduce":
            options = {**options, "algorithm": case.algorithm}
        by_name = getattr(functional, case.collective)(
            case.partial(rank), case.codec, pipeline_chunks=case.chunks, backend="reference", **options
        )
        pairs.append((by_name, CALLS[case.collective](case.partial(rank), None, case.route())))
    return pairs


def test_by_name_equals_by_route(ranks: RankPool) -> None:
    for pairs in ranks.run(_both_ways):
        assert all(same_bits(by_name, by_route) for by_name, by_route in pairs)


def test_bad_codec() -> None:
    with pytest.raises(CodecError, match="mxfp5"):
        functional.all_reduce(torch.ones(1, 32), "mxfp5")
