"""`megacomp convert`, and the commands on GPTQ checkpoints converted and not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import quantized_models as models
import torch
import torch.distributed as dist
from engines import tiny_models
from rank_pool import RankPool
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from megacomp.gptq import ordering
from megacomp.gptq.shards import CONVERTED_INDEX, open_shards
from megacomp.launch import cli, engines
from megacomp.launch.convert import convert
from megacomp.launch.errors import LaunchError

pytestmark = pytest.mark.usefixtures("no_launcher")

DATA = ("gptq-v1-bytellama-h256-g32-sym", "ct-bytellama-h256-g32-asym")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("convert")
    tiny_models.save("llama_biased", folder / "dense")
    tiny_models.save_tokenizer(folder / "dense")
    models.quantize_model(folder / "dense", folder / "gptq", "gptq", group_size=16)
    np.save(folder / "tokens.npy", np.random.default_rng(0).integers(0, 96, (3, 16)))
    return folder / "gptq"


def _call(*arguments: Any) -> Any:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("order", ["tp_aware", "local"])
def test_every_rank_finds_what_it_would_have_made(checkpoint: Path, tmp_path: Path, tp: int, order: str) -> None:
    out = tmp_path / "out"
    result = _call("convert", "--checkpoint", checkpoint, "--tp", tp, "--out", out, "--order", order)
    assert result.exit_code == 0, result.output
    for rank in range(tp):
        with open_shards(checkpoint, rank, tp, order) as made, open_shards(out, rank, tp) as found:
            assert found.linears == made.linears and found.order == order
            for name in made.linears:
                one, other = made.read(name), found.read(name)
                assert (one.in_features, one.out_features, one.order) == (
                    other.in_features,
                    other.out_features,
                    other.order,
                )
                assert (one.bias is None) == (other.bias is None)
                for kind in ("codes", "scales", "zeros", "word_groups", "input_index"):
                    mine, theirs = getattr(one.weight, kind), getattr(other.weight, kind)
                    assert (mine is None and theirs is None) or torch.equal(mine, theirs)
    assert (out / "tokenizer.json").is_file()
    assert "quantization_config" not in json.loads((out / "config.json").read_text())


def test_loading_does_no_permutation(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert(checkpoint, 1, tmp_path / "out")

    def refuse(*_: Any) -> None:
        raise AssertionError("a converted checkpoint was permuted")

    monkeypatch.setattr(ordering, "arrange", refuse)
    monkeypatch.setattr(ordering, "sort_by_group", refuse)
    engines.build(tmp_path / "out", "megatron", tp=1, dtype=torch.float32).close()
    with pytest.raises(AssertionError, match="was permuted"):
        engines.build(checkpoint, "megatron", tp=1, dtype=torch.float32)


@pytest.mark.parametrize("engine", ["deepspeed", "megatron"])
def test_eval_and_generate_take_either(checkpoint: Path, tmp_path: Path, engine: str) -> None:
    convert(checkpoint, 1, tmp_path / "converted")
    tokens = checkpoint.parent / "tokens.npy"
    (tmp_path / "ds.json").write_text(json.dumps({"megacomp": {"weights": {"checkpoint": str(checkpoint)}}}))
    logits, texts = [], []
    # As a model by themselves, converted, and in place of a dense model's own weights.
    for model, more in (
        (checkpoint.parent / "dense", ()),
        (checkpoint, ()),
        (tmp_path / "converted", ()),
        (checkpoint.parent / "dense", ("--config", tmp_path / "ds.json")),
    ):
        out = tmp_path / "logits.safetensors"
        common = ("--model", model, "--engine", engine, "--dtype", "fp32", *more)
        result = _call("eval", *common, "--tokens", tokens, "--logits-out", out)
        assert result.exit_code == 0, result.output
        logits.append(load_file(out)["logits"])
        result = _call("generate", *common, "--prompt", "w5 w17 w3", "--max-new-tokens", 4)
        assert result.exit_code == 0, result.output
        texts.append(result.output.splitlines()[0])
    for other in logits[1:]:
        torch.testing.assert_close(other, logits[0], atol=1e-3, rtol=1e-4)
    assert torch.equal(logits[1], logits[2]) and torch.equal(logits[1], logits[3])
    assert len(set(texts)) == 1


def _logits(folder: str, engine: str, tokens: torch.Tensor) -> torch.Tensor:
    with engines.build(folder, engine, tp=dist.get_world_size(), dtype=torch.float32) as built:
        return built.logits(tokens)


@pytest.mark.parametrize("name", DATA)
@pytest.mark.parametrize("engine", ["deepspeed", "megatron"])
def test_converted_checkpoints_of_third_party_tools(
    ranks: RankPool, data_dir: Path, tmp_path: Path, engine: str, name: str
) -> None:
    reference = load_file(data_dir / name / "reference.safetensors")
    convert(data_dir / name, 2, tmp_path / "out")
    for logits in ranks.run(_logits, str(tmp_path / "out"), engine, reference["input_ids"]):
        assert (logits - reference["logits"]).abs().max() < 5e-5


def test_into_the_folder_one_is_in(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    monkeypatch.chdir(inside)
    result = _call("convert", "--checkpoint", checkpoint, "--tp", 2, "--out", ".")
    assert result.exit_code == 0, result.output
    assert Path.cwd() == inside and {"config.json", "model.safetensors"} < {path.name for path in Path().iterdir()}
    written = sum(path.stat().st_size for path in inside.glob("*.safetensors"))
    assert f"2 ranks, {written:,} bytes of weights" in " ".join(result.output.split())
    assert list(tmp_path.iterdir()) == [inside]


def test_requests_that_cannot_be_served(checkpoint: Path, tmp_path: Path) -> None:
    convert(checkpoint, 2, tmp_path / "two")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    requests = [
        ((checkpoint.parent / "dense", 2, tmp_path / "new"), "is not quantized"),
        ((checkpoint, 3, tmp_path / "new"), "tensor-parallel size 3 does not divide"),
        ((checkpoint, 2, tmp_path / "full"), "exists and is not an empty folder"),
        ((checkpoint, 2, tmp_path / "no" / "new"), "there is no folder"),
        ((tmp_path / "two", 2, tmp_path / "new"), "has been converted already"),
    ]
    for (source, tp, out), message in requests:
        result = _call("convert", "--checkpoint", source, "--tp", tp, "--out", out)
        assert result.exit_code == 2 and message in result.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "two"]
    with pytest.raises(LaunchError, match="was converted for a tensor-parallel size of 2, not 1"):
        engines.check(tmp_path / "two", tp=1)


DOWN = "model.layers.1.mlp.down_proj"


@pytest.mark.parametrize("damage", ["truncated", "lacking", "shape", "index", "rank", "broken", "version"])
def test_damaged_conversions_are_refused(checkpoint: Path, tmp_path: Path, damage: str) -> None:
    convert(checkpoint, 1, tmp_path / "out")
    own, index = tmp_path / "out" / "rank-00-of-01.safetensors", tmp_path / "out" / CONVERTED_INDEX
    tensors, document = load_file(own), json.loads(index.read_text())
    if damage == "truncated":
        own.write_bytes(own.read_bytes()[:-10])
        message = "ends within model"
    elif damage == "lacking":
        save_file({name: tensor for name, tensor in tensors.items() if name != f"{DOWN}.scales"}, own)
        message = f"lack {DOWN}.scales"
    elif damage == "shape":
        save_file({**tensors, f"{DOWN}.scales": tensors[f"{DOWN}.scales"][:, 1:].contiguous()}, own)
        message = rf"{DOWN}\.scales is F16"
    elif damage == "index":
        name = next(name for name in tensors if name.endswith("input_index"))
        tensors[name][0] = 1000
        save_file(tensors, own)
        message = f"{name} is out of range"
    elif damage == "rank":
        own.unlink()
        message = "names .rank-00-of-01.safetensors., which is missing"
    elif damage == "broken":
        index.write_text("{}")
        message = "is not an index that `megacomp convert` writes"
    else:
        index.write_text(json.dumps({**document, "version": 2}))
        message = "version 2 is not supported"
    with pytest.raises(LaunchError, match=message):
        engines.check(tmp_path / "out", tp=1)


@pytest.mark.parametrize("damage", ["g_idx", "missing", "unquantized"])
def test_eval_of_a_damaged_checkpoint_is_a_usage_error(checkpoint: Path, tmp_path: Path, damage: str) -> None:
    shutil.copytree(checkpoint, tmp_path / "m")
    path = tmp_path / "m" / "model.safetensors"
    tensors = load_file(path)
    if damage == "g_idx":
        tensors[f"{DOWN}.g_idx"][0] = -2
    elif damage == "missing":
        del tensors[f"{DOWN}.scales"]
    else:
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(DOWN)}
    save_file(tensors, path)
    result = _call("eval", "--model", tmp_path / "m", "--tokens", checkpoint.parent / "tokens.npy")
    assert result.exit_code == 2 and DOWN in result.output and "Traceback" not in result.output
