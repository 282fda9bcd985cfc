"""Partials of quantized row-parallel layers, encoded where they are computed: the bits of the layers that do not."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import quantized_models as models
import torch
import torch.distributed as dist
import transformers
import triton
from models import megatron_gpt, megatron_logits, tokens
from rank_pool import RankPool

import megacomp
from megacomp.codecs import block
from megacomp.collectives import hops
from megacomp.collectives.links import CollectiveLink
from megacomp.kernels import dequant_gemm
from megacomp.launch import engines
from megacomp.patches import adopting

pytestmark = pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="needs TRITON_INTERPRET=1")

LAYERS = 2
TOKENS = torch.randint(90, (1, 5), generator=torch.Generator().manual_seed(7))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint quantized in activation order."""
    folder = tmp_path_factory.mktemp("deferred")
    config = transformers.LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        tie_word_embeddings=False,
    )
    torch.manual_seed(1)
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "dense")
    models.quantize_model(folder / "dense", folder / "gptq", "gptq", group_size=16)
    return folder / "gptq"


def _counted(run: Any, deferred: bool) -> dict[str, Any]:
    """What `run` returns, and how often a codec was given a product to compute, and a tensor to encode."""
    with ExitStack() as stack:
        # As on a GPU.
        stack.enter_context(mock.patch.object(dequant_gemm, "resolve_gemm_backend", lambda *_: "triton"))
        if not deferred:
            stack.enter_context(mock.patch.object(adopting, "at_site", lambda: False))
        products, tensors = (
            stack.enter_context(mock.patch.object(block, name, wraps=getattr(block, name)))
            for name in ("dequant_gemm_encode", "encode")
        )
        return {"result": run(), "products": products.call_count, "tensors": tensors.call_count}


def _served(folder: Path, engine: str, communication: dict[str, Any], more: dict[str, Any]) -> list[dict[str, Any]]:
    with engines.build(folder, engine, tp=dist.get_world_size(), dtype=torch.float32) as built:
        found = []
        for deferred in (True, False):
            section = {"communication": {"min_bytes": 0, **communication}, "backend": "triton", **more}
            with megacomp.install({"megacomp": section}, model=built.module) as installation:
                got = _counted(lambda: built.logits(TOKENS), deferred)
                sites = installation.report().sites
                found.append({**got, "sites": {name: str(site) for name, site in sites.items()}})
        found.append(_counted(lambda: built.logits(TOKENS), True))
    return found


MXFP4 = {"codec": "mxfp4"}
NO_ATTENTION = {**MXFP4, "rules": [{"module": "attention", "codec": None}]}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
    "mxfp4": (MXFP4, {}, 2 * LAYERS),
    "int8, one of the sites": ({**NO_ATTENTION, "codec": "int8"}, {}, LAYERS),
    # In two steps, by the codec.
    "whole rows": ({"codec": "int4"}, {}, 2 * LAYERS),
    # Over gloo every owner's rows are encoded for themselves.
    "two-shot": ({**MXFP4, "algorithm": "two_shot"}, {}, 0),
    "chunks": ({**MXFP4, "pipeline_chunks": 2}, {}, 0),
    # The exact result is wanted as well.
    "guard": (MXFP4, {"guard": {"every": 1, "min_sqnr_db": -100}}, 0),
    "samples": (MXFP4, {"telemetry": {"sqnr_every": 1}}, 0),
    "nothing": ({"codec": None}, {}, 0),
}


# What travels is the same under both engines; where products are deferred is each engine's own.
@pytest.mark.parametrize(("engine", "case"), [*(("megatron", case) for case in CASES), ("deepspeed", "mxfp4")])
def test_real_ranks(ranks: RankPool, folder: Path, engine: str, case: str) -> None:
    communication, more, products = CASES[case]
    for deferred, plain, uninstalled in ranks.run(_served, folder, engine, communication, more):
        assert torch.equal(deferred["result"], plain["result"]) and deferred["sites"] == plain["sites"]
        assert deferred["products"] == products and plain["products"] == uninstalled["products"] == 0
        assert torch.equal(deferred["result"], uninstalled["result"]) is (communication["codec"] is None)
        if case in ("mxfp4", "int8, one of the sites"):
            assert deferred["tensors"] == 0 and plain["tensors"] == products


def _sequence_parallel(folder: Path) -> list[dict[str, Any]]:
    # Over collectives, as on a GPU: between pairs every owner's rows are encoded for themselves.
    link = mock.patch.object(hops, "link_for", lambda peers, device, channel: CollectiveLink(peers))
    with torch.no_grad(), link, megatron_gpt(sequence_parallel=True) as model:
        section = {"communication": {"codec": "int8", "min_bytes": 0}, "weights": {"checkpoint": str(folder)}}
        with megacomp.install({"megacomp": {**section, "backend": "triton"}}, model=model):
            return [_counted(lambda: megatron_logits(model, tokens()), deferred) for deferred in (True, False)]


def test_sequence_parallelism(ranks: RankPool, tmp_path: Path) -> None:
    for deferred, plain in ranks.run(_sequence_parallel, models.save_for_megatron(tmp_path)):
        assert torch.equal(deferred["result"], plain["result"])
        assert deferred["products"] > 0 == plain["products"]
        assert deferred["products"] + deferred["tensors"] == plain["tensors"]
