"""Decisions: which message of which site gets which route, and why others get none."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megacomp.collectives import Route
from megacomp.config import ConfigError, load
from megacomp.policy import Decline, Policy, Site

BF16 = torch.bfloat16


def policy(**communication: Any) -> Policy:
    return Policy(load({"megacomp": {"communication": {"min_bytes": 0, **communication}}})[0])


def site(layer: int | None = 0, module: Any = "mlp", layer_count: int | None = 4) -> Site:
    return Site(f"layers.{layer}.{module}", module, layer, None if layer is None else layer_count)


def decide(policy: Policy, site: Site, rows: int = 4, features: int = 64, **changes: Any) -> Route | Decline:
    message = {"collective": "all_reduce", "dtype": BF16, "world_size": 2, **changes}
    return policy.decide(site, rows=rows, features=features, **message)


def codec_of(outcome: Route | Decline) -> str:
    assert isinstance(outcome, Route)
    return outcome.codec.name


def test_a_route_carries_the_settings_of_the_section() -> None:
    route = decide(policy(codec="int4", gather_codec="int8", algorithm="two_shot", pipeline_chunks=3), site())
    assert isinstance(route, Route)
    assert (route.codec.name, route.gather_codec.name) == ("int4", "int8")  # type: ignore[union-attr]
    assert (route.algorithm, route.pipeline_chunks) == ("two_shot", 3)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"world_size": 1}, Decline.SINGLE_RANK),
        ({"grad_enabled": True}, Decline.GRAD_ENABLED),
        ({"dtype": torch.int64}, Decline.NOT_FLOATING),
        ({"dtype": torch.bool}, Decline.NOT_FLOATING),
        ({"dtype": torch.float64}, Decline.DTYPE),
        ({"dtype": torch.float8_e4m3fn}, Decline.DTYPE),
        ({"collective": "all_gather"}, Decline.COLLECTIVE),
        ({"even": False}, Decline.UNEVEN_SPLIT),
        ({"rows": 0}, Decline.EMPTY),
        ({"features": 0}, Decline.EMPTY),
    ],
)
def test_what_cannot_be_compressed_is_declined(changes: dict[str, Any], reason: Decline) -> None:
    assert decide(policy(), site(), **changes) is reason


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_min_bytes_counts_bytes_of_the_uncompressed_tensor(dtype: torch.dtype) -> None:
    size = 4 * 64 * dtype.itemsize
    assert codec_of(decide(policy(min_bytes=size), site(), dtype=dtype)) == "mxfp4"
    assert decide(policy(min_bytes=size + 1), site(), dtype=dtype) is Decline.BELOW_MIN_BYTES


def test_the_first_matching_rule_wins() -> None:
    rules = [
        {"layers": "0,-1", "codec": "int8"},
        {"module": "attention", "codec": None},
        {"layers": "0-1", "codec": "int6"},
    ]
    configured = policy(rules=rules)
    outcomes = {
        (layer, module): decide(configured, site(layer, module))
        for layer in range(4)
        for module in ("attention", "mlp")
    }
    exact = {where for where, outcome in outcomes.items() if outcome is Decline.EXACT}
    assert exact == {(1, "attention"), (2, "attention")}
    codecs = {where: codec_of(outcome) for where, outcome in outcomes.items() if where not in exact}
    assert codecs == {
        (0, "attention"): "int8",
        (0, "mlp"): "int8",
        (1, "mlp"): "int6",
        (2, "mlp"): "mxfp4",
        (3, "attention"): "int8",
        (3, "mlp"): "int8",
    }


def test_rules_by_size_of_message() -> None:
    row = 64 * BF16.itemsize
    configured = policy(
        min_bytes=2 * row,
        rules=[
            {"max_bytes": 4 * row, "codec": "int8"},
            {"module": "mlp", "min_bytes": row, "max_bytes": row, "codec": "int6"},
            {"min_bytes": 8 * row, "codec": "int4"},
        ],
    )
    by_rows = {rows: decide(configured, site(), rows=rows) for rows in (1, 2, 4, 5, 7, 8, 9)}
    assert {rows: codec_of(outcome) for rows, outcome in by_rows.items()} == {
        1: "int6",
        2: "int8",
        4: "int8",
        5: "mxfp4",
        7: "mxfp4",
        8: "int4",
        9: "int4",
    }
    assert decide(configured, site(module="attention"), rows=1) is Decline.BELOW_MIN_BYTES


def test_a_rule_on_a_section_that_leaves_everything_exact() -> None:
    configured = policy(codec=None, rules=[{"module": "mlp", "codec": "int8"}])
    assert codec_of(decide(configured, site(module="mlp"))) == "int8"
    assert decide(configured, site(module="attention")) is Decline.EXACT


def test_an_unknown_layer_is_not_guessed() -> None:
    configured = policy(rules=[{"module": "attention", "codec": "int8"}, {"layers": "0", "codec": None}])
    assert codec_of(decide(configured, site(None, "attention"))) == "int8"
    assert decide(configured, site(None, "mlp")) is Decline.UNKNOWN_LAYER
    assert codec_of(decide(policy(), site(None, "mlp"))) == "mxfp4"


def test_a_site_that_is_neither_attention_nor_mlp_gets_the_rules_for_all_modules() -> None:
    configured = policy(rules=[{"module": "mlp", "codec": None}, {"layers": "0", "codec": "int8"}])
    assert codec_of(decide(configured, site(0, None))) == "int8"
    assert codec_of(decide(configured, site(1, None))) == "mxfp4"


MODEL = [site(layer, module) for layer in range(4) for module in ("attention", "mlp")]


def test_rules_are_checked_against_the_sites_of_a_model() -> None:
    policy(rules=[{"layers": "0,-1,2-9", "module": "mlp", "codec": None}]).check_rules(MODEL)
    stray = policy(rules=[{"codec": "int8"}, {"layers": "1,4,-5", "codec": "int8"}, {"module": "mlp", "codec": None}])
    with pytest.raises(ConfigError) as caught:
        stray.check_rules([where for where in MODEL if where.module == "attention"])
    found = dict(caught.value.errors)
    assert set(found) == {"megacomp.communication.rules[1].layers", "megacomp.communication.rules[2].module"}
    message = str(caught.value)
    for word in ("'4'", "'-5'", "4 layers", "'mlp'"):
        assert word in message


def test_layers_of_other_pipeline_stages_exist() -> None:
    stage = [where for where in MODEL if where.layer in (0, 1)]
    policy(rules=[{"layers": "3", "codec": None}]).check_rules(stage)


def test_a_compiler_that_is_missing_is_an_error_before_the_first_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megacomp.kernels.backend.compiler_problem", lambda: "no C++ compiler")
    config, _ = load({"megacomp": {"backend": "compiled"}})
    with pytest.raises(ConfigError, match=r"megacomp\.backend: .*no C\+\+ compiler"):
        Policy(config)
