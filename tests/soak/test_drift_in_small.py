"""`make soak` in small: every mix of codecs once, over two ranks, on each engine."""

from __future__ import annotations

from pathlib import Path

import drift
import pytest
from engines import tiny_models
from rank_pool import RankPool


@pytest.mark.parametrize("engine", ["deepspeed", "megatron"])
def test_ranks_stay_identical_and_counters_exact(ranks: RankPool, tmp_path: Path, engine: str) -> None:
    tiny_models.save("llama", tmp_path)
    steps = 4 * len(drift.MIXES)
    for figures in ranks.run(drift.generate, tmp_path, engine, steps, "reference", 0, 4):
        assert figures["installations"] == len(drift.MIXES)


def test_installing_again_and_again_leaves_nothing(ranks: RankPool, tmp_path: Path) -> None:
    tiny_models.save("llama", tmp_path)
    for figures in ranks.run(drift.reinstall, tmp_path, "megatron", 30, 10):
        before, after = figures["objects"]
        assert after <= before
