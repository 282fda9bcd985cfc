"""The static description of a calibrated codec's wire, and the tables that go with it.

Values are quantized with scales known beforehand, per feature and rank, so none travel; a few outlier features keep
BF16 (arXiv 2411.07942). Beyond the paper, a row may carry one scale of its own: tokens differ in magnitude far more
than any table can know.

Every feature has a code of ``bits`` bits at its own place, and the lowest bits of an outlier feature's BF16 lie in
the place of its code; only its other bits follow behind. So nothing is gathered or scattered but the rest of a few
outliers, and a row takes exactly the paper's ``bits * (features - outliers) + 16 * outliers`` bits.
"""

from __future__ import annotations

import copy
import functools
import hashlib
from dataclasses import dataclass, field, fields

import torch

from megacomp.kernels.elements import IntElement
from megacomp.kernels.packing import Packed, pieces_per_block, plane_widths
from megacomp.kernels.scales import SCALES, RealScale

__all__ = ["BF16", "OutlierRest", "StaticFields", "StaticFormat", "StaticLayout", "StaticTables"]

_bf16 = SCALES["bf16"]
assert isinstance(_bf16, RealScale)
BF16 = _bf16
"""How outlier features and row scales are rounded to BF16: to nearest, saturating, never a negative zero."""


@dataclass(frozen=True)
class OutlierRest(Packed):
    """What of an outlier's BF16 does not lie in the place of its code: its upper ``bits`` bits."""

    bits: int


@dataclass(frozen=True)
class StaticLayout:
    """Where everything lies in a row of the wire, in bytes from its beginning.

    The codes of a row are packed as one block (see packing.py), and so is the rest of its outliers.

    Attributes:
        features: values per row.
        piece: codes in each of the equal pieces that a row is packed from, those that only pad included.
        planes: offset of each plane of codes.
        outliers: outlier features, and ``outlier_piece`` of them in each piece their rest is packed from.
        outlier_planes: offset of each plane of that rest.
        row_scale: offset of the BF16 row scale; -1 if there is none.
        padding: (start, stop) of each run of bytes that belong to nothing, and are zero.
        row_bytes: bytes of a row.
    """

    features: int
    piece: int
    planes: tuple[int, ...]
    outliers: int
    outlier_piece: int
    outlier_planes: tuple[int, ...]
    row_scale: int
    padding: tuple[tuple[int, int], ...]
    row_bytes: int


@dataclass(frozen=True)
class StaticFields:
    """Views into a wire ``[..., rows, row_bytes]``, each ``[..., rows, n]``.

    Attributes:
        planes: the packed codes, uint8.
        outlier_planes: the packed rest of the outliers, uint8.
        row_scales: the bits of the row scales, int16 ``[..., rows, 1]``; None if there are none.
    """

    planes: tuple[torch.Tensor, ...]
    outlier_planes: tuple[torch.Tensor, ...]
    row_scales: torch.Tensor | None


@dataclass(frozen=True)
class StaticFormat:
    """One calibrated codec, but for its tables.

    Attributes:
        bits: of a code, 2 to 8.
        outlier_features: how many features keep BF16; a float below 1 is their share, rounded down.
        row_scale: a scale of its own for every row, by which the tables' are multiplied.
        asymmetric: the tables hold an offset for every scale.
    """

    bits: int
    outlier_features: int | float
    row_scale: bool = False
    asymmetric: bool = False

    @property
    def bf16(self) -> RealScale:
        """How outliers and row scales are stored."""
        return BF16

    @property
    def element(self) -> IntElement:
        """How codes are packed."""
        return IntElement(self.bits)

    @property
    def outlier_rest(self) -> OutlierRest:
        """What of an outlier lies behind the codes."""
        return OutlierRest(16 - self.bits)

    @property
    def pieces(self) -> int:
        """In how many pieces a row's codes are packed."""
        return pieces_per_block(self.bits)

    @property
    def outlier_pieces(self) -> int:
        """In how many pieces the rest of a row's outliers is packed."""
        return pieces_per_block(16 - self.bits)

    @property
    def zero_code(self) -> int:
        """The code of the step 0: what is added to a step, -2**(bits - 1) to 2**(bits - 1) - 1."""
        return 2 ** (self.bits - 1)

    def outliers(self, features: int) -> int:
        """How many of ``features`` features keep BF16."""
        given = self.outlier_features
        return given if isinstance(given, int) else int(given * features)

    def layout(self, features: int) -> StaticLayout:
        """Where the fields of a row of ``features`` values lie."""
        return _layout(self, features)

    def row_bytes(self, features: int) -> int:
        """Bytes of one row on the wire: codes, the rest of the outliers, the row scale, padding to 8."""
        return self.layout(features).row_bytes

    def fields(self, wire: torch.Tensor, features: int) -> StaticFields:
        """Views of the fields of ``wire`` (uint8 ``[..., row_bytes]``, last dimension contiguous)."""
        layout = self.layout(features)
        codes, outliers = layout.piece * self.pieces, layout.outlier_piece * self.outlier_pieces

        def planes(offsets: tuple[int, ...], bits: int, values: int) -> tuple[torch.Tensor, ...]:
            widths = plane_widths(bits)
            return tuple(
                wire[..., offset : offset + values * width // 8] for offset, width in zip(offsets, widths, strict=True)
            )

        return StaticFields(
            planes(layout.planes, self.bits, codes),
            planes(layout.outlier_planes, 16 - self.bits, outliers),
            wire[..., layout.row_scale : layout.row_scale + 2].view(torch.int16) if self.row_scale else None,
        )

    def clear_padding(self, wire: torch.Tensor, features: int) -> None:
        """Zeroes the bytes of ``wire`` that belong to no field, so that equal rows have equal wires."""
        for start, stop in self.layout(features).padding:
            wire[..., start:stop] = 0


@functools.lru_cache(maxsize=1024)
def _layout(format: StaticFormat, features: int) -> StaticLayout:
    end = 0

    def place(size: int) -> int:
        nonlocal end
        end += size
        return end - size

    outliers = format.outliers(features)
    piece, outlier_piece = -(-features // format.pieces), -(-outliers // format.outlier_pieces)
    planes = tuple(place(piece * format.pieces * width // 8) for width in plane_widths(format.bits))
    rest = tuple(place(outlier_piece * format.outlier_pieces * width // 8) for width in plane_widths(16 - format.bits))
    gaps = []
    row_scale = -1
    if format.row_scale:
        gaps.append((end, end := end + end % 2))
        row_scale = place(2)
    row_bytes = -(-end // 8) * 8
    gaps.append((end, row_bytes))
    padding = tuple((start, stop) for start, stop in gaps if start < stop)
    return StaticLayout(features, piece, planes, outliers, outlier_piece, rest, row_scale, padding, row_bytes)


@dataclass(frozen=True, eq=False)
class StaticTables:
    """What a calibrated codec knows of one site, float32 but for ``kept``, all on one device.

    A step of feature ``j`` from rank ``i`` stands for ``step * scale[i, j] + offset[i, j]``, times the row scale if
    there is one; the row scale is the largest ``|x[j]| * weight[i, j]`` of the row.

    Attributes:
        scale: ``[ranks, features]``, finite, positive and no subnormal number.
        offset: ``[ranks, features]`` if the format is asymmetric, else None.
        weight: ``[ranks, features]``, of such numbers too, if the format has row scales, else None.
        kept: int64 ``[outliers]``, the outlier features, ascending; the same on every rank.
        is_kept: int8 ``[features]``: -1 for the outlier features, 0 for the others.
        digest: SHA-256 of all that is given.

    Raises:
        ValueError: ``kept`` is not ascending, or holds what is no feature.
    """

    scale: torch.Tensor
    offset: torch.Tensor | None
    weight: torch.Tensor | None
    kept: torch.Tensor
    is_kept: torch.Tensor = field(init=False)
    _copies: dict[torch.device, StaticTables] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        kept = self.kept.tolist()
        if kept != sorted(set(kept)) or (kept and not (kept[0] >= 0 and kept[-1] < self.features)):
            raise ValueError(f"outlier features must be ascending, of 0 to {self.features - 1}")
        is_kept = torch.zeros(self.features, dtype=torch.int8, device=self.kept.device)
        is_kept[self.kept] = -1
        object.__setattr__(self, "is_kept", is_kept)

    @property
    def ranks(self) -> int:
        """Whose partials the tables are for."""
        return self.scale.shape[0]

    @property
    def features(self) -> int:
        """Values per row."""
        return self.scale.shape[1]

    def to(self, device: torch.device) -> StaticTables:
        """The same tables on ``device``; copied there once."""
        if self.scale.device == device:
            return self
        if device not in self._copies:
            # Not made anew, which would wait for the device.
            copied = copy.copy(self)
            for attribute in fields(self):
                if isinstance(table := getattr(self, attribute.name), torch.Tensor):
                    object.__setattr__(copied, attribute.name, table.to(device))
            # Only now: no room on the device, or another thread, must not leave half a copy to be found.
            self._copies[device] = copied
        return self._copies[device]

    @functools.cached_property
    def digest(self) -> str:
        digest = hashlib.sha256()
        for table in (self.scale, self.offset, self.weight, self.kept):
            digest.update(b"none" if table is None else table.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()
