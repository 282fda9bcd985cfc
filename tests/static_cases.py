"""Static codecs without a calibration: tables that were made up."""

from __future__ import annotations

from typing import Any

import torch

from megacomp import codecs
from megacomp.codecs import StaticCodec
from megacomp.kernels import StaticFormat, StaticTables


def tables(format: StaticFormat, features: int, ranks: int = 1, seed: int = 0) -> StaticTables:
    """Scales, offsets and weights of many magnitudes, and outlier features anywhere."""
    generator = torch.Generator().manual_seed(seed)
    shape = (ranks, features)
    scale = 2.0 ** (8 * torch.rand(shape, generator=generator) - 6)
    offset = 2 * scale * torch.randn(shape, generator=generator)
    weight = 2.0 ** (6 * torch.rand(shape, generator=generator) - 3)
    kept = torch.randperm(features, generator=generator)[: format.outliers(features)].sort().values
    return StaticTables(scale, offset if format.asymmetric else None, weight if format.row_scale else None, kept)


def calibrated(spec: Any, features: int, ranks: int, backend: str = "reference", seed: int = 0) -> StaticCodec:
    """The codec of ``spec`` with such tables."""
    codec = codecs.get(spec, backend=backend)
    assert isinstance(codec, StaticCodec)
    partials = tables(codec.format, features, ranks, seed)
    return codec.calibrated(partials, tables(codec.format, features, seed=seed + 1))
