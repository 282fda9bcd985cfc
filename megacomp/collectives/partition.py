"""Cutting rows into near-equal consecutive parts; every rank computes the same cut."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import accumulate, pairwise


def split(rows: range, parts: int) -> list[range]:
    """`parts` consecutive ranges covering `rows`; lengths differ by at most one, the longer ones come first.

    With fewer rows than parts the last ranges are empty.
    """
    length, longer = divmod(len(rows), parts)
    return consecutive((length + (part < longer) for part in range(parts)), rows.start)


def consecutive(lengths: Iterable[int], start: int = 0) -> list[range]:
    """Ranges of these lengths, each beginning where the one before it ends."""
    return [range(*ends) for ends in pairwise(accumulate(lengths, initial=start))]


def runs(pairs: Iterable[tuple[range, range]]) -> Iterator[tuple[range, range]]:
    """`pairs` of equally long ranges, joined wherever both begin where those of the pair before end.

    Empty ranges are left out.
    """
    source, target = range(0), range(0)
    for next_source, next_target in pairs:
        if not next_source:
            continue
        if next_source.start == source.stop and next_target.start == target.stop and source:
            source, target = range(source.start, next_source.stop), range(target.start, next_target.stop)
            continue
        if source:
            yield source, target
        source, target = next_source, next_target
    if source:
        yield source, target


def deal(rows: int, ranks: int, chunks: int) -> list[list[range]]:
    """For each chunk the rows each rank owns, all of them together `range(rows)` in order; at most `chunks` chunks.

    A chunk's rows are consecutive and so are a rank's within it, and all its pieces are equally long but for the
    last ones of the last chunk: a chunk can be encoded, and decoded from wires of equal size, in one piece.
    What a rank owns altogether (`dealt`) does not depend on the number of chunks.
    """
    share = -(-rows // ranks)
    # In the last chunk the last rank alone is short, by less than its piece.
    chunks = min(chunks, share // max(1, ranks * share - rows)) or 1
    every = range(rows)
    return [
        [every[ranks * part.start + len(part) * rank :][: len(part)] for rank in range(ranks)]
        for part in split(range(share), chunks)
    ]


def dealt(rows: int, ranks: int, rank: int) -> int:
    """How many of `rows` rows `deal` gives to `rank`."""
    share = -(-rows // ranks)
    return len(range(rows)[rank * share :][:share])
