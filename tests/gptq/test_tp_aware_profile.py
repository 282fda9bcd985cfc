"""What a forward of a TP-ordered MLP does beside multiplying, as the profiler sees it: one collective, nothing else."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import quantized_models as models
import torch
import transformers
from rank_pool import RankPool
from typer.testing import CliRunner

from megacomp.kernels import dequant_gemm
from megacomp.kernels.compiled import compiler_problem
from megacomp.launch import engines

GATHERS = ("aten::index_select", "aten::index", "aten::gather", "aten::take")
COLLECTIVES = ("c10d::allreduce_", "c10d::allgather_", "c10d::reduce_scatter_", "c10d::alltoall_base_")


def _profiled(forward: Any) -> dict[str, int]:
    """Calls of each collective and each gathering operator in one forward."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile, torch.inference_mode():
        forward()
    counts = Counter(event.name for event in profile.events())
    return {name: counts[name] for name in (*GATHERS, *COLLECTIVES) if counts[name]}


@mock.patch.object(dequant_gemm, "COMPILED_MIN_VALUES", 0)
def _schemes() -> dict[str, dict[str, int]]:
    from benchmarks import tp_dequant

    up = tp_dequant.Linear.random(256, 512, 32, seed=1)
    down = tp_dequant.Linear.random(512, 256, 32, seed=2)
    x = torch.randn(100, 256, generator=torch.Generator().manual_seed(1)).bfloat16()
    seen, results = {}, {}
    for name, scheme in tp_dequant.SCHEMES.items():
        mlp = scheme(up, down, torch.distributed.get_rank(), torch.distributed.get_world_size())
        with torch.inference_mode():
            results[name] = mlp.forward(x).float()
        seen[name] = _profiled(lambda mlp=mlp: mlp.forward(x))
    for result in results.values():
        assert (result - results["bf16"]).norm() < 0.02 * results["bf16"].norm()
    return seen


@mock.patch.object(dequant_gemm, "COMPILED_MIN_VALUES", 0)
def _engine_mlp(folder: Path, engine: str) -> dict[str, int]:
    with engines.build(folder, engine, tp=torch.distributed.get_world_size(), dtype=torch.float32) as built:
        module: Any = built.module
        mlp = module.model.layers[0].mlp if engine == "deepspeed" else module.decoder.layers[0].mlp
        x = torch.randn(4, 3, 64)
        with torch.inference_mode():
            mlp(x)
        return _profiled(lambda: mlp(x))


@pytest.fixture(autouse=True)
def _compiler() -> None:
    # The definition gathers by an operator of its own; what is compiled or written for a GPU does it in the kernel.
    if problem := compiler_problem():
        pytest.skip(problem)


def test_the_schemes_of_the_benchmark(ranks: RankPool) -> None:
    for seen in ranks.run(_schemes):
        assert seen["tp_aware"] == {"c10d::allreduce_": 1}
        assert seen["naive"] == {"aten::index_select": 1, "c10d::allgather_": 1, "c10d::allreduce_": 1}
        assert seen["replicated"] == {"aten::index_select": 1, "c10d::allreduce_": 1}


@pytest.mark.parametrize("engine", ["deepspeed", "megatron"])
def test_the_mlps_of_the_engines(ranks: RankPool, tmp_path: Path, engine: str) -> None:
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "dense")
    models.quantize_model(tmp_path / "dense", tmp_path / "gptq", "gptq", group_size=16)
    for seen in ranks.run(_engine_mlp, tmp_path / "gptq", engine):
        assert seen == {"c10d::allreduce_": 1}


def test_the_benchmark_records_what_it_measures(tmp_path: Path, no_launcher: None) -> None:
    from benchmarks import tp_dequant

    out = tmp_path / "out.json"
    arguments = ["--tp", "1", "--scale", "16", "--repeats", "1", "--out", str(out)]
    result = CliRunner().invoke(tp_dequant.app, arguments)
    assert result.exit_code == 0, result.output
    written = json.loads(out.read_text())
    assert [(row["model"], row["rows"]) for row in written["rows"]] == [
        (model, rows) for model in tp_dequant.SHAPES for rows in tp_dequant.ROWS
    ]
    for row in written["rows"]:
        schemes = row["schemes"]
        assert set(schemes) == set(tp_dequant.SCHEMES)
        assert (schemes["naive"]["collectives"], schemes["tp_aware"]["collectives"]) == (2, 1)
        assert schemes["tp_aware"]["weight_bytes"] < 0.3 * schemes["bf16"]["weight_bytes"]
        assert schemes["replicated"]["weight_bytes"] > schemes["tp_aware"]["weight_bytes"]
