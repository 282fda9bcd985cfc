"""Damaged calibrations, tunings and quantized checkpoints: refused by name, or read as something that can be used."""

from __future__ import annotations

import json
import shutil
import struct
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from damage import VALUES, damaged, edited, fuzz, of_safetensors
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[1] / "gptq"))
import quantized_models as models

from megacomp import codecs
from megacomp.calibration import Calibration, CalibrationError
from megacomp.calibration.file import SiteTables
from megacomp.codecs import StaticCodec
from megacomp.collectives import Route
from megacomp.gptq import CheckpointError, open_shards
from megacomp.gptq.shards import CONVERTED_INDEX, rank_file
from megacomp.kernels import StaticTables
from megacomp.kernels.grouped_weight import dequantize
from megacomp.tuning import CodecTuning, Key, SizeTuning, Timing, Tuning, TuningError, plan

DEEP = b'{"a":' * 100_000
"""JSON nested more deeply than any reader can follow."""

# Calibrations

TP, FEATURES, SITE = 2, 24, "layers.0.mlp"


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    codec = codecs.get({"preset": "static4", "outlier_features": 2})
    assert isinstance(codec, StaticCodec)

    def tables(ranks: int) -> StaticTables:
        scale = torch.rand(ranks, FEATURES, generator=torch.Generator().manual_seed(ranks)) + 0.5
        return StaticTables(scale, scale / 4, scale + 1, torch.tensor([3, 17]))

    by_site = {SITE: SiteTables(tables(TP), tables(1))}
    made = Calibration(TP, FEATURES, "digest", {codec.name: codec.spec}, {codec.name: by_site})
    path = tmp_path_factory.mktemp("calibration") / "good.safetensors"
    save_file(made.tensors(), path, made.metadata())
    return path.read_bytes()


def _use_calibration(path: Path) -> bool:
    """Whether it could be read; what could be must be of use."""
    try:
        read = Calibration.read(path)
    except CalibrationError as error:
        assert str(path) in str(error)
        return False
    assert len(read.digest) == 64
    for name, spec in read.codecs.items():
        for site in read.sites:
            codec = read.codec(codecs.get(spec, backend="reference"), site)  # type: ignore[arg-type]
            assert codec.name == name
            wires = torch.stack([codec.sender(rank).encode(torch.ones(2, read.features)) for rank in range(read.tp)])
            assert codec.decode_sum(wires, read.features, torch.float32).isfinite().all()
    return True


@fuzz
@given(data=st.data())
def test_calibrations(calibration: bytes, tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(calibration)
    assert _use_calibration(path)
    path.write_bytes(data.draw(of_safetensors(calibration)))
    _use_calibration(path)


# Tunings


def _tuning() -> dict[str, Any]:
    route = Route(codecs.get("int8", backend="reference"))
    sizes = [
        SizeTuning(
            bytes=1024 * 4**step,
            rows=4**step,
            features=512,
            plain_microseconds=100.0,
            timings=tuple(
                Timing(algorithm=algorithm, pipeline_chunks=chunks, microseconds=150.0 / (step + chunks))
                for algorithm in ("one_shot", "two_shot")
                for chunks in (1, 4)
            ),
        )
        for step in range(3)
    ]
    key = Key.here(torch.device("cpu"), 2)
    times = (CodecTuning.of(route, sizes),)
    return Tuning(key=key, hosts=1, dtype="bf16", codecs=times, environment={"note": 1}).to_dict()


def _use_tuning(path: Path) -> bool:
    try:
        read = Tuning.read(path)
    except TuningError as error:
        assert str(path) in str(error)
        return False
    assert len(read.digest()) == 64
    assert Tuning.model_validate_json(json.dumps(read.to_dict())) == read
    route = Route(codecs.get("int8", backend="reference"))
    if (times := read.find(route)) is not None:
        for algorithm in (True, False):
            made = plan(times, route, 2, algorithm=algorithm, chunks=not algorithm)
            assert made.steps[0].min_bytes == 0 and made.steps[-1].max_bytes == float("inf")
            assert all(step.min_bytes <= step.max_bytes for step in made.steps)
    return True


TUNING = _tuning()


@fuzz
@given(
    edited(TUNING).map(lambda document: json.dumps(document).encode())
    | damaged(json.dumps(TUNING).encode())
    | VALUES.map(lambda value: json.dumps(value).encode())
)
def test_tunings(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "tuning.json"
    path.write_text(json.dumps(TUNING))
    assert _use_tuning(path)
    path.write_bytes(text)
    _use_tuning(path)


@pytest.mark.parametrize("text", [DEEP, b"[" * 100_000, b"9" * 100_000, b"\xff", b"", b"\0"], ids=lambda t: repr(t[:8]))
def test_texts_that_are_no_tuning(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "tuning.json"
    path.write_bytes(text)
    assert not _use_tuning(path)


def test_a_path_that_cannot_be() -> None:
    for name in ("a\0b", "\ud800", "/"):
        with pytest.raises((TuningError, FileNotFoundError)):
            Tuning.read(Path(name))
        with pytest.raises(CalibrationError):
            Calibration.read(name)


# Quantized checkpoints

NAME = "model.layers.0.self_attn.o_proj"
SHAPE = (16, 64)


@pytest.fixture(scope="module", params=models.FORMATS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    one = models.linear(SHAPE[1], SHAPE[0], group_size=16)
    one = models.Linear(one.codes, one.scales, one.zeros, one.g_idx, one.bits, torch.ones(SHAPE[0]))
    models.write(folder, {NAME: one}, request.param, models.settings(request.param, group_size=16), {})
    return folder


def _use_checkpoint(folder: Path, ranks: int = 2) -> bool:
    try:
        for rank in range(ranks):
            with open_shards(folder, rank, ranks) as shards:
                shards.check({NAME: SHAPE})
                for name in shards.linears & {NAME}:
                    shard = shards.read(name)
                    assert (shard.in_features, shard.out_features) == (SHAPE[1] // ranks, SHAPE[0])
                    dense = dequantize(shard.weight)
                    assert dense.shape[1] == SHAPE[0] and dense.shape[0] >= SHAPE[1] // ranks
                    index = shard.weight.input_index
                    assert index is None or (len(index) == len(dense) and 0 <= index.min() <= index.max() < SHAPE[1])
    except CheckpointError as error:
        said = str(error)
        assert str(folder) in said or NAME in said, "neither file nor tensor is named"
        said.encode()
        return False
    return True


def _copy(source: Path, target: Path) -> Path:
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
    return target


@fuzz
@given(data=st.data())
def test_weights_of_checkpoints(checkpoint: Path, tmp_path: Path, data: st.DataObject) -> None:
    folder = _copy(checkpoint, tmp_path / "bad")
    assert _use_checkpoint(folder)
    file = folder / "model.safetensors"
    file.write_bytes(data.draw(of_safetensors(file.read_bytes())))
    _use_checkpoint(folder)


@fuzz
@given(data=st.data())
def test_settings_of_checkpoints(checkpoint: Path, tmp_path: Path, data: st.DataObject) -> None:
    folder = _copy(checkpoint, tmp_path / "bad")
    file = folder / "config.json"
    document = json.loads(file.read_text())
    if document["quantization_config"]["quant_method"] == "gptq":
        document["quantization_config"]["dynamic"] = {"-:.*gate.*": {}, r"+:.*\.o_proj": {"bits": 4}}
    good = json.dumps(document).encode()
    file.write_bytes(data.draw(edited(document).map(lambda changed: json.dumps(changed).encode()) | damaged(good)))
    _use_checkpoint(folder)


INDEX = {"metadata": {"total_size": 1}, "weight_map": {f"{NAME}.qweight": "part-1.safetensors"}}


@fuzz
@given(data=st.data())
def test_indices_of_checkpoints(checkpoint: Path, tmp_path: Path, data: st.DataObject) -> None:
    folder = _copy(checkpoint, tmp_path / "bad")
    (folder / "model.safetensors").rename(folder / "part-1.safetensors")
    file = folder / "model.safetensors.index.json"
    file.write_text(json.dumps(INDEX))
    assert _use_checkpoint(folder)
    text = edited(INDEX).map(lambda changed: json.dumps(changed).encode()) | damaged(json.dumps(INDEX).encode())
    file.write_bytes(data.draw(text))
    _use_checkpoint(folder)


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `megacomp convert` writes, put together by hand for one linear and two ranks."""
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("converted")
    models.write(
        source,
        {NAME: models.linear(SHAPE[1], SHAPE[0], group_size=16)},
        "gptq",
        models.settings("gptq", group_size=16),
        {},
    )
    linears = {}
    for rank in range(2):
        with open_shards(source, rank, 2) as shards:
            shard = shards.read(NAME)
        tensors = {
            kind: getattr(shard.weight, kind) for kind in ("codes", "scales", "zeros", "word_groups", "input_index")
        }
        save_file(
            {f"{NAME}.{kind}": each for kind, each in tensors.items() if each is not None}, folder / rank_file(rank, 2)
        )
        linears[NAME] = {
            "bits": shard.weight.bits,
            "in_features": shard.in_features,
            "out_features": shard.out_features,
            "order": shard.order,
        }
    save_file({"model.norm.weight": torch.ones(4)}, folder / "model.safetensors")
    files = [rank_file(rank, 2) for rank in range(2)]
    index = {"version": 1, "ranks": 2, "order": "local", "files": files, "linears": linears}
    (folder / CONVERTED_INDEX).write_text(json.dumps(index))
    return folder


@fuzz
@given(data=st.data())
def test_converted_checkpoints(converted: Path, tmp_path: Path, data: st.DataObject) -> None:
    folder = _copy(converted, tmp_path / "bad")
    assert _use_checkpoint(folder)
    if data.draw(st.booleans()):
        file = folder / CONVERTED_INDEX
        good = file.read_bytes()
        text = edited(json.loads(good)).map(lambda changed: json.dumps(changed).encode()) | damaged(good)
        file.write_bytes(data.draw(text))
    else:
        file = folder / rank_file(0, 2)
        file.write_bytes(data.draw(of_safetensors(file.read_bytes())))
    _use_checkpoint(folder)


@pytest.mark.parametrize("text", [DEEP, b"9" * 10_000, b"\xff", b"[]", b"3", b""], ids=lambda text: repr(text[:8]))
@pytest.mark.parametrize(
    "name", ["config.json", "quantize_config.json", "model.safetensors.index.json", CONVERTED_INDEX]
)
def test_json_of_checkpoints(checkpoint: Path, tmp_path: Path, name: str, text: bytes) -> None:
    folder = _copy(checkpoint, tmp_path / "bad")
    if name == "model.safetensors.index.json":
        (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(text)
    assert not _use_checkpoint(folder)


def test_other_folders_are_none_of_a_checkpoints_business(checkpoint: Path, tmp_path: Path) -> None:
    elsewhere = _copy(checkpoint, tmp_path / "elsewhere") / "model.safetensors"
    for name in ("../elsewhere/model.safetensors", str(elsewhere)):
        folder = _copy(checkpoint, tmp_path / "bad")
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
        assert not _use_checkpoint(folder)


HOSTILE_PATTERNS = [
    "(a+)+$",
    "(.*)*x",
    "(([a-z.])+.)+[A-Z]",
    ".*.*.*.*.*.*.*.*.*.*x",
    "(",
    "[",
    "(?P<a",
    "a?" * 40 + "a" * 40,
    "(?:aa|aa)" * 30,
]


@pytest.mark.parametrize("pattern", HOSTILE_PATTERNS)
def test_patterns_that_would_take_forever(tmp_path: Path, pattern: str) -> None:
    one = models.linear(SHAPE[1], SHAPE[0], group_size=16)
    for layout in ("gptq", "pack-quantized"):
        settings = models.settings(layout, group_size=16)
        if layout == "gptq":
            settings["dynamic"] = {pattern: {}}
        else:
            settings["config_groups"]["group_0"]["targets"] = [f"re:{pattern}", "Linear"]
        models.write(tmp_path, {NAME: one}, layout, settings, {})
        with pytest.raises(CheckpointError, match="pattern"):
            open_shards(tmp_path, 0, 1)


HEADERS: dict[str, Callable[[bytes], bytes]] = {
    "a terabyte": lambda body: struct.pack("<Q", 2**40) + body,
    "all there is": lambda body: struct.pack("<Q", 2**64 - 1) + body,
    "nested": lambda body: struct.pack("<Q", len(DEEP)) + DEEP + body,
    "a tensor of a terabyte": lambda body: (
        struct.pack("<Q", 64) + b'{"a":{"dtype":"F32","shape":[274877906944],"data_offsets":[0,4]}}'.ljust(64) + body
    ),
    "a huge shape of nothing": lambda body: (
        struct.pack("<Q", 80) + b'{"a":{"dtype":"F32","shape":[0,4611686018427387904],"data_offsets":[0,0]}}'.ljust(80)
    ),
}


@pytest.mark.parametrize("header", HEADERS)
def test_headers_that_promise_more_than_there_is(checkpoint: Path, tmp_path: Path, header: str) -> None:
    folder = _copy(checkpoint, tmp_path / "bad")
    file = folder / "model.safetensors"
    file.write_bytes(HEADERS[header](file.read_bytes()[8:]))
    tracemalloc.start()
    try:
        assert not _use_checkpoint(folder)
        assert not _use_calibration(file)
        assert tracemalloc.get_traced_memory()[1] < 16 * 2**20
    finally:
        tracemalloc.stop()
