"""Layers of Transformer Engine inside of Megatron-core on real ranks: what is compressed, what is not, what is left.

Transformer Engine needs a GPU. Here a package on the path stands for it: `stand_ins/transformer_engine` says what of
the real one was read, of which versions, and asserts what the real layers rely on. Where the real package is installed
(`make compat` does that), its own Python code runs instead, its compiled part stood in for.
"""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from models import HIDDEN, LAYERS, megatron_gpt, megatron_logits, tokens
from rank_pool import RankPool

import megacomp

pytest.importorskip("megatron")

# What is put on the path: the stand-in, or what loads the real package.
FOLDER = (
    Path(__file__).parent / "stand_ins"
    if importlib.util.find_spec("transformer_engine") is None
    else Path(__file__).parents[1] / "compat"
)

SITES = {f"layers.{layer}.{module}" for layer in range(LAYERS) for module in ("attention", "mlp")}
ROWS = 16
GATHERED = ["all_reduce", "reduce_scatter", "all_gather"]

LINEAR = "transformer_engine.pytorch.module.linear"
LAYERNORM_LINEAR = "transformer_engine.pytorch.module.layernorm_linear"
ALWAYS_PATCHED = {f"{LINEAR}.Linear.forward", f"{LINEAR}.allreduce", f"{LINEAR}.reduce_scatter_along_first_dim"}
FOR_ALL_GATHER = {
    f"{LAYERNORM_LINEAR}.LayerNormLinear.forward",
    f"{LINEAR}.gather_along_first_dim",
    f"{LAYERNORM_LINEAR}.gather_along_first_dim",
}


@pytest.fixture(scope="module")
def engine_ranks() -> Iterator[RankPool]:
    """Processes that import Megatron-core with Transformer Engine beside it; others have imported it without."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        pool = RankPool()
        yield pool
        pool.close()


def _load_transformer_engine() -> None:
    on_cpu = importlib.util.find_spec("transformer_engine_on_cpu")
    if on_cpu is not None:
        importlib.import_module("transformer_engine_on_cpu").load()


def section(**communication: Any) -> dict[str, Any]:
    settings = {"codec": "int8", "min_bytes": 0, **communication}
    return {"megacomp": {"communication": settings, "backend": "reference"}}


def raw(path: str) -> Any:
    """The object that a module or class itself holds under the last name of `path`."""
    parent, _, name = path.rpartition(".")
    module, _, last = parent.rpartition(".")
    owner = importlib.import_module(parent) if last[0].islower() else getattr(importlib.import_module(module), last)
    return vars(owner)[name]


def counters(report: megacomp.Report) -> dict[str, tuple[Any, ...]]:
    return {name: (site.calls, site.rows, site.bytes_sent, site.plain_bytes) for name, site in report.sites.items()}


def patched(report: megacomp.Report, framework: str) -> set[str]:
    return {path for one in report.frameworks if one.name == framework for path in one.patches}


def sqnr_db(exact: torch.Tensor, result: torch.Tensor) -> float:
    return (10 * torch.log10(exact.square().sum() / (exact - result).square().sum())).item()


def classes(column: str) -> dict[str, type]:
    from megatron.core.extensions import transformer_engine

    return {
        "ColumnParallelLinear": getattr(transformer_engine, column),
        "RowParallelLinear": transformer_engine.TERowParallelLinear,
    }


def _around_an_installation(
    config: dict[str, Any], column: str, model_settings: dict[str, Any], attach: bool = True
) -> dict[str, Any]:
    _load_transformer_engine()
    with megatron_gpt(linears=classes(column), **model_settings) as model, torch.no_grad():
        ids = tokens()
        before = {path: raw(path) for path in ALWAYS_PATCHED | FOR_ALL_GATHER}
        exact = megatron_logits(model, ids)
        with megacomp.install(config, model=model if attach else None) as installation:
            compressed = megatron_logits(model, ids)
            replaced = {path for path, function in before.items() if raw(path) is not function}
        restored = all(raw(path) is function for path, function in before.items())
        again = megatron_logits(model, ids)
    report = installation.report()
    return {
        "replaced": replaced,
        "reported": patched(report, "transformer-engine"),
        "restored": restored,
        "same_afterwards": torch.equal(exact, again),
        "same_bits": compressed.numpy().tobytes(),
        "sqnr_db": sqnr_db(exact, compressed),
        "counters": counters(report),
        "declined": {name: dict(site.declined) for name, site in report.sites.items() if site.declined},
        "not_covered": dict(report.not_covered),
    }


@pytest.mark.parametrize(("world_size", "attach"), [(2, True), (2, False), (4, True)])
def test_row_parallel_outputs_are_compressed(engine_ranks: RankPool, world_size: int, attach: bool) -> None:
    results = engine_ranks.run(
        _around_an_installation, section(), "TEColumnParallelLinear", {}, attach, world_size=world_size
    )
    first = results[0]
    assert all(result["same_bits"] == first["same_bits"] for result in results)
    assert 30 < first["sqnr_db"] < 60
    assert first["replaced"] == first["reported"] == ALWAYS_PATCHED
    assert first["restored"] and first["same_afterwards"]
    assert first["declined"] == first["not_covered"] == {}
    # fp32 rows to every other rank; int8 is one byte and a bf16 scale for 64 values, padded to 8.
    peers = world_size - 1
    expected = (1, ROWS, peers * ROWS * (HIDDEN + 8), peers * ROWS * HIDDEN * 4)
    if world_size == 2:
        assert first["counters"] == dict.fromkeys(SITES, expected)
    assert {name: calls for name, (calls, *_) in first["counters"].items()} == dict.fromkeys(SITES, 1)


@pytest.mark.parametrize("world_size", [2, 4])
def test_sequence_parallel_outputs_are_reduce_scattered(engine_ranks: RankPool, world_size: int) -> None:
    results = engine_ranks.run(
        _around_an_installation,
        section(),
        "TEColumnParallelLinear",
        {"sequence_parallel": True},
        world_size=world_size,
    )
    first = results[0]
    assert all(result["same_bits"] == first["same_bits"] for result in results)
    assert 30 < first["sqnr_db"] < 60
    assert first["restored"] and first["same_afterwards"]
    sent = ROWS * (world_size - 1) // world_size
    assert first["counters"] == dict.fromkeys(SITES, (1, ROWS, sent * (HIDDEN + 8), sent * HIDDEN * 4))


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("column", ["TEColumnParallelLinear", "TELayerNormColumnParallelLinear"])
def test_gathers_are_compressed_on_request(engine_ranks: RankPool, column: str, world_size: int) -> None:
    results = engine_ranks.run(
        _around_an_installation,
        section(collectives=GATHERED),
        column,
        {"sequence_parallel": True},
        world_size=world_size,
    )
    first = results[0]
    assert all(result["same_bits"] == first["same_bits"] for result in results)
    assert 28 < first["sqnr_db"] < 60
    assert first["replaced"] == first["reported"] == ALWAYS_PATCHED | FOR_ALL_GATHER
    assert first["restored"] and first["same_afterwards"]
    own = ROWS // world_size
    sent = 2 * (world_size - 1) * own
    assert first["counters"] == dict.fromkeys(SITES, (2, ROWS + own, sent * (HIDDEN + 8), sent * HIDDEN * 4))


def _biases(sequence_parallel: bool) -> dict[str, Any]:
    """One row-parallel layer with a bias, which it adds itself or returns."""
    _load_transformer_engine()
    from megatron.core.extensions.transformer_engine import TERowParallelLinear

    found = {}
    with megatron_gpt(sequence_parallel=sequence_parallel) as model, torch.no_grad():
        for skip in (False, True):
            layer = TERowParallelLinear(
                HIDDEN,
                HIDDEN,
                config=model.config,
                init_method=torch.nn.init.normal_,
                bias=True,
                input_is_parallel=True,
                skip_bias_add=skip,
                is_expert=False,
            ).eval()
            layer.bias.copy_(torch.arange(HIDDEN))
            model.decoder.layers[0].mlp.linear_fc2 = layer
            x = torch.randn(8, 2, HIDDEN // dist.get_world_size(), generator=torch.Generator().manual_seed(3))
            exact, _ = layer(x)
            with megacomp.install(section(), model=model) as installation:
                result, returned = layer(x)
                of_zeros, _ = layer(torch.zeros_like(x))
                calls = installation.report().sites["layers.0.mlp"].calls
            bias = torch.zeros(HIDDEN) if skip else layer.bias
            found[skip] = {
                "calls": calls,
                "sqnr_db": sqnr_db(exact - bias, result - bias),
                "once": torch.equal(of_zeros, bias.expand_as(of_zeros)),
                "returned": returned is not None and torch.equal(returned, layer.bias),
            }
    return found


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_a_bias_is_added_once(engine_ranks: RankPool, sequence_parallel: bool) -> None:
    for found in engine_ranks.run(_biases, sequence_parallel):
        for skip, seen in found.items():
            assert seen["calls"] == 2
            assert seen["sqnr_db"] > 35
            assert seen["once"]
            assert seen["returned"] is skip


def _with_gradients() -> dict[str, Any]:
    _load_transformer_engine()
    with megatron_gpt(linears=classes("TEColumnParallelLinear")) as model:
        model.requires_grad_(True)
        ids = tokens()
        exact = megatron_logits(model, ids)
        with megacomp.install(section(collectives=GATHERED), model=model) as installation:
            installed = megatron_logits(model, ids)
    report = installation.report()
    return {
        "equal": torch.equal(exact, installed),
        "wants_gradients": installed.requires_grad,
        "calls": report.calls,
        "declined": {name: dict(site.declined) for name, site in report.sites.items()},
    }


def test_with_gradients_everything_stays_exact(engine_ranks: RankPool) -> None:
    first, _ = engine_ranks.run(_with_gradients)
    assert first["equal"] and first["wants_gradients"]
    assert first["calls"] == 0
    assert first["declined"] == {site: {"grad_enabled": 1} for site in SITES}


class _Quantized(torch.Tensor):
    """Like Transformer Engine's quantized tensors, a class of its own."""


def _what_is_not_a_plain_message() -> dict[str, Any]:
    """Calls inside of a layer at a site that the original functions are to have."""
    _load_transformer_engine()
    from transformer_engine.pytorch.module import linear

    seen: list[str] = []

    def remember(name: str) -> Callable[..., Any]:
        def function(inp: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            seen.append(name)
            return inp, None

        return function

    names = ("allreduce", "reduce_scatter_along_first_dim", "gather_along_first_dim")
    with (
        megatron_gpt(linears=classes("TEColumnParallelLinear")) as model,
        mock.patch.multiple(linear, **{name: remember(name) for name in names}),
        torch.no_grad(),
        megacomp.install(section(collectives=GATHERED), model=model) as installation,
    ):
        reduce, scatter, gather = (getattr(linear, name) for name in names)
        x, group = torch.ones(4, 8), dist.group.WORLD
        quantized = x.as_subclass(_Quantized)

        def calls(layer: torch.nn.Module) -> None:
            reduce(x, group, async_op=True)
            scatter(x, group, async_op=True)
            gather(x, group, async_op=True)
            gather(x, group, quantizer=object())
            reduce(x)
            reduce(quantized, group)
            gather(quantized, group)

        from megacomp.installation import _registry

        assert _registry.active is not None
        _registry.active.door.inside(model.decoder.layers[0].mlp.linear_fc2, calls)
        site = installation.report().sites["layers.0.mlp"]
    return {"seen": seen, "calls": site.calls, "declined": dict(site.declined)}


def test_what_is_asynchronous_or_quantized_is_left_to_the_originals(engine_ranks: RankPool) -> None:
    first, _ = engine_ranks.run(_what_is_not_a_plain_message)
    reduce, scatter, gather = ("allreduce", "reduce_scatter_along_first_dim", "gather_along_first_dim")
    assert first["seen"] == [reduce, scatter, gather, gather, reduce, reduce, gather]
    assert first["calls"] == 0
    assert first["declined"] == {"subclass": 2}


def _not_covered() -> dict[str, str]:
    _load_transformer_engine()

    class LayerNormMLP(torch.nn.Module):
        """Stands for Transformer Engine's."""

    class TEFusedMLP(torch.nn.Module):
        """Stands for Megatron's."""

    with megatron_gpt(linears=classes("TEColumnParallelLinear")) as model:
        first, second, third = model.decoder.layers
        first.self_attention.linear_proj.ub_overlap_rs_fprop = True
        first.mlp.linear_fc2.symmetric_ar_type = "one_shot"
        second.mlp = LayerNormMLP()
        fused = TEFusedMLP()
        fused.linear_fc2 = third.mlp.linear_fc2
        third.mlp = fused
        with megacomp.install(section(), model=model) as installation:
            report = installation.report()
    return {**report.not_covered, "sites": ", ".join(report.sites)}


def test_what_reduces_unseen_is_reported(engine_ranks: RankPool) -> None:
    found, _ = engine_ranks.run(_not_covered)
    sites = found.pop("sites")
    assert "layers.2.mlp" not in sites and "layers.2.attention" in sites
    assert {name: why.partition(":")[0] for name, why in found.items()} == {
        "decoder.layers.0.self_attention.linear_proj": "TERowParallelLinear",
        "decoder.layers.0.mlp.linear_fc2": "TERowParallelLinear",
        "decoder.layers.1.mlp": "LayerNormMLP",
        "decoder.layers.2.mlp": "TEFusedMLP",
    }
    assert "tp_comm_overlap" in found["decoder.layers.0.self_attention.linear_proj"]
    assert "symmetric_ar_type" in found["decoder.layers.0.mlp.linear_fc2"]


INFERENCE = "megatron.core.tensor_parallel.inference_layers"


class _NoSymmetricMemory:
    """The buffer of a machine without NVLink."""

    @staticmethod
    def maybe_get_tensor(*_: Any, **__: Any) -> dict[str, None]:
        return {"tensor": None, "handle": None}


def _inference_layers(config: dict[str, Any]) -> dict[str, Any] | None:
    """Megatron's inference layers, which reduce over NCCL where they have no symmetric memory; None if it has none."""
    _load_transformer_engine()
    if importlib.util.find_spec(INFERENCE) is None:
        return None
    module = importlib.import_module(INFERENCE)
    # 0.16 and 0.17 ask a function, later ones a class.
    asked = "get_global_symmetric_memory_buffer"
    buffers = (
        mock.patch.object(module, asked, _NoSymmetricMemory)
        if hasattr(module, asked)
        else mock.patch.object(module.SymmetricMemoryManager, "get_buffer", lambda *_, **__: _NoSymmetricMemory)
    )
    linears = {
        "ColumnParallelLinear": module.InferenceLayerNormColumnParallelLinear,
        "RowParallelLinear": module.InferenceRowParallelLinear,
    }
    with (
        buffers,
        mock.patch.object(
            module, "_te_rms_norm_kernel", lambda x, weight, eps: torch.rms_norm(x, weight.shape, weight, eps)
        ),
        mock.patch("torch.cuda.get_device_properties", lambda *_: mock.Mock(major=8)),
        megatron_gpt(linears=linears, sequence_parallel=True) as model,
        torch.no_grad(),
    ):
        ids = tokens()
        exact = megatron_logits(model, ids)
        before = dict(vars(module))
        with megacomp.install(config, model=model) as installation:
            compressed = megatron_logits(model, ids)
        restored = all(vars(module)[name] is value for name, value in before.items())
        again = megatron_logits(model, ids)
    report = installation.report()
    return {
        "patched": {path for path in patched(report, "megatron-core") if path.startswith(INFERENCE)},
        "restored": restored and torch.equal(exact, again),
        "same_bits": compressed.numpy().tobytes(),
        "sqnr_db": sqnr_db(exact, compressed),
        "counters": counters(report),
        "not_covered": dict(report.not_covered),
    }


@pytest.mark.parametrize("gathered", [False, True])
def test_inference_layers_are_compressed_where_they_have_no_symmetric_memory(
    engine_ranks: RankPool, gathered: bool
) -> None:
    first, second = engine_ranks.run(_inference_layers, section(collectives=GATHERED if gathered else GATHERED[:2]))
    if first is None:
        pytest.skip("this version of Megatron-core has no inference layers")
    assert first["same_bits"] == second["same_bits"]
    assert 28 < first["sqnr_db"] < 60
    assert first["restored"]
    calls = 2 if gathered else 1
    assert first["counters"] == dict.fromkeys(
        SITES, (calls, 24 if gathered else 16, calls * 8 * (HIDDEN + 8), calls * 8 * HIDDEN * 4)
    )
    assert {f"{INFERENCE}.InferenceRowParallelLinear.forward", f"{INFERENCE}.reduce_scatter_along_first_dim"} <= (
        first["patched"]
    )
    assert (f"{INFERENCE}.gather_along_first_dim" in first["patched"]) is gathered
    # Where they have it, they do not come to the door, and the report says so.
    rows = {
        f"decoder.layers.{layer}.{path}"
        for layer in range(LAYERS)
        for path in ("self_attention.linear_proj", "mlp.linear_fc2")
    }
    assert set(first["not_covered"]) == rows
    assert all("symmetric memory" in why for why in first["not_covered"].values())


def _unsupported(version: str) -> tuple[str, bool]:
    _load_transformer_engine()
    import transformer_engine.pytorch  # noqa: F401

    before = {path: raw(path) for path in ALWAYS_PATCHED}
    with mock.patch("importlib.metadata.version", lambda name: version), pytest.raises(RuntimeError) as caught:
        megacomp.install(section())
    assert isinstance(caught.value, megacomp.UnsupportedVersionError)
    return str(caught.value), all(raw(path) is function for path, function in before.items())


def test_versions_out_of_range_are_refused(engine_ranks: RankPool) -> None:
    for version in ("1.12.0", "3.0.0"):
        ((message, unchanged),) = engine_ranks.run(_unsupported, version, world_size=1)
        assert message == (
            f"transformer-engine {version} is not supported; megacomp works with transformer-engine >=1.13,<3"
        )
        assert unchanged


SCRIPT = """
import importlib.util
import sys
import megacomp

installation = megacomp.install({"megacomp": {}})
assert "transformer_engine" not in sys.modules
loader = importlib.util.find_spec("transformer_engine_on_cpu")
if loader is not None:
    importlib.import_module(loader.name).load()
from megatron.core.extensions.transformer_engine import TERowParallelLinear
from transformer_engine.pytorch.module import linear
names = ("allreduce", "reduce_scatter_along_first_dim")
replaced = [getattr(linear, name) for name in names]
assert all(hasattr(function, "__wrapped__") for function in replaced), replaced
versions = {framework.name: framework.version for framework in installation.report().frameworks}
assert versions["transformer-engine"] and versions["megatron-core"] and not versions["deepspeed"], versions
installation.uninstall()
assert [getattr(linear, name) for name in names] == [function.__wrapped__ for function in replaced]
"""


def test_it_is_patched_when_megatron_imports_it() -> None:
    script = f"import sys; sys.path.insert(0, {str(FOLDER)!r})\n{SCRIPT}"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
