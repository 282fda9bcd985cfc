"""How rows are dealt out, and that what follows one another is handled in one piece."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megacomp.collectives.partition import consecutive, deal, dealt, runs


@given(rows=st.integers(1, 300), ranks=st.integers(1, 9), chunks=st.integers(1, 20))
def test_deal(rows: int, ranks: int, chunks: int) -> None:
    pieces = deal(rows, ranks, chunks)
    assert 1 <= len(pieces) <= chunks
    assert [row for chunk in pieces for piece in chunk for row in piece] == list(range(rows))
    for rank in range(ranks):
        assert sum(len(chunk[rank]) for chunk in pieces) == dealt(rows, ranks, rank)
    # Nobody's share is larger than that of the fairest cut, and the chunks are of one size.
    assert max(dealt(rows, ranks, rank) for rank in range(ranks)) == -(-rows // ranks)
    longest = [max(map(len, chunk)) for chunk in pieces]
    assert max(longest) - min(longest) <= 1


@given(rows=st.integers(1, 300), ranks=st.integers(1, 9), chunks=st.integers(1, 20))
def test_a_dealt_chunk_is_encoded_and_decoded_in_one_piece(rows: int, ranks: int, chunks: int) -> None:
    for pieces in deal(rows, ranks, chunks):
        sent = consecutive(map(len, pieces))
        assert len(list(runs(zip(sent, pieces, strict=True)))) == 1
        wire_rows = max(map(len, pieces))
        arrived = [range(rank * wire_rows, rank * wire_rows + len(piece)) for rank, piece in enumerate(pieces)]
        assert len(list(runs(zip(arrived, pieces, strict=True)))) == 1


def test_enough_rows_are_dealt_in_as_many_chunks_as_asked_for() -> None:
    assert len(deal(4096, 8, 4)) == 4
    assert len(deal(4099, 8, 4)) == 4


@given(
    lengths=st.lists(st.integers(0, 4), max_size=12),
    source_gaps=st.lists(st.integers(0, 1), min_size=12, max_size=12),
    target_gaps=st.lists(st.integers(0, 1), min_size=12, max_size=12),
)
def test_runs_map_the_same_rows_in_fewest_pieces(
    lengths: list[int], source_gaps: list[int], target_gaps: list[int]
) -> None:
    pairs = []
    source = target = 7
    for length, source_gap, target_gap in zip(lengths, source_gaps, target_gaps, strict=False):
        source, target = source + source_gap, target + target_gap
        pairs.append((range(source, source + length), range(target, target + length)))
        source, target = source + length, target + length
    joined = list(runs(pairs))
    mapped = [row for pair in pairs for row in zip(*pair, strict=True)]
    assert [row for pair in joined for row in zip(*pair, strict=True)] == mapped
    steps = sum(after != (before[0] + 1, before[1] + 1) for before, after in itertools.pairwise(mapped))
    assert len(joined) == (steps + 1 if mapped else 0)


@pytest.mark.parametrize(("rows", "shares"), [(9, [3, 3, 3, 0]), (10, [3, 3, 3, 1]), (2, [1, 1, 0, 0])])
def test_shares_by_hand(rows: int, shares: list[int]) -> None:
    assert [dealt(rows, 4, rank) for rank in range(4)] == shares
