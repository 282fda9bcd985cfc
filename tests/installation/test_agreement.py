"""Ranks that were given different configurations all get an error that says so; none is left waiting."""

from __future__ import annotations

import sys
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from models import LAYERS, deepspeed_on_cpu, deepspeed_settings, llama, megatron_gpt, megatron_logits, tokens
from rank_pool import RankPool

import megacomp
from megacomp.agreement import differences, statement
from megacomp.config import load

INT8 = {"megacomp": {"communication": {"codec": "int8", "min_bytes": 0}, "backend": "reference"}}
INT4 = {"megacomp": {"communication": {"codec": "int4", "min_bytes": 0}, "backend": "reference"}}


def _error_of(configs: list[Any], ranks: list[int] | None = None) -> str | None:
    """What installing raises on this rank when each rank has a configuration of its own."""
    group = None if ranks is None else dist.new_group(ranks)
    if ranks is not None and dist.get_rank() not in ranks:
        return None
    try:
        megacomp.install(configs[dist.get_rank()], group=group).uninstall()
    except (megacomp.AgreementError, megacomp.ConfigError) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        if "megatron.core" in sys.modules:
            from megatron.core.tensor_parallel import mappings

            assert not hasattr(mappings._reduce, "__wrapped__")
    return None


def test_equal_configurations_agree_however_they_are_written(ranks: RankPool) -> None:
    long = {"megacomp": {**INT8["megacomp"], "weights": {}, "telemetry": {"sqnr_every": 0}}}
    long["megacomp"]["communication"] = {"codec": {"preset": "int8"}, "min_bytes": 0}
    assert ranks.run(_error_of, [INT8, long]) == [None, None]


def test_a_difference_is_an_error_on_every_rank_naming_keys_values_and_ranks(ranks: RankPool) -> None:
    odd = {"megacomp": {"communication": {"codec": "int4", "rules": [{"layers": "0", "codec": None}]}}}
    errors = ranks.run(_error_of, [INT8, odd, INT8], world_size=3)
    for error in errors:
        assert error.startswith("AgreementError")
        assert 'megacomp.communication.codec: "int8" on ranks 0, 2; "int4" on rank 1' in error
        assert "megacomp.communication.min_bytes: 0 on ranks 0, 2; 65536 on rank 1" in error
        assert 'megacomp.communication.rules[0].layers: absent on ranks 0, 2; "0" on rank 1' in error
        assert 'megacomp.backend: "reference" on ranks 0, 2; "auto" on rank 1' in error
        assert "algorithm" not in error.replace("rules[0].algorithm", "")


def test_a_rank_that_fails_tells_the_others(ranks: RankPool) -> None:
    wrong = {"megacomp": {"communication": {"codec": "int9"}}}
    good, bad = ranks.run(_error_of, [INT8, wrong])
    assert good.startswith("AgreementError") and "rank 1: ConfigError" in good
    assert bad.startswith("ConfigError: megacomp.communication.codec")
    assert "'int9'" in good and "'int9'" in bad


def test_only_the_ranks_of_a_given_group_must_agree(ranks: RankPool) -> None:
    assert ranks.run(_error_of, [INT8, INT4, INT8], [0, 2], world_size=3) == [None] * 3
    first, _, last = ranks.run(_error_of, [INT8, INT8, INT4], [0, 2], world_size=3)
    assert first == last and "on rank 0" in first and "on rank 2" in first


def test_the_version_of_the_package_is_part_of_it() -> None:
    config, _ = load(INT8)
    ours = statement(config)
    with mock.patch("megacomp.agreement.__version__", "0.0.1"):
        theirs = statement(config)
    assert differences({0: ours, 1: theirs}, lambda who: f"on {who}") == [
        f"version of megacomp: {megacomp.__version__} on [0]; 0.0.1 on [1]"
    ]


def _installed_before_the_group(configs: list[Any], engine: str) -> str | None:
    """As under `megacomp run`: installed before torch.distributed is initialised, met at the first use."""
    with mock.patch("torch.distributed.is_initialized", return_value=False):
        installation = megacomp.install(configs[dist.get_rank()])
    try:
        with installation, torch.no_grad():
            if engine == "megatron":
                with megatron_gpt() as model:
                    megatron_logits(model, tokens())
            else:
                import deepspeed

                with deepspeed_on_cpu():
                    deepspeed.init_inference(llama(), deepspeed_settings())(tokens())
            assert {site.calls for site in installation.report().sites.values()} == {1}
            assert len(installation.report().sites) == 2 * LAYERS
    except megacomp.AgreementError as error:
        return str(error)
    return None


@pytest.mark.parametrize("engine", ["megatron", "deepspeed"])
def test_without_a_group_at_install_ranks_agree_at_its_first_use(ranks: RankPool, engine: str) -> None:
    pytest.importorskip("megatron.core" if engine == "megatron" else "deepspeed")
    assert ranks.run(_installed_before_the_group, [INT8, INT8], engine) == [None, None]
    errors = ranks.run(_installed_before_the_group, [INT8, INT4], engine)
    for error in errors:
        assert 'megacomp.communication.codec: "int8" on rank 0; "int4" on rank 1' in error


def test_ranks_that_would_gather_differently_do_not_hang(ranks: RankPool) -> None:
    pytest.importorskip("megatron.core")
    assert all("collectives" in error for error in ranks.run(_gathering_differently))


def _gathering_differently() -> str | None:
    collectives = ["all_reduce", "reduce_scatter", "all_gather"][: 3 - dist.get_rank()]
    config = {"megacomp": {"communication": {"min_bytes": 0, "collectives": collectives}, "backend": "reference"}}
    with mock.patch("torch.distributed.is_initialized", return_value=False):
        installation = megacomp.install(config)
    try:
        with installation, megatron_gpt(sequence_parallel=True) as model, torch.no_grad():
            megatron_logits(model, tokens())
    except megacomp.AgreementError as error:
        return str(error)
    return None
