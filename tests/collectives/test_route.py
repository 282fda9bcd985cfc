"""Routes: what they accept, what "auto" chooses, and what a message then costs."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from collective_cases import CALLS, Case
from hypothesis import given
from hypothesis import strategies as st
from rank_pool import RankPool

from megacomp import codecs
from megacomp.collectives import Route, Trace, Traffic, all_reduce, choose_algorithm, payload_ratio, wire_bytes
from megacomp.collectives.partition import split
from megacomp.collectives.route import CUDA_MAX_CHUNKS, MAX_CHUNKS, ONE_SHOT_LIMIT_BYTES, choose_chunks

MXFP4 = codecs.get("mxfp4", backend="reference")
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"algorithm": "ring"}, "algorithm must be one of auto, one_shot, two_shot, not 'ring'"),
        ({"pipeline_chunks": 0}, 'pipeline_chunks must be "auto" or a positive integer, not 0'),
        ({"pipeline_chunks": True}, "not True"),
        ({"pipeline_chunks": 2.0}, "not 2.0"),
        ({"pipeline_chunks": "many"}, "not 'many'"),
    ],
)
def test_bad_routes(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Route(MXFP4, **options)


def test_auto_algorithm() -> None:
    route = Route(MXFP4)
    small_rows = ONE_SHOT_LIMIT_BYTES // MXFP4.row_bytes(4096)
    assert choose_algorithm(route, 2, 100 * small_rows, 4096) == "one_shot"
    assert choose_algorithm(route, 4, small_rows, 4096) == "one_shot"
    assert choose_algorithm(route, 4, small_rows + 1, 4096) == "two_shot"
    assert choose_algorithm(Route(MXFP4, algorithm="two_shot"), 2, 1, 4096) == "two_shot"


def test_auto_chunks() -> None:
    assert choose_chunks(Route(MXFP4), 1, 4096, CPU) == 1
    assert choose_chunks(Route(MXFP4), 1_000_000, 4096, CPU) == MAX_CHUNKS
    assert choose_chunks(Route(MXFP4, pipeline_chunks=7), 5, 64, CPU) == 7
    assert choose_chunks(Route(MXFP4), 1_000_000, 4096, CUDA) == CUDA_MAX_CHUNKS
    assert choose_chunks(Route(MXFP4), 4096, 4096, CUDA) == 1


@given(start=st.integers(0, 50), length=st.integers(0, 200), parts=st.integers(1, 20))
def test_split_covers_the_rows_evenly(start: int, length: int, parts: int) -> None:
    rows = range(start, start + length)
    cut = split(rows, parts)
    assert len(cut) == parts
    assert [row for part in cut for row in part] == list(rows)
    lengths = [len(part) for part in cut]
    assert max(lengths) - min(lengths) <= 1
    assert lengths == sorted(lengths, reverse=True)


def test_traffic_by_hand() -> None:
    row, plain_row = MXFP4.row_bytes(64), 128
    one_shot = wire_bytes(Route(MXFP4, algorithm="one_shot"), 8, 64, torch.bfloat16, rank=0, world_size=4)
    assert one_shot == Traffic(3 * 8 * row, 3 * 8 * plain_row, 12 * plain_row)
    two_shot = Route(MXFP4, codecs.get("int8"), "two_shot")
    # Nine rows among four ranks: 3, 2, 2, 2. Rank 0 sends 6 rows to their owners and its 3 sums to 3 peers.
    assert wire_bytes(two_shot, 9, 64, torch.float32, rank=0, world_size=4) == Traffic(
        6 * row + 9 * codecs.get("int8").row_bytes(64), 15 * 256, 9 * 256 * 6 // 4
    )
    assert wire_bytes(Route(MXFP4), 9, 64, torch.bfloat16, rank=0, world_size=1) == Traffic(0, 0, 0)
    assert payload_ratio(MXFP4, 4096) == pytest.approx(16 / MXFP4.bits_per_value(4096))
    assert payload_ratio(MXFP4, 4096, torch.float32) == pytest.approx(32 / MXFP4.bits_per_value(4096))


def _bytes_sent(cases: list[Case]) -> list[int]:
    """What each case hands to isend."""
    sent: list[int] = []
    usual = dist.isend

    def counting(tensor: torch.Tensor, *args: object) -> object:
        sent[-1] += tensor.nbytes
        return usual(tensor, *args)

    dist.isend = counting
    try:
        for case in cases:
            sent.append(0)
            CALLS[case.collective](case.partial(dist.get_rank()), None, case.route())
    finally:
        dist.isend = usual
    return sent


@pytest.mark.parametrize("world_size", [2, 3])
def test_traffic_is_what_is_sent(ranks: RankPool, world_size: int) -> None:
    cases = [
        Case(shape=(rows, 64), algorithm=algorithm, collective=collective, gather_codec="int8", chunks=2)
        for rows in (1, 12, 14, 31)
        for algorithm in ("one_shot", "two_shot")
        for collective in CALLS
        if collective != "reduce_scatter" or rows == 12
    ]
    for rank, sent in enumerate(ranks.run(_bytes_sent, cases, world_size=world_size)):
        for case, measured in zip(cases, sent, strict=True):
            expected = wire_bytes(
                case.route(), *case.shape, case.dtype, rank=rank, world_size=world_size, collective=case.collective
            )
            assert measured == expected.sent, (rank, case)


def _traced(algorithm: str) -> Trace:
    case, trace = Case(algorithm=algorithm), Trace()
    all_reduce(case.partial(dist.get_rank()), None, case.route(), trace=trace)
    return trace


@pytest.mark.parametrize("algorithm", ["one_shot", "two_shot"])
def test_trace_counts_every_stage(ranks: RankPool, algorithm: str) -> None:
    for trace in ranks.run(_traced, algorithm):
        assert trace.encode > 0 and trace.wire > 0 and trace.decode > 0
