"""How kernels are launched: what may be, what is guessed, what was measured."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
import triton
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import DTYPES, SPECS

from megacomp import codecs
from megacomp.kernels import launch_config as launching
from megacomp.kernels.launch_config import OPERATIONS, LaunchConfig
from megacomp.kernels.tiles import Tile

GPU = "NVIDIA Test 9000"
CONFIG = LaunchConfig(Tile(256, 0, 16), 8)
FORMAT = codecs.get("mxfp4").format
LAYOUT = FORMAT.layout(4096)
BF16 = torch.bfloat16


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A GPU by name only, and the empty file of what was measured on it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(launching, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setattr(launching, "current_gpu", lambda: 0)
    monkeypatch.setattr(launching, "gpu_processors", lambda gpu: 132)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: GPU)
    launching.forget()
    yield tmp_path / "cache" / "megacomp" / "kernels" / "nvidia-test-9000.json"
    launching.forget()


def record(rows: int, config: LaunchConfig = CONFIG, operation: str = "encode") -> Path:
    found = launching.measurement(operation, FORMAT, LAYOUT, rows, BF16, config, 10.0, 12.0)
    return launching.record(GPU, [found])


def launch(rows: int, operation: str = "encode", features: int = 4096, dtype: torch.dtype = BF16) -> LaunchConfig:
    return launching.launch_config(operation, FORMAT, FORMAT.layout(features), rows, dtype)


def guessed(rows: int, operation: str = "encode", features: int = 4096, dtype: torch.dtype = BF16) -> LaunchConfig:
    return launching.guess(operation, FORMAT, FORMAT.layout(features), rows, dtype, 132)


@given(
    operation=st.sampled_from(OPERATIONS),
    spec=st.sampled_from(SPECS),
    features=st.integers(1, 32768),
    rows=st.integers(1, 2**20),
    dtype=st.sampled_from(DTYPES),
    processors=st.integers(1, 200),
)
def test_whatever_the_shape_the_guess_and_the_candidates_fit(operation, spec, features, rows, dtype, processors):
    format = codecs.get(spec).format
    layout = format.layout(features)
    tried = launching.candidates(operation, format, layout, dtype)
    assert len(set(tried)) == len(tried)
    for config in (launching.guess(operation, format, layout, rows, dtype, processors), *tried):
        launching.check(operation, format, layout, config)
        tile = config.tile
        assert tile.programs(layout, rows) * tile.blocks >= rows * layout.blocks
        assert tile.piece * dtype.itemsize >= 16 or tile.piece <= format.block_size
        # No thread without a block or a part of one.
        assert config.num_warps == 1 or config.num_warps * 32 * 8 <= tile.blocks * format.block_size


@given(spec=st.sampled_from(SPECS), rows=st.integers(1, 4096), processors=st.integers(1, 200))
def test_small_messages_keep_every_multiprocessor_busy(spec, rows, processors):
    format = codecs.get(spec).format
    layout = format.layout(4096)
    tile = launching.guess("decode_sum", format, layout, rows, BF16, processors).tile
    assert tile.programs(layout, rows) >= min(processors, rows * layout.blocks // launching.FEWEST_BLOCKS)


def test_the_first_candidate_is_the_guess_for_a_large_message():
    for operation in OPERATIONS:
        first = launching.candidates(operation, FORMAT, LAYOUT, BF16)[0]
        assert first == launching.guess(operation, FORMAT, LAYOUT, 2**20, BF16, 132)


@pytest.mark.parametrize(
    ("spec", "operation", "tile", "warps", "problem"),
    [
        ("mxfp4", "encode", Tile(96, 0, 8), 4, "blocks 96 is no power of two"),
        ("mxfp4", "encode", Tile(0, 0, 8), 4, "blocks 0 is no power of two"),
        ("mxfp4", "encode", Tile(128, 0, 6), 4, "piece 6 is no power of two"),
        ("mxfp4", "encode", Tile(128, 0, 8), 3, "num_warps 3 is no power of two"),
        ("mxfp4", "encode", Tile(128, 0, 8), 64, "num_warps 64 is more than 32"),
        ("mxfp4", "decode_sum", Tile(128, 0, 32), 4, "piece 32 is longer than 16"),
        ({"preset": "mxfp4", "rotation": 256}, "decode_sum", Tile(4, 0, 8), 4, "no whole rotation of 256"),
        ("nvfp4", "encode", Tile(256, 0, 8), 4, "the rows are taken whole"),
        ("nvfp4", "decode_sum_encode", Tile(128, 128, 8), 4, "blocks_per_row 128 is no power of two from 256"),
        ("nvfp4", "encode", Tile(512, 512 + 1, 8), 4, "blocks_per_row 513 is no power of two"),
        ({"preset": "mxfp4", "scale": "e5m0"}, "encode", Tile(256, 128, 8), 4, "packed exponents take one row"),
    ],
)
def test_configurations_that_cannot_be_launched_are_refused(spec, operation, tile, warps, problem):
    format = codecs.get(spec).format
    with pytest.raises(ValueError, match=problem):
        launching.check(operation, format, format.layout(4096), LaunchConfig(tile, warps))


def test_numerics_forbid_fused_multiply_adds():
    assert guessed(1000).options["enable_fp_fusion"] is False


def test_long_rows_are_declined_only_where_they_are_held_whole():
    cpu, row_scaled = torch.device("cpu"), codecs.get("nvfp4").format
    device = launching.device_problem(cpu)
    assert launching.launch_problem("encode", row_scaled, 32768, cpu) == device
    assert launching.launch_problem("decode_sum", row_scaled, 2**20, cpu) == device
    assert launching.launch_problem("encode", FORMAT, 2**20, cpu) == device
    assert "a row scale" in launching._row_problem("encode", row_scaled, 32769)
    packed = codecs.get({"preset": "mxfp4", "scale": "e5m0"}).format
    assert "exponents packed" in launching._row_problem("decode_sum_encode", packed, 65536)


def test_kernels_need_a_gpu_or_the_interpreter(monkeypatch):
    def problem(device: str, interpret: bool, version: str = triton.__version__) -> str | None:
        monkeypatch.setattr(triton, "__version__", version)
        with triton.knobs.runtime.scope():
            triton.knobs.runtime.interpret = interpret
            return launching.device_problem.__wrapped__(torch.device(device))

    assert problem("cpu", True) is None
    assert "on CUDA tensors, not on cpu" in problem("cpu", False)
    assert "not on meta" in problem("meta", False) and "meta" in problem("meta", True)
    assert "3.5.1 is older than 3.6" in problem("cpu", True, "3.5.1")
    assert problem("cpu", True, "3.10.0+git") is None


@pytest.mark.parametrize(("capability", "fits"), [((7, 5), False), ((8, 0), True), ((9, 0), True), ((12, 1), True)])
def test_old_gpus_are_declined(monkeypatch, capability, fits):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: GPU)
    with triton.knobs.runtime.scope():
        triton.knobs.runtime.interpret = False
        problem = launching.device_problem.__wrapped__(torch.device("cuda", 0))
    assert (problem is None) == fits
    assert fits or (GPU in problem and "7.5" in problem and "8.0" in problem)


def test_more_blocks_than_a_launch_can_number():
    with pytest.raises(ValueError, match="at most"):
        launch(2**24)


def test_without_measurements_it_is_the_guess(gpu):
    assert launch(1000) == guessed(1024 * 31 // 32)
    assert not gpu.exists()


def test_what_was_measured_is_used_for_messages_of_nearly_that_size(gpu):
    assert record(8192) == gpu
    for rows in (2048, 4096, 8192, 10000, 32768):
        assert launch(rows) == CONFIG
    for rows in (1, 1024, 65536):
        assert launch(rows) != CONFIG
    assert launch(8192, "decode_sum") == guessed(8192, "decode_sum")
    assert launch(8192, dtype=torch.float32) == guessed(8192, dtype=torch.float32)
    assert launch(8192, features=8192) == guessed(8192, features=8192)


def test_the_nearest_measurement_wins_and_a_newer_one_replaces(gpu):
    other = LaunchConfig(Tile(64, 0, 8), 2)
    record(1024)
    record(8192, other)
    assert (launch(1024), launch(2048), launch(4096), launch(8192)) == (CONFIG, CONFIG, other, other)
    record(8192, CONFIG)
    assert launch(8192) == CONFIG
    assert len(json.loads(gpu.read_text())["measurements"]) == 2
    assert [path.name for path in gpu.parent.iterdir()] == [gpu.name]


def test_a_users_own_measurements_go_before_shipped_ones(gpu):
    launching.SHIPPED.mkdir()
    shipped = launching.SHIPPED / gpu.name
    record(8192)
    gpu.rename(shipped)
    launching.forget()
    assert launch(8192) == CONFIG
    own = LaunchConfig(Tile(64, 0, 8), 2)
    record(8192, own)
    assert launch(8192) == own


def test_files_are_read_once(gpu):
    record(8192)
    launch(8192)
    gpu.unlink()
    assert launch(4096) == CONFIG
    launching.forget()
    assert launch(4096) == guessed(4096)


def test_another_tritons_measurements_do_not_count(gpu, monkeypatch):
    record(8192)
    monkeypatch.setattr(launching, "TRITON_VERSION", "2.0")
    assert launch(8192) == guessed(8192)


def entry(**changes) -> dict:
    found = {
        "triton": launching.TRITON_VERSION,
        "operation": "encode",
        "format": launching.format_name(FORMAT),
        "features": 4096,
        "dtype": "bfloat16",
        "log2_values": 25,
        "config": {"tile": {"blocks": 256, "blocks_per_row": 0, "piece": 16}, "num_warps": 8},
        "microseconds": 1.0,
        "guess_microseconds": 2.0,
    }
    return {**found, **changes}


def content(*entries, **header) -> str:
    start = {"kind": launching.FILE_KIND, "version": launching.FILE_VERSION, "gpu": GPU}
    return json.dumps({**start, "measurements": list(entries), **header})


def test_the_files_form(gpu):
    gpu.parent.mkdir(parents=True)
    gpu.write_text(content(entry()))
    assert launch(8192) == CONFIG


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '"text"',
        "{}",
        content(gpu="Another GPU"),
        content(version=2),
        content(kind="a web browser's"),
        content(measurements=None),
        content("entry"),
        content(entry(surplus=1)),
        content(entry(features="4096")),
        content(entry(log2_values=True)),
        content(entry(operation=7)),
        content(entry(config={"tile": {"blocks": 256}, "num_warps": 8})),
        content(entry(config={"tile": {"blocks": 256, "blocks_per_row": 0, "piece": 8}, "num_warps": -8})),
        # Well formed, but such a kernel does not exist.
        content(entry(config={"tile": {"blocks": 100, "blocks_per_row": 0, "piece": 8}, "num_warps": 8})),
    ],
)
def test_bad_and_foreign_files_are_ignored_with_one_warning(gpu, caplog, text):
    gpu.parent.mkdir(parents=True)
    gpu.write_text(text)
    with caplog.at_level(logging.WARNING, "megacomp"):
        assert launch(8192) == guessed(8192)
        assert launch(8192) == guessed(8192)
    assert len(caplog.records) == 1 and str(gpu) in caplog.text
    # Tuning replaces such a file.
    record(8192)
    assert launch(8192) == CONFIG


def test_unreadable_files_are_ignored_too(gpu, caplog):
    gpu.mkdir(parents=True)
    with caplog.at_level(logging.WARNING, "megacomp"):
        assert launch(8192) == guessed(8192)
    assert str(gpu) in caplog.text


def test_a_failed_write_leaves_the_old_file(gpu, monkeypatch):
    record(8192)
    before = gpu.read_text()

    def fail(self: Path, target: Path) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        record(1024)
    assert gpu.read_text() == before
    assert [path.name for path in gpu.parent.iterdir()] == [gpu.name]


def test_a_configuration_by_hand():
    usual = launch(8192)
    with launching.using("encode", CONFIG):
        assert launch(8192) == CONFIG
        assert launch(8192, "decode_sum") == launching.launch_config("decode_sum", FORMAT, LAYOUT, 8192, BF16)
        with launching.using("encode", usual):
            assert launch(8192) == usual
        assert launch(8192) == CONFIG
    assert launch(8192) == usual
    with launching.using("encode", LaunchConfig(Tile(100, 0, 8), 4)), pytest.raises(ValueError, match="blocks 100"):
        launch(8192)
    assert launch(8192) == usual


def test_the_cache_lies_where_xdg_says(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for setting in ("", "relative/path"):
        monkeypatch.setenv("XDG_CACHE_HOME", setting)
        assert launching.cache_file("A b") == tmp_path / ".cache" / "megacomp" / "kernels" / "a-b.json"
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/c")
    assert launching.cache_file("NVIDIA H200") == Path("/var/c/megacomp/kernels/nvidia-h200.json")


def test_without_a_home_there_is_no_cache(gpu, no_home):
    assert launching.cache_file(GPU) is None
    assert launch(8192) == guessed(8192)
    with pytest.raises(FileNotFoundError, match="no home folder"):
        record(8192)


def test_without_a_home_what_is_shipped_counts(gpu, no_home, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(gpu.parents[2]))
    record(8192)
    monkeypatch.delenv("XDG_CACHE_HOME")
    gpu.parent.rename(launching.SHIPPED)
    launching.forget()
    assert launch(8192) == CONFIG


@given(st.text())
def test_slugs_are_names_of_files(name):
    slug = launching.slug(name)
    assert slug and set(slug) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")


def test_formats_have_names_of_their_own():
    formats = {codecs.get(spec).format for spec in SPECS}
    assert len({launching.format_name(format) for format in formats}) == len(formats)
