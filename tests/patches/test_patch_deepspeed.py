"""DeepSpeed AutoTP on two real ranks: what is compressed, what stays exact, and that nothing is left behind."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
import torch.distributed as dist
from models import HIDDEN, LAYERS, deepspeed_on_cpu, deepspeed_settings, llama, tokens
from rank_pool import RankPool

import megacomp
from megacomp.patches.deepspeed import DeepSpeed
from megacomp.policy import Site

pytest.importorskip("deepspeed")

SITES = {f"layers.{layer}.{module}" for layer in range(LAYERS) for module in ("attention", "mlp")}
# 16 rows of fp32, sent once to the other rank; int8 is one byte and a bf16 scale for 64 values, padded to 8.
ONE_FORWARD = (1, 16, 16 * (HIDDEN + 8), 16 * HIDDEN * 4)

LAYERS_MODULE = "deepspeed.module_inject.layers"
PATCHED = {
    "deepspeed.init_inference",
    f"{LAYERS_MODULE}.LinearAllreduce.forward",
    "megacomp.patches.deepspeed_layers.QuantizedLinearAllreduce.forward",
    f"{LAYERS_MODULE}.RowParallel.forward",
}

SUPPORTED = ">=0.17,<0.20"


def section(**communication: Any) -> dict[str, Any]:
    return {"communication": {"codec": "int8", "min_bytes": 0, **communication}, "backend": "reference"}


def originals() -> dict[str, Any]:
    """The raw objects behind every name that is patched."""
    found = {}
    for path in PATCHED:
        parent, _, name = path.rpartition(".")
        module, _, last = parent.rpartition(".")
        owner = getattr(importlib.import_module(module), last) if last[0].isupper() else importlib.import_module(parent)
        found[path] = vars(owner)[name]
    return found


def counters(report: megacomp.Report) -> dict[str, tuple[int, ...]]:
    return {name: (site.calls, site.rows, site.bytes_sent, site.plain_bytes) for name, site in report.sites.items()}


def reported_patches(report: megacomp.Report) -> set[str]:
    (deepspeed,) = (framework for framework in report.frameworks if framework.name == "deepspeed")
    return set(deepspeed.patches)


def sqnr_db(exact: torch.Tensor, result: torch.Tensor) -> float:
    return (10 * torch.log10(exact.square().sum() / (exact - result).square().sum())).item()


def _built_before(config: dict[str, Any], attach: bool) -> dict[str, Any]:
    import deepspeed

    with deepspeed_on_cpu(), torch.no_grad():
        engine = deepspeed.init_inference(llama(), deepspeed_settings())
        before = originals()
        exact = engine(tokens()).logits
        with megacomp.install({"megacomp": config}, model=engine if attach else None) as installation:
            compressed = engine(tokens()).logits
            replaced = {path for path, raw in originals().items() if raw is not before[path]}
        after = originals()
        again = engine(tokens()).logits
    report = installation.report()
    return {
        "replaced": replaced,
        "reported": {
            path for framework in report.frameworks for path in framework.patches if framework.name == "deepspeed"
        },
        "restored": all(after[path] is before[path] for path in before),
        "static": isinstance(after[f"{LAYERS_MODULE}.RowParallel.forward"], staticmethod),
        "same_afterwards": torch.equal(exact, again),
        "same_bits": compressed.numpy().tobytes(),
        "changed": not torch.equal(exact, compressed),
        "sqnr_db": sqnr_db(exact, compressed),
        "counters": counters(report),
        "declined": {name: dict(site.declined) for name, site in report.sites.items() if site.declined},
        "not_covered": dict(report.not_covered),
    }


def test_a_model_built_before(ranks: RankPool) -> None:
    first, second = ranks.run(_built_before, section(), True)
    assert first["same_bits"] == second["same_bits"]
    assert first["changed"] and first["sqnr_db"] > 30
    assert first["replaced"] == first["reported"] == PATCHED
    assert first["restored"] and first["static"] and first["same_afterwards"]
    assert first["counters"] == dict.fromkeys(SITES, ONE_FORWARD)
    assert first["declined"] == {}
    assert list(first["not_covered"]) == ["module.lm_head"]


def test_a_model_built_before_and_not_given_is_known_by_module(ranks: RankPool) -> None:
    config = section(rules=[{"module": "mlp", "codec": None}])
    first, second = ranks.run(_built_before, config, False)
    assert first["same_bits"] == second["same_bits"]
    assert first["counters"]["attention"] == tuple(LAYERS * count for count in ONE_FORWARD)
    assert first["declined"] == {"mlp": {"exact": LAYERS}}


def test_without_the_model_rules_by_layer_are_not_guessed(ranks: RankPool) -> None:
    first, _ = ranks.run(_built_before, section(rules=[{"layers": "0", "codec": None}]), False)
    assert not first["changed"]
    assert first["declined"] == {module: {"unknown_layer": LAYERS} for module in ("attention", "mlp")}


def _built_after(config: dict[str, Any], own_section: dict[str, Any] | None) -> dict[str, Any]:
    """An unmodified script: it only calls deepspeed.init_inference, perhaps with our section in its settings."""
    import deepspeed

    with deepspeed_on_cpu(), torch.no_grad():
        settings = deepspeed_settings(**(own_section or {}))
        given = repr(settings)
        with megacomp.install({"megacomp": config}) as installation:
            engine = deepspeed.init_inference(llama(), settings)
            compressed = engine(tokens()).logits
        exact = engine(tokens()).logits
    return {
        "untouched": repr(settings) == given,
        "changed": not torch.equal(exact, compressed),
        "counters": counters(installation.report()),
    }


@pytest.mark.parametrize("own_section", [None, section()])
def test_a_model_built_after(ranks: RankPool, own_section: dict[str, Any] | None) -> None:
    config = section(rules=[{"layers": "-1", "codec": None}])
    if own_section is not None:
        own_section = config
    first, _ = ranks.run(_built_after, config, own_section)
    assert first["untouched"] and first["changed"]
    last = {f"layers.{LAYERS - 1}.{module}" for module in ("attention", "mlp")}
    assert first["counters"] == {site: (0,) * 4 if site in last else ONE_FORWARD for site in SITES}


def _gradients_enabled() -> dict[str, Any]:
    import deepspeed

    with deepspeed_on_cpu():
        engine = deepspeed.init_inference(llama(), deepspeed_settings())
        exact = engine(tokens()).logits
        with megacomp.install({"megacomp": section()}, model=engine) as installation:
            equal = torch.equal(exact, engine(tokens()).logits)
            engine.module.generate(tokens(batch=1), max_new_tokens=2, do_sample=False)
        report = installation.report()
    return {
        "equal": equal,
        "calls": {site.calls for site in report.sites.values()},
        "declined": {frozenset(site.declined.items()) for site in report.sites.values()},
    }


def test_gradients_stay_exact_and_generation_is_compressed(ranks: RankPool) -> None:
    first, _ = ranks.run(_gradients_enabled)
    assert first == {"equal": True, "calls": {2}, "declined": {frozenset({("grad_enabled", 1)})}}


def _row_parallel_outside_of_layers() -> dict[str, Any]:
    from deepspeed.module_inject.layers import RowParallel

    with deepspeed_on_cpu(), torch.no_grad(), megacomp.install({"megacomp": section()}) as installation:
        import deepspeed

        deepspeed.init_distributed("gloo")
        x = torch.arange(64.0)
        total = RowParallel.apply(dist.group.WORLD, x.clone(), True)
        alone = RowParallel.apply(None, x, True)
        report = installation.report()
    return {"total": torch.equal(total, 2 * x), "alone": torch.equal(alone, x), "outside": report.outside}


def test_row_parallel_sums_of_others_stay_exact(ranks: RankPool) -> None:
    first, _ = ranks.run(_row_parallel_outside_of_layers)
    assert first == {"total": True, "alone": True, "outside": 1}


def _unsplit_model() -> dict[str, Any]:
    import deepspeed

    with deepspeed_on_cpu(), torch.no_grad(), megacomp.install({"megacomp": section()}) as installation:
        engine = deepspeed.init_inference(llama(), deepspeed_settings())
        equal = torch.equal(engine(tokens()).logits, llama()(tokens()).logits)
        return {"equal": equal, "sites": dict(installation.report().sites)}


def test_a_model_that_is_not_split_runs_as_it_is(ranks: RankPool) -> None:
    assert ranks.run(_unsplit_model, world_size=1) == [{"equal": True, "sites": {}}]


def _sites_of(*names: str) -> dict[str, Site]:
    """The sites of a model whose row-parallel linears have these names."""
    from deepspeed.module_inject.layers import LinearAllreduce

    model = torch.nn.Module()
    for name in names:
        *parents, last = name.split(".")
        owner = model
        for parent in parents:
            if not hasattr(owner, parent):
                owner.add_module(parent, torch.nn.Module())
            owner = getattr(owner, parent)
        # Only its class and its name matter; AutoTP's own constructor wants a model to cut.
        linear = LinearAllreduce.__new__(LinearAllreduce)
        torch.nn.Module.__init__(linear)
        owner.add_module(last, linear)
    found = DeepSpeed().sites(model)
    return {name: found[module] for name, module in model.named_modules() if module in found}


@pytest.mark.parametrize(
    ("name", "site"),
    [
        ("model.layers.3.self_attn.o_proj", Site("layers.3.attention", "attention", 3, 4)),
        ("model.layers.3.mlp.down_proj", Site("layers.3.mlp", "mlp", 3, 4)),
        ("model.layers.0.mlp.experts.5.down_proj", Site("layers.0.mlp", "mlp", 0, 1)),
        ("model.layers.0.block_sparse_moe.experts.1.w2", Site("layers.0.mlp", "mlp", 0, 1)),
        ("transformer.h.1.attn.c_proj", Site("layers.1.attention", "attention", 1, 2)),
        ("transformer.h.1.mlp.c_proj", Site("layers.1.mlp", "mlp", 1, 2)),
        ("transformer.h.0.mlp.dense_4h_to_h", Site("layers.0.mlp", "mlp", 0, 1)),
        ("gpt_neox.layers.0.attention.dense", Site("layers.0.attention", "attention", 0, 1)),
        ("model.decoder.layers.2.fc2", Site("layers.2.mlp", "mlp", 2, 3)),
        ("bert.encoder.layer.1.attention.output.dense", Site("layers.1.attention", "attention", 1, 2)),
        ("bert.encoder.layer.1.output.dense", Site("layers.1.mlp", "mlp", 1, 2)),
        ("decoder.block.4.layer.0.SelfAttention.o", Site("layers.4.attention", "attention", 4, 5)),
        ("decoder.block.4.layer.1.DenseReluDense.wo", Site("layers.4.mlp", "mlp", 4, 5)),
        ("backbone.layers.0.mixer.out_proj", Site("layers.0.mixer.out_proj", None, 0, 1)),
    ],
)
def test_sites_are_named_alike_for_every_architecture(name: str, site: Site) -> None:
    assert _sites_of(name) == {name: site}


def test_stacks_beside_one_another_keep_their_paths() -> None:
    names = ["model.layers.1.mlp.down_proj", "vision.blocks.0.mlp.fc2"]
    assert _sites_of(*names) == {
        names[0]: Site("model.layers.1.mlp", "mlp", 1, 2),
        names[1]: Site("vision.blocks.0.mlp", "mlp", 0, 1),
    }


def test_linears_outside_of_layers_are_no_sites() -> None:
    assert _sites_of("lm_head", "projector.linear") == {}


def _unsupported(version: str | None) -> tuple[str, bool]:
    """What installing says of a version, or (None) of one that lacks a function; and whether anything changed."""
    from deepspeed.module_inject.layers import LinearAllreduce

    before = originals()
    with pytest.MonkeyPatch.context() as patch:
        if version is None:
            patch.delattr(LinearAllreduce, "forward")
        else:
            patch.setattr("deepspeed.__version__", version)
        try:
            megacomp.install({"megacomp": section()}).uninstall()
        except (megacomp.UnsupportedVersionError, megacomp.MissingSymbolError) as error:
            message = str(error)
    return message, originals() == before


def test_versions_that_do_not_work_are_refused_by_naming_those_that_do(ranks: RankPool) -> None:
    for version in ("0.1.0", "0.99.0"):
        ((message, unchanged),) = ranks.run(_unsupported, version, world_size=1)
        assert message == f"deepspeed {version} is not supported; megacomp works with deepspeed {SUPPORTED}"
        assert unchanged


def test_a_missing_function_is_refused_by_its_full_path(ranks: RankPool) -> None:
    ((message, unchanged),) = ranks.run(_unsupported, None, world_size=1)
    assert "deepspeed.module_inject.layers.LinearAllreduce.forward" in message
    assert SUPPORTED in message
    assert unchanged
