"""Both engines against transformers' own forward and generate, on one, two and four ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from engines import tiny_models
from rank_pool import RankPool

from megacomp.launch import engines
from megacomp.launch.errors import LaunchError

ENGINES = ("deepspeed", "megatron")
NEW_TOKENS = 10


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("models")
    return folder, tiny_models.save_all(folder)


def _tokens(model: Any) -> torch.Tensor:
    return torch.randint(model.config.vocab_size, (3, 24), generator=torch.Generator().manual_seed(7))


def _run(folder: Path, engine: str, prompts: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, Any]:
    """What one rank gets from each model."""
    tp = dist.get_world_size()
    results = {}
    for name, tokens in prompts.items():
        with engines.build(folder / name, engine, tp=tp, dtype=dtype) as built:
            assert built.name == engine
            assert built.tp == dist.get_world_size(built.group) == tp
            assert {parameter.dtype for parameter in built.module.parameters()} == {dtype}
            results[name] = {
                "logits": built.logits(tokens),
                "prefill": built.prefill(tokens),
                "tokens": built.generate(tokens[:1], NEW_TOKENS).tokens,
            }
    return results


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("engine", ENGINES)
def test_logits_and_greedy_tokens_are_those_of_transformers(
    ranks: RankPool, zoo: tuple[Path, dict[str, Any]], engine: str, tp: int
) -> None:
    folder, models = zoo
    prompts = {name: _tokens(model) for name, model in models.items()}
    by_rank = ranks.run(_run, folder, engine, prompts, torch.float32, world_size=tp)
    for name, model in models.items():
        with torch.no_grad():
            expected = model(prompts[name]).logits
            generated = model.generate(prompts[name][:1], max_new_tokens=NEW_TOKENS, do_sample=False)
        for results in by_rank:
            got = results[name]
            assert got["logits"].dtype == torch.float32
            torch.testing.assert_close(got["logits"], expected, atol=1e-4, rtol=0, msg=name)
            torch.testing.assert_close(got["prefill"], expected[:, -1], atol=1e-4, rtol=0, msg=name)
            assert got["tokens"] == generated[0, prompts[name].shape[1] :].tolist(), name


@pytest.mark.parametrize("engine", ENGINES)
def test_bfloat16_follows_transformers_bfloat16(ranks: RankPool, zoo: tuple[Path, dict[str, Any]], engine: str) -> None:
    folder, models = zoo
    prompts = {name: _tokens(models[name]) for name in ("llama", "qwen2")}
    (results, _) = ranks.run(_run, folder, engine, prompts, torch.bfloat16)
    for name, tokens in prompts.items():
        exact = models[name](tokens).logits
        rounded = tiny_models.save(name, folder / "bf16").bfloat16()(tokens).logits.float()
        noise = (rounded - exact).norm()
        assert (results[name]["logits"] - exact).norm() < 2 * noise


def _perplexity(folder: Path, engine: str, tokens: torch.Tensor) -> float:
    with engines.build(folder, engine, tp=dist.get_world_size(), dtype=torch.float32) as built:
        losses = []
        for batch in tokens.split(16):
            logits = built.logits(batch)[:, :-1]
            losses.append(torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()))
    return torch.stack(losses).mean().exp().item()


@pytest.mark.parametrize("engine", ENGINES)
def test_perplexity_of_a_trained_model(ranks: RankPool, data_dir: Path, engine: str) -> None:
    folder = data_dir / "stories260K"
    tokens = torch.from_numpy(np.load(folder / "tinystories_ids.npy"))
    for perplexity in ranks.run(_perplexity, folder, engine, tokens):
        assert perplexity == pytest.approx(4.2089, abs=1e-3)


def test_end_of_sequence_ends_generation(zoo: tuple[Path, dict[str, Any]]) -> None:
    folder, models = zoo
    prompt = _tokens(models["mistral"])[:1]
    with engines.build(folder / "mistral", "megatron", tp=1, dtype=torch.float32) as built:
        free = built.generate(prompt, 8)
        third = free.tokens[2]
        for ends in (third, [third, 100]):
            stopped = built.generate(prompt, 8, eos_token_id=ends)
            assert stopped.tokens == free.tokens[: free.tokens.index(third) + 1]
        assert built.generate(prompt, 1).tokens_per_s is None
        assert free.ttft_s > 0 and free.tokens_per_s is not None
        for bad_prompt, count in ((prompt[:, :0], 4), (prompt.expand(2, -1), 4), (prompt, 0)):
            with pytest.raises(ValueError, match="one prompt of at least one token"):
                built.generate(bad_prompt, count)


def test_megatron_refuses_what_a_sliding_window_would_hide(zoo: tuple[Path, dict[str, Any]]) -> None:
    tokens = torch.zeros(1, 41, dtype=torch.int64)
    with engines.build(zoo[0] / "mistral", "megatron", tp=1, dtype=torch.float32) as built:
        built.logits(tokens[:, :40])
        with pytest.raises(LaunchError, match="41 tokens are more than the model's sliding_window 40"):
            built.logits(tokens)
        with pytest.raises(LaunchError, match="sliding_window"):
            built.generate(tokens[:, :40], 2)


def test_deepspeed_computes_a_sliding_window(zoo: tuple[Path, dict[str, Any]]) -> None:
    folder, models = zoo
    tokens = torch.randint(101, (1, 60), generator=torch.Generator().manual_seed(3))
    expected = models["mistral"].generate(tokens, max_new_tokens=5, do_sample=False)[0, 60:].tolist()
    with engines.build(folder / "mistral", "deepspeed", tp=1, dtype=torch.float32) as built:
        torch.testing.assert_close(built.logits(tokens), models["mistral"](tokens).logits, atol=1e-4, rtol=0)
        assert built.generate(tokens, 5).tokens == expected


@pytest.mark.parametrize("engine", ENGINES)
def test_config_json_of_older_transformers(zoo: tuple[Path, dict[str, Any]], tmp_path: Path, engine: str) -> None:
    folder, models = zoo
    for name in ("llama", "llama_mlp_biased"):
        (tmp_path / name).mkdir()
        for file in (folder / name).iterdir():
            (tmp_path / name / file.name).symlink_to(file)
        config = json.loads((folder / name / "config.json").read_text())
        scaling = config.pop("rope_parameters")
        config["rope_theta"] = scaling.pop("rope_theta")
        if name == "llama_mlp_biased":
            scaling["type"] = scaling.pop("rope_type")
        config["rope_scaling"] = scaling
        (tmp_path / name / "config.json").unlink()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        tokens = _tokens(models[name])
        with engines.build(tmp_path / name, engine, tp=1, dtype=torch.float32) as built:
            torch.testing.assert_close(built.logits(tokens), models[name](tokens).logits, atol=1e-4, rtol=0)


def _state() -> dict[str, Any]:
    """The global state an engine may touch."""
    import deepspeed
    from deepspeed.inference.engine import InferenceEngine
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import random

    return {
        "current_device": torch.cuda.current_device,
        "rng": torch.get_rng_state().tolist(),
        "cdb": deepspeed.comm.comm.cdb,
        "mp_group": InferenceEngine.inference_mp_group,
        "compatible_ops": vars(deepspeed.ops).get("__compatible_ops__"),
        "megatron": parallel_state.model_parallel_is_initialized(),
        "tracker": random._CUDA_RNG_STATE_TRACKER,
        "groups": len(dist.distributed_c10d._world.pg_map),
    }


def _state_is_restored(folder: Path, engine: str) -> None:
    before = _state()
    built = engines.build(folder, engine, tp=2, dtype=torch.float32, simulate=dist.get_world_size() == 1)
    assert _state() != before
    built.close()
    assert _state() == before


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("engine", ENGINES)
def test_close_leaves_no_trace(ranks: RankPool, zoo: tuple[Path, dict[str, Any]], engine: str, processes: int) -> None:
    ranks.run(_state_is_restored, zoo[0] / "qwen2", engine, world_size=processes)


def test_a_group_made_by_the_engine_ends_with_it(zoo: tuple[Path, dict[str, Any]]) -> None:
    with engines.build(zoo[0] / "llama", "deepspeed", tp=1, dtype=torch.float32):
        assert dist.get_world_size() == 1
    assert not dist.is_initialized()


def test_bad_requests_change_nothing(zoo: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    model = zoo[0] / "llama"
    requests: list[tuple[str, Path, str, int, torch.dtype]] = [
        ("unknown engine 'vllm'; there are deepspeed, megatron", model, "vllm", 1, torch.float32),
        ("no model folder at", tmp_path / "nowhere", "megatron", 1, torch.float32),
        ("holds no config.json", tmp_path, "deepspeed", 1, torch.float32),
        ("size 3 does not divide num_attention_heads 8", model, "megatron", 3, torch.float32),
        ("does not divide num_key_value_heads 4 .* fit: 1, 2, 4", model, "deepspeed", 8, torch.float32),
        ("at least 1, not 0", model, "deepspeed", 0, torch.float32),
        ("tensor-parallel size 2, but there is 1 rank:", model, "megatron", 2, torch.float32),
        ("dtype torch.float64 is not supported", model, "megatron", 1, torch.float64),
    ]
    for message, folder, engine, tp, dtype in requests:
        with pytest.raises(LaunchError, match=message):
            engines.build(folder, engine, tp=tp, dtype=dtype)
        assert not dist.is_initialized()


def test_an_engine_that_is_not_installed(zoo: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "find_spec", lambda name: None)
    with pytest.raises(LaunchError, match=r"megatron is not installed: pip install 'megacomp\[megatron\]'"):
        engines.check(zoo[0] / "llama", "megatron", tp=1)
