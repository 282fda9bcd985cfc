"""The report: complete, JSON-able, readable; and reasons are logged once."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest
import torch

from megacomp.collectives import Traffic
from megacomp.policy import Decline, Site
from megacomp.report import FrameworkReport, Report, SiteReport
from megacomp.telemetry import GuardSamples, Telemetry

ATTENTION = Site("layers.0.attention", "attention", 0, 1)
MLP = Site("layers.0.mlp", "mlp", 0, 1)


def site(**counts: Any) -> SiteReport:
    nothing = {"calls": 0, "rows": 0, "bytes_sent": 0, "plain_bytes": 0, "ratio": None}
    return SiteReport(**{**nothing, "declined": {}, "codec": None, "sqnr_db": None, **counts})


REPORT = Report(
    version="1.2.3",
    active=True,
    config={"backend": "auto"},
    digest="0123456789abcdef",
    frameworks=(
        FrameworkReport("megatron-core", "0.16.1", ("megatron.core.tensor_parallel.mappings._reduce",)),
        FrameworkReport("deepspeed", None, ()),
    ),
    sites={
        "layers.0.attention": site(
            calls=2, rows=2048, bytes_sent=1000, plain_bytes=3760, ratio=3.76, codec="mxfp4", sqnr_db=19.14
        ),
        "layers.0.mlp": site(
            calls=1,
            rows=1024,
            bytes_sent=500,
            plain_bytes=1880,
            ratio=3.76,
            declined={"exact": 3},
            guard=GuardSamples(2, 3.25, 3.25, "SQNR 3.2 dB, the bound is 15 dB"),
        ),
    },
    outside=7,
    not_covered={"decoder.layers.1.mlp.linear_fc2": "TERowParallelLinear: Transformer Engine reduces by itself"},
)


def test_totals_over_sites() -> None:
    assert (REPORT.calls, REPORT.bytes_sent, REPORT.plain_bytes, REPORT.ratio) == (3, 1500, 5640, 3.76)
    assert REPORT.declined == {"exact": 3}


def test_the_dict_is_json_with_everything_in_it() -> None:
    document = json.loads(json.dumps(REPORT.to_dict(), allow_nan=False))
    assert document["sites"]["layers.0.attention"] == {
        "calls": 2,
        "rows": 2048,
        "bytes_sent": 1000,
        "plain_bytes": 3760,
        "ratio": 3.76,
        "declined": {},
        "codec": "mxfp4",
        "sqnr_db": 19.14,
        "guard": {"samples": 0, "last_sqnr_db": None, "lowest_sqnr_db": None, "switched_off": None},
    }
    assert document["sites"]["layers.0.mlp"]["guard"] == {
        "samples": 2,
        "last_sqnr_db": 3.25,
        "lowest_sqnr_db": 3.25,
        "switched_off": "SQNR 3.2 dB, the bound is 15 dB",
    }
    assert document["frameworks"][0]["patches"] == ["megatron.core.tensor_parallel.mappings._reduce"]
    assert document["total"] == {
        "calls": 3,
        "bytes_sent": 1500,
        "plain_bytes": 5640,
        "ratio": 3.76,
        "declined": {"exact": 3},
    }


def test_the_text_shows_what_was_patched_sent_and_declined() -> None:
    text = str(REPORT)
    for part in (
        "megacomp 1.2.3",
        "megatron-core 0.16.1",
        "megatron.core.tensor_parallel.mappings._reduce",
        "deepspeed: not imported yet",
        "layers.0.attention",
        "3.76",
        "19.1",
        "mxfp4",
        "3 x exact",
        "7 messages",
        "guard of layers.0.mlp: 2 samples, last 3.2 dB, lowest 3.2 dB, switched off: SQNR 3.2 dB, the bound is 15 dB",
        "TERowParallelLinear",
    ):
        assert part in text


def test_counters_add_up() -> None:
    telemetry = Telemetry()
    counters = telemetry.at(MLP)
    assert counters.ratio is None and counters.sqnr_db is None
    for codec in ("mxfp4", "int8", "mxfp4"):
        counters.count(codec, 4, Traffic(sent=10, uncompressed=30, ring=20))
    assert (counters.calls, counters.rows, counters.bytes_sent, counters.plain_bytes) == (3, 12, 30, 90)
    assert counters.ratio == 3.0
    assert list(counters.codecs.items()) == [("mxfp4", 2), ("int8", 1)]
    assert telemetry.at(MLP) is counters
    assert telemetry.at(ATTENTION) is not counters


def test_sqnr_is_over_the_energies_of_all_samples() -> None:
    counters = Telemetry().at(MLP)
    counters.sample(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.5]))
    assert counters.sqnr_db == pytest.approx(20.0)
    counters.sample(torch.tensor([0.0, 75**0.5]), torch.tensor([0.5, 75**0.5], dtype=torch.float64))
    assert counters.sqnr_db == pytest.approx(23.0103)


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_sqnr_without_a_measurable_ratio_is_none(value: float) -> None:
    counters = Telemetry().at(MLP)
    counters.sample(torch.full((2,), value), torch.ones(2))
    assert counters.sqnr_db is None


def test_each_reason_is_logged_once_and_counted_always(caplog: pytest.LogCaptureFixture) -> None:
    telemetry = Telemetry()
    with caplog.at_level(logging.INFO, "megacomp"):
        for where in (MLP, ATTENTION, MLP):
            telemetry.decline(where, Decline.BELOW_MIN_BYTES)
        telemetry.decline(None, Decline.OUTSIDE)
        telemetry.decline(None, Decline.OUTSIDE)
    assert telemetry.at(MLP).declined == {"below_min_bytes": 2}
    assert telemetry.at(ATTENTION).declined == {"below_min_bytes": 1}
    assert telemetry.outside == 2
    assert len(caplog.records) == 2
    assert "layers.0.mlp" in caplog.messages[0] and "min_bytes" in caplog.messages[0]


def test_every_reason_has_a_key_and_an_explanation() -> None:
    assert len({reason.key for reason in Decline}) == len(Decline)
    assert all(reason.key == reason.name.lower() and reason.why for reason in Decline)
