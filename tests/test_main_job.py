"""The main job on a real model: both engines, uncompressed and compressed, against independent definitions."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "codecs"))
import reference

from megacomp.launch import engines
from megacomp.launch.evaluation import Evaluation, evaluate

UNCOMPRESSED_PERPLEXITY = 4.2089
"""Of stories260K over all 128 sequences, float32 (the checkpoint's README)."""
SEQUENCES = 12


def evaluate_both(model: str, tokens: torch.Tensor, tp: int, algorithm: str) -> list[Evaluation]:
    """One rank's part: every engine, with and without mxfp4."""
    communication = {"codec": "mxfp4", "algorithm": algorithm, "min_bytes": 0}
    config = {"megacomp": {"communication": communication, "backend": "reference"}}
    results = []
    for name in engines.ENGINES:
        with engines.build(model, name, tp=tp, dtype=torch.float32) as engine:
            results.append(evaluate(engine, tokens, config, prefills=1))
    return results


def emulated_perplexity(model_dir: Path, tokens: torch.Tensor, tp: int, algorithm: str) -> tuple[float, float]:
    """Uncompressed and MXFP4-compressed perplexity of tensor parallelism, in one process, by numpy and transformers.

    Every row-parallel layer (o_proj, down_proj) becomes ``tp`` partials over slices of its input; each is quantized
    by the numpy definition, and they are added in rank order; two-shot quantizes the sum once more.
    """
    import transformers

    model = transformers.LlamaForCausalLM.from_pretrained(model_dir, dtype=torch.float32)

    def quantize(x):
        quantized = reference.mx_quantize(x.flatten(0, -2).double().numpy(), "fp4_e2m1", 32)
        return torch.from_numpy(quantized).float().view_as(x)

    def compress(module, inputs, output):
        pieces = inputs[0].chunk(tp, dim=-1), module.weight.chunk(tp, dim=1)
        total = torch.zeros_like(output)
        for piece, weight in zip(*pieces, strict=True):
            total += quantize(piece @ weight.T)
        return quantize(total) if algorithm == "two_shot" else total

    def perplexity() -> float:
        loss, count = 0.0, 0
        with torch.no_grad():
            for batch in tokens.split(4):
                log = model(batch).logits[:, :-1].log_softmax(-1)
                loss -= log.gather(-1, batch[:, 1:, None]).double().sum().item()
                count += batch[:, 1:].numel()
        return float(np.exp(loss / count))

    plain = perplexity()
    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_hook(compress)
        layer.mlp.down_proj.register_forward_hook(compress)
    return plain, perplexity()


@pytest.mark.parametrize(("tp", "algorithm"), [(2, "one_shot"), (4, "one_shot"), (4, "two_shot")])
def test_compressed_perplexity_is_that_of_an_independent_emulation(ranks, data_dir, tp, algorithm):
    model = data_dir / "stories260K"
    tokens = torch.from_numpy(np.load(model / "tinystories_ids.npy")[:SEQUENCES])
    plain, compressed = emulated_perplexity(model, tokens, tp, algorithm)
    assert compressed > plain * 1.01
    for result in ranks.run(evaluate_both, str(model), tokens, tp, algorithm, world_size=tp)[0]:
        assert abs(result.baseline_perplexity - plain) < 1e-3
        assert abs(result.perplexity / compressed - 1) < 0.002
        assert result.bits_per_value == 5.0  # hidden 64: two scales, padded to 8 bytes
        assert 0.5 < result.top1_agreement < 1


def test_the_command_runs_the_whole_of_a_real_model(data_dir, tmp_path):
    """As a user would: one command, its own ranks, a report and the logits. Both engines start so in test_launchers."""
    from safetensors.torch import load_file

    model = data_dir / "stories260K"
    config = tmp_path / "ds.json"
    section = {"communication": {"codec": "int8", "min_bytes": 0}, "backend": "reference"}
    config.write_text(json.dumps({"dtype": "fp32", "tensor_parallel": {"tp_size": 2}, "megacomp": section}))
    command = [sys.executable, "-m", "megacomp.launch.eval", "--model", model, "--config", config]
    command += ["--tokens", model / "tinystories_ids.npy", "--engine", "megatron", "--tp", "2", "--dtype", "fp32"]
    command += ["--json", tmp_path / "report.json", "--logits-out", tmp_path / "logits.safetensors"]
    command += ["--batch-size", "16"]
    subprocess.run([str(part) for part in command], check=True, timeout=300, cwd=tmp_path)
    report = json.loads((tmp_path / "report.json").read_text())
    assert abs(report["baseline_perplexity"] - UNCOMPRESSED_PERPLEXITY) < 1e-3
    assert abs(report["perplexity"] / report["baseline_perplexity"] - 1) < 1e-3
    assert (report["engine"], report["tp"], report["codec"]) == ("megatron", 2, "int8")
    logits = load_file(tmp_path / "logits.safetensors")["logits"]
    tokens = torch.from_numpy(np.load(model / "tinystories_ids.npy"))
    assert logits.shape == (*tokens.shape, 512)
    log = logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None])
    assert abs(np.exp(-log.double().mean().item()) - report["perplexity"]) < 1e-4
