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
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import torch

from megacomp.kernels.block_format import WireFields

__all__ = ["compiler_problem", "run_compiled"]

logger = logging.getLogger("megacomp")


@functools.cache
def compiler_problem() -> str | None:
    """Why torch.compile cannot build kernels for this CPU; None if it can. Logged once."""
    try:
        from torch._inductor.cpp_builder import get_cpp_compiler

        get_cpp_compiler()
    except Exception as error:  # whatever the compiler search raises is the reason
        reason = f"no working C++ compiler for torch.compile ({str(error).strip() or type(error).__name__})"
        logger.warning("%s: codecs run uncompiled on the CPU, about 20 times slower", reason)
        return reason
    return None


@functools.cache
def _compiled(definition: Callable[..., Any], key: Hashable) -> Callable[..., Any]:
    """A compiled copy of ``definition`` for one ``key``.

    A copy, because compiled variants are counted per code object, and a definition with many formats would exceed
    the limit and fall back to eager.
    """
    code = definition.__code__.replace(co_name=f"{definition.__name__}_{abs(hash(key)):x}")
    copy = types.FunctionType(code, definition.__globals__, code.co_name, definition.__defaults__)
    return torch.compile(copy, fullgraph=True)


def _tensors(arguments: Sequence[Any]) -> Iterator[torch.Tensor]:
    for argument in arguments:
        if isinstance(argument, torch.Tensor):
            yield argument
        elif isinstance(argument, WireFields):
            yield from argument.tensors()
        elif isinstance(argument, (list, tuple)):
            yield from _tensors(argument)


def _unalias(argument: Any) -> Any:
    if isinstance(argument, torch.Tensor):
        return torch.from_dlpack(argument)
    if isinstance(argument, WireFields):
        return argument.map(torch.from_dlpack)
    if isinstance(argument, (list, tuple)):
        return [_unalias(item) for item in argument]
    return argument


def run_compiled(definition: Callable[..., Any], format: Hashable, *arguments: Any) -> None:
    """Runs ``definition(format, *arguments)`` compiled.

    Args:
        definition: a kernel's definition; it writes into some of its arguments.
        format: its static description.
        arguments: tensors, :class:`WireFields` and sequences of them. The first dimension of every tensor is the
            rows, at least 2 (a compiler treats a dimension of one as a constant).
    """
    with torch.no_grad():
        arguments = tuple(_unalias(argument) for argument in arguments)
        tensors = list(_tensors(arguments))
        key = (
            format,
            torch.is_inference_mode_enabled(),
            *((t.dtype, t.shape[1:], t.stride()) for t in tensors),
        )
        for tensor in tensors:
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
        _compiled(definition, key)(format, *arguments)
