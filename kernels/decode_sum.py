"""decode_sum: the wires of all peers -> the sum of their partials ``[rows, features]``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from megacomp.kernels.backend import resolve_backend
from megacomp.kernels.block_format import BlockFormat, WireFields
from megacomp.kernels.compiled import run_compiled
from megacomp.kernels.packing import pieces_per_block, unpack
from megacomp.kernels.rotation import hadamard
from megacomp.kernels.scales import PowerOfTwoScale, RealScale

__all__ = ["decode_sum", "decode_sum_definition"]


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
    peers = [_readable(format, format.fields(wire, features)) for wire in wires]
    padded = format.padded_features(features)
    direct = padded == features and out.is_contiguous()
    target = out if direct else out.new_empty(rows, padded)
    # A rotation needs whole rows; otherwise every piece of the blocks is written by itself.
    count = 1 if format.rotation else pieces_per_block(format.element.bits)
    pieces = [*target.view(rows, -1, count, format.block_size // count).unbind(2)]
    if resolve_backend(backend, out.device, rows) == "compiled":
        run_compiled(decode_sum_definition, format, features, peers, pieces)
    else:
        decode_sum_definition(format, peers, pieces)
    if not direct:
        out.copy_(target[:, :features])


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
