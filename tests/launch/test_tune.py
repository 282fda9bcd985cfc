"""`megacomp tune`: what it tries and concludes, with times that are made up, and one small run over real ranks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import static_cases
import torch
import torch.distributed as dist
from rank_pool import RankPool
from typer.testing import CliRunner

from megacomp import codecs
from megacomp.collectives import Route
from megacomp.config import load
from megacomp.launch import autotune, cli
from megacomp.launch.autotune import GroupRanks, Message, Rejected, candidates, messages, routes_of, tune
from megacomp.policy import Policy, Site
from megacomp.tuning import Tuning, plan

CPU = torch.device("cpu")
BF16 = torch.bfloat16
INT8 = Route(codecs.get("int8", backend="reference"))
INT4 = Route(codecs.get("int4", backend="reference"))


class MadeUp:
    """Ranks whose times a function makes up; they remember what was asked of them."""

    device = CPU

    def __init__(
        self, seconds: Callable[[Message, Route | None], float], world_size: int = 2, wrong: Route | None = None
    ) -> None:
        self.world_size = world_size
        self.asked: list[tuple[int, Route | None]] = []
        self.verified: list[tuple[int, Route]] = []
        self._seconds, self._wrong = seconds, wrong

    def verify(self, message: Message, route: Route) -> bool:
        self.verified.append((message.bytes, route))
        return route != self._wrong

    def seconds(self, message: Message, route: Route | None) -> float:
        assert route is None or (message.bytes, route) in self.verified, "timed before it was verified"
        self.asked.append((message.bytes, route))
        return self._seconds(message, route)


def test_messages_double_up_to_the_largest_and_are_at_least_one_row() -> None:
    sizes = messages(64 * 2**20, 4096, BF16)
    assert [message.bytes for message in sizes] == [1024 * 2**step for step in range(17)]
    assert [(message.rows, message.features) for message in sizes[:4]] == [(1, 512), (1, 1024), (1, 2048), (1, 4096)]
    assert sizes[-1].rows == 8192
    assert [message.bytes for message in messages(3000, 4096, torch.float32)] == [1024, 2048]


def test_small_messages_are_not_cut_and_large_ones_are_cut_both_ways() -> None:
    small, large = (candidates(INT8, message, 4, CPU) for message in (Message(1, 512, BF16), Message(4096, 4096, BF16)))
    assert {(way.algorithm, way.pipeline_chunks) for way in small} == {("one_shot", 1), ("two_shot", 1)}
    assert {(way.algorithm, way.pipeline_chunks) for way in large} == {
        (algorithm, chunks) for algorithm in ("one_shot", "two_shot") for chunks in (1, 2, 4, 8, 16)
    }
    few_rows = candidates(INT8, Message(2, 2**18, BF16), 4, CPU)
    assert max(way.pipeline_chunks for way in few_rows if way.algorithm == "two_shot") == 1
    assert len(set(large)) == len(large)


def test_the_verdict_is_that_of_the_times() -> None:
    """A link of 1 byte per microsecond; a call costs 100 us, an additional chunk 10 us, and hides half the encoding."""

    def seconds(message: Message, route: Route | None) -> float:
        if route is None:
            return 1e-6 * (10 + message.bytes)
        chunks = int(route.pipeline_chunks)
        encoding = 0.1 * message.bytes
        return 1e-6 * (3000 + 0.5 * message.bytes + encoding / chunks + 10 * chunks)

    ranks = MadeUp(seconds)
    sizes = messages(2**20, 512, BF16)
    (found,) = tune([INT8], sizes, ranks, repeats=5)
    made = plan(found, INT8, 2, algorithm=True, chunks=True)
    assert made.min_bytes == 16 * 1024
    assert made.steps[-1].route.pipeline_chunks == 16
    assert found.sizes[0].plain_microseconds == pytest.approx(10 + 1024)
    assert [size.bytes for size in found.sizes] == [message.bytes for message in sizes]


def test_plain_and_compressed_alternate_and_slow_ways_drop_out() -> None:
    message = Message(512, 4096, BF16)

    def seconds(message: Message, route: Route | None) -> float:
        return 1e-3 if route is None or route.algorithm == "one_shot" else 1e-2

    ranks = MadeUp(seconds, world_size=4)
    (found,) = tune([INT8], [message], ranks, repeats=7)
    ways = candidates(INT8, message, 4, CPU)
    quick = [way for way in ways if way.algorithm == "one_shot"]
    asked = [route for _, route in ranks.asked]
    assert asked == [None, *ways] * 3 + [None, *quick] * 4
    assert len(found.sizes[0].timings) == len(ways)


def test_on_a_slow_link_repetitions_end_early() -> None:
    ranks = MadeUp(lambda message, route: 1.0)
    tune([INT8], [Message(1, 512, BF16)], ranks, repeats=15)
    assert sum(route is None for _, route in ranks.asked) == autotune.FEWEST_REPEATS


def test_a_way_with_other_bits_ends_it_before_it_is_timed() -> None:
    message = Message(64, 512, BF16)
    wrong = candidates(INT8, message, 2, CPU)[1]
    ranks = MadeUp(lambda message, route: 1e-3, wrong=wrong)
    with pytest.raises(Rejected, match="int8, two_shot in 1 chunks"):
        tune([INT8], [message], ranks)
    assert not ranks.asked


def test_the_codecs_of_a_configuration_each_once() -> None:
    rules = [{"layers": "0", "codec": "int8"}, {"module": "mlp", "codec": None}, {"layers": "1", "codec": "int8"}]
    communication = {
        "codec": "int4",
        "gather_codec": "int8",
        # The last two say the same in two ways.
        "rules": [*rules, {"max_bytes": 2**20, "gather_codec": None}, {"layers": "2", "gather_codec": "int4"}],
    }
    config, _ = load({"megacomp": {"communication": communication, "backend": "reference"}})
    names = [(route.codec.name, route.second_codec.name) for route in routes_of(config)]
    assert names == [("int4", "int8"), ("int8", "int8"), ("int4", "int4")]


def _verified(cases: list[tuple[Message, Route]], spoil: bool) -> list[bool]:
    ranks = GroupRanks(None, CPU)
    if spoil and dist.get_rank() == 1:
        # One rank alone receives something else: no rank may find its own result right.
        original = autotune.all_reduce

        def spoilt(x: Any, group: Any, route: Any, *, out: Any) -> Any:
            original(x, group, route, out=out)
            out[-1, -1] += 1

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(autotune, "all_reduce", spoilt)
            return [ranks.verify(message, route) for message, route in cases]
    return [ranks.verify(message, route) for message, route in cases]


def test_verification_over_real_ranks(ranks: RankPool) -> None:
    mixed = Route(codecs.get("int4", backend="reference"), codecs.get("int8", backend="reference"))
    cases = [
        (message, way)
        for message in (Message(1, 512, BF16), Message(150, 96, BF16), Message(7, 64, torch.float32))
        for route in (INT8, mixed)
        for way in candidates(route, message, 3, CPU)
    ]
    cases.append((cases[-1][0], Route(INT4.codec, None, "two_shot", 3)))
    assert ranks.run(_verified, cases, False, world_size=3) == [[True] * len(cases)] * 3
    assert ranks.run(_verified, cases, True, world_size=3) == [[False] * len(cases)] * 3


def _command(arguments: list[str], cache: str | None) -> tuple[int, str]:
    """cache: where it lies; None for a user without one."""
    with pytest.MonkeyPatch.context() as patch:
        if cache is None:
            for module in ("megacomp.tuning", "megacomp.launch.tune"):
                patch.setattr(f"{module}.cache_folder", lambda name: None)
        else:
            patch.setenv("XDG_CACHE_HOME", cache)
        result = CliRunner().invoke(cli.app, ["tune", *arguments])
    return result.exit_code, result.output


def test_the_command_writes_what_a_policy_reads(ranks: RankPool, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    settings: dict[str, Any] = {"codec": "int8", "gather_codec": "mxint8", "min_bytes": "tuned", "algorithm": "tuned"}
    config = {"megacomp": {"communication": settings, "backend": "reference"}}
    (tmp_path / "ds.json").write_text(json.dumps(config))
    out, plot = tmp_path / "tuning.json", tmp_path / "tune.png"
    arguments = ["--config", str(tmp_path / "ds.json"), "--max-bytes", "4096", "--features", "256", "--repeats", "3"]
    first, second = ranks.run(_command, [*arguments, "--out", str(out), "--plot", str(plot)], None)
    assert first[0] == second[0] == 0, first[1]
    assert "int8 + mxint8" in first[1] and '"tuning": ' in first[1] and str(out) in first[1]
    assert not second[1], "rank 0 alone speaks"
    assert plot.read_bytes().startswith(b"\x89PNG")
    tuning = Tuning.read(out)
    assert (tuning.key.world_size, tuning.key.backend, tuning.hosts) == (2, "gloo", 1)
    assert [size.bytes for size in tuning.codecs[0].sizes] == [1024, 2048, 4096]
    settings["tuning"] = str(out)
    policy = Policy(load(config)[0])
    made = plan(tuning.codecs[0], routes_of(load(config)[0])[0], 2, algorithm=True, chunks=False)
    outcome = policy.decide(Site("layers.0.mlp"), "all_reduce", 8, 256, BF16, 2)
    assert isinstance(outcome, Route) == (made.min_bytes <= 4096)

    again = ranks.run(_command, arguments, str(tmp_path / "cache"))
    assert [code for code, _ in again] == [0, 0], again
    (kept,) = (tmp_path / "cache" / "megacomp" / "tuning").iterdir()
    assert kept.name.endswith("-gloo-2-ranks.json") and Tuning.read(kept).codecs[0].codec == "int8"

    for code, output in ranks.run(_command, arguments, None):
        assert code == 2 and "no home folder" in " ".join(output.split()) and "--out" in output


def test_static_codecs_are_tuned_without_reading_a_calibration(ranks: RankPool, tmp_path: Path) -> None:
    settings = {"codec": "static4", "calibration": "not-there"}
    document = {"megacomp": {"communication": settings, "backend": "reference"}}
    (tmp_path / "ds.json").write_text(json.dumps(document))
    out = tmp_path / "tuning.json"
    arguments = ["--config", str(tmp_path / "ds.json"), "--max-bytes", "4096", "--features", "256", "--repeats", "3"]
    for code, output in ranks.run(_command, [*arguments, "--out", str(out)], None):
        assert code == 0, output
    (times,) = Tuning.read(out).codecs
    assert times.covers(Route(static_cases.calibrated("static4", 256, 2)))


def test_what_auto_chooses_stays_unless_another_way_is_clearly_faster() -> None:
    message = Message(512, 4096, BF16)
    usual, *others = candidates(INT8, message, 2, CPU)
    for seconds, chosen in ((0.96e-3, usual), (0.94e-3, others[-1])):
        ranks = MadeUp(lambda _, way, other=seconds: other if way == others[-1] else 1e-3)
        made = plan(*tune([INT8], [message], ranks), INT8, 2, algorithm=True, chunks=True)
        assert made.route_of(message.bytes) == chosen


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--codec int9", "unknown preset 'int9'"),
        ("--codec int8 --config {}/ds.json", "give either --codec or --config"),
        ("--config {}/exact.json", "compresses nothing"),
        ("--tp 1", "at least two"),
        ("--out {}/none/tuning.json", "there is no folder"),
        ("--plot {}", "is a folder"),
    ],
)
def test_requests_that_cannot_be_served(tmp_path: Path, no_launcher: None, arguments: str, message: str) -> None:
    (tmp_path / "ds.json").write_text('{"megacomp": {}}')
    (tmp_path / "exact.json").write_text('{"megacomp": {"communication": {"codec": null}}}')
    result = CliRunner().invoke(cli.app, ["tune", *arguments.replace("{}", str(tmp_path)).split()])
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
