"""The static description of a block codec and of its wire: what every kernel is specialised for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from megacomp.kernels.elements import FloatElement, IntElement
from megacomp.kernels.packing import plane_widths
from megacomp.kernels.scales import PowerOfTwoScale, RealScale

__all__ = ["BlockFormat", "WireFields"]


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


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

    def padded_features(self, features: int) -> int:
        """``features`` rounded up to whole blocks (and whole rotations)."""
        return _round_up(features, max(self.block_size, self.rotation))

    def _field_bytes(self, features: int) -> list[int]:
        """Bytes of each field of a row, in wire order, without the padding between and behind them."""
        padded = self.padded_features(features)
        blocks = padded // self.block_size
        sizes = [padded * width // 8 for width in plane_widths(self.element.bits)]
        if isinstance(self.scale, PowerOfTwoScale):
            # Exponents shorter than a byte are packed like codes, in one group of whole bytes per plane.
            exponents = blocks if self.scale.bits == 8 else _round_up(blocks, 8)
            return sizes + [exponents * width // 8 for width in plane_widths(self.scale.bits)]
        if self.scale.row_relative:
            sizes.append(4)
        sizes.append(blocks * self.scale.dtype.itemsize)
        if self.asymmetric:
            sizes.append(blocks * self.scale.dtype.itemsize)
        return sizes

    def row_bytes(self, features: int) -> int:
        """Bytes of one row on the wire: codes, padding to 4, scales, padding to 8."""
        sizes = self._field_bytes(features)
        planes = len(plane_widths(self.element.bits))
        return _round_up(_round_up(sum(sizes[:planes]), 4) + sum(sizes[planes:]), 8)

    def fields(self, wire: torch.Tensor, features: int) -> WireFields:
        """Views of the fields of ``wire`` (uint8 ``[..., row_bytes]``, last dimension contiguous)."""
        planes = len(plane_widths(self.element.bits))
        views = []
        offset = 0
        for index, size in enumerate(self._field_bytes(features)):
            if index == planes:
                offset = _round_up(offset, 4)
            views.append(wire[..., offset : offset + size])
            offset += size
        scales = views[planes:]
        if isinstance(self.scale, PowerOfTwoScale):
            return WireFields(tuple(views[:planes]), tuple(scales), None, None)
        row_scales = scales.pop(0).view(torch.float32) if self.scale.row_relative else None
        typed = [scale.view(self.scale.bits_dtype) for scale in scales]
        return WireFields(tuple(views[:planes]), (typed[0],), typed[1] if self.asymmetric else None, row_scales)

    def clear_padding(self, wire: torch.Tensor, features: int) -> None:
        """Zeroes the bytes of ``wire`` that belong to no field, so that equal rows have equal wires."""
        sizes = self._field_bytes(features)
        planes = sum(sizes[: len(plane_widths(self.element.bits))])
        end = _round_up(planes, 4) + sum(sizes) - planes
        for start, stop in ((planes, _round_up(planes, 4)), (end, wire.shape[-1])):
            if stop > start:
                wire[..., start:stop] = 0
