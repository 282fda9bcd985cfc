"""Calibrating a model and running it: real ranks and simulated ones, interruptions, mismatches, every collective."""

from __future__ import annotations

import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import outlier_model
import pytest
import torch
import torch.distributed as dist
from engines import tiny_models
from models import HIDDEN, LAYERS, megatron_gpt, megatron_logits
from models import tokens as megatron_tokens
from rank_pool import RankPool
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parents[1] / "calibration"))
from test_statistics import static

import megacomp
from megacomp import codecs
from megacomp.calibration import Calibration, SiteTables, Statistics, tables_of
from megacomp.launch import calibration as calibrating
from megacomp.launch import cli, engines
from megacomp.launch.calibration import calibrate, pick_sequences, write
from megacomp.launch.engines.checkpoint import model_digest
from megacomp.launch.errors import LaunchError

CODECS = ("static4", "static4_paper", {"format": "static", "bits": 3, "outlier_features": 3, "row_scale": False})
BATCHES, PASSES = 2, 3
STEPS = BATCHES * PASSES


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    outlier_model.save(folder)
    np.save(folder / "tokens.npy", outlier_model.tokens().numpy())
    return folder


def _calibrate(
    folder: Path, engine: str, tp: int = 2, dtype: torch.dtype = torch.float32, **options: Any
) -> Calibration:
    """In as many real ranks as there are, or, alone, simulated."""
    simulate = dist.get_world_size() == 1 if dist.is_initialized() else True
    with engines.build(folder, engine, tp=tp, dtype=dtype, simulate=simulate) as built:
        return calibrate(
            built, outlier_model.tokens(), list(map(static, CODECS)), model_digest(folder), batch_size=3, **options
        )


def _same(first: Calibration, second: Calibration) -> bool:
    mine, theirs = first.tensors(), second.tensors()
    equal = mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
    return equal and first.metadata() == second.metadata()


@pytest.mark.parametrize("engine", engines.ENGINES)
def test_simulated_ranks_are_calibrated_as_real_ones(ranks: RankPool, folder: Path, engine: str) -> None:
    simulated = _calibrate(folder, engine)
    assert simulated.sites == outlier_model.SITES
    assert (simulated.tp, simulated.features, simulated.model) == (2, outlier_model.FEATURES, model_digest(folder))
    for real in ranks.run(_calibrate, folder, engine):
        assert _same(real, simulated)
    for site in outlier_model.SITES:
        for tables in (own := simulated.tables["static4_paper"][site]).partials, own.sum:
            assert tables.kept.tolist() == list(outlier_model.OUTLIERS)
    in_bf16 = _calibrate(folder, engine, 2, torch.bfloat16)
    assert _same(ranks.run(_calibrate, folder, engine, 2, torch.bfloat16)[1], in_bf16) and not _same(in_bf16, simulated)


ALWAYS_SAVED = mock.patch.object(calibrating, "SECONDS_BETWEEN_SAVES", -1.0)


class _Interrupted(Exception):
    pass


def _in_parts(folder: Path, engine: str, state: Path, stops: list[int]) -> tuple[Calibration, list[int]]:
    """What comes of runs that end after so many steps each, the last one well; and the steps of each."""
    steps: list[int] = []

    def progress(done: int, total: int) -> None:
        assert total == PASSES * len(outlier_model.tokens())
        steps[-1] += 1
        if len(steps) <= len(stops) and steps[-1] == stops[len(steps) - 1]:
            raise _Interrupted

    with ALWAYS_SAVED:
        while True:
            steps.append(0)
            try:
                return _calibrate(folder, engine, state=state, progress=progress), steps
            except _Interrupted:
                pass


@pytest.mark.parametrize("engine", engines.ENGINES)
def test_an_interrupted_calibration_goes_on(ranks: RankPool, folder: Path, tmp_path: Path, engine: str) -> None:
    """The step that was interrupted is not saved yet, and done again."""
    whole = _calibrate(folder, engine)
    state = tmp_path / ".calibration.state"
    result, steps = _in_parts(folder, engine, state, [3, 1, 2, 2])
    assert _same(result, whole) and steps == [3, 1, 2, 2, STEPS - 4]
    for result, steps in ranks.run(_in_parts, folder, engine, state, [1, 4, 2]):
        assert _same(result, whole) and steps == [1, 4, 2, STEPS - 4]
    assert not list(tmp_path.iterdir())


def _interrupt(folder: Path, state: Path) -> list[str]:
    def stop(done: int, total: int) -> None:
        if done == 2 * len(outlier_model.tokens()):
            raise _Interrupted

    with ALWAYS_SAVED, pytest.raises(_Interrupted):
        _calibrate(folder, "megatron", state=state, progress=stop)
    return sorted(path.name for path in state.parent.iterdir())


def _steps(folder: Path, state: Path, batch_size: int = 3, tokens: torch.Tensor | None = None) -> int:
    seen = []
    with engines.build(folder, "megatron", tp=2, dtype=torch.float32, simulate=dist.get_world_size() == 1) as built:
        calibrate(
            built,
            outlier_model.tokens() if tokens is None else tokens,
            list(map(static, CODECS)),
            model_digest(folder),
            batch_size=batch_size,
            state=state,
            progress=lambda done, total: seen.append(done),
        )
    return len(seen)


def test_a_state_is_of_use_for_the_same_request_only(ranks: RankPool, folder: Path, tmp_path: Path) -> None:
    def alone(function: Any, *arguments: Any) -> Any:
        (result,) = ranks.run(function, *arguments, world_size=1)
        return result

    state = tmp_path / ".state"
    # Of a simulation there is a file as if it were of real rank 0, and the other way round.
    assert alone(_interrupt, folder, state) == [".state.0"]
    assert ranks.run(_steps, folder, state) == [STEPS, STEPS]
    assert ranks.run(_interrupt, folder, state)[0] == [".state.0", ".state.1"]
    assert alone(_steps, folder, state) == STEPS
    assert alone(_interrupt, folder, state)
    assert alone(_steps, folder, state, 2) == 3 * PASSES
    assert alone(_interrupt, folder, state)
    assert alone(_steps, folder, state, 3, outlier_model.tokens(seed=2)) == STEPS
    # A rank whose file is lost takes the others with it.
    ranks.run(_interrupt, folder, state)
    (tmp_path / ".state.1").unlink()
    assert ranks.run(_steps, folder, state) == [STEPS, STEPS]
    assert not list(tmp_path.iterdir())


def test_a_damaged_state_is_named(folder: Path, tmp_path: Path) -> None:
    (tmp_path / ".state.0").write_bytes(b"nothing")
    with pytest.raises(LaunchError, match=r"\.state\.0, left by an interrupted run, cannot be read"):
        _calibrate(folder, "deepspeed", state=tmp_path / ".state")


def test_sequences_are_drawn_by_the_seed() -> None:
    tokens = torch.arange(50)[:, None].expand(-1, 3)
    drawn = pick_sequences(tokens, 10, 4)
    assert torch.equal(drawn, pick_sequences(tokens, 10, 4)) and drawn.shape == (10, 3)
    assert (drawn[1:, 0] > drawn[:-1, 0]).all() and not torch.equal(drawn, pick_sequences(tokens, 10, 5))
    for count in (None, 50, 99):
        assert torch.equal(pick_sequences(tokens, count, 0), tokens)


def _with_nan_at(folder: Path, token: int, tmp_path: Path) -> Path:
    changed = tmp_path / "nan"
    shutil.copytree(folder, changed)
    weights = load_file(changed / "model.safetensors")
    weights["model.embed_tokens.weight"][token] = float("nan")
    save_file(weights, changed / "model.safetensors", {"format": "pt"})
    return changed


def test_rows_with_nan_are_left_out_and_counted(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokens = outlier_model.tokens() % (outlier_model.VOCABULARY - 1)
    results = []
    for model, drawn in ((folder, tokens[1:]), (_with_nan_at(folder, 95, tmp_path), tokens.clone())):
        if model is not folder:
            drawn[0] = 95
        with engines.build(model, "deepspeed", tp=2, dtype=torch.float32, simulate=True) as built:
            # One sequence a message: the extremes go by messages, and of the first nothing is left.
            results.append(calibrate(built, drawn, list(map(static, CODECS)), "", batch_size=1))
    assert _same(*results)
    (record,) = [record for record in caplog.records if "NaN" in record.message]
    sites, length = len(outlier_model.SITES), tokens.shape[1]
    assert record.message.endswith(f"left out of the calibration for a NaN or Inf in their sum: {sites * length}")


def test_nothing_but_nan_is_an_error(folder: Path, tmp_path: Path) -> None:
    tokens = torch.full((2, 8), 95)
    with (
        engines.build(
            _with_nan_at(folder, 95, tmp_path), "megatron", tp=2, dtype=torch.float32, simulate=True
        ) as built,
        pytest.raises(
            LaunchError, match=r"layers\.0\.attention: the partials of rank 0 have a NaN or Inf in every row"
        ),
    ):
        calibrate(built, tokens, [static("static4")], "")


def test_a_model_that_does_not_reduce(folder: Path) -> None:
    with (
        engines.build(folder, "megatron", tp=1, dtype=torch.float32) as built,
        pytest.raises(ValueError, match="no site that reduces"),
    ):
        calibrate(built, outlier_model.tokens(), [static("static4")], "")


def _call(*arguments: Any) -> Any:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def test_the_command_writes_a_file_that_eval_takes(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "calibration.safetensors"
    common = ("--model", folder, "--dtype", "fp32", "--tokens", folder / "tokens.npy", "--simulate-tp", 2)
    result = _call(
        "calibrate", *common, "--out", out, "--sequences", 4, "--codec", "static4", "--codec", json.dumps(CODECS[2])
    )
    assert result.exit_code == 0, result.output
    assert f"TP 2, hidden {outlier_model.FEATURES}, 80 tokens" in " ".join(result.output.split())
    assert [path.name for path in tmp_path.iterdir()] == [out.name]
    read = Calibration.read(out)
    assert (read.tp, read.model, len(read.codecs)) == (2, model_digest(folder), 2)

    config = tmp_path / "ds.json"
    communication = {"codec": "static4", "calibration": str(out), "min_bytes": 0}
    config.write_text(json.dumps({"megacomp": {"communication": communication, "backend": "reference"}}))
    result = _call("eval", *common, "--config", config, "--json", tmp_path / "eval.json")
    assert result.exit_code == 0, result.output
    written = json.loads((tmp_path / "eval.json").read_text())
    bits = static("static4").bits_per_value(outlier_model.FEATURES)
    assert (written["codec"], written["bits_per_value"]) == ("static4", pytest.approx(bits))
    assert 0 < written["kl"] < 0.5

    result = _call("eval", *common[:-1], 4, "--config", config)
    assert result.exit_code == 2 and "was made for tensor-parallel size 2, not 4" in result.output
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    weights = load_file(other / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][3] += 1
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    result = _call("eval", "--model", other, *common[2:], "--config", config)
    assert result.exit_code == 2 and "was made for another model" in result.output


TOO_MANY = '{"format": "static", "outlier_features": 500}'


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--simulate-tp", 2, "--codec", "mxfp4"), "a block codec needs no calibration; static codecs: static4"),
        (("--simulate-tp", 2, "--codec", "static5"), "--codec static5: unknown preset"),
        (("--simulate-tp", 2, "--codec", '{"format": "static", "bits": 9}'), "9 is not allowed"),
        (("--simulate-tp", 2, "--codec", "{bits"), "--codec {bits:"),
        (("--simulate-tp", 2, "--codec", TOO_MANY), "keeps 500 outlier features, of 128"),
        (("--simulate-tp", 3), "does not divide num_attention_heads"),
        ((), "one rank reduces nothing: give --tp N or --simulate-tp N"),
        (("--simulate-tp", 1), "one rank reduces nothing"),
        (("--simulate-tp", 2, "--text", "absent.txt"), "give either --text FILE or --tokens FILE.npy"),
        (("--simulate-tp", 2, "--out", "absent/calibration.safetensors"), "there is no folder absent"),
    ],
)  # fmt: skip
def test_what_the_command_refuses(folder: Path, tmp_path: Path, arguments: tuple[Any, ...], message: str) -> None:
    out = tmp_path / "out.safetensors"
    result = _call("calibrate", "--model", folder, "--tokens", folder / "tokens.npy", "--out", out, *arguments)
    assert result.exit_code == 2 and message in result.output, result.output
    assert not list(tmp_path.iterdir())


def test_a_hidden_size_too_small_is_known_at_once(tmp_path: Path) -> None:
    tiny_models.save("llama", tmp_path)
    with (
        engines.build(tmp_path, "deepspeed", tp=2, dtype=torch.float32, simulate=True) as built,
        pytest.raises(LaunchError, match="static4_paper keeps no outlier of 48 features"),
    ):
        calibrate(
            built, outlier_model.tokens(), [static("static4_paper")], "", progress=lambda *_: pytest.fail("began")
        )


def _config(file: Path, **communication: Any) -> dict[str, Any]:
    settings = {"codec": "static4", "calibration": str(file), "min_bytes": 0, **communication}
    return {"megacomp": {"communication": settings, "backend": "reference", "telemetry": {"sqnr_every": 1}}}


ROUTES: tuple[dict[str, Any], ...] = (
    {"algorithm": "one_shot"},
    {"algorithm": "two_shot"},
    {"codec": "static4_paper", "algorithm": "two_shot"},
    {"codec": "int8", "gather_codec": "static4", "algorithm": "two_shot"},
    {"codec": CODECS[2], "gather_codec": "int8", "algorithm": "two_shot"},
)


def _run(folder: Path, engine: str, file: Path) -> list[tuple[torch.Tensor, dict[str, Any]]]:
    found = []
    with engines.build(folder, engine, tp=2, dtype=torch.float32, simulate=dist.get_world_size() == 1) as built:
        for route in ROUTES:
            with megacomp.install(_config(file, **route), model=built.module) as installation:
                logits = built.logits(outlier_model.tokens())
            found.append((logits, installation.report().to_dict()))
    return found


@pytest.mark.parametrize("engine", engines.ENGINES)
def test_both_algorithms_on_real_ranks_as_simulated(ranks: RankPool, folder: Path, tmp_path: Path, engine: str) -> None:
    file = tmp_path / "calibration.safetensors"
    write(_calibrate(folder, engine), file)
    first, second = ranks.run(_run, folder, engine, file)
    (simulated,) = ranks.run(_run, folder, engine, file, world_size=1)
    for route, *runs in zip(ROUTES, first, second, simulated, strict=True):
        logits, report = runs[0]
        for other_logits, other_report in runs[1:]:
            assert torch.equal(logits, other_logits) and other_report["sites"] == report["sites"]
        for name in outlier_model.SITES:
            site = report["sites"][name]
            assert (site["calls"], site["declined"]) == (1, {})
            assert site["codec"] == codecs.get(route.get("codec", "static4")).name
            assert site["sqnr_db"] > (10 if route.get("codec") == CODECS[2] else 15)


def _sequence_parallel(file: Path) -> tuple[bytes, dict[str, Any]]:
    codec, statistics = static("static4"), Statistics([static("static4")])
    with megatron_gpt(sequence_parallel=True) as model, torch.no_grad():
        with megacomp.observe(model, statistics):
            for index in range(statistics.passes):
                if index:
                    statistics.next_pass()
                megatron_logits(model, megatron_tokens())
        statistics.finish()
        states: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(states, statistics.state())
        for state in states:
            statistics.merge(state)
        tables = {site: SiteTables(*tables_of(statistics, codec, site)) for site in statistics.sites}
        calibration = Calibration(2, HIDDEN, "", {codec.name: dict(codec.spec)}, {codec.name: tables})
        if dist.get_rank() == 0:
            write(calibration, file)
        dist.barrier()
        everything = ["all_reduce", "reduce_scatter", "all_gather"]
        with megacomp.install(_config(file, collectives=everything), model=model) as installation:
            logits = megatron_logits(model, megatron_tokens())
    return logits.numpy().tobytes(), installation.report().to_dict()["sites"]


def test_sequence_parallel_scatters_and_gathers_exactly(ranks: RankPool, tmp_path: Path) -> None:
    (first, report), (second, other) = ranks.run(_sequence_parallel, tmp_path / "calibration.safetensors")
    assert first == second and report.keys() == other.keys()
    reducing = {f"layers.{layer}.{module}" for layer in range(LAYERS) for module in ("attention", "mlp")}
    row_bytes = static("static4").row_bytes(HIDDEN)
    for name in reducing:
        site = report[name]
        assert (site["calls"], site["codec"], site["bytes_sent"]) == (1, "static4", 16 // 2 * row_bytes)
        assert site["sqnr_db"] > 15
    # What column-parallel layers gather is no partial: static codecs know nothing of it.
    declined = [name for name, site in report.items() if site["declined"] == {"not_calibrated": 1}]
    assert len(declined) == 2 * LAYERS


def _mismatched(file: Path) -> list[str]:
    said = []
    with megatron_gpt() as model, torch.no_grad():
        exact = megatron_logits(model, megatron_tokens())
        with pytest.raises(megacomp.ConfigError) as error:
            megacomp.install(_config(file), model=model)
        said.append(str(error.value))
        # Of a model that is not known every message tells for itself.
        with megacomp.install(_config(file)) as installation:
            assert torch.equal(megatron_logits(model, megatron_tokens()), exact)
        declined = [site.declined for site in installation.report().sites.values()]
        assert declined == [{"not_calibrated": 1}] * (2 * LAYERS)
    return said


def test_what_was_not_calibrated_stays_exact(ranks: RankPool, folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "calibration.safetensors"
    calibration = _calibrate(folder, "megatron")
    for changed, message in (
        (replace(calibration, tp=2), f"hidden size {outlier_model.FEATURES}, not {HIDDEN}"),
        (_calibrate(folder, "megatron", 4), "tensor-parallel size 4, not 2"),
    ):
        write(changed, file)
        for (error,) in ranks.run(_mismatched, file):
            assert error.startswith("megacomp.communication.calibration: ") and message in error


def _agree(files: list[Path]) -> str | None:
    try:
        megacomp.install(_config(files[dist.get_rank()])).uninstall()
    except megacomp.AgreementError as error:
        return str(error)
    return None


def test_ranks_agree_on_contents_not_on_paths(ranks: RankPool, folder: Path, tmp_path: Path) -> None:
    files = [tmp_path / f"{name}.safetensors" for name in ("first", "copy", "other")]
    calibration = _calibrate(folder, "megatron")
    for file in files[:2]:
        write(calibration, file)
    write(_calibrate(folder, "megatron", dtype=torch.bfloat16), files[2])
    assert ranks.run(_agree, files[:2]) == [None, None]
    for error in ranks.run(_agree, files, world_size=3):
        assert error is not None
        assert re.search(r"megacomp\.communication\.calibration: \w{64} on ranks 0, 1; \w{64} on rank 2", error)
        assert error.count("\n") == 1, "nothing else differs"
