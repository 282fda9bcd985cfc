"""Messages as models have them, and tables for static codecs to go with them: for times, where no model is at hand."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Literal

import torch

from megacomp.codecs import Codec, StaticCodec
from megacomp.collectives import Route
from megacomp.kernels import StaticFormat, StaticTables

__all__ = ["OUTLIER_EVERY", "OUTLIER_GAIN", "Distribution", "partial", "route_with_tables", "with_tables"]

Distribution = Literal["gaussian", "outliers"]

OUTLIER_EVERY, OUTLIER_GAIN = 97, 30.0
"""In "outliers" one feature in 97 is 30 times larger, the spread measured in small transformers' row-parallel outputs
(channel range max/median 29-59). A prime, so that they stand anywhere in a block."""


def partial(rows: int, features: int, dtype: torch.dtype, rank: int, distribution: Distribution) -> torch.Tensor:
    """Rank `rank`'s partial [rows, features]: normal values, seeded by the rank."""
    generator = torch.Generator().manual_seed(1000 + rank)
    x = torch.randn(rows, features, generator=generator)
    if distribution == "outliers":
        x[:, ::OUTLIER_EVERY] *= OUTLIER_GAIN
    return x.to(dtype)


def with_tables(codec: Codec, ranks: int, features: int) -> Codec:
    """`codec`; a static one with tables for partials with outliers, every other one as it is."""
    if not isinstance(codec, StaticCodec):
        return codec
    return codec.calibrated(_tables(codec.format, ranks, features), _tables(codec.format, 1, features))


def route_with_tables(route: Route, ranks: int, features: int) -> Route:
    """`route` with such codecs."""
    gather = route.gather_codec
    return replace(
        route,
        codec=with_tables(route.codec, ranks, features),
        gather_codec=None if gather is None else with_tables(gather, ranks, features),
    )


@functools.lru_cache(maxsize=64)
def _tables(format: StaticFormat, ranks: int, features: int) -> StaticTables:
    feature = torch.arange(features)
    gain = torch.where(feature % OUTLIER_EVERY == 0, OUTLIER_GAIN, 1.0) * torch.linspace(1, 1.5, ranks)[:, None]
    scale = gain * ((1 if format.row_scale else 4) / format.zero_code)
    largest_first = sorted(range(features), key=lambda feature: feature % OUTLIER_EVERY != 0)
    return StaticTables(
        scale,
        scale / 2 if format.asymmetric else None,
        1 / gain if format.row_scale else None,
        torch.tensor(sorted(largest_first[: format.outliers(features)]), dtype=torch.int64),
    )
