"""decode_sum_encode: the wires of all peers -> the wire of their sum, in another format; the middle of two-shot."""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl

from megacomp.kernels.backend import resolve_backend
from megacomp.kernels.block_format import BlockFormat
from megacomp.kernels.decode_sum import decode_sum, decode_sum_tile, dense_wires, sums_in_slices
from megacomp.kernels.encode import dense_wire, encode, encode_tile
from megacomp.kernels.launch_config import launch_config, on_device_of
from megacomp.kernels.tiles import Tile, clear_tail, locate, longest_piece, regroup_pieces

__all__ = ["decode_sum_encode"]


def decode_sum_encode(
    format: BlockFormat,
    wires: torch.Tensor,
    gather_format: BlockFormat,
    features: int,
    wire: torch.Tensor,
    backend: str,
    sums: torch.Tensor | None = None,
) -> None:
    """wire = encode(sum(decode(wire) for wire in wires)), the sum in float32.

    Args:
        format: the block format of ``wires``.
        wires: uint8 ``[peers, rows, format.row_bytes(features)]``, rows contiguous.
        gather_format: the block format of ``wire``.
        features: values per row.
        wire: uint8 ``[rows, gather_format.row_bytes(features)]``, rows contiguous, written whole.
        backend: one of ``megacomp.kernels.backend.BACKENDS``.
        sums: where sums may lie between the two steps, if there are two (on the CPU, and for hidden sizes that the
            two formats pad differently): float32
            ``[sums_rows(...), features]``, contiguous. Made here if needed and not given.
    """
    rows = wire.shape[0]
    if rows == 0:
        return
    resolved = resolve_backend(backend, "decode_sum_encode", gather_format, features, rows, wires.device)
    if resolved == "triton" and _fusable(format, gather_format, features):
        _decode_sum_encode_triton(format, wires, gather_format, features, wire)
    else:
        _in_two_steps(format, wires, gather_format, features, wire, backend, sums)


def _in_two_steps(
    format: BlockFormat,
    wires: torch.Tensor,
    gather_format: BlockFormat,
    features: int,
    wire: torch.Tensor,
    backend: str,
    sums: torch.Tensor | None,
) -> None:
    """The definition: :func:`decode_sum` into float32, then :func:`encode` of that, over slices of the rows."""

    def summed(wires: torch.Tensor, out: torch.Tensor) -> None:
        decode_sum(format, wires, out, backend)

    for part, total in sums_in_slices(summed, wires, features, sums):
        encode(gather_format, total, wire[part], backend)


def _fusable(format: BlockFormat, gather_format: BlockFormat, features: int) -> bool:
    """Whether blocks of both formats cover the same stretches of a message."""
    return format.padded_features(features) == gather_format.padded_features(features)


def _decode_sum_encode_triton(
    format: BlockFormat, wires: torch.Tensor, gather_format: BlockFormat, features: int, wire: torch.Tensor
) -> None:
    rows = wire.shape[0]
    layout, gather_layout = format.layout(features), gather_format.layout(features)
    wires = dense_wires(wires, layout)
    target = dense_wire(wire, gather_layout)
    with on_device_of(wire):
        launch = launch_config("decode_sum_encode", gather_format, gather_layout, rows, torch.float32)
        gather_tile = replace(launch.tile, piece=min(launch.tile.piece, longest_piece(format)))
        values = gather_tile.blocks * gather_format.block_size
        values_per_row = gather_tile.blocks_per_row * gather_format.block_size
        tile = Tile(values // format.block_size, values_per_row // format.block_size, gather_tile.piece)
        _decode_sum_encode_kernel[(gather_tile.programs(gather_layout, rows),)](
            wires, target, rows, wires.stride(0) // 8, len(wires),
            format, layout, tile, gather_format, gather_layout, gather_tile, **launch.options,
        )  # fmt: skip
    if target is not wire:
        wire.copy_(target)


@triton.jit
def _decode_sum_encode_kernel(
    wires, wire, rows, peer_words, peers: tl.constexpr,
    format: tl.constexpr, layout: tl.constexpr, tile: tl.constexpr,
    gather_format: tl.constexpr, gather_layout: tl.constexpr, gather_tile: tl.constexpr,
):  # fmt: skip
    row, index, exists = locate(rows, layout, tile)
    pieces = decode_sum_tile(wires, peer_words, row, index, exists, peers, format, layout, tile)
    pieces = clear_tail(pieces, index, format.block_size, layout, tile)
    pieces = regroup_pieces(pieces, format.block_size, gather_format.block_size)
    row, index, exists = locate(rows, gather_layout, gather_tile)
    encode_tile(pieces, wire, row, index, exists, gather_format, gather_layout, gather_tile)
