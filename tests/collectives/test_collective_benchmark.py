"""What the collective benchmark reports is complete, consistent and JSON-able; its times are nobody's test."""

from __future__ import annotations

import json
from typing import Any

import pytest
from collective_cases import Case
from rank_pool import RankPool

from megacomp.launch.measure import measure


def _measure(case: Case, distribution: str) -> dict[str, Any]:
    rows, features = case.shape
    return measure(case.route(), rows=rows, features=features, distribution=distribution, warmup=1, repeats=3)


@pytest.mark.parametrize("distribution", ["gaussian", "outliers"])
def test_report(ranks: RankPool, distribution: str) -> None:
    case = Case(shape=(64, 256), algorithm="two_shot", codec="int8", chunks=2)
    first, second, _ = reports = ranks.run(_measure, case, distribution, world_size=3)
    assert all(report == json.loads(json.dumps(report)) for report in reports)
    assert {**first, "traffic": None} == {**second, "traffic": None}
    assert first["route"] == {
        "codec": "int8",
        "gather_codec": "int8",
        "algorithm": "two_shot",
        "pipeline_chunks": 2,
        "world_size": 3,
    }
    assert first["plain"]["min_ms"] <= first["plain"]["median_ms"] <= first["plain"]["max_ms"]
    assert min(first["stages"].values()) > 0
    assert 30 < first["sqnr_db"]["compressed"] < first["sqnr_db"]["plain"] < 70
    assert pytest.approx(first["traffic"]["payload_ratio"], rel=0.01) == 16 / 8.25
