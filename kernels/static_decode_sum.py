"""static_decode_sum: the wires of all peers -> the sum of what they hold, by calibrated tables."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from megacomp.kernels.backend import resolve_backend
from megacomp.kernels.compiled import run_compiled
from megacomp.kernels.launch_config import on_device_of
from megacomp.kernels.packing import unpack, unpack_codes
from megacomp.kernels.scales import scale_value
from megacomp.kernels.static_encode import pad_features, static_tile
from megacomp.kernels.static_format import BF16, StaticFields, StaticFormat, StaticLayout, StaticTables
from megacomp.kernels.tiles import round_to

__all__ = ["static_decode_sum", "static_decode_sum_definition"]


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
    tile_rows, positions = static_tile(format, layout, rows)
    grid = (triton.cdiv(rows, tile_rows), triton.cdiv(layout.piece, positions))
    with on_device_of(out):
        _static_decode_sum_kernel[grid](
            wires, target, tables.scale, tables.offset, tables.slots, rows, wires.stride(0) // 8,
            wires.stride(1) // 8, target.stride(0), len(wires), format, layout, tile_rows, positions,
            num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    if target is not out:
        out.copy_(target)


@triton.jit
def _static_decode_sum_kernel(
    wires, out, scale, offset, slots, rows, peer_words, row_words, out_stride,
    peers: tl.constexpr, format: tl.constexpr, layout: tl.constexpr, tile_rows: tl.constexpr, positions: tl.constexpr,
):  # fmt: skip
    """Twin of ``static_decode_sum``, for one tile of rows and positions."""
    pieces: tl.constexpr = format.pieces
    row = (tl.program_id(0) * tile_rows + tl.arange(0, tile_rows)).to(tl.int64)[:, None]
    position = tl.program_id(1) * positions + tl.arange(0, positions)[None, :]
    exists = (row < rows) & (position < layout.piece)
    wires = tl.multiple_of(wires, 8) + row * row_words * 8
    totals = ()
    for peer in tl.static_range(peers):
        # A 64-bit product: the wires of a message may exceed 2 GiB.
        wire = wires + tl.full((), peer, tl.int64) * peer_words * 8
        totals = _add_decoded(totals, wire, scale, offset, slots, row < rows, position, exists, peer, format, layout)
    for piece in tl.static_range(pieces):
        feature = piece * layout.piece + position
        here = exists & (feature < layout.features)
        tl.store(out + row * out_stride + feature, round_to(totals[piece], out.dtype.element_ty), here)


@triton.jit
def _add_decoded(
    totals, wire, scale, offset, slots, row_exists, position, exists,
    peer: tl.constexpr, format: tl.constexpr, layout: tl.constexpr,
):  # fmt: skip
    """The values of one wire, added to ``totals`` (none before the first peer)."""
    element: tl.constexpr = format.element
    bf16: tl.constexpr = format.bf16
    pieces: tl.constexpr = format.pieces
    planes = ()
    for plane in tl.static_range(len(format.element.planes)):
        parts = ()
        for part in tl.static_range(format.pieces * format.element.planes[plane] // 8):
            source = wire + layout.planes[plane] + part * layout.piece + position
            parts = parts + (tl.load(source, exists, 0),)
        planes = planes + (parts,)
    row_scale = tl.zeros(row_exists.shape, tl.float32)
    if format.row_scale:
        bits = tl.load((wire + layout.row_scale).to(tl.pointer_type(tl.int16)), row_exists, 0)
        row_scale = scale_value(bits.to(tl.int32), bf16)
    sums = ()
    for piece in tl.static_range(pieces):
        code = unpack_codes(planes, piece, pieces, element)
        feature = piece * layout.piece + position
        here = (position < layout.piece) & (feature < layout.features)
        value = (code - format.zero_code).to(tl.float32) * tl.load(scale + peer * layout.features + feature, here, 0.0)
        if format.asymmetric:
            value = value + tl.load(offset + peer * layout.features + feature, here, 0.0)
        if format.row_scale:
            value = value * row_scale
        if layout.outliers > 0:
            slot = tl.load(slots + feature, here, -1)
            bits = code | (_rest(wire, slot, exists, format, layout) << format.bits)
            value = tl.where(slot >= 0, scale_value(bits, bf16), value)
        sums = sums + (value if len(totals) == 0 else totals[piece] + value,)
    return sums


@triton.jit
def _rest(wire, slot, exists, format: tl.constexpr, layout: tl.constexpr):
    """The upper bits of the outliers among the features of a tile, int32; 0 for the others."""
    rest: tl.constexpr = format.outlier_rest
    here = exists & (slot >= 0)
    bits = tl.zeros(here.shape, tl.int32)
    for plane in tl.static_range(len(rest.planes)):
        bits = bits | (_field(wire + layout.outlier_planes[plane], slot, here, layout.outlier_piece * format.outlier_pieces * rest.planes[plane] // 8, rest.planes[plane]) << rest.plane_shifts[plane])
    return bits


@triton.jit
def _field(plane, slot, here, length: tl.constexpr, width: tl.constexpr):
    byte = tl.load(plane + slot % length, here, 0).to(tl.int32)
    return (byte >> (slot // length * width)) & ((1 << width) - 1)
