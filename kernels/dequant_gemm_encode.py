"""dequant_gemm_encode: activations ``[rows, in_features]`` times a :class:`GroupedWeight` -> the product's wire."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from megacomp.kernels.backend import resolve_backend
from megacomp.kernels.block_format import BlockFormat
from megacomp.kernels.dequant_gemm import (
    TILE_OUTPUTS,
    dequant_gemm,
    gemm_tile,
    launch_gemm,
    launch_of,
    multiplies_codes,
    split_sums,
)
from megacomp.kernels.encode import dense_wire, encode, encode_tile
from megacomp.kernels.grouped_weight import GroupedWeight
from megacomp.kernels.launch_config import launch_config, on_device_of
from megacomp.kernels.tiles import (
    Tile,
    cut_pieces,
    load_pieces,
    locate,
    longest_piece,
    needs_whole_rows,
    round_to,
    widen,
)

__all__ = ["dequant_gemm_encode", "encodes_products"]


def dequant_gemm_encode(
    format: BlockFormat,
    x: torch.Tensor,
    weight: GroupedWeight,
    wire: torch.Tensor,
    backend: str,
    gemm_backend: str = "auto",
) -> None:
    """wire = encode(dequant_gemm(x, weight)), the same bits: the product is rounded to the dtype of ``x`` on its way.

    Where Triton kernels do both, and :func:`encodes_products` of the format, the product is never in memory: the
    kernel that multiplies encodes its tiles or, where the inputs are split, the one that adds the splits does.

    Args:
        format: the block format.
        x: bf16, fp16 or fp32 ``[rows, in_features]``, on the device of the weight.
        weight: the weight; see :func:`dequant_gemm`.
        wire: uint8 ``[rows, format.row_bytes(out_features)]``, rows contiguous, written whole.
        backend, gemm_backend: who encodes and who multiplies, each one of ``megacomp.kernels.backend.BACKENDS``.

    Raises:
        RuntimeError: the one backend that was asked for cannot run on the device of ``x``.
    """
    rows, features = len(x), weight.out_features
    if rows == 0:
        return
    resolved = resolve_backend(backend, "encode", format, features, rows, x.device)
    if resolved == "triton" and encodes_products(format) and multiplies_codes(gemm_backend, x, weight):
        _encode_tiles(format, x, weight, wire)
    else:
        encode(format, dequant_gemm(x, weight, gemm_backend), wire, backend)


def encodes_products(format: BlockFormat) -> bool:
    """Whether a tile of the product holds whole blocks of ``format``, and those all that their scales depend on."""
    return not (format.rotation or needs_whole_rows(format)) and TILE_OUTPUTS % format.block_size == 0


def _encode_tiles(format: BlockFormat, x: torch.Tensor, weight: GroupedWeight, wire: torch.Tensor) -> None:
    rows = len(x)
    layout = format.layout(weight.out_features)
    target = dense_wire(wire, layout)
    with on_device_of(x):
        launch = launch_of(x, weight)
        if launch.splits == 1:
            tile = Tile(launch.rows * (launch.outputs // format.block_size), 0, longest_piece(format))
            launch_gemm(_dequant_gemm_encode_kernel, launch, x, weight, target, format, layout, tile)
        else:
            sums = split_sums(launch, x, weight)
            config = launch_config("encode", format, layout, rows, torch.float32)
            _sum_splits_encode_kernel[(config.tile.programs(layout, rows),)](
                sums, x, target, rows, launch.splits, format, layout, config.tile, **config.options
            )
    if target is not wire:
        wire.copy_(target)


@triton.jit
def _dequant_gemm_encode_kernel(
    wire, x, codes, scales, zeros, word_groups, input_index, rows, out_features, words, x_stride,
    bits: tl.constexpr, group_words: tl.constexpr,
    block_rows: tl.constexpr, block_outputs: tl.constexpr, block_words: tl.constexpr, splits: tl.constexpr,
    format: tl.constexpr, layout: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    total, _, output = gemm_tile(
        x, codes, scales, zeros, word_groups, input_index, rows, out_features, words, x_stride,
        bits, group_words, block_rows, block_outputs, block_words, splits,
    )  # fmt: skip
    if layout.features % block_outputs:
        # Only what pads the last block counts: zeros.
        total = tl.where((output < out_features)[None, :], total, 0.0)
    blocks_per_row: tl.constexpr = block_outputs // format.block_size
    block = tl.arange(0, tile.blocks)
    index = tl.program_id(1) * blocks_per_row + block % blocks_per_row
    place = tl.program_id(0) * block_rows + block // blocks_per_row
    exists = (place < rows) & (index < layout.blocks)
    values = tl.reshape(widen(round_to(total, x.dtype.element_ty)), (tile.blocks, format.block_size))
    pieces = cut_pieces(values, format.block_size // tile.piece)
    encode_tile(pieces, wire, place.to(tl.int64), index, exists, format, layout, tile)


@triton.jit
def _sum_splits_encode_kernel(
    sums, x, wire, rows, splits: tl.constexpr, format: tl.constexpr, layout: tl.constexpr, tile: tl.constexpr
):
    """wire = encode(the sums ``[splits, rows, features]``, added in order and rounded to the dtype of ``x``)."""
    row, index, exists = locate(rows, layout, tile)
    totals = load_pieces(sums, row, index, exists, layout.features, format.block_size, layout, tile)
    for split in tl.static_range(1, splits):
        source = sums + tl.full((), split, tl.int64) * rows * layout.features
        pieces = load_pieces(source, row, index, exists, layout.features, format.block_size, layout, tile)
        added = ()
        for piece in tl.static_range(len(pieces)):
            added = added + (totals[piece] + pieces[piece],)
        totals = added
    rounded = ()
    for piece in tl.static_range(len(totals)):
        rounded = rounded + (widen(round_to(totals[piece], x.dtype.element_ty)),)
    encode_tile(rounded, wire, row, index, exists, format, layout, tile)
