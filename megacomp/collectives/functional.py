"""The collectives as one call each, the codec given by name; `megacomp.all_reduce` and its siblings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
import torch.distributed as dist

from megacomp import codecs
from megacomp.collectives.all_gather import all_gather as _all_gather
from megacomp.collectives.all_reduce import all_reduce as _all_reduce
from megacomp.collectives.all_reduce_norm import all_reduce_norm as _all_reduce_norm
from megacomp.collectives.reduce_scatter import reduce_scatter as _reduce_scatter
from megacomp.collectives.route import Algorithm, Route

CodecSpec = str | Mapping[str, object] | codecs.Codec


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
    arguments. Raises ValueError for bad ones, and RuntimeError for a backend that cannot run here, before anything
    is sent; see `megacomp.collectives.all_reduce`.
    """
    return _all_reduce(x, group, _route(codec, algorithm, gather_codec, pipeline_chunks, backend))


def all_reduce_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    codec: CodecSpec = "mxfp4",
    group: dist.ProcessGroup | None = None,
    *,
    bias: torch.Tensor | None = None,
    algorithm: Algorithm | Literal["auto"] = "auto",
    gather_codec: CodecSpec | None = None,
    pipeline_chunks: int | Literal["auto"] = "auto",
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """(`residual` + the sum of every rank's `x` + `bias`, its RMSNorm): what follows a row-parallel layer.

    residual: of x's shape, the same values on every rank.
    weight, eps: of the norm; `weight` and `bias` are [features].

    Returns new tensors, the same bits on every rank; nothing is written to. The other arguments and errors are as
    for `all_reduce`; docs/fusion.md shows a layer built on it, and the numerics are those of
    `megacomp.collectives.all_reduce_norm`.
    """
    route = _route(codec, algorithm, gather_codec, pipeline_chunks, backend)
    return _all_reduce_norm(x, residual, weight, eps, group, route, bias=bias)


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


def _route(
    codec: CodecSpec,
    algorithm: Algorithm | Literal["auto"],
    gather_codec: CodecSpec | None,
    pipeline_chunks: int | Literal["auto"],
    backend: str,
) -> Route:
    gather = None if gather_codec is None else codecs.get(gather_codec, backend=backend)
    return Route(codecs.get(codec, backend=backend), gather, algorithm, pipeline_chunks)
