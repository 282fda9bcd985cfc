"""static_decode_sum: the wires of all peers -> the sum of what they hold, by calibrated tables."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from megacomp.kernels.backend import resolve_backend
from megacomp.kernels.compiled import run_compiled
from megacomp.kernels.elements import dequantize_codes
from megacomp.kernels.launch_config import on_device_of
from megacomp.kernels.packing import load_code, unpack, unpack_codes
from megacomp.kernels.scales import scale_value
from megacomp.kernels.static_encode import load_row, pad_features, row_exists, rows_per_program, warps_of
from megacomp.kernels.static_format import BF16, StaticFields, StaticFormat, StaticLayout, StaticTables
from megacomp.kernels.tiles import round_to

__all__ = ["static_decode_sum", "static_decode_sum_definition"]

MOST_VALUES = 8192
"""Sums that a Triton program holds: it goes through longer rows in parts, but for the outliers. Unmeasured."""


def static_decode_sum(
    format: StaticFormat, tables: StaticTables, wires: torch.Tensor, out: torch.Tensor, backend: str
) -> None:
    """out = sum(decode(wire) for wire in wires), wire ``i`` decoded by the tables of rank ``i``.

    Args:
        format: the format.
        tables: of the site, with ``format.outliers(features)`` kept features.
        wires: uint8 ``[tables.ranks, rows, format.row_bytes(features)]``, rows contiguous.
        out: bf16, fp16 or fp32 ``[rows, features]``, any strides, written whole.
        backend: one of ``megacomp.kernels.backend.BACKENDS``.
    """
    rows, features = out.shape
    if rows == 0:
        return
    resolved = resolve_backend(backend, "decode_sum", format, features, rows, out.device)
    if resolved == "triton":
        _static_decode_sum_triton(format, tables, wires, out)
        return
    layout = format.layout(features)
    peers = [format.fields(wire, features) for wire in wires]
    read = [
        [*fields.planes, *([] if fields.row_scales is None else [fields.row_scales.view(torch.bfloat16)])]
        for fields in peers
    ]
    steps = [
        [
            pad_features(table[rank], format, layout, 0.0).expand(rows, -1)
            for table in (tables.scale, tables.offset)
            if table is not None
        ]
        for rank in range(tables.ranks)
    ]
    padded = layout.piece * format.pieces
    direct = padded == features and out.is_contiguous()
    target = out if direct else out.new_empty(rows, padded)
    pieces = [*target.view(rows, format.pieces, -1).unbind(1)]
    if resolved == "compiled":
        run_compiled(static_decode_sum_definition, format, features, read, steps, pieces)
    else:
        static_decode_sum_definition(format, read, steps, pieces)
    if layout.outliers:
        _read_outliers(format, layout, peers, tables.kept, target)
    if not direct:
        out.copy_(target[:, :features])


def static_decode_sum_definition(
    format: StaticFormat,
    peers: Sequence[Sequence[torch.Tensor]],
    tables: Sequence[Sequence[torch.Tensor]],
    pieces: Sequence[torch.Tensor],
) -> None:
    """The definition of static_decode_sum, outliers aside, in PyTorch; what every backend equals bit for bit.

    1. Per peer: unpack the codes, multiply by the scales, add the offsets, multiply by the row scale. 2. Add the
    peers in order, in float32. 3. Round once, to the dtype of the output.

    Args:
        format: the format.
        peers: for each peer, in rank order, the planes of codes and, if there are any, its row scales as bfloat16.
        tables: for each peer the scale and, if asymmetric, the offset, float32 ``[rows, padded features]``.
        pieces: bf16, fp16 or fp32 ``[rows, piece]``, written: the pieces of every row.
    """
    totals: list[torch.Tensor] = []
    for fields, steps in zip(peers, tables, strict=True):
        codes = unpack(fields[: len(format.element.planes)], format.bits)
        values = []
        for code, *own in zip(codes, *(table.chunk(format.pieces, 1) for table in steps), strict=True):
            value = (code - float(format.zero_code)) * own[0]
            if format.asymmetric:
                value = value + own[1]
            if format.row_scale:
                value = value * BF16.value(fields[-1])
            values.append(value)
        totals = [total + value for total, value in zip(totals, values, strict=True)] if totals else values
    for piece, total in zip(pieces, totals, strict=True):
        piece.copy_(total)


def _read_outliers(
    format: StaticFormat, layout: StaticLayout, peers: Sequence[StaticFields], kept: torch.Tensor, out: torch.Tensor
) -> None:
    """Puts the sums of the outliers in their places."""
    piece, position = kept // layout.piece, kept % layout.piece
    total = None
    for fields in peers:
        rest = torch.cat(unpack(fields.outlier_planes, 16 - format.bits), dim=-1)[:, : len(kept)]
        bits = rest.to(torch.int32) << format.bits
        for plane, width, shift in zip(fields.planes, format.element.planes, format.element.plane_shifts, strict=True):
            parts = format.pieces * width // 8
            byte = plane.index_select(1, piece % parts * layout.piece + position).to(torch.int32)
            bits |= (byte >> piece // parts * width & (2**width - 1)) << shift
        values = (bits << 16).view(torch.float32)
        total = values if total is None else total + values
    assert total is not None
    out[:, kept] = total.to(out.dtype)


def _static_decode_sum_triton(
    format: StaticFormat, tables: StaticTables, wires: torch.Tensor, out: torch.Tensor
) -> None:
    rows, features = out.shape
    layout = format.layout(features)
    target = out if out.stride(1) == 1 else torch.empty_like(out, memory_format=torch.contiguous_format)
    with on_device_of(out):
        tile_rows = rows_per_program(rows)
        positions = min(triton.next_power_of_2(layout.piece), MOST_VALUES // (tile_rows * format.pieces))
        warps = warps_of(tile_rows * positions * format.pieces)
        _static_decode_sum_kernel[(triton.cdiv(rows, tile_rows),)](
            wires, target, tables.scale, tables.offset, tables.kept, rows, wires.stride(0) // 8,
            wires.stride(1) // 8, target.stride(0), len(wires), format, layout, tile_rows, positions,
            min(triton.next_power_of_2(layout.outliers), 32 * warps), num_warps=warps, enable_fp_fusion=False,
        )  # fmt: skip
    if target is not out:
        out.copy_(target)


@triton.jit
def _static_decode_sum_kernel(
    wires, out, scale, offset, kept, rows, peer_words, row_words, out_stride,
    peers: tl.constexpr, format: tl.constexpr, layout: tl.constexpr, tile_rows: tl.constexpr,
    positions: tl.constexpr, outlier_slots: tl.constexpr,
):  # fmt: skip
    """Twin of ``static_decode_sum``, for a tile of whole rows: first as if there were no outliers, then these."""
    first = tl.program_id(0).to(tl.int64) * tile_rows
    wires = tl.multiple_of(wires, 8) + first * row_words * 8
    out += first * out_stride
    rows -= first
    for start in range(0, layout.piece, positions):
        position = start + tl.arange(0, positions)
        _sum_positions(
            wires, out, scale, offset, position, rows, peer_words, row_words, out_stride,
            peers, format, layout, tile_rows,
        )  # fmt: skip
    if layout.outliers > 0:
        # What follows goes to places where other threads stored the above.
        tl.debug_barrier()
        row = tl.arange(0, tile_rows)[:, None]
        exists = row < rows
        wires += row * row_words * 8
        out += row * out_stride
        for start in range(0, layout.outliers, outlier_slots):
            slot = start + tl.arange(0, outlier_slots)[None, :]
            _sum_outliers(wires, out, kept, slot, exists, peer_words, peers, format, layout)


@triton.jit
def _sum_positions(
    wires, out, scale, offset, position, rows, peer_words, row_words, out_stride,
    peers: tl.constexpr, format: tl.constexpr, layout: tl.constexpr, tile_rows: tl.constexpr,
):  # fmt: skip
    """Writes the sums at such positions of every piece, of the first ``rows`` rows, as if there were no outliers."""
    totals = ()
    for peer in tl.static_range(peers):
        # A 64-bit product: the wires of a message may exceed 2 GiB.
        wire = wires + tl.full((), peer, tl.int64) * peer_words * 8
        scales = load_row(scale + peer * layout.features, position, True, 0.0, format, layout)
        offsets = position
        if format.asymmetric:
            offsets = load_row(offset + peer * layout.features, position, True, 0.0, format, layout)
        sums = ()
        for index in tl.static_range(tile_rows):
            decoded = _decode_row(wire + index * row_words * 8, scales, offsets, position, index, rows, format, layout)
            sums = sums + (decoded if peer == 0 else _add(totals[index], decoded),)
        totals = sums
    for index in tl.static_range(tile_rows):
        for piece in tl.static_range(len(totals[0])):
            feature = piece * layout.piece + position
            here = (position < layout.piece) & (feature < layout.features) & row_exists(position, index, rows)
            tl.store(out + index * out_stride + feature, round_to(totals[index][piece], out.dtype.element_ty), here)


@triton.jit
def _decode_row(wire, scales, offsets, position, index: tl.constexpr, rows, format: tl.constexpr, layout: tl.constexpr):
    """The values of one row of a wire, as pieces, as if there were no outliers."""
    element: tl.constexpr = format.element
    bf16: tl.constexpr = format.bf16
    here = row_exists(position, index, rows) & (position < layout.piece)
    planes = ()
    for plane in tl.static_range(len(element.planes)):
        parts = ()
        for part in tl.static_range(len(scales) * element.planes[plane] // 8):
            source = wire + layout.planes[plane] + part * layout.piece + position
            parts = parts + (tl.load(source, here, 0),)
        planes = planes + (parts,)
    row_scale = 1.0
    if format.row_scale:
        bits = tl.load((wire + layout.row_scale).to(tl.pointer_type(tl.int16)), index < rows, 0)
        row_scale = scale_value(bits.to(tl.int32), bf16)
    values = ()
    for piece in tl.static_range(len(scales)):
        value = dequantize_codes(unpack_codes(planes, piece, len(scales), element), element) * scales[piece]
        if format.asymmetric:
            value = value + offsets[piece]
        if format.row_scale:
            value = value * row_scale
        values = values + (value,)
    return values


@triton.jit
def _add(totals, values):
    sums = ()
    for piece in tl.static_range(len(values)):
        sums = sums + (totals[piece] + values[piece],)
    return sums


@triton.jit
def _sum_outliers(
    wires, out, kept, slot, row_exists, peer_words,
    peers: tl.constexpr, format: tl.constexpr, layout: tl.constexpr,
):  # fmt: skip
    """Writes the sums of the outliers ``slot``."""
    feature = tl.load(kept + slot, slot < layout.outliers, 0).to(tl.int32)
    exists = row_exists & (slot < layout.outliers)
    total = _load_outliers(wires, feature, slot, exists, format, layout)
    for _ in tl.static_range(1, peers):
        wires += tl.full((), 8, tl.int64) * peer_words
        total += _load_outliers(wires, feature, slot, exists, format, layout)
    tl.store(out + feature, round_to(total, out.dtype.element_ty), exists)


@triton.jit
def _load_outliers(wire, feature, slot, exists, format: tl.constexpr, layout: tl.constexpr):
    """The values of the outliers ``slot`` of a wire, float32."""
    element: tl.constexpr = format.element
    rest: tl.constexpr = format.outlier_rest
    bf16: tl.constexpr = format.bf16
    planes: tl.constexpr = layout.planes
    rest_planes: tl.constexpr = layout.outlier_planes
    lower = load_code(wire, planes, feature, exists, layout.piece * format.pieces, element)
    upper = load_code(wire, rest_planes, slot, exists, layout.outlier_piece * format.outlier_pieces, rest)
    return scale_value(lower | (upper << format.bits), bf16)
