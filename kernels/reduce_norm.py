"""reduce_norm: the wires of all peers and the residual -> the new residual and its RMSNorm.

What follows a row-parallel layer of a pre-norm transformer, in one pass over memory: the sum over ranks is never
written, and the new residual not read again.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from megacomp.kernels.backend import resolve_backend
from megacomp.kernels.block_format import BlockFormat
from megacomp.kernels.compiled import run_compiled
from megacomp.kernels.decode_sum import decode_sum, decode_sum_tile, dense_wires, sums_in_slices
from megacomp.kernels.launch_config import launch_config, on_device_of
from megacomp.kernels.tiles import load_pieces, locate, log2, round_to, store_pieces, widen

__all__ = ["add_definition", "add_norm", "norm_definition", "reduce_norm"]


def reduce_norm(
    format: BlockFormat,
    wires: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    new_residual: torch.Tensor,
    normalized: torch.Tensor,
    backend: str,
    bias: torch.Tensor | None = None,
    sums: torch.Tensor | None = None,
) -> None:
    """new_residual = sum(decode(wire) for wire in wires) + bias + residual; normalized = RMSNorm(new_residual).

    The definition, which every backend equals bit for bit: :func:`decode_sum` into float32, then
    :func:`add_definition`, then :func:`norm_definition`.

    Args:
        format: the block format of ``wires``.
        wires: uint8 ``[peers, rows, format.row_bytes(features)]``, rows contiguous.
        residual: bf16, fp16 or fp32 ``[rows, features]``, any strides.
        weight: the norm's weight, bf16, fp16 or fp32 ``[features]``.
        eps: what the norm adds to the mean square.
        new_residual: ``[rows, features]`` of the residual's dtype, contiguous, written whole; not the residual.
        normalized: bf16, fp16 or fp32 ``[rows, features]``, contiguous, written whole.
        backend: one of ``megacomp.kernels.backend.BACKENDS``.
        bias: the row-parallel layer's bias, if any, bf16, fp16 or fp32 ``[features]``.
        sums: where float32 sums may lie between the steps, if there are several; as for ``decode_sum_encode``.
    """
    rows, features = residual.shape
    if rows == 0:
        return
    resolved = resolve_backend(backend, "reduce_norm", format, features, rows, residual.device)
    if resolved == "triton":
        _reduce_norm_triton(format, wires, residual, weight, eps, new_residual, normalized, bias)
        return

    def summed(wires: torch.Tensor, out: torch.Tensor) -> None:
        decode_sum(format, wires, out, backend)

    for part, total in sums_in_slices(summed, wires, features, sums):
        _add_norm(total, residual[part], weight, eps, new_residual[part], normalized[part], resolved, bias)


def add_norm(
    total: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    new_residual: torch.Tensor,
    normalized: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> None:
    """:func:`reduce_norm` of a float32 ``total [rows, features]`` that is there already; by its definition."""
    _add_norm(total, residual, weight, eps, new_residual, normalized, "reference", bias)


def _add_norm(
    total: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    new_residual: torch.Tensor,
    normalized: torch.Tensor,
    backend: str,
    bias: torch.Tensor | None,
) -> None:
    weights, *biases = (each.expand(total.shape) for each in (weight, bias) if each is not None)
    _run(backend, add_definition, None, total, biases, residual, new_residual)
    _run(backend, norm_definition, eps, new_residual, weights, normalized)


def _run(backend: str, definition: Callable[..., object], static: Hashable, *arguments: Any) -> None:
    if backend == "compiled":
        run_compiled(definition, static, arguments[0].shape[1], *arguments)
    else:
        definition(static, *arguments)


def add_definition(
    _: None,
    total: torch.Tensor,
    biases: Sequence[torch.Tensor],
    residual: torch.Tensor,
    new_residual: torch.Tensor,
) -> None:
    """The definition of the step after decode_sum, in PyTorch: add bias (if any) and residual to the total, in this
    order, in float32; round once.

    Args:
        total: float32 ``[rows, features]``, like all the others.
        biases: one or none.
        residual: bf16, fp16 or fp32.
        new_residual: written.
    """
    for bias in biases:
        total = total + bias.to(torch.float32)
    new_residual.copy_(total + residual.to(torch.float32))


def norm_definition(
    eps: float, values: torch.Tensor, weight: torch.Tensor, normalized: torch.Tensor
) -> list[torch.Tensor]:
    """The definition of the last step, in PyTorch.

    A function of its own, for a compiler would spare itself the rounding in between: the norm is that of the
    residual handed on, not of what it was before rounding. Whoever normalizes it again finds the same.

    1. Square and add the squares in float32: neighbours in pairs, then the pairs' neighbours, and so on.
    2. Multiply by ``1 / features``, add ``eps``, take the root and its reciprocal, each rounded to float32.
    3. Multiply the values by that and by the weight, in float32; round once.

    Args:
        eps: what is added to the mean square.
        values: bf16, fp16 or fp32 ``[rows, features]``, like all the others.
        weight: bf16, fp16 or fp32.
        normalized: written.

    Returns:
        The intermediates per row; as outputs of a compiled graph they are computed once per row.
    """
    values = values.to(torch.float32)
    squares = values * values
    while squares.shape[1] > 1:
        if squares.shape[1] % 2:
            squares = torch.nn.functional.pad(squares, (0, 1))
        squares = squares[:, 0::2] + squares[:, 1::2]
    # PyTorch's float32 root on the CPU is off by one in the last place now and then.
    root = torch.sqrt((squares * (1 / values.shape[1]) + eps).to(torch.float64)).to(torch.float32)
    inverse = 1.0 / root
    normalized.copy_(values * inverse * weight.to(torch.float32))
    return [squares, inverse]


def _reduce_norm_triton(
    format: BlockFormat,
    wires: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    new_residual: torch.Tensor,
    normalized: torch.Tensor,
    bias: torch.Tensor | None,
) -> None:
    rows, features = residual.shape
    layout = format.layout(features)
    wires = dense_wires(wires, layout)
    if residual.stride(1) != 1:
        residual = residual.contiguous()
    with on_device_of(residual):
        launch = launch_config("reduce_norm", format, layout, rows, residual.dtype)
        _reduce_norm_kernel[(launch.tile.programs(layout, rows),)](
            wires, residual, weight.contiguous(), None if bias is None else bias.contiguous(), new_residual,
            normalized, rows, wires.stride(0) // 8, residual.stride(0), float(eps), len(wires),
            format, layout, launch.tile, **launch.options,
        )  # fmt: skip


@triton.jit
def _reduce_norm_kernel(
    wires, residual, weight, bias, new_residual, normalized,
    rows, peer_words, residual_stride, eps,
    peers: tl.constexpr, format: tl.constexpr, layout: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    row, index, exists = locate(rows, layout, tile)
    size: tl.constexpr = format.block_size
    totals = decode_sum_tile(wires, peer_words, row, index, exists, peers, format, layout, tile)
    if bias is not None:
        totals = _added(totals, load_pieces(bias, row, index, exists, 0, size, layout, tile))
    totals = _added(totals, load_pieces(residual, row, index, exists, residual_stride, size, layout, tile))
    values = _rounded(totals, new_residual.dtype.element_ty)
    store_pieces(new_residual, values, row, index, exists, layout.features, size, layout, tile)
    squares = _sum_of_squares(values, index, exists, size, layout, tile)
    root = tl.sqrt_rn(squares * (1 / layout.features) + eps)
    values = _scaled(values, tl.reshape(tl.div_rn(1.0, root), (tile.blocks, 1)))
    weights = load_pieces(weight, row, index, exists, 0, size, layout, tile)
    store_pieces(normalized, _multiplied(values, weights), row, index, exists, layout.features, size, layout, tile)


@triton.jit
def _added(pieces, others):
    added = ()
    for piece in tl.static_range(len(pieces)):
        added = added + (pieces[piece] + others[piece],)
    return added


@triton.jit
def _multiplied(pieces, others):
    products = ()
    for piece in tl.static_range(len(pieces)):
        products = products + (pieces[piece] * others[piece],)
    return products


@triton.jit
def _scaled(pieces, factor):
    products = ()
    for piece in tl.static_range(len(pieces)):
        products = products + (pieces[piece] * factor,)
    return products


@triton.jit
def _rounded(pieces, dtype: tl.constexpr):
    rounded = ()
    for piece in tl.static_range(len(pieces)):
        rounded = rounded + (widen(round_to(pieces[piece], dtype)),)
    return rounded


@triton.jit
def _sum_of_squares(pieces, index, exists, block_size: tl.constexpr, layout: tl.constexpr, tile: tl.constexpr):
    """The sum of each row's squares, neighbours in pairs, at every block of the row: float32 ``[blocks]``."""
    # What lies behind the last feature is decoded, too, and need not be zero.
    feature = index[:, None] * block_size + tl.arange(0, tile.piece)[None, :]
    sums = ()
    for piece in tl.static_range(len(pieces)):
        mask = exists[:, None] & (feature + piece * tile.piece < layout.features)
        sums = sums + (_sum_in_pairs(tl.where(mask, pieces[piece] * pieces[piece], 0.0), tile.blocks),)
    for _ in tl.static_range(log2(len(pieces))):
        sums = _pairs_added(sums)
    of_rows = _sum_in_pairs(sums[0], tile.rows)
    of_rows = tl.broadcast_to(tl.reshape(of_rows, (tile.rows, 1)), (tile.rows, tile.blocks_per_row))
    return tl.reshape(of_rows, (tile.blocks,))


@triton.jit
def _sum_in_pairs(x, rows: tl.constexpr):
    """Sums of the rows of ``x``, taken as ``[rows, n]``: an addition of two does not depend on their order."""
    for _ in tl.static_range(log2(x.numel // rows)):
        x = tl.sum(tl.reshape(x, (x.numel // 2, 2)), 1)
    return tl.reshape(x, (rows,))


@triton.jit
def _pairs_added(sums):
    added = ()
    for pair in tl.static_range(len(sums) // 2):
        added = added + (sums[2 * pair] + sums[2 * pair + 1],)
    return added
