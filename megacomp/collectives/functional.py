"""The collectives as one call each, the codec given by name; `megacomp.all_reduce` and its siblings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
import torch.distributed as dist

from megacomp import codecs
from megacomp.collectives.all_gather import all_gather as _all_gather
from megacomp.collectives.all_reduce import all_reduce as _all_reduce
from megacomp.collectives.reduce_scatter import reduce_scatter as _reduce_scatter
from megacomp.collectives.route import Algorithm, Route

CodecSpec = str | Mapping[str, object] | codecs.Codec


@torch.compiler.disable
def all_reduce(
    x: torch.Tensor,
    codec: CodecSpec = "mxfp4",
    group: dist.ProcessGroup | None = None,
    *,
    algorithm: Algorithm | Literal["auto"] = "auto",
    gather_codec: CodecSpec | None = None,
    pipeline_chunks: int | Literal["auto"] = "auto",
    backend: str = "auto",
) -> torch.Tensor:
    """The sum of every rank's `x` [..., features], encoded on the way; the same bits on every rank.

    codec, gather_codec, backend: see `megacomp.codecs.get`.
    algorithm, pipeline_chunks: see `Route`.

    Returns a new tensor of x's shape and dtype; `x` is not written to. Every rank must pass the same
    arguments. Raises ValueError for bad ones, before anything is sent; see `megacomp.collectives.all_reduce`.
    """
    route = Route(
        codecs.get(codec, backend=backend),
        None if gather_codec is None else codecs.get(gather_codec, backend=backend),
        algorithm,
        pipeline_chunks,
    )
    return _all_reduce(x, group, route)


@torch.compiler.disable
def reduce_scatter(
    x: torch.Tensor,
    codec: CodecSpec = "mxfp4",
    group: dist.ProcessGroup | None = None,
    *,
    pipeline_chunks: int | Literal["auto"] = "auto",
    backend: str = "auto",
) -> torch.Tensor:
    """This rank's share, cut along the first dimension, of the sum of every rank's `x` [rows, ..., features].

    Returns [rows / world, ..., features]. Arguments and errors as for `all_reduce`; ValueError also where the
    rows do not divide by the world size.
    """
    route = Route(codecs.get(codec, backend=backend), pipeline_chunks=pipeline_chunks)
    return _reduce_scatter(x, group, route)


@torch.compiler.disable
def all_gather(
    x: torch.Tensor,
    codec: CodecSpec = "mxfp4",
    group: dist.ProcessGroup | None = None,
    *,
    pipeline_chunks: int | Literal["auto"] = "auto",
    backend: str = "auto",
) -> torch.Tensor:
    """Every rank's `x` [rows, ..., features], concatenated along the first dimension in rank order.

    Returns [rows * world, ..., features], with the same bits on every rank. Arguments and errors as for
    `all_reduce`.
    """
    route = Route(codecs.get(codec, backend=backend), pipeline_chunks=pipeline_chunks)
    return _all_gather(x, group, route)
