"""Packing: codes of any width into bytes, as planes of 8, 4, 2 or 1 bits.

A width that is no power of two is split, high bits first in value, into such planes (5 = 4 + 1, 7 = 4 + 2 + 1).
Inside a block a plane's byte ``j`` of ``n`` holds the codes ``j, j + n, j + 2n, ...``, the first in the lowest
bits: a vector register then packs its halves with one shift, where interleaved neighbours would need shuffles.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import triton
import triton.language as tl

__all__ = ["Packed", "load_code", "pack", "pack_codes", "pieces_per_block", "plane_widths", "unpack", "unpack_codes"]


def plane_widths(bits: int) -> tuple[int, ...]:
    """Widths of the planes of a ``bits``-wide code, lowest bits first: 6 -> (4, 2)."""
    return tuple(width for width in (8, 4, 2, 1) if bits & width)


class _HasBits(Protocol):
    @property
    def bits(self) -> int: ...


class Packed:
    """What is packed into planes: a format of ``bits`` bits."""

    @property
    def planes(self: _HasBits) -> tuple[int, ...]:
        """Widths of the planes of its codes."""
        return plane_widths(self.bits)

    @property
    def plane_shifts(self: _HasBits) -> tuple[int, ...]:
        """The lowest bit of each plane: 6 bits -> (0, 4)."""
        widths = plane_widths(self.bits)
        return tuple(sum(widths[:plane]) for plane in range(len(widths)))


def pieces_per_block(bits: int) -> int:
    """In how many equal contiguous pieces a block of codes is packed and unpacked: 1, 2, 4 or 8.

    Pieces stay separate tensors on both sides: a compiler then never has to materialize a whole block.
    """
    return 8 // plane_widths(bits)[-1]


def pack(pieces: Sequence[torch.Tensor], bits: int) -> list[torch.Tensor]:
    """Packs codes into planes.

    Args:
        pieces: the ``pieces_per_block(bits)`` contiguous pieces of the codes, in order: float32
            ``[..., block / pieces]`` holding integers in ``[0, 2**bits)``.
        bits: width of a code.

    Returns:
        For each plane a uint8 tensor ``[..., block * width / 8]``.
    """
    planes = []
    widths = plane_widths(bits)
    for width in widths:
        if width == widths[-1]:
            fields = list(pieces)
        else:
            upper = [torch.floor(piece * 2.0**-width) for piece in pieces]
            fields = [piece - high * 2.0**width for piece, high in zip(pieces, upper, strict=True)]
            pieces = upper
        parts = len(fields) * width // 8
        packed = []
        for part in range(parts):
            byte = fields[part]
            for slot in range(1, 8 // width):
                byte = byte + fields[slot * parts + part] * 2.0 ** (slot * width)
            packed.append(byte.to(torch.uint8))
        planes.append(packed[0] if parts == 1 else torch.cat(packed, dim=-1))
    return planes


def unpack(planes: Sequence[torch.Tensor], bits: int) -> list[torch.Tensor]:
    """Reverses :func:`pack`.

    Args:
        planes: the uint8 planes ``[..., block * width / 8]``.
        bits: width of a code.

    Returns:
        The codes in ``pieces_per_block(bits)`` float32 tensors ``[..., block / pieces]``, in order. They are not
        concatenated: a compiled decoder writes each piece to its own slice of the output.
    """
    pieces = pieces_per_block(bits)
    codes: list[torch.Tensor] = []
    for piece in range(pieces):
        code: torch.Tensor | None = None
        shift = 0
        for plane, width in zip(planes, plane_widths(bits), strict=True):
            per_byte = 8 // width
            length = plane.shape[-1] * per_byte // pieces
            slot, part = divmod(piece, pieces // per_byte)
            field = plane[..., part * length : (part + 1) * length]
            if width < 8:
                field = field.to(torch.int32)
                if slot:
                    field = field >> (slot * width)
                if slot < per_byte - 1:
                    field = field & (2**width - 1)
            code = field if code is None else code | (field << shift)
            shift += width
        assert code is not None
        codes.append(code.to(torch.float32))
    return codes


@triton.jit
def pack_codes(pieces, surplus: tl.constexpr, shift: tl.constexpr, width: tl.constexpr, whole: tl.constexpr):
    """Twin of ``pack`` for one plane: the bytes of bits ``shift`` to ``shift + width`` of the codes.

    Args:
        pieces: the tuple of equal contiguous pieces of every block's codes, int32 ``[blocks, length]``, as many as
            divides by ``8 / width``.
        surplus: what was added to every code; shifted, it may leave the 32 bits: all is modulo 2**32.
        whole: the plane holds the whole code.

    Returns:
        The tuple of the pieces of the plane's bytes, int32 ``[blocks, length]``. With ``whole``, the shifted surpluses
        of all codes in a byte are still in it.
    """
    parts: tl.constexpr = len(pieces) * width // 8
    packed = ()
    for part in tl.static_range(parts):
        byte = _field(pieces[part], surplus, shift, width, whole)
        for slot in tl.static_range(1, 8 // width):
            byte += _field(pieces[slot * parts + part], surplus, shift, width, whole) << (slot * width)
        packed = packed + (byte,)
    return packed


@triton.jit
def _field(code, surplus: tl.constexpr, shift: tl.constexpr, width: tl.constexpr, whole: tl.constexpr):
    if whole:
        return code
    else:
        return ((code - surplus) >> shift) & (2**width - 1)


@triton.jit
def unpack_codes(planes, piece: tl.constexpr, pieces: tl.constexpr, element: tl.constexpr):
    """Twin of ``unpack`` for one piece of ``pieces``: its codes, int32 ``[blocks, length]``.

    Args:
        planes: for each plane the tuple of the pieces of its bytes, uint8 ``[blocks, length]``.
        element: whose codes they are.
    """
    code = tl.zeros(planes[0][0].shape, tl.int32)
    for plane in tl.static_range(len(element.planes)):
        field = _unpack_field(planes[plane], piece, pieces, element.planes[plane])
        code = code | (field << element.plane_shifts[plane])
    return code


@triton.jit
def _unpack_field(plane, piece: tl.constexpr, pieces: tl.constexpr, width: tl.constexpr):
    parts: tl.constexpr = pieces * width // 8
    slot: tl.constexpr = piece // parts
    field = plane[piece % parts].to(tl.int32) >> (slot * width)
    if slot < 8 // width - 1:
        field = field & (2**width - 1)
    return field


@triton.jit
def load_code(wire, planes: tl.constexpr, index, exists, count: tl.constexpr, packed: tl.constexpr):
    """Single codes of ``count`` that were packed together, int32.

    Args:
        wire: pointer to uint8.
        planes: offset of each plane.
        index: which codes.
        packed: whose codes they are.
    """
    code = tl.zeros(index.shape, tl.int32)
    for plane in tl.static_range(len(packed.planes)):
        field = _load_field(wire + planes[plane], index, exists, count, packed.planes[plane])
        code = code | (field << packed.plane_shifts[plane])
    return code


@triton.jit
def _load_field(plane, index, exists, count: tl.constexpr, width: tl.constexpr):
    length: tl.constexpr = count * width // 8
    byte = tl.load(plane + index % length, exists, 0).to(tl.int32)
    return (byte >> (index // length * width)) & (2**width - 1)
