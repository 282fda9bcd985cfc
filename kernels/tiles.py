"""Tiles: which blocks a Triton program works on, and moving them between memory and registers.

A program holds the values of its blocks as a tuple of *pieces*, float32 ``[blocks, length]``: the first ``length``
values of every block, the next, and so on. Loaded piece by piece, 16 bytes at a time, a thread comes to own whole
blocks: extremes, errors and packing stay inside of threads, and no data passes through shared memory.

Programs of formats with row scales hold whole rows, up to the next power of two of blocks; those of others any
run of blocks, across rows, so that no lane idles whatever the hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from megacomp.kernels.block_format import BlockFormat, WireLayout
from megacomp.kernels.packing import pieces_per_block

__all__ = [
    "Tile",
    "clear_bytes",
    "clear_tail",
    "cut_pieces",
    "join_pieces",
    "load_bytes",
    "load_pieces",
    "locate",
    "log2",
    "longest_piece",
    "needs_whole_rows",
    "regroup_pieces",
    "round_to",
    "store_bytes",
    "store_pieces",
    "widen",
]

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
"""Whether kernels run in Triton's interpreter, whose casts to bfloat16 truncate, and from it lose subnormals."""


@dataclass(frozen=True)
class Tile:
    """What a program works on.

    Attributes:
        blocks: blocks per program, a power of two.
        blocks_per_row: 0 if a program holds any run of blocks; otherwise it holds whole rows, of so many blocks
            each: a power of two, at least ``WireLayout.blocks``.
        piece: values of a piece, a power of two.
    """

    blocks: int
    blocks_per_row: int
    piece: int

    @property
    def rows(self) -> int:
        """Rows per program; 0 if it does not hold whole rows."""
        return self.blocks // self.blocks_per_row if self.blocks_per_row else 0

    def programs(self, layout: WireLayout, rows: int) -> int:
        """How many programs cover ``rows`` rows."""
        if self.blocks_per_row:
            return triton.cdiv(rows, self.rows)
        return triton.cdiv(rows * layout.blocks, self.blocks)


def needs_whole_rows(format: BlockFormat) -> bool:
    """Whether a row can be encoded only as a whole: for its scale, or because exponents are packed across it."""
    return format.scale.row_relative or format.scale.bits < 8


def longest_piece(format: BlockFormat) -> int:
    """The longest pieces a format's codes can be packed from."""
    return format.block_size // pieces_per_block(format.element.bits)


@triton.constexpr_function
def log2(size: int) -> int:
    """Of a power of two."""
    return size.bit_length() - 1


@triton.jit
def locate(rows, layout: tl.constexpr, tile: tl.constexpr):
    """(row int64, index of the block in its row, whether it exists), each ``[blocks]``, of this program's blocks."""
    block = tl.arange(0, tile.blocks)
    if tile.blocks_per_row:
        row = tl.program_id(0) * tile.rows + block // tile.blocks_per_row
        index = block % tile.blocks_per_row
        exists = (row < rows) & (index < layout.blocks)
    else:
        block += tl.program_id(0) * tile.blocks
        row = block // layout.blocks
        index = block % layout.blocks
        exists = row < rows
    return row.to(tl.int64), index, exists


@triton.jit
def load_pieces(x, row, index, exists, stride, block_size: tl.constexpr, layout: tl.constexpr, tile: tl.constexpr):
    """The blocks of ``x`` ``[rows, features]`` as float32 pieces; zeros behind the last feature."""
    feature = index[:, None] * block_size + tl.arange(0, tile.piece)[None, :]
    source = x + row[:, None] * stride + feature
    pieces = ()
    for piece in tl.static_range(block_size // tile.piece):
        mask = exists[:, None]
        if layout.features != layout.blocks * block_size:
            mask = mask & (feature + piece * tile.piece < layout.features)
        pieces = pieces + (widen(tl.load(source + piece * tile.piece, mask, 0.0)),)
    return pieces


@triton.jit
def store_pieces(
    out, pieces, row, index, exists, stride, block_size: tl.constexpr, layout: tl.constexpr, tile: tl.constexpr
):
    """Writes float32 pieces to ``out`` ``[rows, features]``, rounded to its dtype."""
    feature = index[:, None] * block_size + tl.arange(0, tile.piece)[None, :]
    target = out + row[:, None] * stride + feature
    for piece in tl.static_range(block_size // tile.piece):
        mask = exists[:, None]
        if layout.features != layout.blocks * block_size:
            mask = mask & (feature + piece * tile.piece < layout.features)
        tl.store(target + piece * tile.piece, round_to(pieces[piece], out.dtype.element_ty), mask)


@triton.jit
def regroup_pieces(pieces, block_size: tl.constexpr, new_block_size: tl.constexpr):
    """The same values as pieces of larger or smaller blocks."""
    if new_block_size == block_size:
        return pieces
    elif new_block_size > block_size:
        front = ()
        back = ()
        for piece in tl.static_range(len(pieces)):
            x = pieces[piece]
            a, b = tl.split(tl.permute(tl.reshape(x, (x.shape[0] // 2, 2, x.shape[1])), (0, 2, 1)))
            front = front + (a,)
            back = back + (b,)
        return regroup_pieces(front + back, block_size * 2, new_block_size)
    else:
        half: tl.constexpr = len(pieces) // 2
        halved = ()
        for piece in tl.static_range(half):
            x = tl.join(pieces[piece], pieces[half + piece])
            halved = halved + (tl.reshape(tl.permute(x, (0, 2, 1)), (2 * x.shape[0], x.shape[1])),)
        return regroup_pieces(halved, block_size // 2, new_block_size)


@triton.jit
def cut_pieces(x, pieces: tl.constexpr):
    """``x`` ``[blocks, block_size]`` as the tuple of its ``pieces`` pieces."""
    if pieces == 1:
        return (x,)
    else:
        front, back = split_pieces(x)
        return cut_pieces(front, pieces // 2) + cut_pieces(back, pieces // 2)


@triton.jit
def clear_tail(pieces, index, block_size: tl.constexpr, layout: tl.constexpr, tile: tl.constexpr):
    """``pieces`` with zeros behind the last feature."""
    if layout.features == layout.blocks * block_size:
        return pieces
    else:
        feature = index[:, None] * block_size + tl.arange(0, tile.piece)[None, :]
        cleared = ()
        for piece in tl.static_range(block_size // tile.piece):
            exists = feature + piece * tile.piece < layout.features
            cleared = cleared + (tl.where(exists, pieces[piece], 0.0),)
        return cleared


@triton.jit
def widen(x):
    """``x`` in float32, exactly."""
    if INTERPRETED and x.dtype == tl.bfloat16:
        return (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """``x`` float32, rounded to ``dtype``: to nearest, ties to even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        rounded = (bits + ((bits >> 16) & 1) + 0x7FFF) >> 16
        rounded = tl.where(x == x, rounded, 0x7FC0)
        return rounded.to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dtype)


@triton.jit
def join_pieces(a, b):
    """``[blocks, n]`` twice -> ``[blocks, 2 n]``, ``a`` in front."""
    return tl.reshape(tl.permute(tl.join(a, b), (0, 2, 1)), (a.shape[0], 2 * a.shape[1]))


@triton.jit
def split_pieces(x):
    """Undoes :func:`join_pieces`."""
    return tl.split(tl.permute(tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def store_bytes(target, pieces, surplus: tl.constexpr, finite, fill: tl.constexpr, exists, access: tl.constexpr):
    """Writes a plane's bytes, as 32-bit words, up to ``access`` bytes at once.

    Args:
        target: pointer to uint8 ``[blocks]``: where each block's bytes begin.
        pieces: the tuple of their pieces, int32 ``[blocks, length]``, in order.
        surplus: what each byte is too large by, modulo 2**32.
        finite: ``[blocks]``; blocks that are not are filled with the byte ``fill``.
    """
    blocks: tl.constexpr = pieces[0].shape[0]
    length: tl.constexpr = pieces[0].shape[1]
    if length < 4:
        for piece in tl.static_range(len(pieces)):
            byte = tl.where(finite[:, None], pieces[piece] - surplus % 256, fill).to(tl.uint8)
            offset = piece * length + tl.arange(0, length)
            tl.store(target[:, None] + offset[None, :], byte, exists[:, None])
    else:
        words = ()
        places = tl.arange(0, 4) * 8
        for piece in tl.static_range(len(pieces)):
            fours = tl.reshape(pieces[piece].to(tl.uint32, bitcast=True), (blocks, length // 4, 4))
            word = tl.sum(fours << places[None, None, :], 2) - (surplus * 0x01010101) % 2**32
            words = words + (tl.where(finite[:, None], word, fill * 0x01010101),)
        count: tl.constexpr = min(len(pieces), max(1, access // length))
        for unit in tl.static_range(len(pieces) // count):
            if count == 4:
                front = join_pieces(words[unit * 4], words[unit * 4 + 1])
                joined = join_pieces(front, join_pieces(words[unit * 4 + 2], words[unit * 4 + 3]))
            elif count == 2:
                joined = join_pieces(words[unit * 2], words[unit * 2 + 1])
            else:
                joined = words[unit]
            offset = unit * count * length // 4 + tl.arange(0, count * length // 4)
            pointers = target.to(tl.pointer_type(tl.uint32))[:, None] + offset[None, :]
            tl.store(pointers, joined, exists[:, None])


@triton.jit
def load_bytes(source, count: tl.constexpr, length: tl.constexpr, exists, access: tl.constexpr):
    """Reads a plane's bytes, up to ``access`` at once: the tuple of ``count`` uint8 pieces ``[blocks, length]``."""
    unit: tl.constexpr = 1 if length < 4 else min(count, max(1, access // length))
    pieces = ()
    for first in tl.static_range(0, count, unit):
        offset = first * length + tl.arange(0, unit * length)
        loaded = tl.load(source[:, None] + offset[None, :], exists[:, None], 0)
        if unit == 4:
            front, back = split_pieces(loaded)
            pieces = pieces + split_pieces(front) + split_pieces(back)
        elif unit == 2:
            pieces = pieces + split_pieces(loaded)
        else:
            pieces = pieces + (loaded,)
    return pieces


@triton.jit
def clear_bytes(wire, start: tl.constexpr, stop: tl.constexpr, mask):
    """Zeroes the bytes ``start`` to ``stop`` of every row."""
    for byte in tl.static_range(start, stop):
        tl.store(wire + byte, 0, mask)
