"""static_encode: a partial ``[rows, features]`` -> its wire ``uint8[rows, row_bytes]``, by calibrated tables."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from megacomp.kernels.backend import resolve_backend
from megacomp.kernels.compiled import run_compiled
from megacomp.kernels.elements import ROUNDING
from megacomp.kernels.launch_config import MOST_WARPS, current_gpu, gpu_processors, on_device_of
from megacomp.kernels.packing import pack, pack_codes
from megacomp.kernels.scales import reciprocal_or_zero, round_scale, safe_reciprocal, scale_value
from megacomp.kernels.static_format import BF16, StaticFields, StaticFormat, StaticLayout, StaticTables
from megacomp.kernels.tiles import clear_bytes, widen

__all__ = [
    "load_row",
    "measure_rows_definition",
    "pad_features",
    "quantize_rows_definition",
    "row_exists",
    "rows_per_program",
    "static_encode",
    "warps_of",
]

ROWS_PER_PROGRAM, VALUES_PER_THREAD = 2, 32
"""Rows of a Triton program share what it loads of the tables, which takes more bytes than a row. Compiled for sm_90,
a thread has 32 values in 128 registers. Unmeasured."""

MOST_VALUES = 16384
"""Of several rows in a program; those of a single row of up to LONGEST_ROW spill registers beyond it."""


def static_encode(
    format: StaticFormat, tables: StaticTables, rank: int, x: torch.Tensor, wire: torch.Tensor, backend: str
) -> None:
    """wire = encode(x), as rank ``rank`` encodes.

    Args:
        format: the format.
        tables: of the site, with ``format.outliers(features)`` kept features.
        rank: 0 to ``tables.ranks - 1``.
        x: bf16, fp16 or fp32 ``[rows, features]``, any strides, on the device of the tables.
        wire: uint8 ``[rows, format.row_bytes(features)]``, rows contiguous, written whole.
        backend: one of ``megacomp.kernels.backend.BACKENDS``.
    """
    rows, features = x.shape
    if rows == 0:
        return
    resolved = resolve_backend(backend, "encode", format, features, rows, x.device)
    if resolved == "triton":
        _static_encode_triton(format, tables, rank, x, wire)
        return
    fields = format.fields(wire, features)
    format.clear_padding(wire, features)
    layout = format.layout(features)
    finite = torch.empty(rows, 1, dtype=torch.bool, device=x.device)

    def own(table: torch.Tensor, fill: float) -> torch.Tensor:
        return pad_features(table[rank], format, layout, fill).expand(rows, -1)

    offset = [] if tables.offset is None else [own(tables.offset, 0.0)]
    weight = [] if tables.weight is None else [own(tables.weight, 0.0)]
    padded = pad_features(x.contiguous(), format, layout, 0.0)
    row_scales = [] if fields.row_scales is None else [fields.row_scales]
    reciprocals = [torch.empty(rows, 1, dtype=torch.float32, device=x.device) for _ in row_scales]
    measuring = padded, finite, weight, row_scales, reciprocals
    quantizing = padded, finite, reciprocals, own(tables.scale, 1.0), offset, fields.planes
    if resolved == "compiled":
        # By themselves: in one loop with 16-bit integers a compiler would not vectorize the steps.
        run_compiled(measure_rows_definition, format, features, *measuring)
        run_compiled(quantize_rows_definition, format, features, *quantizing)
    else:
        measure_rows_definition(format, *measuring)
        quantize_rows_definition(format, *quantizing)
    if layout.outliers:
        _write_outliers(format, layout, x, finite, tables.kept, fields)


def measure_rows_definition(
    format: StaticFormat,
    x: torch.Tensor,
    finite: torch.Tensor,
    weight: Sequence[torch.Tensor],
    row_scales: Sequence[torch.Tensor],
    reciprocals: Sequence[torch.Tensor],
) -> None:
    """The first half of the definition of static_encode, in PyTorch; what every backend equals bit for bit.

    The row scale, if there is one, is the largest weighted magnitude of the row, in BF16; NaN if the row is not finite.

    Args:
        format: the format.
        x: bf16, fp16 or fp32 ``[rows, padded features]``, contiguous.
        finite: bool ``[rows, 1]``, written: no NaN or Inf in the row.
        weight: this rank's, float32, of x's shape; here and below none if there are no row scales.
        row_scales: the bits of the row scales, written.
        reciprocals: float32 ``[rows, 1]``, written: what values are multiplied by.
    """
    values = x.to(torch.float32)
    is_finite = values.abs().amax(-1, keepdim=True) < torch.inf
    finite.copy_(is_finite)
    if format.row_scale:
        largest = (torch.where(is_finite, values, 0.0).abs() * weight[0]).amax(-1, keepdim=True)
        bits = BF16.round(largest)
        row_scales[0].copy_(torch.where(is_finite, bits, BF16.nan_bits))
        reciprocals[0].copy_(safe_reciprocal(BF16.value(bits)))


def quantize_rows_definition(
    format: StaticFormat,
    x: torch.Tensor,
    finite: torch.Tensor,
    reciprocals: Sequence[torch.Tensor],
    scale: torch.Tensor,
    offset: Sequence[torch.Tensor],
    planes: Sequence[torch.Tensor],
) -> None:
    """The second half of the definition of static_encode, outliers aside.

    1. Take a row that is not finite for zeros. 2. Multiply by the reciprocal of the row scale, if there is one.
    3. Subtract the offset, if there is one. 4. Divide by the scale, round (arXiv 2411.07942: q = clamp(round(x / s))),
    pack.

    Args:
        format: the format.
        x: bf16, fp16 or fp32 ``[rows, padded features]``, contiguous.
        finite, reciprocals: of :func:`measure_rows_definition`.
        scale, offset: this rank's, float32, of x's shape; offset: none if symmetric.
        planes: the planes of codes, written.
    """
    values = torch.where(finite, x.to(torch.float32), 0.0)
    if format.row_scale:
        values = values * reciprocals[0]
    if format.asymmetric:
        values = values - offset[0]
    zero = float(format.zero_code)
    codes = torch.round(values / scale).clamp(-zero, zero - 1) + zero
    packed = pack(codes.view(len(codes), format.pieces, -1).unbind(1), format.bits)
    for plane, field in zip(packed, planes, strict=True):
        field.copy_(plane)


def _write_outliers(
    format: StaticFormat,
    layout: StaticLayout,
    x: torch.Tensor,
    finite: torch.Tensor,
    kept: torch.Tensor,
    fields: StaticFields,
) -> None:
    """Splits the BF16 of the outliers between the places of their codes and their own planes.

    A row with a NaN or Inf anywhere gets NaN for all its outliers: without a row scale nothing else could tell.
    """
    values = x.index_select(1, kept).to(torch.float32)
    bits = torch.where(finite, BF16.round(values), BF16.nan_bits).to(torch.int32) & 0xFFFF
    lowest = bits & (2**format.bits - 1)
    piece, position = kept // layout.piece, kept % layout.piece
    for plane, width, shift in zip(fields.planes, format.element.planes, format.element.plane_shifts, strict=True):
        parts = format.pieces * width // 8
        byte, left = piece % parts * layout.piece + position, piece // parts * width
        field = (lowest >> shift & (2**width - 1)) << left
        # Two outliers may share a byte, so each slot of the bytes has its turn.
        for slot in range(8 // width):
            mine = left == slot * width
            place = byte[mine]
            others = plane.index_select(1, place) & (0xFF ^ (2**width - 1) << slot * width)
            plane[:, place] = others | field[:, mine].to(torch.uint8)
    rest = torch.nn.functional.pad(bits >> format.bits, (0, layout.outlier_piece * format.outlier_pieces - len(kept)))
    pieces = rest.to(torch.float32).view(len(rest), format.outlier_pieces, -1).unbind(1)
    for field, plane in zip(fields.outlier_planes, pack(pieces, 16 - format.bits), strict=True):
        field.copy_(plane)


def pad_features(x: torch.Tensor, format: StaticFormat, layout: StaticLayout, fill: float) -> torch.Tensor:
    """``x`` ``[..., features]`` with ``fill`` up to whole pieces; itself where nothing is missing."""
    missing = layout.piece * format.pieces - layout.features
    return torch.nn.functional.pad(x, (0, missing), value=fill) if missing else x


def rows_per_program(rows: int) -> int:
    """Rows of a Triton program: fewer where some processors would be left without a program."""
    processors = gpu_processors(current_gpu())
    return max(1, min(ROWS_PER_PROGRAM, triton.next_power_of_2(rows // processors)))


def warps_of(values: int) -> int:
    """Warps of a Triton program of so many values at once, a power of two."""
    return max(1, min(MOST_WARPS, values // (32 * VALUES_PER_THREAD)))


def _static_encode_triton(
    format: StaticFormat, tables: StaticTables, rank: int, x: torch.Tensor, wire: torch.Tensor
) -> None:
    rows, features = x.shape
    layout = format.layout(features)
    if x.stride(1) != 1:
        x = x.contiguous()
    scale, offset, weight = (
        None if table is None else table[rank] for table in (tables.scale, tables.offset, tables.weight)
    )
    with on_device_of(x):
        positions = triton.next_power_of_2(layout.piece)
        values = positions * format.pieces
        tile_rows = min(rows_per_program(rows), max(1, MOST_VALUES // values))
        _static_encode_kernel[(triton.cdiv(rows, tile_rows),)](
            x, wire, scale, offset, weight, tables.is_kept, tables.kept, rows, x.stride(0), wire.stride(0) // 8,
            format, layout, tile_rows, positions, triton.next_power_of_2(layout.outlier_piece),
            num_warps=warps_of(tile_rows * values), enable_fp_fusion=False,
        )  # fmt: skip


@triton.jit
def _static_encode_kernel(
    x, wire, scale, offset, weight, is_kept, kept, rows, x_stride, row_words,
    format: tl.constexpr, layout: tl.constexpr, tile_rows: tl.constexpr, positions: tl.constexpr,
    outlier_positions: tl.constexpr,
):  # fmt: skip
    """Twin of ``static_encode``, for a tile of whole rows."""
    position = tl.arange(0, positions)
    first = tl.program_id(0).to(tl.int64) * tile_rows
    x += first * x_stride
    rows -= first
    wire = tl.multiple_of(wire, 8) + first * row_words * 8
    loaded = ()
    for index in tl.static_range(tile_rows):
        here = row_exists(position, index, rows)
        loaded = loaded + (load_row(x + index * x_stride, position, here, 0.0, format, layout),)
    weights = position
    if format.row_scale:
        weights = load_row(weight, position, True, 0.0, format, layout)
    measured = ()
    for index in tl.static_range(tile_rows):
        measured = measured + (_measure(loaded[index], weights, format),)

    scales = load_row(scale, position, True, 1.0, format, layout)
    offsets = position
    if format.asymmetric:
        offsets = load_row(offset, position, True, 0.0, format, layout)
    outliers = position
    if layout.outliers > 0:
        outliers = load_row(is_kept, position, True, 0, format, layout)
    row = tl.arange(0, tile_rows)[:, None]
    finite = row < 0
    for index in tl.static_range(tile_rows):
        _encode_row(
            wire + index * row_words * 8, loaded[index], measured[index][0], measured[index][1],
            scales, offsets, outliers, position, index, rows, format, layout,
        )  # fmt: skip
        finite = finite | (measured[index][0] & (row == index))
    if layout.outliers > 0:
        _store_outliers(
            wire + row * row_words * 8, x + row * x_stride, kept, finite, row < rows,
            tl.arange(0, outlier_positions)[None, :], format, layout,
        )  # fmt: skip


@triton.jit
def row_exists(position, index: tl.constexpr, rows):
    """Whether row ``index`` is one of ``rows``, for each position.

    No splat of a scalar comparison, which the interpreter makes int32, and as a mask does not take in Triton 3.9.
    """
    return tl.full(position.shape, index, tl.int32) < rows


@triton.jit
def load_row(source, position, exists, fill: tl.constexpr, format: tl.constexpr, layout: tl.constexpr):
    """The tuple of the pieces of one row, or of a table, as they are; ``fill`` where there is nothing."""
    pieces: tl.constexpr = format.pieces
    loaded = ()
    for piece in tl.static_range(pieces):
        feature = piece * layout.piece + position
        here = (position < layout.piece) & (feature < layout.features) & exists
        loaded = loaded + (tl.load(source + feature, here, fill),)
    return loaded


@triton.jit
def _encode_row(
    wire, x, finite, largest, scales, offsets, outliers, position, index: tl.constexpr, rows,
    format: tl.constexpr, layout: tl.constexpr,
):  # fmt: skip
    """Writes one row, but for the rest of its outliers."""
    bf16: tl.constexpr = format.bf16
    element: tl.constexpr = format.element
    planes: tl.constexpr = layout.planes
    inverse_row_scale = 1.0
    if format.row_scale:
        bits = round_scale(largest, bf16)
        inverse_row_scale = reciprocal_or_zero(scale_value(bits, bf16))
        bits = tl.where(finite, bits, format.bf16.nan_bits).to(tl.int16)
        tl.store((wire + layout.row_scale).to(tl.pointer_type(tl.int16)), bits, index < rows)
    codes = ()
    for piece in tl.static_range(len(x)):
        value = tl.where(finite, widen(x[piece]), 0.0)
        if format.row_scale:
            value = value * inverse_row_scale
        if format.asymmetric:
            value = value - offsets[piece]
        steps = tl.div_rn(value, scales[piece])
        steps = tl.minimum(tl.maximum(steps, -format.zero_code), format.zero_code - 1)
        # The code, and above it bits that packing drops.
        code = (steps + (ROUNDING + format.zero_code)).to(tl.int32, bitcast=True)
        if layout.outliers > 0:
            outlier = outliers[piece].to(tl.int32)
            code = (code & ~outlier) | (_outlier_bits(x[piece], finite, format) & outlier)
        codes = codes + (code,)
    here = row_exists(position, index, rows) & (position < layout.piece)
    _store_planes(wire, planes, codes, position, here, layout.piece, element)
    for gap in tl.static_range(len(layout.padding)):
        clear_bytes(wire, layout.padding[gap][0], layout.padding[gap][1], index < rows)


@triton.jit
def _measure(x, weights, format: tl.constexpr):
    """(whether a row is finite, its largest weighted magnitude or 0), scalars."""
    extreme = tl.zeros(x[0].shape, tl.int32)
    for piece in tl.static_range(len(x)):
        magnitude = tl.abs(widen(x[piece]))
        weighted = magnitude
        if format.row_scale:
            weighted = magnitude * weights[piece]
        # Bits of magnitudes are ordered like the magnitudes, and those of a NaN come last.
        bits = tl.where(magnitude < float("inf"), weighted.to(tl.int32, bitcast=True), 0x7FC00000)
        extreme = tl.maximum(extreme, bits)
    extreme = tl.max(extreme, 0)
    finite = extreme < 0x7FC00000
    return finite, tl.where(finite, extreme, 0).to(tl.float32, bitcast=True)


@triton.jit
def _outlier_bits(x, finite, format: tl.constexpr):
    """int32 bits of values in BF16, NaN in rows that are not finite.

    Of BF16 itself as they are, a negative zero's too: it does not differ in the bits that lie in the place of a code.
    """
    bf16: tl.constexpr = format.bf16
    if x.dtype == tl.bfloat16:
        return tl.where(finite, x.to(tl.int16, bitcast=True).to(tl.int32), format.bf16.nan_bits)
    else:
        return tl.where(finite, round_scale(x.to(tl.float32), bf16), format.bf16.nan_bits)


@triton.jit
def _store_outliers(wire, x, kept, finite, exists, position, format: tl.constexpr, layout: tl.constexpr):
    """Writes what of the outliers does not lie in the places of their codes."""
    rest: tl.constexpr = format.outlier_rest
    planes: tl.constexpr = layout.outlier_planes
    pieces: tl.constexpr = format.outlier_pieces
    codes = ()
    for piece in tl.static_range(pieces):
        slot = piece * layout.outlier_piece + position
        here = (position < layout.outlier_piece) & (slot < layout.outliers)
        values = widen(tl.load(x + tl.load(kept + slot, here, 0), exists & here, 0.0))
        codes = codes + (tl.where(here, _outlier_bits(values, finite, format) >> format.bits, 0),)
    here = exists & (position < layout.outlier_piece)
    _store_planes(wire, planes, codes, position, here, layout.outlier_piece, rest)


@triton.jit
def _store_planes(wire, planes: tl.constexpr, codes, position, here, length: tl.constexpr, packed: tl.constexpr):
    """Packs the pieces of codes, ``length`` long, and writes their planes."""
    for plane in tl.static_range(len(packed.planes)):
        parts = pack_codes(codes, 0, packed.plane_shifts[plane], packed.planes[plane], False)
        for part in tl.static_range(len(parts)):
            tl.store(wire + planes[plane] + part * length + position, parts[part].to(tl.uint8), here)
