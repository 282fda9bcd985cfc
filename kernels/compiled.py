"""The CPU fast path: torch.compile of the very definitions, bit for bit their equal.

What makes a compiled definition fast here, each found by measuring (benchmarks/codec.py):

* one compiled function per format, feature count, dtype and number of peers, with only the rows dynamic: constant
  inner loops vectorize, symbolic ones do not;
* the fields of a wire are passed as tensors of their own. Views of one storage that are written to would be merged
  and scattered back by the compiler, some fifty times slower, so each view crosses DLPack, which hides the
  storage they share; they never overlap, so nothing is lost by hiding it;
* no concatenation and no assignment to slices inside the graph (`pieces` in packing.py).
"""

from __future__ import annotations

import functools
import logging
import types
import zlib
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch
from torch.utils.dlpack import from_dlpack, to_dlpack

from megacomp.kernels.block_format import WireFields

__all__ = ["compiled", "compiler_problem", "isolated", "run_compiled"]

logger = logging.getLogger("megacomp")

VALUES_PER_CALL = 2**20
"""Values a compiled call handles: its float32 intermediates stay in the cache. Measured: 16 M values of int4 with
rotation take 23 ms to decode in such slices and 107 ms in one."""


@functools.cache
def compiler_problem() -> str | None:
    """Why torch.compile cannot build kernels for this CPU; None if it can. Logged once."""
    try:
        from torch._inductor.cpp_builder import get_cpp_compiler

        get_cpp_compiler()
        torch.compile(_probe, fullgraph=True)(torch.zeros(8, device="cpu"))
    except Exception as error:  # whatever the compiler search or the build raises is the reason
        reason = f"no working C++ compiler for torch.compile ({type(error).__name__}: {str(error).strip()[:200]})"
        logger.warning("%s: codecs run uncompiled on the CPU, about 20 times slower", reason)
        return reason
    return None


def _probe(x: torch.Tensor) -> torch.Tensor:
    return x + 1


@functools.cache
def compiled(definition: Callable[..., Any], key: Hashable) -> Callable[..., Any]:
    """A compiled copy of ``definition`` for one ``key``.

    A copy, because compiled variants are counted per code object: many formats of one definition would exceed the
    limit. Under a name of its own, because sizes seen to change under one name are compiled as variables: a second
    feature count would slow down every format. The same name in every process, for the compiler's cache on disk.
    """
    digest = zlib.crc32(repr(key).encode())
    code = definition.__code__.replace(co_name=f"{definition.__name__}_{digest:08x}")
    copy = types.FunctionType(code, definition.__globals__, code.co_name, definition.__defaults__)
    return torch.compile(copy, fullgraph=True)


def isolated(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` without a trace of the storage it shares with other views of it; they must not overlap."""
    return from_dlpack(to_dlpack(tensor))


def _tensors(argument: Any) -> Iterator[torch.Tensor]:
    if isinstance(argument, torch.Tensor):
        yield argument
    else:
        for item in argument.tensors() if isinstance(argument, WireFields) else argument:
            yield from _tensors(item)


def _map(function: Callable[[torch.Tensor], torch.Tensor], argument: Any) -> Any:
    """``argument``, a tensor, :class:`WireFields` or a sequence of them, with ``function`` applied to each tensor."""
    if isinstance(argument, torch.Tensor):
        return function(argument)
    if isinstance(argument, WireFields):
        return argument.map(function)
    return [_map(function, item) for item in argument]


_uncompilable: set[Hashable] = set()


def run_compiled(definition: Callable[..., Any], format: Hashable, features: int, *arguments: Any) -> None:
    """Runs ``definition(format, *arguments)`` compiled, over slices of the rows that fit the cache.

    What this version of PyTorch cannot compile runs as it is, logged once.

    Args:
        definition: a kernel's definition; it writes into some of its arguments.
        format: its static description.
        features: values per row, for the size of the slices.
        arguments: tensors, :class:`WireFields` and sequences of them. The first dimension of every tensor is the
            rows, at least 2 (a compiler treats a dimension of one as a constant).
    """
    tensors = list(_tensors(arguments))
    rows = tensors[0].shape[0]
    key = (format, torch.is_inference_mode_enabled(), *((t.dtype, t.shape[1:], t.stride()) for t in tensors))
    if (definition, key) in _uncompilable:
        definition(format, *arguments)
        return
    run = compiled(definition, key)
    slices = max(1, min(rows // 2, rows * features // VALUES_PER_CALL))

    for index in range(slices):
        start, stop = rows * index // slices, rows * (index + 1) // slices

        def isolate(tensor: torch.Tensor, start: int = start, stop: int = stop) -> torch.Tensor:
            rows_alone = isolated(tensor[start:stop])
            torch._dynamo.maybe_mark_dynamic(rows_alone, 0)
            return rows_alone

        try:
            with torch.no_grad():
                run(format, *(_map(isolate, argument) for argument in arguments))
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = str(error).strip().splitlines()[0]
            logger.warning(
                "PyTorch %s cannot compile %s of %s, it runs uncompiled, about 20 times slower: %s",
                torch.__version__, definition.__name__, format, reason,
            )  # fmt: skip
            _uncompilable.add((definition, key))
            definition(format, *arguments)
            return
