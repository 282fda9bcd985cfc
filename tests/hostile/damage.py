"""What an unreliable disk or a spiteful author makes of a file: strategies for hypothesis."""

from __future__ import annotations

import copy
import json
import os
import struct
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

fuzz = settings(
    max_examples=int(os.environ.get("MEGACOMP_FUZZ_EXAMPLES", "60")),
    derandomize=True,
    database=None,
    # Folders of fixtures are written anew by every example, or only read.
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)
"""The same inputs in every run; more of them with MEGACOMP_FUZZ_EXAMPLES."""

BIG_NUMBERS = st.sampled_from([2**31, 2**63, -(2**63), 2**64, 10**30, 1e308, -1e308, 5e-324])
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-3, 300)
    | BIG_NUMBERS
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["\ud800", "\x00", "../../x", "/etc/passwd", "(a+)+$", "[", "auto", "tuned", "int8", "static4"])
)
VALUES: st.SearchStrategy[Any] = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
"""Anything that Python's json reads, NaN and lone surrogates included."""


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of everything within a JSON value, itself included."""
    keys = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [path, *(place for key in keys for place in _places(value[key], (*path, key)))]


@st.composite
def edited(draw: st.DrawFn, original: Any, values: st.SearchStrategy[Any] = VALUES) -> Any:
    """`original`, a JSON value, with a few of its parts removed, replaced, renamed or added."""
    document = [copy.deepcopy(original)]
    for _ in range(draw(st.integers(1, 3))):
        # The list around it is no part of the document.
        *path, last = (0, *draw(st.sampled_from(_places(document[0]))))
        holder: Any = document
        for key in path:
            holder = holder[key]
        edit = draw(st.sampled_from(["replace", "replace", "remove", "rename", "add"])) if path else "replace"
        if edit == "remove":
            del holder[last]
        elif edit == "rename" and isinstance(holder, dict):
            holder[draw(st.text(max_size=6))] = holder.pop(last)
        elif edit == "add" and isinstance(holder[last], dict):
            holder[last][draw(st.text(max_size=6))] = draw(values)
        else:
            holder[last] = draw(values)
    return document[0]


@st.composite
def damaged(draw: st.DrawFn, original: bytes) -> bytes:
    """`original` with a few bits flipped, parts cut out, doubled or overwritten."""
    data = bytearray(original)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        some = draw(st.integers(1, 64))
        match draw(st.sampled_from(["flip", "flip", "truncate", "cut", "double", "noise"])):
            case "flip" if data:
                data[at] ^= 1 << draw(st.integers(0, 7))
            case "truncate":
                del data[at:]
            case "cut":
                del data[at : at + some]
            case "double":
                data[at:at] = data[at : at + some]
            case _:
                data[at : at + some] = draw(st.binary(max_size=some))
    return bytes(data)


DTYPES = [
    "BOOL",
    "U8",
    "I8",
    "I16",
    "I32",
    "I64",
    "U64",
    "F16",
    "BF16",
    "F32",
    "F64",
    "F8_E4M3",
    "F8_E8M0",
    "F4",
    "C64",
]


def of_safetensors(original: bytes) -> st.SearchStrategy[bytes]:
    """A safetensors file with its bytes, or what its header says, damaged."""
    (length,) = struct.unpack("<Q", original[:8])
    header, body = json.loads(original[8 : 8 + length]), original[8 + length :]

    def file(header: Any, header_length: Callable[[int], int] = lambda length: length) -> bytes:
        text = json.dumps(header).encode()
        return struct.pack("<Q", header_length(len(text)) % 2**64) + text + body

    names = sorted(name for name in header if name != "__metadata__")

    def retyped(change: tuple[str, str]) -> bytes:
        """One tensor of another dtype, and of as many rows as its bytes then are."""
        name, dtype = change
        return file({**header, name: {**header[name], "dtype": dtype}})

    def reshaped(change: tuple[str, list[int]]) -> bytes:
        name, shape = change
        return file({**header, name: {**header[name], "shape": shape}})

    def exchanged(pair: tuple[str, str]) -> bytes:
        """Two tensors under each other's names."""
        one, other = pair
        return file({**header, one: header[other], other: header[one]})

    tensor = st.sampled_from(names)
    same_size = tensor.flatmap(
        lambda name: st.tuples(st.just(name), st.sampled_from(_shapes_like(header[name]["shape"])))
    )
    return st.one_of(
        damaged(original),
        edited(header).map(file),
        st.integers(-16, 2**64 - 1).map(lambda more: file(header, lambda length: length + more)),
        st.tuples(tensor, st.sampled_from(DTYPES)).map(retyped),
        same_size.map(reshaped),
        st.tuples(tensor, tensor).map(exchanged),
    )


def _shapes_like(shape: list[int]) -> list[list[int]]:
    """Shapes with as many elements."""
    total = 1
    for size in shape:
        total *= size
    return [[total], [1, total], [total, 1], shape[::-1], [1, *shape], [*shape, 1], [2, total // 2]]
