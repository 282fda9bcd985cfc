"""Models with GPTQ weights under both engines, on one, two and four ranks, against the tools' own logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import quantized_models as models
import torch
import torch.distributed as dist
from engines import tiny_models
from rank_pool import RankPool
from safetensors.torch import load_file

from megacomp.gptq import QuantizedLinear
from megacomp.launch import engines

ENGINES = ("deepspeed", "megatron")
DATA = ("gptq-v1-bytellama-h256-g32-sym", "ct-bytellama-h256-g32-asym")


def _logits(folders: list[Path], engine: str, tokens: torch.Tensor, order: str) -> list[dict[str, Any]]:
    results = []
    for folder in folders:
        with engines.build(folder, engine, tp=dist.get_world_size(), dtype=torch.float32, order=order) as built:
            held = {name: m for name, m in built.module.named_modules() if isinstance(m, QuantizedLinear)}
            results.append(
                {
                    "logits": built.logits(tokens),
                    "tokens": built.generate(tokens[:1], 4).tokens,
                    "orders": {name: module.order for name, module in held.items()},
                    "dense": sum(p.numel() for name, p in built.module.named_parameters() if "proj" in name),
                }
            )
    return results


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("engine", ENGINES)
def test_logits_are_those_of_the_tools_that_quantized(ranks: RankPool, data_dir: Path, engine: str, tp: int) -> None:
    folders = [data_dir / name for name in DATA]
    references = [load_file(folder / "reference.safetensors") for folder in folders]
    tokens = references[0]["input_ids"]
    assert torch.equal(tokens, references[1]["input_ids"])
    for results in ranks.run(_logits, folders, engine, tokens, "tp_aware", world_size=tp):
        for got, reference in zip(results, references, strict=True):
            assert (got["logits"] - reference["logits"]).abs().max() < 5e-5
            mlps = {order for name, order in got["orders"].items() if "mlp" in name}
            attention = {order for name, order in got["orders"].items() if "mlp" not in name}
            assert (mlps, attention, got["dense"]) == ({"tp_aware"}, {"local"}, 0)


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small models with random codes, each beside its dense equivalent: "llama-gptq" and "llama-dense" and so on."""
    folder = tmp_path_factory.mktemp("quantized")
    for kind, layout, options in (
        ("llama_biased", "gptq_v2", {"group_size": 16}),
        ("llama_mlp_biased", "pack-quantized", {"bits": 8, "group_size": 32}),
        ("qwen2", "gptq", {"group_size": -1, "symmetric": True}),
        ("mistral", "pack-quantized", {"group_size": 16, "left_out": ("0.self_attn.o_proj", "1.mlp.down_proj")}),
    ):
        tiny_models.save(kind, folder / f"{kind}-dense")
        models.quantize_model(folder / f"{kind}-dense", folder / f"{kind}-quantized", layout, **options)
    return folder


KINDS = ("llama_biased", "llama_mlp_biased", "qwen2", "mistral")


@pytest.mark.parametrize("order", ["tp_aware", "local"])
@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("engine", ENGINES)
def test_every_kind_of_model_equals_its_dense_equivalent(
    ranks: RankPool, zoo: Path, engine: str, tp: int, order: str
) -> None:
    import transformers

    tokens = torch.randint(90, (2, 24), generator=torch.Generator().manual_seed(7))
    by_rank = ranks.run(_logits, [zoo / f"{kind}-quantized" for kind in KINDS], engine, tokens, order, world_size=tp)
    for index, kind in enumerate(KINDS):
        dense = transformers.AutoModelForCausalLM.from_pretrained(zoo / f"{kind}-dense", dtype=torch.float32)
        with torch.no_grad():
            expected = dense(tokens).logits
            continued = dense.generate(tokens[:1], max_new_tokens=4, do_sample=False)[0, 24:].tolist()
        for results in by_rank:
            torch.testing.assert_close(results[index]["logits"], expected, atol=1e-3, rtol=1e-4, msg=kind)
            assert results[index]["tokens"] == continued
    # 88 inner features over 2 or 4 ranks: 44 and 22 do not fill words of 8, so the order is a local one.
    orders = [by_rank[0][index]["orders"] for index in range(len(KINDS))]
    if order == "local":
        assert {one for found in orders for one in found.values()} == {"local"}
    else:
        assert ("tp_aware" in orders[0].values()) is (tp == 1)
