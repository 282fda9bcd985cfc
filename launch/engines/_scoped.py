"""Changing an attribute of someone else's object for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

_ABSENT = object()


@contextmanager
def attribute(owner: object, name: str, value: object) -> Iterator[None]:
    """`owner.name` is `value` inside the `with` block, and afterwards exactly what it was, or absent."""
    before = vars(owner).get(name, _ABSENT)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if before is _ABSENT:
            delattr(owner, name)
        else:
            setattr(owner, name, before)


@contextmanager
def unchanged(owner: object, name: str) -> Iterator[None]:
    """Whatever happens to `owner.name` inside the `with` block, afterwards it is what it was."""
    with attribute(owner, name, getattr(owner, name)):
        yield
