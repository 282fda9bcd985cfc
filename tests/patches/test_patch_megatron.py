"""Megatron-core on two real ranks: what is compressed, what stays exact, and that nothing is left behind."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from models import HIDDEN, LAYERS, megatron_gpt, megatron_logits, tokens
from rank_pool import RankPool

import megacomp

pytest.importorskip("megatron.core")

SITES = {f"layers.{layer}.{module}" for layer in range(LAYERS) for module in ("attention", "mlp")}
EMBEDDING = 1

MAPPINGS = "megatron.core.tensor_parallel.mappings"
PARALLEL_LAYERS = "megatron.core.tensor_parallel.layers"
FROZEN_LINEAR = f"{PARALLEL_LAYERS}.linear_with_frozen_weight"
ALWAYS_PATCHED = {
    "megatron.core.transformer.transformer_layer.TransformerLayer.forward",
    f"{PARALLEL_LAYERS}.RowParallelLinear.forward",
    f"{MAPPINGS}._reduce",
    f"{MAPPINGS}._reduce_scatter_along_first_dim",
}
FOR_ALL_GATHER = {
    f"{PARALLEL_LAYERS}.ColumnParallelLinear.forward",
    f"{PARALLEL_LAYERS}.dist_all_gather_func",
    f"{MAPPINGS}._gather_along_first_dim",
}

SUPPORTED = ">=0.12,<0.20"


def section(**communication: Any) -> dict[str, Any]:
    settings = {"codec": "int8", "min_bytes": 0, **communication}
    return {"megacomp": {"communication": settings, "backend": "reference"}}


def originals() -> dict[str, Any]:
    """The raw objects behind every name that could be patched."""
    found = {}
    for path in ALWAYS_PATCHED | FOR_ALL_GATHER:
        parent, _, name = path.rpartition(".")
        module, _, last = parent.rpartition(".")
        owner = importlib.import_module(parent) if last[0].islower() else getattr(importlib.import_module(module), last)
        found[path] = vars(owner)[name]
    return found


def counters(report: megacomp.Report) -> dict[str, tuple[Any, ...]]:
    return {name: (site.calls, site.rows, site.bytes_sent, site.plain_bytes) for name, site in report.sites.items()}


def reported_patches(report: megacomp.Report) -> set[str]:
    (megatron,) = (framework for framework in report.frameworks if framework.name == "megatron-core")
    return set(megatron.patches)


def sqnr_db(exact: torch.Tensor, result: torch.Tensor) -> float:
    return (10 * torch.log10(exact.square().sum() / (exact - result).square().sum())).item()


def _around_an_installation(
    config: dict[str, Any], attach: bool, model_settings: dict[str, Any], trainable: bool = False
) -> dict[str, Any]:
    with megatron_gpt(**model_settings) as model, torch.no_grad():
        model.requires_grad_(trainable)
        ids = tokens()
        before = originals()
        exact = megatron_logits(model, ids)
        with megacomp.install(config, model=model if attach else None) as installation:
            compressed = megatron_logits(model, ids)
            replaced = {path for path, raw in originals().items() if raw is not before[path]}
        after = originals()
        again = megatron_logits(model, ids)
    report = installation.report()
    return {
        "replaced": replaced,
        "reported": reported_patches(report),
        "restored": all(after[path] is before[path] for path in before),
        "same_afterwards": torch.equal(exact, again),
        "same_bits": compressed.numpy().tobytes(),
        "sqnr_db": sqnr_db(exact, compressed),
        "changed": not torch.equal(exact, compressed),
        "counters": counters(report),
        "declined": {name: dict(site.declined) for name, site in report.sites.items() if site.declined},
        "outside": report.outside,
        "active": report.active,
    }


@pytest.mark.parametrize("attach", [True, False])
def test_every_row_parallel_output_is_compressed_and_nothing_else(ranks: RankPool, attach: bool) -> None:
    first, second = ranks.run(_around_an_installation, section(), attach, {})
    assert first["same_bits"] == second["same_bits"]
    assert first["changed"] and first["sqnr_db"] > 30
    assert first["replaced"] == first["reported"] == ALWAYS_PATCHED
    assert first["restored"] and first["same_afterwards"] and not first["active"]
    # 16 rows of fp32, sent once to the other rank; int8 is one byte and a bf16 scale for 64 values, padded to 8.
    expected = (1, 16, 16 * (HIDDEN + 8), 16 * HIDDEN * 4)
    assert first["counters"] == dict.fromkeys(SITES, expected)
    assert first["declined"] == {}
    assert first["outside"] == EMBEDDING


@pytest.mark.parametrize("world_size", [2, 4])
def test_sequence_parallel_reduce_scatters(ranks: RankPool, world_size: int) -> None:
    config, settings = section(), {"sequence_parallel": True}
    results = ranks.run(_around_an_installation, config, True, settings, world_size=world_size)
    first = results[0]
    assert all(result["same_bits"] == first["same_bits"] for result in results)
    assert first["changed"] and first["sqnr_db"] > 30
    assert first["restored"] and first["same_afterwards"]
    # A rank's own share of the rows stays.
    sent = 16 * (world_size - 1) // world_size
    assert first["counters"] == dict.fromkeys(SITES, (1, 16, sent * (HIDDEN + 8), sent * HIDDEN * 4))
    assert first["outside"] == EMBEDDING


# Frozen weights gather by mappings._gather_along_first_dim; trainable ones, gradients off, by dist_all_gather_func.
@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("world_size", [2, 4])
def test_gathers_are_compressed_on_request(ranks: RankPool, world_size: int, trainable: bool) -> None:
    config = section(collectives=["all_reduce", "reduce_scatter", "all_gather"])
    settings = {"sequence_parallel": True}
    results = ranks.run(_around_an_installation, config, True, settings, trainable, world_size=world_size)
    first = results[0]
    assert all(result["same_bits"] == first["same_bits"] for result in results)
    assert first["sqnr_db"] > 30
    assert first["replaced"] == first["reported"] == ALWAYS_PATCHED | FOR_ALL_GATHER
    assert first["restored"] and first["same_afterwards"]
    # 16 rows to scatter and its share of them to gather, which goes to every other rank.
    own = 16 // world_size
    sent = 2 * (world_size - 1) * own
    assert first["counters"] == dict.fromkeys(SITES, (2, 16 + own, sent * (HIDDEN + 8), sent * HIDDEN * 4))
    # The embedding's reduce-scatter and the gather in front of the output layer.
    assert first["outside"] == 2


def test_a_section_without_a_codec_is_bit_exact(ranks: RankPool) -> None:
    first, _ = ranks.run(_around_an_installation, section(codec=None), True, {})
    assert not first["changed"]
    assert first["declined"] == {site: {"exact": 1} for site in SITES}


def test_rules_pick_layers_modules_and_sizes(ranks: RankPool) -> None:
    config = section(
        codec=None,
        rules=[
            {"layers": "0,-1", "module": "mlp", "codec": "int8"},
            {"module": "attention", "min_bytes": 16 * HIDDEN * 4, "codec": "int8"},
            {"layers": "1", "min_bytes": 16 * HIDDEN * 4 + 1, "codec": "int8"},
        ],
    )
    first, _ = ranks.run(_around_an_installation, config, True, {})
    compressed = {name for name, (calls, *_) in first["counters"].items() if calls}
    assert compressed == {name for name in SITES if "attention" in name} | {"layers.0.mlp", "layers.2.mlp"}


def _with_gradients() -> dict[str, Any]:
    with megatron_gpt() as model:
        model.requires_grad_(True)
        ids = tokens()

        def gradients() -> list[torch.Tensor]:
            model.zero_grad()
            megatron_logits(model, ids).square().sum().backward()
            return [parameter.grad for parameter in model.parameters()]

        exact = gradients()
        with megacomp.install(section(), model=model) as installation:
            installed = gradients()
        report = installation.report()
    return {
        "equal": all(torch.equal(a, b) for a, b in zip(exact, installed, strict=True)),
        "calls": report.calls,
        "declined": {name: dict(site.declined) for name, site in report.sites.items()},
    }


def test_training_steps_stay_exact(ranks: RankPool) -> None:
    first, _ = ranks.run(_with_gradients)
    assert first["equal"]
    assert first["calls"] == 0
    assert first["declined"] == {site: {"grad_enabled": 1} for site in SITES}


def _collectives_outside_of_layers() -> dict[str, Any]:
    from megatron.core import tensor_parallel
    from megatron.core.tensor_parallel import mappings

    with megatron_gpt() as model, torch.no_grad():
        rank = dist.get_rank()
        group = dist.group.WORLD
        counts = torch.arange(4) + rank
        config = section(collectives=["all_reduce", "reduce_scatter", "all_gather"])
        with megacomp.install(config, model=model) as installation:
            results = [
                tensor_parallel.reduce_from_tensor_model_parallel_region(counts.clone()),
                tensor_parallel.gather_from_sequence_parallel_region(counts),
                mappings._reduce_scatter_along_first_dim(counts.float(), group),
                mappings._gather_along_first_dim(counts, group, [4, 4]),
            ]
        return {"results": [result.tolist() for result in results], "outside": installation.report().outside}


def test_collectives_of_others_stay_exact(ranks: RankPool) -> None:
    first, second = ranks.run(_collectives_outside_of_layers)
    assert first["results"] == [[1, 3, 5, 7], [0, 1, 2, 3, 1, 2, 3, 4], [1, 3], [0, 1, 2, 3, 1, 2, 3, 4]]
    assert second["results"][2] == [5, 7]
    assert first["outside"] == 4


Change = Callable[[torch.Tensor], torch.Tensor]


def _layer_called_with(change: Change, model_settings: dict[str, Any]) -> dict[str, Any]:
    """One row-parallel layer by itself, on an input that `change` made."""
    with megatron_gpt(**model_settings) as model, torch.no_grad():
        layer = model.decoder.layers[1].mlp.linear_fc2
        generator = torch.Generator().manual_seed(dist.get_rank())
        x = change(torch.randn(8, 2, 4 * HIDDEN // dist.get_world_size(), generator=generator))
        layer.to(x.dtype)
        try:
            exact = layer(x)[0]
        except AssertionError as error:
            exact = error
        with megacomp.install(section(), model=model) as installation:
            try:
                result = layer(x)[0]
            except AssertionError as error:
                result = error
        site = installation.report().sites["layers.1.mlp"]
    if isinstance(exact, AssertionError):
        return {"error": (str(exact), str(result)), "declined": dict(site.declined), "calls": site.calls}
    return {
        "contiguous": x.is_contiguous(),
        "equal": torch.equal(exact, result),
        "sqnr_db": sqnr_db(exact, result),
        "declined": dict(site.declined),
        "calls": site.calls,
    }


def _double(x: torch.Tensor) -> torch.Tensor:
    return x.double()


def _no_tokens(x: torch.Tensor) -> torch.Tensor:
    return x[:0]


def _odd_tokens(x: torch.Tensor) -> torch.Tensor:
    return x[:7]


@pytest.mark.parametrize(("change", "reason"), [(_double, "dtype"), (_no_tokens, "empty")])
def test_unsuitable_tensors_take_the_original_path(ranks: RankPool, change: Change, reason: str) -> None:
    first, _ = ranks.run(_layer_called_with, change, {})
    assert first["equal"]
    assert first["calls"] == 0 and first["declined"] == {reason: 1}


def test_rows_that_cannot_be_scattered_get_the_original_error(ranks: RankPool) -> None:
    first, _ = ranks.run(_layer_called_with, _odd_tokens, {"sequence_parallel": True})
    original, installed = first["error"]
    assert installed == original
    assert first["calls"] == 0 and first["declined"] == {"uneven_split": 1}


def _non_contiguous_partial() -> float:
    """The SQNR of a layer whose partial is not contiguous, against the true sum."""
    with megatron_gpt() as model, torch.no_grad():
        layer = model.decoder.layers[0].self_attention.linear_proj
        partial = torch.randn(HIDDEN, 16, generator=torch.Generator().manual_seed(dist.get_rank())).t()
        frozen_linear = mock.patch(FROZEN_LINEAR, lambda *args, **kwargs: partial)
        with megacomp.install(section(), model=model), frozen_linear:
            result = layer(torch.zeros(16, 1, HIDDEN // 2))[0]
        total = partial.contiguous()
        dist.all_reduce(total)
    return sqnr_db(total, result)


def test_a_partial_that_is_not_contiguous_is_summed(ranks: RankPool) -> None:
    assert min(ranks.run(_non_contiguous_partial)) > 30


def _interrupted_layer() -> int:
    """A row-parallel layer that fails must not leave its site behind for whoever reduces next."""
    from megatron.core.tensor_parallel import mappings

    with megatron_gpt() as model, torch.no_grad(), megacomp.install(section(), model=model) as installation:
        layer = model.decoder.layers[0].mlp.linear_fc2
        with mock.patch(FROZEN_LINEAR, side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
            layer(torch.zeros(16, 1, 2 * HIDDEN))
        mappings.reduce_from_tensor_model_parallel_region(torch.ones(4))
        return installation.report().outside


def test_an_exception_leaves_no_site_behind(ranks: RankPool) -> None:
    assert ranks.run(_interrupted_layer) == [EMBEDDING, EMBEDDING]


def _without_a_group() -> dict[str, Any]:
    """As in 0.12, where `_reduce(input_)` takes no group and means the tensor-parallel one."""
    from megatron.core.tensor_parallel import mappings

    original = mappings._reduce
    has_group = "group" in inspect.signature(original).parameters
    old = (lambda input_: original(input_, dist.group.WORLD)) if has_group else original
    reduce_region = f"{PARALLEL_LAYERS}.reduce_from_tensor_model_parallel_region"
    with (
        megatron_gpt() as model,
        torch.no_grad(),
        mock.patch.object(mappings, "_reduce", old),
        mock.patch(reduce_region, lambda input_, group=None: mappings._reduce(input_)),
        megacomp.install(section(), model=model) as installation,
    ):
        model.decoder.layers[0].self_attention.linear_proj(torch.ones(16, 1, HIDDEN // 2))
        total = mappings._reduce(torch.ones(4))
        report = installation.report()
    return {
        "calls": report.sites["layers.0.attention"].calls,
        "outside": report.outside,
        "total": total.tolist(),
    }


def test_reduce_without_a_group_means_the_tensor_parallel_one(ranks: RankPool) -> None:
    first, _ = ranks.run(_without_a_group)
    assert first == {"calls": 1, "outside": 1, "total": [2.0] * 4}


def _on_one_rank() -> dict[str, Any]:
    with megatron_gpt() as model, torch.no_grad():
        exact = megatron_logits(model, tokens())
        with megacomp.install(section(), model=model) as installation:
            equal = torch.equal(exact, megatron_logits(model, tokens()))
    report = installation.report()
    return {"equal": equal, "declined": {name: dict(site.declined) for name, site in report.sites.items()}}


def test_a_single_rank_is_left_exact(ranks: RankPool) -> None:
    (only,) = ranks.run(_on_one_rank, world_size=1)
    assert only["equal"]
    assert only["declined"] == {site: {"single_rank": 1} for site in SITES}


def _sampled(collectives: list[str]) -> dict[str, Any]:
    config = section(collectives=collectives)
    config["megacomp"]["telemetry"] = {"sqnr_every": 2}
    with megatron_gpt(sequence_parallel="all_gather" in collectives) as model, torch.no_grad():
        with megacomp.install(config, model=model) as installation:
            nothing_yet = None
            for _ in range(2):
                megatron_logits(model, tokens())
                if nothing_yet is None:
                    nothing_yet = {site.sqnr_db for site in installation.report().sites.values()}
        return {"first": nothing_yet, "then": [site.sqnr_db for site in installation.report().sites.values()]}


def test_sampled_noise_is_that_of_the_codec(ranks: RankPool) -> None:
    first, _ = ranks.run(_sampled, ["all_reduce"])
    assert first["first"] == {None}
    # int8 with one scale for 64 values of a bell curve: METHODS measures 41.9 dB on real activations.
    assert all(38 < sqnr < 50 for sqnr in first["then"])
    gathered, _ = ranks.run(_sampled, ["reduce_scatter", "all_gather"])
    assert all(38 < sqnr < 50 for sqnr in gathered["then"])


def _guarded(min_sqnr_db: float, sequence_parallel: bool) -> dict[str, Any]:
    config = section(collectives=["all_reduce", "reduce_scatter"])
    config["megacomp"]["guard"] = {"every": 1, "min_sqnr_db": min_sqnr_db}
    with megatron_gpt(sequence_parallel=sequence_parallel) as model, torch.no_grad():
        exact = megatron_logits(model, tokens())
        with megacomp.install(config, model=model) as installation:
            logits = [megatron_logits(model, tokens()) for _ in range(2)]
    return {
        "equal": [torch.equal(exact, each) for each in logits],
        "sites": [(site.calls, dict(site.declined), site.guard) for site in installation.report().sites.values()],
    }


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_a_guarded_model_is_compressed_or_the_plain_one(ranks: RankPool, sequence_parallel: bool) -> None:
    for found in ranks.run(_guarded, 30, sequence_parallel):
        assert found["equal"] == [False, False]
        assert all((calls, declined) == (2, {}) for calls, declined, _ in found["sites"])
        assert all(38 < guard.lowest_sqnr_db < 50 and not guard.switched_off for *_, guard in found["sites"])
    for found in ranks.run(_guarded, 60, sequence_parallel):
        assert found["equal"] == [True, True]
        assert all(
            (calls, declined, guard.samples) == (0, {"guard": 2}, 1) for calls, declined, guard in found["sites"]
        )


def _experts(model_settings: dict[str, Any]) -> dict[str, Any]:
    """A mixture of experts: its layers by themselves, and the model around them."""
    experts = {"num_moe_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": HIDDEN}
    config = section(collectives=["all_reduce", "reduce_scatter", "all_gather"])
    # The all-to-all dispatcher copies its counts beside the stream that computes.
    streams = mock.patch.multiple("torch.cuda", Stream=mock.Mock, current_stream=mock.Mock, stream=nullcontext)
    # Without Transformer Engine, 0.16 asks for a name it has not defined.
    router = mock.patch("megatron.core.transformer.moe.moe_utils.te_general_gemm", None, create=True)
    with streams, router, megatron_gpt(**experts, **model_settings) as model, torch.no_grad():
        layer = model.decoder.layers[1].mlp
        rows = 8 // dist.get_world_size() if model_settings["sequence_parallel"] else 8
        x = torch.randn(8, 2, HIDDEN, generator=torch.Generator().manual_seed(2))[:rows]
        exact, logits = layer(x)[0], megatron_logits(model, tokens())
        with megacomp.install(config, model=model) as installation:
            installed = layer(x)[0]
            outside = installation.report().outside
            compressed = megatron_logits(model, tokens())
    report = installation.report()
    return {
        "layer_equal": torch.equal(exact, installed),
        "outside": outside,
        "same_bits": compressed.numpy().tobytes(),
        "sqnr_db": sqnr_db(logits, compressed),
        "calls": {name: site.calls for name, site in report.sites.items()},
        "not_covered": {name: why.partition(":")[0] for name, why in report.not_covered.items()},
    }


@pytest.mark.parametrize("dispatcher", ["allgather", "alltoall"])
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_experts_stay_exact_and_are_reported(ranks: RankPool, dispatcher: str, sequence_parallel: bool) -> None:
    settings = {
        "moe_token_dispatcher_type": dispatcher,
        "moe_shared_expert_intermediate_size": HIDDEN,
        "sequence_parallel": sequence_parallel,
    }
    first, second = ranks.run(_experts, settings)
    # Token counts, dispatched tokens, combined outputs and shared experts: all of them passed by.
    assert first["layer_equal"] and second["layer_equal"]
    assert first["outside"] > 0
    assert first["same_bits"] == second["same_bits"]
    assert first["sqnr_db"] > 20
    calls = 2 if sequence_parallel else 1
    assert first["calls"] == {f"layers.{layer}.attention": calls for layer in range(LAYERS)}
    expected = {f"decoder.layers.{layer}.mlp": "MoELayer" for layer in range(LAYERS)}
    expected |= {f"decoder.layers.{layer}.mlp.shared_experts": "SharedExpertMLP" for layer in range(LAYERS)}
    assert first["not_covered"] == expected


def _inference_layer_of_a_model() -> dict[str, str]:
    class InferenceRowParallelLinear(torch.nn.Module):
        """Stands for the fused inference layer."""

    with megatron_gpt() as model:
        model.decoder.layers[1].self_attention.linear_proj = InferenceRowParallelLinear()
        with megacomp.install(section(), model=model) as installation:
            return dict(installation.report().not_covered)


def test_layers_that_choose_their_way_are_reported(ranks: RankPool) -> None:
    first, _ = ranks.run(_inference_layer_of_a_model)
    assert list(first) == ["decoder.layers.1.self_attention.linear_proj"]
    assert "symmetric memory" in first["decoder.layers.1.self_attention.linear_proj"]


def _unsupported(version: str | None) -> tuple[str, bool]:
    """What installing says of a version, or (None) of one that lacks a function; and whether anything changed."""
    from megatron.core.tensor_parallel import mappings

    before = originals()
    with pytest.MonkeyPatch.context() as patch:
        if version is None:
            patch.delattr(mappings, "_reduce_scatter_along_first_dim")
        else:
            patch.setattr("megatron.core.__version__", version)
        try:
            megacomp.install(section()).uninstall()
        except (megacomp.UnsupportedVersionError, megacomp.MissingSymbolError) as error:
            message = str(error)
    return message, originals() == before


def test_versions_that_do_not_work_are_refused_by_naming_those_that_do(ranks: RankPool) -> None:
    for version in ("0.1.0", "0.99.0"):
        ((message, unchanged),) = ranks.run(_unsupported, version, world_size=1)
        assert message == f"megatron-core {version} is not supported; megacomp works with megatron-core {SUPPORTED}"
        assert unchanged


def test_a_missing_function_is_refused_by_its_full_path(ranks: RankPool) -> None:
    ((message, unchanged),) = ranks.run(_unsupported, None, world_size=1)
    assert "megatron.core.tensor_parallel.mappings._reduce_scatter_along_first_dim" in message
    assert SUPPORTED in message
    assert unchanged
