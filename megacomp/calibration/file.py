"""The calibration file: safetensors with the tables of static codecs, and what they were made for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megacomp.codecs import StaticCodec, get, presets
from megacomp.kernels import StaticTables
from megacomp.version import __version__

__all__ = ["Calibration", "CalibrationError", "SiteTables"]

KIND, VERSION = "megacomp calibration", "1"
PARTIALS, SUM = "partials", "sum"
TABLES = ("scale", "offset", "weight", "kept")


class CalibrationError(ValueError):
    """A calibration cannot be read, or is for something else; the message names the file and what is wrong."""


@dataclass(frozen=True)
class SiteTables:
    """The tables of one codec at one site: of the partials of every rank, and of their sum."""

    partials: StaticTables
    sum: StaticTables


@dataclass(frozen=True, eq=False)
class Calibration:
    """The tables of one or more static codecs at every site of a model.

    Attributes:
        tp: for how many ranks.
        features: values per row, the hidden size.
        model: digest of the model (:func:`megacomp.launch.engines.checkpoint.model_digest`).
        codecs: specification of each codec, by its name.
        tables: by codec's name and site's name.
        source: the file, for messages.
    """

    tp: int
    features: int
    model: str
    codecs: Mapping[str, Mapping[str, Any]]
    tables: Mapping[str, Mapping[str, SiteTables]]
    source: str = "the calibration"

    @property
    def sites(self) -> tuple[str, ...]:
        """The names of the sites."""
        return tuple(next(iter(self.tables.values()), {}))

    def codec(self, codec: StaticCodec, site: str) -> StaticCodec:
        """``codec`` with its tables at ``site``.

        Raises:
            CalibrationError: the file has none for it, and what it has.
        """
        if codec.name not in self.tables:
            raise CalibrationError(
                f"{self.source} has no tables for codec {codec.name}, only for {', '.join(self.tables)}; "
                f"calibrate it: megacomp calibrate --codec {_option(codec)}"
            )
        by_site = self.tables[codec.name]
        if site not in by_site:
            raise CalibrationError(f"{self.source} has no tables for site {site}")
        tables = by_site[site]
        return codec.calibrated(tables.partials, tables.sum)

    def check(self, *, tp: int | None = None, features: int | None = None, model: str | None = None) -> None:
        """Raise CalibrationError unless it is for so many ranks, such a hidden size, this model; None: whatever."""
        if tp is not None and tp != self.tp:
            raise CalibrationError(f"{self.source} was made for tensor-parallel size {self.tp}, not {tp}")
        if features is not None and features != self.features:
            raise CalibrationError(f"{self.source} was made for hidden size {self.features}, not {features}")
        if model is not None and model != self.model:
            raise CalibrationError(
                f"{self.source} was made for another model (digest {self.model[:12]}, this one has {model[:12]}); "
                "calibrate this one: megacomp calibrate --model ..."
            )

    @property
    def digest(self) -> str:
        """SHA-256 of all that decides bits: what ranks compare."""
        digest = hashlib.sha256(f"{self.tp},{self.features}".encode())
        for name in sorted(self.tables):
            for site, tables in sorted(self.tables[name].items()):
                digest.update(f"{name},{site},{tables.partials.digest},{tables.sum.digest}".encode())
        return digest.hexdigest()

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tables by the names they have in a file."""
        return {
            f"{codec}/{site}/{part}/{name}": table
            for codec, by_site in self.tables.items()
            for site, tables in by_site.items()
            for part, own in ((PARTIALS, tables.partials), (SUM, tables.sum))
            for name in TABLES
            if (table := getattr(own, name)) is not None
        }

    def metadata(self) -> dict[str, str]:
        """What a file says beside its tensors."""
        return {
            "kind": KIND,
            "version": VERSION,
            "megacomp": __version__,
            "tp": str(self.tp),
            "features": str(self.features),
            "model": self.model,
            "codecs": json.dumps(self.codecs, sort_keys=True),
            "sites": json.dumps(self.sites),
            "digest": self.digest,
        }

    @classmethod
    def read(cls, path: str | Path) -> Calibration:
        """The calibration in a file.

        Raises:
            CalibrationError: it is missing, unreadable, no calibration, of another version, or incomplete.
        """
        from safetensors import SafetensorError, safe_open

        path = Path(path)
        if not path.is_file():
            raise CalibrationError(f"no calibration file {path}")
        try:
            with safe_open(path, framework="pt") as opened:
                metadata = opened.metadata() or {}
                if metadata.get("kind") != KIND:
                    raise CalibrationError(f"{path} is no calibration: megacomp calibrate writes one")
                if metadata.get("version") != VERSION:
                    found = metadata.get("version")
                    raise CalibrationError(
                        f"{path} is of version {found}, this megacomp reads {VERSION}: calibrate again"
                    )
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 -- no mapping
        except (SafetensorError, OSError) as error:
            raise CalibrationError(f"{path} cannot be read: {error}") from None
        return cls._of(metadata, tensors, str(path))

    @classmethod
    def _of(cls, metadata: Mapping[str, str], tensors: dict[str, torch.Tensor], source: str) -> Calibration:
        try:
            tp, features = int(metadata["tp"]), int(metadata["features"])
            specs, sites, model = json.loads(metadata["codecs"]), json.loads(metadata["sites"]), metadata["model"]
            codecs = {name: get(spec) for name, spec in specs.items()}
            sites = [str(site) for site in sites]
        except (KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
            raise CalibrationError(f"{source}: its description is damaged ({error!r})") from None
        tables: dict[str, dict[str, SiteTables]] = {}
        for name, codec in codecs.items():
            if not isinstance(codec, StaticCodec) or codec.name != name:
                raise CalibrationError(f"{source}: codec {name} is no static codec of this name")
            for site in sites:
                where = f"{name}/{site}"
                parts = [_take(tensors, f"{where}/{part}", source) for part in (PARTIALS, SUM)]
                if (parts[0].ranks, parts[0].features) != (tp, features):
                    raise CalibrationError(
                        f"{source}: {where}/{PARTIALS}/scale must be [{tp}, {features}], "
                        f"not {list(parts[0].scale.shape)}"
                    )
                try:
                    codec.calibrated(*parts)
                except ValueError as error:
                    raise CalibrationError(f"{source}: {where}: {error}") from None
                tables.setdefault(name, {})[site] = SiteTables(*parts)
        if tensors:
            raise CalibrationError(f"{source}: unknown tensor {next(iter(tensors))}")
        calibration = cls(tp, features, model, specs, tables, source)
        if metadata.get("digest") != calibration.digest:
            raise CalibrationError(f"{source} is damaged: its tables are not those that were written")
        return calibration


def _option(codec: StaticCodec) -> str:
    """``codec`` as a command line has it."""
    return codec.name if codec.name in presets(static=True) else f"'{json.dumps(dict(codec.spec))}'"


def _take(tensors: dict[str, torch.Tensor], where: str, source: str) -> StaticTables:
    """The tables of the tensors under ``where``, taken out of ``tensors``."""
    scale, offset, weight, kept = (tensors.pop(f"{where}/{name}", None) for name in TABLES)
    for name, table, dimensions in (("scale", scale, 2), ("kept", kept, 1)):
        if table is None:
            raise CalibrationError(f"{source}: tensor {where}/{name} is missing")
        if table.dim() != dimensions:
            raise CalibrationError(f"{source}: tensor {where}/{name} has shape {list(table.shape)}")
    assert scale is not None and kept is not None
    if kept.dtype is not torch.int64:
        raise CalibrationError(f"{source}: tensor {where}/kept must be int64, not {kept.dtype}")
    try:
        return StaticTables(scale, offset, weight, kept)
    except ValueError as error:
        raise CalibrationError(f"{source}: {where}: {error}") from None
