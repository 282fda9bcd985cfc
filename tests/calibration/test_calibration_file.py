"""Calibration files: what is written is read, and whatever else is in a file is an error that says so."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parent))
from test_statistics import messages, static

import megacomp
from megacomp import codecs
from megacomp.calibration import Calibration, CalibrationError, SiteTables, Statistics, tables_of
from megacomp.codecs import StaticCodec
from megacomp.collectives import Route
from megacomp.config import ConfigError, load
from megacomp.kernels import StaticTables
from megacomp.launch.calibration import write
from megacomp.policy import Decline, Policy, Site

FEATURES, TP, MODEL = 128, 2, "0123456789abcdef" * 4
SITES = [Site(f"layers.{layer}.{module}", module, layer, 2) for layer in range(2) for module in ("attention", "mlp")]  # type: ignore[arg-type]
ODD = {"format": "static", "bits": 3, "outlier_features": 2, "symmetric": True}
CALIBRATED: tuple[StaticCodec, ...] = tuple(map(static, ("static4", "static4_paper", ODD)))


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    statistics = Statistics(CALIBRATED)
    for index in range(statistics.passes):
        if index:
            statistics.next_pass()
        for seed, site in enumerate(SITES):
            (partials,) = messages(FEATURES, TP, [30], seed)
            for rank, x in enumerate(partials):
                statistics.partial(site, rank, TP, torch.from_numpy(x))
            statistics.total(site, torch.from_numpy(sum(partials)))
    statistics.finish()
    tables = {
        codec.name: {site.name: SiteTables(*tables_of(statistics, codec, site.name)) for site in SITES}
        for codec in CALIBRATED
    }
    return Calibration(TP, FEATURES, MODEL, {codec.name: dict(codec.spec) for codec in CALIBRATED}, tables)


@pytest.fixture
def file(calibration: Calibration, tmp_path: Path) -> Path:
    path = tmp_path / "calibration.safetensors"
    write(calibration, path)
    return path


def test_what_is_written_is_read(calibration: Calibration, file: Path) -> None:
    read = Calibration.read(file)
    assert (read.tp, read.features, read.model, read.source) == (TP, FEATURES, MODEL, str(file))
    assert read.codecs == calibration.codecs and read.sites == calibration.sites == tuple(site.name for site in SITES)
    assert read.digest == calibration.digest
    x = torch.randn(5, FEATURES)
    for codec in CALIBRATED:
        for site in SITES:
            ours, theirs = (source.codec(codec, site.name) for source in (calibration, read))
            for rank in range(TP):
                assert ours.sender(rank).key == theirs.sender(rank).key
                assert torch.equal(ours.sender(rank).encode(x), theirs.sender(rank).encode(x))
            assert torch.equal(ours.summed.encode(x), theirs.summed.encode(x))
    assert list(file.parent.iterdir()) == [file]
    tensors, metadata = _contents(file)
    write(read, file)
    again, metadata_again = _contents(file)
    assert metadata_again == metadata and again.keys() == tensors.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items())


def test_a_digest_is_of_all_that_decides_bits(calibration: Calibration) -> None:
    def changed(**tables: torch.Tensor) -> Calibration:
        site = SITES[1].name
        own = calibration.tables["static4"][site]
        other = replace(own, sum=StaticTables(**{**_fields(own.sum), **tables}))
        return replace(
            calibration, tables={**calibration.tables, "static4": {**calibration.tables["static4"], site: other}}
        )

    own = calibration.tables["static4"][SITES[1].name].sum
    assert changed().digest == calibration.digest
    others = [changed(scale=own.scale * 1.01), changed(offset=own.offset + 1), changed(weight=own.weight * 2)]
    others += [changed(kept=(own.kept + 1) % FEATURES), replace(calibration, tp=4)]
    assert len({calibration.digest, *(other.digest for other in others)}) == 6


def _fields(tables: StaticTables) -> dict[str, Any]:
    return {name: getattr(tables, name) for name in ("scale", "offset", "weight", "kept")}


Contents = tuple[dict[str, torch.Tensor], dict[str, str]]


def _contents(path: Path) -> Contents:
    with safe_open(path, framework="pt") as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}, dict(opened.metadata())  # noqa: SIM118


def _error(path: Path) -> str:
    with pytest.raises(CalibrationError) as error:
        Calibration.read(path)
    assert str(path) in str(error.value)
    return str(error.value)


SCALE = "static4/layers.0.mlp/partials/scale"


def _tensor(name: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> Callable[[Contents], None]:
    def apply(contents: Contents) -> None:
        tensors, _ = contents
        changed = change(tensors.pop(name))
        if changed is not None:
            tensors[name] = changed.contiguous()

    return apply


def _metadata(**entries: Any) -> Callable[[Contents], None]:
    def apply(contents: Contents) -> None:
        for name, value in entries.items():
            if value is None:
                del contents[1][name]
            else:
                contents[1][name] = value if isinstance(value, str) else json.dumps(value)

    return apply


def _at(index: tuple[int, int], value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda table: table.index_put([torch.tensor(place) for place in index], torch.tensor(value))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_metadata(kind=None), "is no calibration: megacomp calibrate writes one"),
        (_metadata(kind="something else"), "is no calibration"),
        (_metadata(version="2"), "is of version 2, this megacomp reads 1: calibrate again"),
        (_metadata(version=None), "is of version None"),
        (_metadata(tp=None), "its description is damaged (KeyError('tp'))"),
        (_metadata(tp="two"), "its description is damaged"),
        (_metadata(codecs="{"), "its description is damaged"),
        (_metadata(codecs=[1]), "its description is damaged"),
        (_metadata(sites=3), "its description is damaged"),
        (_metadata(codecs={"static9": {"format": "static", "bits": 9}}), "its description is damaged"),
        (_metadata(codecs={"static4": {"format": "rotary"}}), "its description is damaged"),
        (_metadata(codecs={"static4": "static4_paper"}), "codec static4 is no static codec of this name"),
        (_metadata(codecs={"mxfp4": "mxfp4"}), "codec mxfp4 is no static codec of this name"),
        (_metadata(codecs={}), "unknown tensor"),
        (_metadata(sites=[site.name for site in SITES[:-1]]), "unknown tensor"),
        (_metadata(sites=[*(site.name for site in SITES), "layers.2.mlp"]), "layers.2.mlp/partials/scale is missing"),
        (_metadata(tp="4"), "layers.0.attention/partials/scale must be [4, 128], not [2, 128]"),
        (_metadata(features="256"), "must be [2, 256], not [2, 128]"),
        (_metadata(digest=None), "its tables are not those that were written"),
        (lambda contents: contents[0].update(extra=torch.zeros(1)), "unknown tensor extra"),
        (_tensor(SCALE, lambda _: None), f"tensor {SCALE} is missing"),
        (_tensor("static4_paper/layers.0.mlp/sum/kept", lambda _: None), "sum/kept is missing"),
        (_tensor("static4/layers.0.mlp/sum/weight", lambda _: None), "sum_tables.weight: codec static4 needs one"),
        (_tensor("static4/layers.0.mlp/partials/offset", lambda _: None), "tables.offset: codec static4 needs one"),
        (_tensor(SCALE, lambda table: table[0]), f"tensor {SCALE} has shape [128]"),
        (_tensor(SCALE, lambda table: table[:1]), f"{SCALE} must be [2, 128], not [1, 128]"),
        (_tensor(SCALE, lambda table: table.double()), "tables.scale must be float32 [2, 128], not torch.float64"),
        (_tensor(SCALE, _at((1, 5), float("nan"))), "static4/layers.0.mlp: tables.scale must be finite"),
        (_tensor(SCALE, _at((0, 0), float("inf"))), "tables.scale must be finite"),
        (_tensor(SCALE, _at((0, 0), 0.0)), "tables.scale must be positive"),
        (_tensor("static4/layers.1.mlp/partials/weight", _at((0, 9), -1.0)), "tables.weight must be positive"),
        (_tensor("static4/layers.1.mlp/sum/offset", _at((0, 9), float("nan"))), "sum_tables.offset must be finite"),
        (_tensor("static4/layers.1.mlp/sum/scale", lambda table: table.expand(2, -1)), "sum_tables"),
        (_tensor("static4/layers.1.mlp/sum/kept", lambda kept: kept.float()), "kept must be int64, not torch.float32"),
        (_tensor("static4/layers.1.mlp/sum/kept", lambda kept: kept[None]), "sum/kept has shape [1, 1]"),
        (_tensor("static4/layers.1.mlp/partials/kept", lambda kept: kept + FEATURES), "features must be ascending"),
        (_tensor("static4_paper/layers.1.mlp/partials/kept", lambda kept: kept.flip(0)), "must be ascending"),
        (_tensor("static4_paper/layers.1.mlp/partials/kept", lambda kept: kept[:1]), "kept must be int64 [2]"),
        (_tensor(SCALE, lambda table: table * 1.01), "is damaged: its tables are not those that were written"),
    ],
)  # fmt: skip
def test_anything_else_in_a_file_is_an_error(file: Path, damage: Callable[[Contents], Any], message: str) -> None:
    contents = _contents(file)
    damage(contents)
    save_file(contents[0], file, contents[1])
    assert message in _error(file)


def test_files_that_are_none(file: Path, tmp_path: Path) -> None:
    whole = file.read_bytes()
    for size in (0, 7, 8, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:size])
        assert "cannot be read" in _error(file)
    file.write_bytes(b"\xff" * len(whole))
    assert "cannot be read" in _error(file)
    # Anywhere in the tables a changed bit shows.
    header = 8 + int.from_bytes(whole[:8], "little")
    for place in torch.randint(header, len(whole), (30,), generator=torch.Generator().manual_seed(0)).tolist():
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        _error(file)
    assert "no calibration file" in _error(tmp_path / "absent.safetensors")
    assert "no calibration file" in _error(tmp_path)
    save_file({"weight": torch.zeros(2)}, file)
    assert "is no calibration" in _error(file)


def test_what_it_was_made_for_is_what_it_is_for(calibration: Calibration, file: Path) -> None:
    read = Calibration.read(file)
    read.check()
    read.check(tp=TP, features=FEATURES, model=MODEL)
    for wrong, message in (
        ({"tp": 4}, "was made for tensor-parallel size 2, not 4"),
        ({"features": 4096}, "was made for hidden size 128, not 4096"),
        ({"model": "f" * 64}, r"another model \(digest 0123456789ab, this one has ffffffffffff\)"),
    ):
        with pytest.raises(CalibrationError, match=message):
            read.check(**wrong)  # type: ignore[arg-type]
    with pytest.raises(CalibrationError, match=r"no tables for site layers\.7\.mlp"):
        read.codec(CALIBRATED[0], "layers.7.mlp")
    unknown = {"format": "static", "bits": 5}
    with pytest.raises(
        CalibrationError, match=r"no tables for codec static5-.*only for static3-.*, static4, static4_paper"
    ) as error:
        read.codec(static(unknown), SITES[0].name)
    # The message is a command that helps.
    option = str(error.value).partition("--codec '")[2].rstrip("'")
    assert codecs.get(json.loads(option)).spec == static(unknown).spec


def _communication(file: Path | None, **settings: Any) -> dict[str, Any]:
    calibration = {} if file is None else {"calibration": str(file)}
    return {"megacomp": {"communication": {"codec": "static4", "min_bytes": 0, **calibration, **settings}}}


def test_a_static_codec_needs_a_calibration() -> None:
    rules = [{"layers": "0", "codec": "int8"}, {"module": "mlp", "codec": "static4_paper"}]
    for settings, path in (
        ({}, "megacomp.communication.codec"),
        ({"codec": "mxfp4", "gather_codec": "static4"}, "megacomp.communication.gather_codec"),
        ({"codec": "mxfp4", "rules": rules}, "megacomp.communication.rules[1].codec"),
        (
            {"codec": "int4", "rules": [{"module": "mlp", "gather_codec": ODD}]},
            "megacomp.communication.rules[0].gather_codec",
        ),
    ):
        with pytest.raises(ConfigError) as error:
            load(_communication(None, **settings))
        assert [found for found, _ in error.value.errors] == [path]
        assert 'give the file of its calibration as "calibration"' in str(error.value)


def _refusal(config: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as error:
        Policy(load(config)[0])
    assert [path for path, _ in error.value.errors] == ["megacomp.communication.calibration"]
    return str(error.value)


def test_a_calibration_that_does_not_serve_the_configuration(file: Path) -> None:
    assert "no calibration file absent" in _refusal(_communication(Path("absent")))
    assert "no tables for codec static5-" in _refusal(_communication(file, codec={"format": "static", "bits": 5}))
    rules = [{"module": "mlp", "codec": "int8", "gather_codec": {"format": "static", "bits": 6}}]
    assert "no tables for codec static6-" in _refusal(_communication(file, rules=rules))
    policy = Policy(load(_communication(file))[0])
    policy.check_calibration(SITES, {FEATURES}, {TP})
    for arguments, message in (
        ((SITES, {FEATURES}, {4}), "tensor-parallel size 2, not 4"),
        (([*SITES, Site("layers.2.mlp", "mlp", 2, 3)], {FEATURES}, {TP}), "no tables for site layers.2.mlp"),
        ((SITES, {64}, {TP}), "hidden size 128, not 64"),
    ):
        with pytest.raises(ConfigError, match=message) as error:
            policy.check_calibration(*arguments)
        assert [path for path, _ in error.value.errors] == ["megacomp.communication.calibration"]


def test_each_site_has_its_own_tables_and_others_are_declined(calibration: Calibration, file: Path) -> None:
    rules = [{"module": "attention", "codec": "int8", "gather_codec": "static4_paper"}]
    everything = ["all_reduce", "reduce_scatter", "all_gather"]
    policy = Policy(load(_communication(file, rules=rules, collectives=everything))[0])

    def decide(site: Site, features: int = FEATURES, world_size: int = TP, collective: Any = "all_reduce") -> Any:
        return policy.decide(site, collective, 8, features, torch.bfloat16, world_size)

    for site in SITES:
        for collective in ("all_reduce", "reduce_scatter"):
            route = decide(site, collective=collective)
            assert isinstance(route, Route)
            name = "static4" if site.module == "mlp" else "static4_paper"
            tables = calibration.tables[name][site.name]
            codec = route.codec if site.module == "mlp" else route.gather_codec
            assert isinstance(codec, StaticCodec) and codec.tables is not None
            assert codec.tables.digest == tables.partials.digest
            assert isinstance(route.second_codec, StaticCodec) and route.second_codec.tables is not None
            assert route.second_codec.tables.digest == tables.sum.digest
        assert decide(site, features=64) is decide(site, world_size=4) is Decline.NOT_CALIBRATED
        assert decide(site, collective="all_gather") is Decline.NOT_CALIBRATED
    assert decide(Site("layers.9.mlp", "mlp", 9, 10)) is Decline.NOT_CALIBRATED


def test_the_public_names() -> None:
    assert megacomp.Calibration is Calibration and megacomp.CalibrationError is CalibrationError
