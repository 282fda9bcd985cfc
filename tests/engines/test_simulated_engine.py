"""A model whose ranks are simulated by one process against the same model on real ranks, bit for bit."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from engines import tiny_models
from rank_pool import RankPool

sys.path.insert(0, str(Path(__file__).parents[1] / "gptq"))
import quantized_models

import megacomp
from megacomp.launch import engines
from megacomp.launch.errors import LaunchError
from megacomp.launch.evaluation import Evaluation, evaluate

MODELS = ("llama", "qwen2")
COMMUNICATION: dict[str, dict[str, Any] | None] = {
    "uncompressed": None,
    "one_shot": {"codec": "mxfp4", "algorithm": "one_shot"},
    "two_shot": {"codec": "mxfp4", "algorithm": "two_shot", "gather_codec": "int8"},
    "rules": {
        "codec": {"preset": "int4", "rotation": 32},
        "rules": [{"layers": "0", "module": "attention", "codec": None}, {"layers": "-1", "codec": "int8"}],
    },
}


def _section(communication: dict[str, Any]) -> dict[str, Any]:
    section = {"backend": "reference", "telemetry": {"sqnr_every": 1}}
    return {"megacomp": {**section, "communication": {"min_bytes": 0, **communication}}}


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every model, and "quantized", a GPTQ checkpoint."""
    folder = tmp_path_factory.mktemp("models")
    tiny_models.save_all(folder)
    quantized_models.quantize_model(folder / "llama_biased", folder / "quantized", "gptq_v2", group_size=16)
    return folder


def _tokens() -> torch.Tensor:
    return torch.randint(90, (2, 20), generator=torch.Generator().manual_seed(7))


def _run(folder: Path, names: tuple[str, ...], engine: str, tp: int, dtype: torch.dtype) -> dict[str, Any]:
    """What a rank gets, by model and configuration; a process alone takes the part of all ranks."""
    results = {}
    for name in names:
        simulate = dist.get_world_size() == 1
        with engines.build(folder / name, engine, tp=tp, dtype=dtype, simulate=simulate) as built:
            assert (built.name, built.tp, built.simulated) == (engine, tp, simulate)
            for label, communication in COMMUNICATION.items():
                results[name, label] = found = {}
                with megacomp.install(_section(communication or {"codec": None}), model=built.module) as installation:
                    found["logits"] = built.logits(_tokens())
                    found["prefill"] = built.prefill(_tokens())
                    found["tokens"] = built.generate(_tokens()[:1], 3).tokens
                found["report"] = installation.report().to_dict()
    return results


def _assert_same(real: dict[str, Any], simulated: dict[str, Any]) -> None:
    assert real.keys() == simulated.keys()
    for what, expected in real.items():
        for key, value in expected.items():
            got = simulated[what][key]
            assert torch.equal(got, value) if isinstance(value, torch.Tensor) else got == value, (what, key)


@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize("engine", engines.ENGINES)
def test_simulated_ranks_are_real_ones_bit_for_bit(ranks: RankPool, zoo: Path, engine: str, tp: int) -> None:
    real = ranks.run(_run, zoo, MODELS, engine, tp, torch.float32, world_size=tp)[0]
    (simulated,) = ranks.run(_run, zoo, MODELS, engine, tp, torch.float32, world_size=1)
    _assert_same(real, simulated)
    for (name, label), found in simulated.items():
        sites = found["report"]["sites"].values()
        # Rank 0's messages alone: logits, prefill and three tokens.
        assert {site["calls"] + sum(site["declined"].values()) for site in sites} == {5}
        compressed = not torch.equal(found["logits"], simulated[name, "uncompressed"]["logits"])
        assert compressed == (label != "uncompressed") == any(site["sqnr_db"] for site in sites)


@pytest.mark.parametrize("engine", engines.ENGINES)
def test_bfloat16_and_quantized_weights_too(ranks: RankPool, zoo: Path, engine: str) -> None:
    for name, dtype in (("llama", torch.bfloat16), ("quantized", torch.float32)):
        real = ranks.run(_run, zoo, (name,), engine, 4, dtype, world_size=4)[0]
        (simulated,) = ranks.run(_run, zoo, (name,), engine, 4, dtype, world_size=1)
        _assert_same(real, simulated)


def _evaluate(folder: Path, engine: str, logits_out: Path | None = None) -> Evaluation:
    simulate = dist.get_world_size() == 1
    with engines.build(folder, engine, tp=2, dtype=torch.float32, simulate=simulate) as built:
        config = _section({"codec": "mxfp4"})
        return evaluate(built, _tokens(), config, batch_size=1, prefills=1, logits_out=logits_out)


@pytest.mark.parametrize("engine", engines.ENGINES)
def test_an_evaluation_is_that_of_real_ranks(ranks: RankPool, zoo: Path, tmp_path: Path, engine: str) -> None:
    files = tmp_path / "real", tmp_path / "simulated"
    real = ranks.run(_evaluate, zoo / "llama", engine, files[0])[0].to_dict()
    simulated = ranks.run(_evaluate, zoo / "llama", engine, files[1], world_size=1)[0].to_dict()
    assert files[0].read_bytes() == files[1].read_bytes()
    assert (simulated["simulated"], simulated["ttft_ms"], simulated["baseline_ttft_ms"]) == (True, None, None)
    differing = {key for key, value in real.items() if simulated[key] != value}
    assert differing == {"simulated", "ttft_ms", "baseline_ttft_ms"}


def test_weights_configured_for_a_dense_model_go_to_each_rank(zoo: Path) -> None:
    dense, checkpoint = zoo / "llama_biased", zoo / "quantized"
    section = {"megacomp": {"weights": {"checkpoint": str(checkpoint)}, "communication": {"codec": None}}}
    for engine in engines.ENGINES:
        with engines.build(checkpoint, engine, tp=2, dtype=torch.float32, simulate=True) as built:
            expected = built.logits(_tokens())
        with engines.build(dense, engine, tp=2, dtype=torch.float32, simulate=True) as built:
            original = built.logits(_tokens())
            with megacomp.install(section, model=built.module):
                assert torch.equal(built.logits(_tokens()), expected)
            assert torch.equal(built.logits(_tokens()), original) and not torch.equal(original, expected)


@pytest.fixture(params=engines.ENGINES)
def simulated(request: pytest.FixtureRequest, zoo: Path) -> Iterator[engines.Engine]:
    with engines.build(zoo / "llama", request.param, tp=4, dtype=torch.float32, simulate=True) as built:
        yield built


def test_the_whole_model_is_held_once(simulated: engines.Engine) -> None:
    tensors = {parameter.data_ptr(): parameter.numel() for parameter in simulated.module.parameters()}
    sizes = simulated.architecture.tensor_shapes()
    whole = sum(torch.Size(shape).numel() for shape in sizes.values())
    # Megatron pads the vocabulary, 97, to a multiple of the ranks, in the embedding and in the output layer.
    padding = 2 * 3 * simulated.architecture.hidden_size if simulated.name == "megatron" else 0
    assert sum(tensors.values()) == whole + padding


def test_an_error_of_one_rank_is_the_caller_s(simulated: engines.Engine) -> None:
    models: Any = simulated.module

    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    failing = models[2].register_forward_pre_hook(fail)
    with pytest.raises(ZeroDivisionError):
        simulated.logits(_tokens())
    failing.remove()
    assert simulated.logits(_tokens()).shape == (2, 20, 97)


def test_one_simulated_rank_is_a_real_one(zoo: Path) -> None:
    with engines.build(zoo / "llama", "deepspeed", tp=1, dtype=torch.float32, simulate=True) as built:
        assert (built.tp, built.simulated) == (1, False)


def _refusal(folder: Path) -> str:
    with pytest.raises(LaunchError) as error:
        engines.build(folder, "megatron", tp=2, dtype=torch.float32, simulate=True)
    return str(error.value)


def test_requests_that_cannot_be_simulated(ranks: RankPool, zoo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "tensor-parallel size 1, but there are 2 ranks" in ranks.run(_refusal, zoo / "llama")[0]
    with pytest.raises(LaunchError, match="size 3 does not divide num_attention_heads 8"):
        engines.build(zoo / "llama", "megatron", tp=3, dtype=torch.float32, simulate=True)
    from megacomp.launch.engines import megatron

    monkeypatch.setattr(megatron, "RowParallelLinear", torch.nn.Linear)
    with pytest.raises(LaunchError, match=r"simulated ranks need megatron-core 0\.13 or later, not 0\."):
        engines.build(zoo / "llama", "megatron", tp=2, dtype=torch.float32, simulate=True)
    assert not dist.is_initialized()
