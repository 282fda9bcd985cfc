"""The static description of a block codec and of its wire: what every kernel is specialised for."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch

from megacomp.kernels.elements import FloatElement, IntElement
from megacomp.kernels.packing import plane_widths
from megacomp.kernels.scales import PowerOfTwoScale, RealScale

__all__ = ["BlockFormat", "WireFields", "WireLayout"]


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


@dataclass(frozen=True)
class WireLayout:
    """Where everything lies in a row of the wire, in bytes from its beginning.

    Attributes:
        features: values per row.
        blocks: blocks per row, those that only pad included.
        planes: offset of each plane of codes.
        row_scale: offset of the float32 row scale; -1 if there is none.
        scales: offset of the scales, or of each plane of exponents shorter than a byte.
        stored_scales: scales per row, those that fill up the last byte of packed exponents included.
        minimums: offset of the minimums; -1 if there are none.
        padding: (start, stop) of each run of bytes that belong to nothing, and are zero.
        row_bytes: bytes of a row.
    """

    features: int
    blocks: int
    planes: tuple[int, ...]
    row_scale: int
    scales: tuple[int, ...]
    stored_scales: int
    minimums: int
    padding: tuple[tuple[int, int], ...]
    row_bytes: int

    @property
    def access_bytes(self) -> int:
        """The widest access, up to 16 bytes, that is aligned at every block's codes in every row."""
        return 16 if all(offset % 16 == 0 for offset in (self.row_bytes, *self.planes)) else 8


@dataclass(frozen=True)
class WireFields:
    """Views into a wire ``[..., rows, row_bytes]``, one tensor per field, each ``[..., rows, n]``.

    Attributes:
        planes: the packed codes, uint8.
        scales: the block scales: exponent codes (uint8, packed if shorter than a byte), or the bits of
            floating-point scales (uint8 or int16).
        minimums: the bits of asymmetric blocks' minimums, like the scales.
        row_scales: float32 ``[..., rows, 1]``, for row-relative scales.
    """

    planes: tuple[torch.Tensor, ...]
    scales: tuple[torch.Tensor, ...]
    minimums: torch.Tensor | None
    row_scales: torch.Tensor | None

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> WireFields:
        """The same fields, each replaced by ``function`` of it."""
        return WireFields(
            tuple(map(function, self.planes)),
            tuple(map(function, self.scales)),
            None if self.minimums is None else function(self.minimums),
            None if self.row_scales is None else function(self.row_scales),
        )

    def tensors(self) -> list[torch.Tensor]:
        """All fields that are there."""
        optional = (self.minimums, self.row_scales)
        return [*self.planes, *self.scales, *(field for field in optional if field is not None)]


@dataclass(frozen=True)
class BlockFormat:
    """One block codec: element, block, scale.

    Attributes:
        element: how a scaled value is stored.
        block_size: values sharing one scale; a multiple of 8.
        scale: how a block's scale is stored.
        search: choose each block's scale among a few candidates by least squared error.
        asymmetric: store a minimum beside the scale and use every code above it (integers only).
        rotation: size of the Hadamard rotation in front of the blocks; 0 for none.
    """

    element: FloatElement | IntElement
    block_size: int
    scale: PowerOfTwoScale | RealScale
    search: bool = False
    asymmetric: bool = False
    rotation: int = 0

    @property
    def full_range(self) -> float:
        """The magnitude to which a block's extreme is scaled: integers reach their lowest value (signed max)."""
        return self.element.zero_code if isinstance(self.element, IntElement) else self.element.max_value

    @property
    def saturation(self) -> float:
        """Where blocks with a floating-point scale saturate.

        What a rounded-up scale decodes to must stay finite, and so must an asymmetric block's span.
        """
        return 2.0**126 if self.asymmetric else 2.0**127

    @property
    def shrink_factors(self) -> tuple[float, ...]:
        """Clipping candidates of the scale search, relative to the scale that clips nothing."""
        return (0.95, 0.9, 0.85, 0.8)

    @property
    def error_resolution(self) -> float:
        """Steps per unit in which the search counts errors: 128 to the element's coarsest step."""
        return 128 / self.element.top_step

    @property
    def largest_error(self) -> float:
        """The cap on an error of the search, in steps (2.8 of the element's).

        128 squares of it stay below 2**24, so a block's sum is exact in float32 in whatever order it is formed.
        """
        return 362.0

    def padded_features(self, features: int) -> int:
        """``features`` rounded up to whole blocks (and whole rotations)."""
        return _round_up(features, max(self.block_size, self.rotation))

    def layout(self, features: int) -> WireLayout:
        """Where the fields of a row of ``features`` values lie."""
        return _layout(self, features)

    def row_bytes(self, features: int) -> int:
        """Bytes of one row on the wire: codes, padding to 4, scales, padding to 8."""
        return self.layout(features).row_bytes

    def fields(self, wire: torch.Tensor, features: int) -> WireFields:
        """Views of the fields of ``wire`` (uint8 ``[..., row_bytes]``, last dimension contiguous)."""
        layout = self.layout(features)

        def field(offset: int, size: int) -> torch.Tensor:
            return wire[..., offset : offset + size]

        planes = tuple(
            field(offset, layout.blocks * self.block_size * width // 8)
            for offset, width in zip(layout.planes, plane_widths(self.element.bits), strict=True)
        )
        if isinstance(self.scale, PowerOfTwoScale):
            scales = tuple(
                field(offset, layout.stored_scales * width // 8)
                for offset, width in zip(layout.scales, plane_widths(self.scale.bits), strict=True)
            )
            return WireFields(planes, scales, None, None)
        itemsize, dtype = self.scale.dtype.itemsize, self.scale.bits_dtype
        scale = field(layout.scales[0], layout.blocks * itemsize).view(dtype)
        minimums = field(layout.minimums, layout.blocks * itemsize).view(dtype) if self.asymmetric else None
        row_scales = field(layout.row_scale, 4).view(torch.float32) if self.scale.row_relative else None
        return WireFields(planes, (scale,), minimums, row_scales)

    def clear_padding(self, wire: torch.Tensor, features: int) -> None:
        """Zeroes the bytes of ``wire`` that belong to no field, so that equal rows have equal wires."""
        for start, stop in self.layout(features).padding:
            wire[..., start:stop] = 0


@functools.lru_cache(maxsize=1024)
def _layout(format: BlockFormat, features: int) -> WireLayout:
    blocks = format.padded_features(features) // format.block_size
    end = 0

    def place(size: int) -> int:
        nonlocal end
        end += size
        return end - size

    planes = tuple(place(blocks * format.block_size * width // 8) for width in plane_widths(format.element.bits))
    codes_end = end
    end = _round_up(end, 4)
    scales_start = end
    scale = format.scale
    stored_scales = blocks
    row_scale = minimums = -1
    if isinstance(scale, PowerOfTwoScale):
        # Exponents shorter than a byte are packed like codes, in one group of whole bytes per plane.
        stored_scales = blocks if scale.bits == 8 else _round_up(blocks, 8)
        scales = tuple(place(stored_scales * width // 8) for width in plane_widths(scale.bits))
    else:
        if scale.row_relative:
            row_scale = place(4)
        scales = (place(blocks * scale.dtype.itemsize),)
        if format.asymmetric:
            minimums = place(blocks * scale.dtype.itemsize)
    row_bytes = _round_up(end, 8)
    gaps = ((codes_end, scales_start), (end, row_bytes))
    padding = tuple((start, stop) for start, stop in gaps if start < stop)
    return WireLayout(features, blocks, planes, row_scale, scales, stored_scales, minimums, padding, row_bytes)
