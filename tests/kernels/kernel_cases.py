"""What the kernel tests have in common: formats, values that are hard on a quantizer, comparison bit for bit."""

from __future__ import annotations

from typing import Any

import torch
import triton

from megacomp import codecs
from megacomp.kernels import BlockFormat
from megacomp.kernels.launch_config import guess
from megacomp.kernels.tiles import Tile, longest_piece, needs_whole_rows

MX_ELEMENTS = (
    *("fp3_e2m0", "fp3_e1m1", "fp4_e2m1", "fp4_e1m2", "fp5_e2m2", "fp5_e3m1", "fp6_e2m3", "fp6_e3m2"),
    *("fp8_e4m3", "fp8_e5m2", "int2", "int3", "int4", "int5", "int6", "int7", "int8"),
)

SPECS: tuple[str | dict[str, Any], ...] = (
    *codecs.presets(),
    # Every element that no preset has, with every block size and power-of-two scale.
    {"format": "mx", "element": "fp3_e1m1", "block_size": 8},
    {"format": "mx", "element": "fp4_e1m2", "block_size": 16, "scale_rounding": "best"},
    {"format": "mx", "element": "fp5_e3m1", "block_size": 64, "scale": "e5m0"},
    {"format": "mx", "element": "fp8_e4m3", "block_size": 128, "scale_rounding": "best"},
    {"format": "mx", "element": "int2", "block_size": 8, "scale_rounding": "best"},
    {"format": "mx", "element": "int3", "block_size": 8, "scale": "e5m0"},
    {"format": "mx", "element": "int4", "block_size": 128},
    {"format": "mx", "element": "int5", "block_size": 64},
    {"format": "mx", "element": "int6", "block_size": 16},
    {"format": "mx", "element": "int7", "block_size": 32},
    # Minifloats under floating-point scales, searched and not.
    {"format": "mx", "element": "fp3_e2m0", "block_size": 8, "scale": "bf16", "scale_search": True},
    {"format": "mx", "element": "fp4_e2m1", "block_size": 8, "scale": "e4m3", "scale_search": True},
    {"format": "mx", "element": "fp6_e3m2", "block_size": 64, "scale": "fp16", "scale_search": True},
    {"format": "mx", "element": "fp8_e5m2", "block_size": 16, "scale": "e4m3"},
    # Integers: every width, block size and scale, symmetric, searched, asymmetric.
    {"format": "int", "bits": 7, "block_size": 128, "scale": "e4m3"},
    {"format": "int", "bits": 2, "block_size": 16, "scale": "fp16"},
    {"format": "int", "bits": 8, "block_size": 16, "scale": "bf16", "scale_search": True},
    {"format": "int", "bits": 4, "block_size": 64, "scale": "fp16", "scale_search": True},
    {"format": "int", "bits": 4, "block_size": 128, "scale": "fp16", "symmetric": False},
    {"format": "int", "bits": 3, "block_size": 16, "scale": "bf16", "symmetric": False},
    {"format": "int", "bits": 8, "block_size": 64, "scale": "bf16", "symmetric": False},
    # Rotations shorter than a block, as long, and longer.
    {"preset": "int4", "rotation": 128},
    {"preset": "mxfp4", "rotation": 32},
    {"preset": "nvfp4", "rotation": 64},
    {"preset": "int8", "rotation": 256},
    {"preset": "mxfp6_e2m3", "rotation": 32, "scale": "e5m0"},
    {"format": "int", "bits": 7, "block_size": 128, "scale": "bf16", "symmetric": False, "rotation": 32},
    {"format": "mx", "element": "fp5_e2m2", "block_size": 8, "rotation": 256, "scale_rounding": "best"},
)

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def pair(spec: Any) -> tuple[codecs.Codec, codecs.Codec]:
    """A codec by its definition, and by its kernels."""
    return codecs.get(spec, backend="reference"), codecs.get(spec, backend="triton")


KINDS = 12
"""Kinds of rows that :func:`hard_values` makes."""


def hard_values(rows: int, features: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Rows of every kind in turn, beginning with kind ``seed``: outliers, ties, zeros of both signs, subnormals,
    numbers at the end of the range, NaN, Inf, constants, all exponents mixed."""
    generator = torch.Generator().manual_seed(seed)
    largest = torch.finfo(dtype).max
    x = torch.randn(rows, features, generator=generator)
    uniform = torch.rand(rows, features, generator=generator)
    places = torch.randint(features, (rows, 3), generator=generator)
    for row in range(rows):
        kind = (row + seed) % KINDS
        if kind == 1:
            x[row, ::37] *= 100
        elif kind == 2:  # multiples of a quarter: many lie half-way between two codes
            x[row] = torch.round(4 * x[row]) / 4
            x[row, ::8] = 2.0 ** (row % 5)
        elif kind == 3:
            x[row] = torch.where(uniform[row] < 0.5, 0.0, -0.0)
            x[row, features // 2 :] *= -1
        elif kind == 4:  # float32 subnormals, and normal numbers among them
            x[row] *= 2.0**-130
            x[row, ::50] = 2.0**-125
        elif kind == 5:
            x[row] = (2 * uniform[row] - 1) * largest
            x[row, places[row, 0]] = largest
        elif kind == 6:
            x[row, places[row, 0]] = torch.nan
        elif kind == 7:
            x[row, places[row, 0]] = torch.inf
            x[row, places[row, 1]] = -torch.inf
            x[row, places[row, 2]] = -torch.nan
        elif kind == 8:  # far from zero, all alike
            x[row] = 1000 + uniform[row]
        elif kind == 9:
            x[row] = -3.0
        elif kind == 10:
            x[row] = x[row].sign() * 2.0 ** (uniform[row] * 270 - 145)
        elif kind == 11:  # magnitudes apart from block to block
            x[row] *= 2.0 ** (torch.arange(features) // 16 % 40 - 20)
    finite = x.clamp(-largest, largest)
    return torch.where(x.isfinite(), finite, x).to(dtype)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors agree in every bit, the signs of zeros included; of NaNs only in where they are."""
    if not a.is_floating_point():
        return torch.equal(a, b)
    integers = {2: torch.int16, 4: torch.int32}[a.dtype.itemsize]
    a, b = a.contiguous(), b.contiguous()
    numbers = ~a.isnan()
    return torch.equal(numbers, ~b.isnan()) and torch.equal(a.view(integers)[numbers], b.view(integers)[numbers])


def tiles(operation: str, format: BlockFormat, features: int) -> list[Tile]:
    """Tiles of every kind that ``operation`` may be told to work on: small and large programs, parts of rows, whole
    rows and several, pieces of every length, and what would be guessed on a GPU."""
    layout = format.layout(features)
    runs = max(2, format.rotation // format.block_size)
    row = max(triton.next_power_of_2(layout.blocks), runs, 8)
    shapes = [(runs, 0), (8 * runs, 0), (row, row), (2 * row, row)]
    if operation != "decode_sum" and needs_whole_rows(format):
        shapes = [(row, row)] if format.scale.bits < 8 else [(row, row), (4 * row, row)]
    longest = longest_piece(format)
    # More pieces take long in the interpreter; the tests of shapes have more.
    pieces = [length for length in (longest, 16, 8, 4, 2, 1) if format.block_size // 8 <= length <= longest]
    found = {Tile(*shapes[index % len(shapes)], piece) for index, piece in enumerate(pieces)}
    found |= {Tile(*shape, pieces[0]) for shape in shapes}
    found |= {guess(operation, format, layout, rows, torch.bfloat16, processors=132).tile for rows in (1, 2**20)}
    return sorted(found, key=repr)
