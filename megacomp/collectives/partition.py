"""Cutting rows into near-equal consecutive parts; every rank computes the same cut."""

from __future__ import annotations

from itertools import accumulate, pairwise


def split(rows: range, parts: int) -> list[range]:
    """`parts` consecutive ranges covering `rows`; lengths differ by at most one, the longer ones come first.

    With fewer rows than parts the last ranges are empty.
    """
    length, longer = divmod(len(rows), parts)
    lengths = (length + (part < longer) for part in range(parts))
    return [range(start, stop) for start, stop in pairwise(accumulate(lengths, initial=rows.start))]
