"""decode_sum: the wires of all peers -> the sum of their partials ``[rows, features]``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
import triton
import triton.language as tl

from megacomp.kernels.backend import resolve_backend
from megacomp.kernels.block_format import BlockFormat, WireFields, WireLayout
from megacomp.kernels.compiled import run_compiled
from megacomp.kernels.elements import dequantize_codes
from megacomp.kernels.launch_config import launch_config, on_device_of
from megacomp.kernels.packing import load_code, pieces_per_block, unpack, unpack_codes
from megacomp.kernels.rotation import hadamard, rotate_pieces
from megacomp.kernels.scales import PowerOfTwoScale, RealScale, exponent_value, scale_value
from megacomp.kernels.tiles import load_bytes, locate, store_pieces

__all__ = ["decode_sum", "decode_sum_definition", "decode_sum_tile", "dense_wires", "sums_in_slices", "sums_rows"]

VALUES_PER_SLICE = 2**20
"""Values summed on the CPU before something goes on with them: their float32 sums stay in the cache."""


def decode_sum(format: BlockFormat, wires: torch.Tensor, out: torch.Tensor, backend: str) -> None:
    """out = sum(decode(wire) for wire in wires).

    Args:
        format: the block format.
        wires: uint8 ``[peers, rows, format.row_bytes(features)]``, rows contiguous.
        out: bf16, fp16 or fp32 ``[rows, features]``, any strides, written whole.
        backend: one of ``megacomp.kernels.backend.BACKENDS``.
    """
    rows, features = out.shape
    if rows == 0:
        return
    resolved = resolve_backend(backend, "decode_sum", format, features, rows, out.device)
    if resolved == "triton":
        _decode_sum_triton(format, wires, out)
        return
    peers = [_readable(format, format.fields(wire, features)) for wire in wires]
    padded = format.padded_features(features)
    direct = padded == features and out.is_contiguous()
    target = out if direct else out.new_empty(rows, padded)
    # A rotation needs whole rows; otherwise every piece of the blocks is written by itself.
    count = 1 if format.rotation else pieces_per_block(format.element.bits)
    pieces = [*target.view(rows, -1, count, format.block_size // count).unbind(2)]
    if resolved == "compiled":
        run_compiled(decode_sum_definition, format, features, peers, pieces)
    else:
        decode_sum_definition(format, peers, pieces)
    if not direct:
        out.copy_(target[:, :features])


def sums_rows(rows: int, features: int, device: torch.device) -> int:
    """How many rows of float32 sums :func:`sums_in_slices` keeps for a message of ``[rows, features]``."""
    return rows if device.type != "cpu" else min(rows, max(3, VALUES_PER_SLICE // features))


def sums_in_slices(
    decode_sum: Callable[[torch.Tensor, torch.Tensor], None],
    wires: torch.Tensor,
    features: int,
    sums: torch.Tensor | None,
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Sums in float32 for what goes on with them, in slices of the rows.

    Args:
        decode_sum: (wires, out): any codec's.
        wires: uint8 ``[peers, rows, row_bytes]``.
        features: values per row.
        sums: where sums may lie: float32 ``[sums_rows(...), features]``, contiguous; None: made here.

    Yields:
        (the rows, their sums float32 ``[rows, features]``), the sums valid until the next.
    """
    rows = wires.shape[1]
    if rows == 0:
        return
    if sums is None:
        sums = wires.new_empty(sums_rows(rows, features, wires.device), features, dtype=torch.float32)
    # Even slices: none is a single row, which no backend compiles, unless that is the message.
    slices = -(-rows // len(sums))
    for index in range(slices):
        part = slice(rows * index // slices, rows * (index + 1) // slices)
        total = sums[: part.stop - part.start]
        decode_sum(wires[:, part], total)
        yield part, total


def decode_sum_definition(format: BlockFormat, peers: Sequence[WireFields], pieces: Sequence[torch.Tensor]) -> None:
    """The definition of decode_sum, in PyTorch; what every backend equals bit for bit.

    1. Per peer: unpack the codes, turn them into values, multiply by the scale (and add the minimum).
    2. Add the peers in order, in float32. 3. Rotate back, if the format rotates. 4. Round once, to the dtype of the
    output.

    Args:
        format: the block format.
        peers: the fields of each peer's wire, in rank order.
        pieces: bf16, fp16 or fp32 ``[rows, blocks, block_size / pieces]``, written: the contiguous pieces of every
            block, or the whole blocks where the format rotates.
    """
    rows, blocks = pieces[0].shape[:2]
    totals: list[torch.Tensor] = []
    for fields in peers:
        values = _decode(format, fields, rows, blocks)
        totals = [total + value for total, value in zip(totals, values, strict=True)] if totals else values
    if format.rotation:
        rotated = torch.cat(totals, dim=-1).view(rows, -1)
        totals = [hadamard(rotated, format.rotation).view(rows, blocks, -1)]
    for piece, total in zip(pieces, totals, strict=True):
        piece.copy_(total)


def _readable(format: BlockFormat, fields: WireFields) -> WireFields:
    """Two-byte scales as the floats they are: a compiler does not vectorize around int16."""
    scale = format.scale
    if isinstance(scale, PowerOfTwoScale) or scale.bits == 8:
        return fields
    minimums = None if fields.minimums is None else fields.minimums.view(scale.dtype)
    return replace(fields, scales=(fields.scales[0].view(scale.dtype),), minimums=minimums)


def _decode(format: BlockFormat, fields: WireFields, rows: int, blocks: int) -> list[torch.Tensor]:
    """The values of one wire, float32, in pieces ``[rows, blocks, block_size / pieces]``."""
    codes = unpack([plane.view(rows, blocks, -1) for plane in fields.planes], format.element.bits)
    if isinstance(format.scale, PowerOfTwoScale):
        exponents = unpack(fields.scales, format.scale.bits)
        exponent = exponents[0] if len(exponents) == 1 else torch.cat(exponents, dim=-1)[..., :blocks]
        scales = format.scale.value(exponent.to(torch.int32))
    else:
        scales = format.scale.value(fields.scales[0])
        if fields.row_scales is not None:
            scales = scales * fields.row_scales
    scales = scales.unsqueeze(-1)
    if fields.minimums is None:
        return [format.element.dequantize(piece) * scales for piece in codes]
    assert isinstance(format.scale, RealScale)
    minimums = format.scale.value(fields.minimums).unsqueeze(-1)
    return [piece * scales + minimums for piece in codes]


def _decode_sum_triton(format: BlockFormat, wires: torch.Tensor, out: torch.Tensor) -> None:
    rows, features = out.shape
    target = out if out.stride(1) == 1 else torch.empty_like(out, memory_format=torch.contiguous_format)
    layout = format.layout(features)
    wires = dense_wires(wires, layout)
    with on_device_of(out):
        launch = launch_config("decode_sum", format, layout, rows, out.dtype)
        _decode_sum_kernel[(launch.tile.programs(layout, rows),)](
            wires, target, rows, wires.stride(0) // 8, target.stride(0), len(wires),
            format, layout, launch.tile, **launch.options,
        )  # fmt: skip
    if target is not out:
        out.copy_(target)


def dense_wires(wires: torch.Tensor, layout: WireLayout) -> torch.Tensor:
    """``wires``, or a copy where rows lie further apart than they are long (no collective has such)."""
    return wires if wires.shape[1] == 1 or wires.stride(1) == layout.row_bytes else wires.contiguous()


@triton.jit
def _decode_sum_kernel(
    wires, out, rows, peer_words, out_stride,
    peers: tl.constexpr, format: tl.constexpr, layout: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    row, index, exists = locate(rows, layout, tile)
    pieces = decode_sum_tile(wires, peer_words, row, index, exists, peers, format, layout, tile)
    store_pieces(out, pieces, row, index, exists, out_stride, format.block_size, layout, tile)


@triton.jit
def decode_sum_tile(
    wires, peer_words, row, index, exists,
    peers: tl.constexpr, format: tl.constexpr, layout: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    """Twin of ``decode_sum_definition``, for one tile (see tiles.py): float32 pieces, not rounded yet.

    Args:
        wires: uint8 ``[peers, rows, row_bytes]``, rows contiguous, wires ``peer_words`` times 8 bytes apart.
        row, index, exists: the blocks, from ``locate``.
    """
    wires = tl.multiple_of(wires, 8)
    totals = ()
    for peer in tl.static_range(peers):
        # A 64-bit product: the wires of a message may exceed 2 GiB.
        wire = wires + tl.full((), peer, tl.int64) * peer_words * 8 + row * layout.row_bytes
        totals = _add_decoded(totals, wire, index, exists, format, layout, tile)
    if format.rotation:
        totals = rotate_pieces(totals, format.rotation)
    return totals


@triton.jit
def _add_decoded(totals, wire, index, exists, format: tl.constexpr, layout: tl.constexpr, tile: tl.constexpr):
    """Twin of ``_decode``, added to ``totals`` (none before the first peer)."""
    element: tl.constexpr = format.element
    stored: tl.constexpr = format.scale
    count: tl.constexpr = format.block_size // tile.piece
    planes = ()
    for plane in tl.static_range(len(element.planes)):
        source = wire + layout.planes[plane] + index * (format.block_size * element.planes[plane] // 8)
        planes = planes + (
            load_bytes(source, count * element.planes[plane] // 8, tile.piece, exists, layout.access_bytes),
        )
    if format.scale.power_of_two:
        scale_planes: tl.constexpr = layout.scales
        code = load_code(wire, scale_planes, index, exists, layout.stored_scales, stored)
        scale = exponent_value(code, stored)
    else:
        scale = scale_value(_load_scales(wire + layout.scales[0], index, exists, stored), stored)
        if format.scale.row_relative:
            scale = scale * tl.load((wire + layout.row_scale).to(tl.pointer_type(tl.float32)), exists, 0.0)
    minimum = scale
    if format.asymmetric:
        minimum = scale_value(_load_scales(wire + layout.minimums, index, exists, stored), stored)
    sums = ()
    for piece in tl.static_range(count):
        codes = unpack_codes(planes, piece, count, element)
        if format.asymmetric:
            # The bits of 2**23 + code: no conversion instruction.
            steps = (codes | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0
            value = steps * scale[:, None] + minimum[:, None]
            sums = sums + (value if len(totals) == 0 else totals[piece] + value,)
        elif len(totals) == 0:
            sums = sums + (dequantize_codes(codes, element) * scale[:, None],)
        elif format.scale.row_relative:
            sums = sums + (totals[piece] + dequantize_codes(codes, element) * scale[:, None],)
        else:
            # A few bits times a scale of a few bits is exact: fused with the addition it rounds no differently.
            sums = sums + (tl.fma(dequantize_codes(codes, element), scale[:, None], totals[piece]),)
    return sums


@triton.jit
def _load_scales(source, index, exists, scale: tl.constexpr):
    """int32 bits of floating-point scales."""
    if scale.bits == 16:
        source = source.to(tl.pointer_type(tl.int16))
    return tl.load(source + index, exists, 0).to(tl.int32)
