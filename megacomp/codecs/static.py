"""Static codecs: the scales are known beforehand, from a calibration, and do not travel (arXiv 2411.07942)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import ClassVar
from weakref import WeakValueDictionary

import torch

from megacomp.codecs.codec import Codec, canonical_json
from megacomp.kernels import StaticFormat, StaticTables, static_decode_sum, static_encode

__all__ = ["StaticCodec", "calibrated"]


@dataclass(frozen=True)
class StaticCodec(Codec):
    """A static codec, of one site once it is calibrated; until then it can tell sizes and nothing else.

    Outlier features travel in BF16, all others in the steps of the tables. A row with a NaN or Inf decodes to NaN:
    every value where the format has row scales, otherwise those of the outlier features.

    Attributes:
        format: the numerics and the layout.
        tables: of the partials of every rank; None before calibration.
        sum_tables: of their sum, for the second hop of two-shot, one for all ranks; None before calibration.
        rank: whose partials ``encode`` takes; None for a codec that only decodes.
    """

    name: str
    spec: Mapping[str, object] = field(hash=False, compare=False)
    format: StaticFormat
    backend: str = "auto"
    tables: StaticTables | None = field(default=None, repr=False, compare=False)
    sum_tables: StaticTables | None = field(default=None, repr=False, compare=False)
    rank: int | None = None
    key: str = field(init=False, repr=False)
    _first: StaticCodec | None = field(init=False, repr=False, compare=False, default=None)
    static: ClassVar[bool] = True

    __str__ = Codec.__str__

    def __post_init__(self) -> None:
        backend, spec = f'"backend":"{self.backend}"', f'"spec":{canonical_json(self.spec)}'
        if self.tables is None or self.sum_tables is None:
            object.__setattr__(self, "key", f"{{{backend},{spec}}}")
            return
        rank = "null" if self.rank is None else self.rank
        tables = f'"tables":["{self.tables.digest}","{self.sum_tables.digest}"]'
        object.__setattr__(self, "key", f'{{{backend},"rank":{rank},{spec},{tables}}}')
        # The first of equal codecs is the one that is found, and is there as long as any of them.
        first = _by_key.setdefault(self.key, self)
        object.__setattr__(self, "_first", None if first is self else first)

    def calibrated(self, tables: StaticTables, sum_tables: StaticTables) -> StaticCodec:
        """This codec at a site.

        Args:
            tables: of the partials: scale, offset and weight as the format has them, ``[ranks, features]``.
            sum_tables: of the sum, the same with one rank.

        Raises:
            ValueError: tables that do not fit the format, or one another.
        """
        for what, given in (("tables", tables), ("sum_tables", sum_tables)):
            self._check_tables(what, given)
        if sum_tables.ranks != 1 or sum_tables.features != tables.features:
            raise ValueError(
                f"sum_tables must be for one sender and {tables.features} features, "
                f"not {sum_tables.ranks} and {sum_tables.features}"
            )
        return replace(self, tables=tables, sum_tables=sum_tables)

    @cached_property
    def summed(self) -> StaticCodec:
        return replace(self, tables=self.sum_tables, rank=0)

    def sender(self, rank: int) -> StaticCodec:
        """What rank ``rank`` encodes its partials by; ValueError if it was not calibrated for so many ranks.

        The codec of sums is the same on every rank.
        """
        tables = self._tables()
        if self.rank is not None and tables is self.sum_tables:
            return self
        if not 0 <= rank < tables.ranks:
            raise ValueError(f"codec {self.name} was calibrated for {tables.ranks} ranks; there is no rank {rank}")
        if rank not in self._senders:
            self._senders[rank] = replace(self, rank=rank)
        return self._senders[rank]

    @cached_property
    def _senders(self) -> dict[int | None, StaticCodec]:
        return {self.rank: self}

    def with_backend(self, backend: str) -> StaticCodec:
        return self if backend == self.backend else replace(self, backend=backend)

    def check_features(self, features: int) -> None:
        """Raise ValueError if rows of ``features`` values are too short for the outlier features it keeps."""
        outliers = self.format.outliers(features)
        if outliers > features:
            raise ValueError(f"codec {self.name} keeps {outliers} outlier features, of {features}")
        if not self.format.row_scale and not outliers:
            raise ValueError(f"codec {self.name} keeps no outlier of {features} features: nothing could tell NaN")

    def check_message(self, features: int, wires: int, device: torch.device) -> None:
        super().check_message(features, wires, device)
        self._tables(features, wires)

    def row_bytes(self, features: int) -> int:
        return self.format.row_bytes(features)

    def _encode(self, x: torch.Tensor, wire: torch.Tensor) -> None:
        tables = self._tables(x.shape[1])
        if self.rank is None:
            raise ValueError(f"codec {self.name} encodes for one rank: take codec.sender(rank)")
        static_encode(self.format, tables.to(x.device), self.rank, x, wire, self.backend)

    def _decode_sum(self, wires: torch.Tensor, out: torch.Tensor) -> None:
        tables = self._tables(out.shape[1], len(wires))
        static_decode_sum(self.format, tables.to(out.device), wires, out, self.backend)

    def _tables(self, features: int | None = None, ranks: int | None = None) -> StaticTables:
        if self.tables is None:
            raise ValueError(
                f"codec {self.name} is not calibrated: it needs a calibration of the model "
                '(megacomp calibrate; "calibration" in the configuration)'
            )
        if features is not None and features != self.tables.features:
            raise ValueError(f"codec {self.name} was calibrated for {self.tables.features} features, not {features}")
        if ranks is not None and ranks != self.tables.ranks:
            raise ValueError(f"codec {self.name} was calibrated for {self.tables.ranks} ranks, not {ranks}")
        return self.tables

    def _check_tables(self, what: str, tables: StaticTables) -> None:
        shape = (tables.ranks, tables.features)
        wanted = {"scale": True, "offset": self.format.asymmetric, "weight": self.format.row_scale}
        for name, needed in wanted.items():
            table = getattr(tables, name)
            if (table is not None) != needed:
                raise ValueError(f"{what}.{name}: codec {self.name} {'needs one' if needed else 'has none'}")
            if table is not None and (table.shape != shape or table.dtype is not torch.float32):
                raise ValueError(f"{what}.{name} must be float32 {list(shape)}, not {table.dtype} {list(table.shape)}")
            if table is not None and not bool(torch.isfinite(table).all()):
                raise ValueError(f"{what}.{name} must be finite")
            if table is not None and name != "offset" and not bool((table >= torch.finfo(torch.float32).tiny).all()):
                raise ValueError(f"{what}.{name} must be positive, and no subnormal numbers")
        self.check_features(tables.features)
        outliers, kept = self.format.outliers(tables.features), tables.kept
        if kept.dtype is not torch.int64 or kept.shape != (outliers,):
            raise ValueError(f"{what}.kept must be int64 [{outliers}], not {kept.dtype} {list(kept.shape)}")


_by_key: WeakValueDictionary[str, StaticCodec] = WeakValueDictionary()
"""The calibrated codecs there are: in an operator's schema only a string can stand for one."""


def calibrated(key: str) -> StaticCodec:
    """The calibrated codec of this ``key``; KeyError if it is no longer there."""
    return _by_key[key]
