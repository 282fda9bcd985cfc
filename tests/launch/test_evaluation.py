"""The evaluation against figures computed independently from the logits of both runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from engines import tiny_models
from rank_pool import RankPool
from safetensors.torch import load_file

from megacomp import codecs
from megacomp.launch import engines
from megacomp.launch.evaluation import Evaluation, evaluate
from megacomp.launch.files import logits_file

HIDDEN, LAYERS, VOCAB = 48, 2, 97


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("llama")
    return folder, tiny_models.save("llama", folder)


def _tokens() -> torch.Tensor:
    return torch.randint(VOCAB, (5, 20), generator=torch.Generator().manual_seed(1))


def _config(**communication: Any) -> dict[str, Any]:
    return {"megacomp": {"backend": "reference", "communication": {"min_bytes": 0, **communication}}}


def _evaluate(folder: Path, engine: str, config: Any, logits_out: Path | None = None) -> Evaluation:
    with engines.build(folder, engine, tp=dist.get_world_size(), dtype=torch.float32) as built:
        seen: list[tuple[int, int]] = []
        result = evaluate(
            built,
            _tokens(),
            config,
            batch_size=2,
            prefills=1,
            logits_out=logits_out,
            progress=lambda done, total: seen.append((done, total)),
        )
    assert seen == [(2, 5), (4, 5), (5, 5)]
    return result


def _without_times(result: Evaluation) -> Evaluation:
    return replace(result, ttft_ms=None, baseline_ttft_ms=0.0)


def test_figures_are_those_of_the_logits(ranks: RankPool, model: tuple[Path, Any], tmp_path: Path) -> None:
    folder, reference = model
    tokens, targets = _tokens(), _tokens()[:, 1:, None]
    with torch.no_grad():
        exact = reference(tokens).logits[:, :-1].double().log_softmax(-1)
    compressed = {}
    for engine in engines.ENGINES:
        path = tmp_path / f"{engine}.safetensors"
        results = ranks.run(_evaluate, folder, engine, _config(codec="mxfp4"), path)
        assert _without_times(results[0]) == _without_times(results[1])
        result = results[0]
        logits = load_file(path)["logits"]
        assert logits.shape == (5, 20, VOCAB)
        compressed[engine] = logits
        log = logits[:, :-1].double().log_softmax(-1)
        figures = {
            "baseline_perplexity": (-exact.gather(-1, targets).mean()).exp(),
            "perplexity": (-log.gather(-1, targets).mean()).exp(),
            "kl": (exact.exp() * (exact - log)).sum(-1).mean(),
            "top1_agreement": (exact.argmax(-1) == log.argmax(-1)).double().mean(),
        }
        for name, expected in figures.items():
            assert getattr(result, name) == pytest.approx(expected.item(), rel=1e-4), name
        assert result.kl is not None and result.kl > 1e-3
        row_bytes = codecs.get("mxfp4").row_bytes(HIDDEN)
        assert (result.engine, result.tp, result.codec) == (engine, 2, "mxfp4")
        assert result.bits_per_value == pytest.approx(8 * row_bytes / HIDDEN)
        assert result.wire_bytes_per_token == 2 * LAYERS * row_bytes
        assert result.plain_bytes_per_token == 2 * LAYERS * HIDDEN * 2
        assert result.ratio == pytest.approx(16 / result.bits_per_value)
    # Partials that differ by rounding alone end as the same bits, or, at ties, one quantum apart.
    same = (compressed["deepspeed"] - compressed["megatron"]).abs().amax(-1) < 1e-3
    assert same.double().mean() > 0.9


def test_messages_left_exact_are_counted_too(ranks: RankPool, model: tuple[Path, Any]) -> None:
    config = _config(codec="int8", rules=[{"module": "attention", "codec": None}])
    for result in ranks.run(_evaluate, model[0], "megatron", config):
        compressed, exact = LAYERS * codecs.get("int8").row_bytes(HIDDEN), LAYERS * HIDDEN * 4
        assert result.codec == "int8"
        assert result.wire_bytes_per_token == compressed + exact
        assert result.bits_per_value == pytest.approx(codecs.get("int8").bits_per_value(HIDDEN))


def test_nothing_to_compare(ranks: RankPool, model: tuple[Path, Any]) -> None:
    (alone,) = ranks.run(_evaluate, model[0], "deepspeed", _config(codec="int8"), world_size=1)
    assert (alone.codec, alone.bits_per_value, alone.wire_bytes_per_token) == (None, None, None)
    assert alone.perplexity == alone.baseline_perplexity and alone.kl == 0 and alone.top1_agreement == 1
    (plain, _) = ranks.run(_evaluate, model[0], "deepspeed", None)
    assert plain.baseline_perplexity == pytest.approx(alone.baseline_perplexity, rel=1e-5)
    assert plain.perplexity is plain.kl is plain.ttft_ms is plain.ratio is None
    assert plain.baseline_ttft_ms > 0


def test_tokens_without_a_next_one(model: tuple[Path, Any]) -> None:
    with engines.build(model[0], "deepspeed", tp=1, dtype=torch.float32) as built:
        for shape in ((3,), (0, 8), (3, 1)):
            with pytest.raises(ValueError, match="length of at least 2"):
                evaluate(built, torch.zeros(shape, dtype=torch.int64))


def test_a_logits_file_is_complete_or_absent(tmp_path: Path) -> None:
    path = tmp_path / "logits.safetensors"
    logits = torch.randn(3, 4, 5)
    with pytest.raises(KeyError), logits_file(path, (3, 4, 5)) as write:
        write(logits[:1])
        raise KeyError
    assert not list(tmp_path.iterdir())
    with logits_file(path, (3, 4, 5)) as write:
        write(logits[:1])
        write(logits[1:])
        assert not path.exists()
    assert torch.equal(load_file(path)["logits"], logits)
    assert list(tmp_path.iterdir()) == [path]
