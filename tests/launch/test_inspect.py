"""The inspection against figures computed independently from the partials that an observer sees."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import outlier_model
import pytest
import torch
import torch.distributed as dist
from rank_pool import RankPool
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import megacomp
from megacomp import codecs
from megacomp.codecs import Codec, StaticCodec
from megacomp.launch import cli, engines
from megacomp.launch.calibration import calibrate
from megacomp.launch.errors import LaunchError
from megacomp.launch.inspection import Inspection, inspect
from megacomp.policy import Site

FEATURES = outlier_model.FEATURES


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    outlier_model.save(folder)
    np.save(folder / "tokens.npy", outlier_model.tokens().numpy())
    return folder


def _codecs() -> list[Codec]:
    specs = ("mxfp4", {"preset": "int4", "rotation": 128}, "static4", "static4_paper", "int8")
    return [codecs.get(spec, backend="reference") for spec in specs]


class _Recorder:
    """Keeps every partial, [site][rank], and every sum."""

    def __init__(self) -> None:
        self.partials: dict[str, dict[int, list[np.ndarray]]] = {}
        self.sums: dict[str, list[np.ndarray]] = {}

    def partial(self, site: Site, rank: int, world_size: int, x: torch.Tensor) -> None:
        self.partials.setdefault(site.name, {}).setdefault(rank, []).append(x.float().numpy().copy())

    def total(self, site: Site, x: torch.Tensor) -> None:
        self.sums.setdefault(site.name, []).append(x.numpy().copy())


def _recorded(engine: Any, tokens: torch.Tensor) -> _Recorder:
    recorder = _Recorder()
    with megacomp.observe(engine.module, recorder):
        engine.logits(tokens)
    return recorder


def _quantile(values: np.ndarray, share: float) -> float:
    return float(np.sort(values)[int(np.ceil(share * len(values))) - 1])


@pytest.mark.parametrize("tp", [2, 4])
def test_figures_are_those_of_the_partials(folder: Path, tp: int) -> None:
    tokens = outlier_model.tokens(7, 24)
    with engines.build(folder, "megatron", tp=tp, dtype=torch.float32, simulate=True) as built:
        result = inspect(built, tokens, batch_size=3)
        seen = _recorded(built, tokens)
    assert (result.engine, result.tp, result.simulated, result.dtype) == ("megatron", tp, True, "float32")
    assert (result.sequences, result.length, result.calibration_sequences, result.features) == (7, 24, 0, FEATURES)
    assert tuple(result.sites) == outlier_model.SITES and result.ranges.shape == (len(result.sites), tp, FEATURES)
    for index, (name, site) in enumerate(result.sites.items()):
        partials = [np.concatenate(messages) for messages in seen.partials[name].values()]
        ranges = np.stack([np.abs(x).max(0) for x in partials]).astype(np.float64)
        combined = ranges.sum(0)
        assert np.allclose(result.ranges[index].numpy(), ranges, rtol=1e-5)
        assert site.range_max == pytest.approx(combined.max(), rel=1e-5)
        assert site.range_median == pytest.approx(np.median(combined), rel=1e-5)
        assert site.rank_range_max == pytest.approx(tuple(ranges.max(1)), rel=1e-5)
        values = np.concatenate(partials).astype(np.float64)
        centered = values - values.mean()
        assert site.kurtosis == pytest.approx((centered**4).mean() / (centered**2).mean() ** 2, rel=1e-4)
        norms = [np.linalg.norm(x.astype(np.float64), axis=1) for x in partials]
        spread = max(_quantile(norm, 0.99) / _quantile(norm, 0.5) for norm in norms)
        assert site.norm_spread == pytest.approx(spread, rel=0.023)
        top = [np.abs(x).argmax(1) for x in partials]  # 1 % of 128 features is one
        for outlier, feature in zip(site.outliers, np.argsort(-combined, kind="stable"), strict=False):
            assert outlier.feature == feature and outlier.range == pytest.approx(combined[feature], rel=1e-5)
            assert outlier.token_share == pytest.approx(np.mean([own == feature for own in top]), abs=0.002)
        assert {outlier.feature for outlier in site.outliers[:2]} == set(outlier_model.OUTLIERS)
        kept = [set(np.argsort(-own)[: FEATURES // 64]) for own in ranges]
        overlap = np.mean([len(one & other) / (FEATURES // 64) for one, other in combinations(kept, 2)])
        assert site.rank_overlap == pytest.approx(overlap)
        assert (site.rows, site.skipped_rows, site.sqnr_db) == (7 * 24, 0, {})


def _sqnr_db(exact: np.ndarray, result: np.ndarray) -> float:
    noise = (result.astype(np.float64) - exact) ** 2
    return float(10 * np.log10((exact.astype(np.float64) ** 2).sum() / noise.sum()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_codec_is_judged_on_the_sum(folder: Path, dtype: torch.dtype) -> None:
    tokens, judged = outlier_model.tokens(7), _codecs()
    progress: list[tuple[int, int]] = []
    with engines.build(folder, "deepspeed", tp=2, dtype=dtype, simulate=True) as built:
        result = inspect(
            built, tokens, judged, batch_size=2, progress=lambda done, total: progress.append((done, total))
        )
        static = [codec for codec in judged if isinstance(codec, StaticCodec)]
        calibration = calibrate(built, tokens[:3], static, "", batch_size=2)
        seen = _recorded(built, tokens[3:])
    assert (result.calibration_sequences, result.sequences) == (3, 4)
    # Three passes of the search, and one to judge.
    assert progress == [(done, 13) for done in (2, 3, 5, 6, 8, 9, 11, 13)]
    assert result.bits_per_value == {codec.name: codec.bits_per_value(FEATURES) for codec in judged}
    for name, site in result.sites.items():
        exact = np.concatenate(seen.sums[name])
        partials = [torch.from_numpy(np.concatenate(messages)).to(dtype) for messages in seen.partials[name].values()]
        for codec in judged:
            at_site = calibration.codec(codec, name) if isinstance(codec, StaticCodec) else codec
            wires = torch.stack([at_site.sender(rank).encode(x) for rank, x in enumerate(partials)])
            summed = at_site.decode_sum(wires, FEATURES, dtype).float().numpy()
            assert site.sqnr_db[codec.name] == pytest.approx(_sqnr_db(exact, summed), abs=0.02)
    for codec in judged:
        found = [site.sqnr_db[codec.name] for site in result.sites.values()]
        assert result.mean_sqnr_db[codec.name] == pytest.approx(np.mean(found))  # type: ignore[arg-type]
    assert result.mean_sqnr_db["int8"] > result.mean_sqnr_db["static4"] > result.mean_sqnr_db["mxfp4"]  # type: ignore[operator]


def _inspect(folder: Path, engine: str) -> Inspection:
    simulate = dist.get_world_size() == 1 if dist.is_initialized() else True
    with engines.build(folder, engine, tp=2, dtype=torch.float32, simulate=simulate) as built:
        return inspect(built, outlier_model.tokens(), _codecs(), batch_size=2)


def test_real_ranks_give_the_same_everywhere(ranks: RankPool, folder: Path) -> None:
    simulated = _inspect(folder, "deepspeed")
    for real in ranks.run(_inspect, folder, "deepspeed"):
        assert real.to_dict() == {**simulated.to_dict(), "simulated": False}
        assert torch.equal(real.ranges, simulated.ranges)


def test_rows_with_nan_are_left_out(folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    weights = load_file(broken / "model.safetensors")
    weights["model.embed_tokens.weight"][95] = float("nan")
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    clean = outlier_model.tokens() % 95
    dirty = torch.cat([clean, torch.full_like(clean[:1], 95)])
    judged = [codecs.get("int8", backend="reference")]
    with engines.build(broken, "deepspeed", tp=2, dtype=torch.float32, simulate=True) as built:
        expected, found = (inspect(built, tokens, judged) for tokens in (clean, dirty))
    length = clean.shape[1]
    for name, site in expected.sites.items():
        counted = {**asdict(site), "rows": site.rows + length, "skipped_rows": length}
        assert _close(asdict(found.sites[name]), counted)


def _close(found: Any, expected: Any) -> bool:
    """Alike but for the last bits of products of another shape."""
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(_close(found[key], value) for key, value in expected.items())
    if isinstance(expected, tuple):
        return len(found) == len(expected) and all(map(_close, found, expected))
    return found == pytest.approx(expected, rel=1e-3)


def test_what_cannot_be_inspected(folder: Path) -> None:
    with engines.build(folder, "deepspeed", tp=2, dtype=torch.float32, simulate=True) as built:
        with pytest.raises(LaunchError, match="calibrated on half of the sequences and judged on the rest: give two"):
            inspect(built, outlier_model.tokens()[:1], _codecs())
        inspect(built, outlier_model.tokens()[:1], [codecs.get("int8", backend="reference")])
    with (
        engines.build(folder, "deepspeed", tp=1, dtype=torch.float32) as built,
        pytest.raises(ValueError, match="no site that reduces"),
    ):
        inspect(built, outlier_model.tokens())


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands' codecs run their definitions: compiling them takes longer here than all they do."""
    monkeypatch.setattr("megacomp.kernels.backend.compiler_problem", lambda: "not wanted here")


def _call(*arguments: Any) -> Any:
    return CliRunner().invoke(cli.app, ["inspect", *(str(argument) for argument in arguments)])


def test_the_command_shows_writes_and_draws(folder: Path, tmp_path: Path, uncompiled: None) -> None:
    pytest.importorskip("matplotlib")
    arguments = ("--model", folder, "--tokens", folder / "tokens.npy", "--simulate-tp", 4, "--dtype", "fp32")
    outputs = ("--json", tmp_path / "out.json", "--plot", tmp_path / "ranges.png")
    result = _call(*arguments, *outputs, "--sequences", 4, "--seed", 3, "--engine", "megatron")
    assert result.exit_code == 0, result.output
    written = json.loads((tmp_path / "out.json").read_text())
    names = ["mxfp4", "nvfp4", "int4+rotation128", "static4", "int8"]
    assert list(written["bits_per_value"]) == list(written["mean_sqnr_db"]) == names
    assert (written["sequences"], written["calibration_sequences"], written["tp"]) == (2, 2, 4)
    assert list(written["sites"]) == list(outlier_model.SITES)
    assert written["environment"]["torch"] == torch.__version__
    site = written["sites"]["layers.1.mlp"]
    assert {outlier["feature"] for outlier in site["outliers"][:2]} == set(outlier_model.OUTLIERS)
    for shown in ("megatron, simulated TP 4, float32, 2 x 20", "layers.1.mlp", *names, "mean"):
        assert shown in result.output
    assert f"{site['range_max'] / site['range_median']:.1f}" in result.output
    assert f"{site['sqnr_db']['static4']:.1f}" in result.output
    image = (tmp_path / "ranges.png").read_bytes()
    assert image.startswith(b"\x89PNG") and len(image) > 10_000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.json", "ranges.png"]


def test_codecs_of_choice(folder: Path, tmp_path: Path, uncompiled: None) -> None:
    options = '{"format": "static", "bits": 6, "outlier_features": 3}'
    result = _call(
        *("--model", folder, "--tokens", folder / "tokens.npy", "--simulate-tp", 2, "--json", tmp_path / "out.json"),
        *("--codec", options, "--codec", "int4"),
    )
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "out.json").read_text())["mean_sqnr_db"]
    assert list(found) == [codecs.get(json.loads(options)).name, "int4"]
    assert found.popitem()[1] < found.popitem()[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--codec", "mxfp5"), "--codec mxfp5: unknown preset 'mxfp5' (did you mean"),
        (("--codec", '{"format": "int", "bits": 11}'), "11 is not allowed"),
        (("--plot", "ranges.foo"), "ranges.foo: its suffix must be one of"),
        (("--plot", "absent/ranges.png"), "there is no folder absent"),
        (("--json", "absent/out.json"), "there is no folder absent"),
        (("--simulate-tp", 1), "one rank reduces nothing: give --tp N or --simulate-tp N"),
        (("--simulate-tp", 3), "does not divide num_attention_heads"),
        (("--text", "absent.txt"), "give either --text FILE or --tokens FILE.npy"),
        (("--sequences", 1), "give two"),
    ],
)
def test_what_the_command_refuses(folder: Path, arguments: tuple[Any, ...], message: str) -> None:
    pytest.importorskip("matplotlib")
    common = ("--model", folder, "--tokens", folder / "tokens.npy", "--simulate-tp", 2)
    result = _call(*common, *arguments)
    assert result.exit_code == 2 and message in result.output, result.output


def test_a_plot_without_matplotlib(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megacomp.launch.files.find_spec", lambda name: None)
    common = ("--model", folder, "--tokens", folder / "tokens.npy", "--simulate-tp", 2)
    result = _call(*common, "--plot", tmp_path / "ranges.png")
    assert result.exit_code == 2 and "pip install 'megacomp[plot]'" in result.output
