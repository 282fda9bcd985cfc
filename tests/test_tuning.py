"""What "tuned" means: the plan that follows from times, the files they are kept in, and what ranks must share."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rank_pool import RankPool

import megacomp
from megacomp import codecs
from megacomp.agreement import differences
from megacomp.collectives import Collective, Route
from megacomp.config import ConfigError, load
from megacomp.door import Door
from megacomp.policy import Decline, Policy, Site
from megacomp.tuning import CodecTuning, Key, SizeTuning, Timing, Tuning, TuningError, Tunings, cache_file, plan

KIB = 1024
SITE = Site("layers.0.mlp", "mlp", 0, 2)
FEATURES = 512


def route(codec: Any = "int8", **settings: Any) -> Route:
    return Route(codecs.get(codec, backend="reference"), **settings)


def times(codec: Any, sizes: Mapping[int, Mapping[tuple[str, int] | None, float]]) -> CodecTuning:
    """bytes -> (way, or None for plain) -> microseconds."""
    return CodecTuning.of(
        route(codec),
        [
            SizeTuning(
                bytes=count,
                rows=count // FEATURES // 2,
                features=FEATURES,
                plain_microseconds=ways[None],
                timings=tuple(
                    Timing(algorithm=way[0], pipeline_chunks=way[1], microseconds=us)  # type: ignore[arg-type]
                    for way, us in ways.items()
                    if way is not None
                ),
            )
            for count, ways in sizes.items()
        ],
    )


def by_size(plain: Callable[[int], float], compressed: Callable[[int], float], codec: str = "int8") -> CodecTuning:
    sizes = [KIB * 2**step for step in range(8)]
    return times(codec, {size: {None: plain(size), ("one_shot", 1): compressed(size)} for size in sizes})


def tuning(*codec_times: CodecTuning, world_size: int = 2, **key: str) -> Tuning:
    here = Key.here(torch.device("cpu"), world_size)
    return Tuning(
        key=here.model_copy(update=key), hosts=1, dtype="bf16", codecs=tuple(codec_times), environment={"note": "test"}
    )


def write(tuned: Tuning, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(tuned.to_dict()))
    return path


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return tmp_path / "cache" / "megacomp" / "tuning"


# The plan


def test_the_threshold_is_the_first_size_from_which_all_larger_ones_are_faster() -> None:
    alternating = by_size(
        lambda size: 100.0, lambda size: 50.0 if size in (KIB, 8 * KIB) or size >= 32 * KIB else 200.0
    )
    assert plan(alternating, route(), 2, algorithm=True, chunks=True).min_bytes == 32 * KIB
    assert plan(by_size(float, lambda size: size / 2), route(), 2, algorithm=True, chunks=True).min_bytes == KIB
    assert plan(by_size(float, lambda size: 2.0 * size), route(), 2, algorithm=True, chunks=True).min_bytes == math.inf


def test_a_gain_within_the_noise_is_none() -> None:
    assert plan(by_size(float, lambda size: 0.92 * size), route(), 2, algorithm=True, chunks=True).min_bytes == math.inf
    assert plan(by_size(float, lambda size: 0.88 * size), route(), 2, algorithm=True, chunks=True).min_bytes == KIB


WAYS = times(
    "int8",
    {
        16 * KIB: {None: 90.0, ("one_shot", 1): 20.0, ("two_shot", 1): 30.0, ("one_shot", 2): 40.0},
        64 * KIB: {None: 90.0, ("one_shot", 1): 50.0, ("two_shot", 1): 40.0, ("one_shot", 2): 30.0},
        256 * KIB: {None: 95.0, ("one_shot", 1): 94.0, ("two_shot", 4): 60.0, ("one_shot", 4): 70.0},
    },
)


def test_every_size_has_the_way_that_was_fastest_at_the_nearest() -> None:
    steps = plan(WAYS, route(), 4, algorithm=True, chunks=True).steps
    assert [(step.route.algorithm, step.route.pipeline_chunks) for step in steps] == [
        ("one_shot", 1),
        ("one_shot", 2),
        ("two_shot", 4),
    ]
    assert [(step.min_bytes, step.max_bytes) for step in steps] == [
        (0, 32 * KIB),
        (32 * KIB + 1, 128 * KIB),
        (128 * KIB + 1, math.inf),
    ]


def test_what_is_not_to_be_tuned_stays_and_its_times_count() -> None:
    (only,) = plan(WAYS, route(), 2, algorithm=False, chunks=False).steps
    assert (only.route, only.min_bytes, only.max_bytes) == (route(), 0, math.inf)
    # Among two ranks "auto" is one-shot, at these sizes in one piece: at 256 KiB that gains too little.
    assert plan(WAYS, route(), 2, algorithm=False, chunks=False).min_bytes == math.inf
    assert plan(WAYS, route(), 2, algorithm=False, chunks=True).min_bytes == 16 * KIB
    two_shot = plan(WAYS, route(algorithm="two_shot"), 2, algorithm=False, chunks=True).steps
    assert [(step.route.algorithm, step.route.pipeline_chunks) for step in two_shot] == [
        ("two_shot", 1),
        ("two_shot", 4),
    ]
    fixed = plan(WAYS, route(pipeline_chunks=2), 2, algorithm=True, chunks=False).steps
    assert [(step.route.algorithm, step.route.pipeline_chunks) for step in fixed] == [("one_shot", 2), ("two_shot", 2)]


ABOUT_AS_FAST = {
    **{("one_shot", chunks): us for chunks, us in ((4, 100.0), (1, 97.0), (2, 96.0), (8, 101.0))},
    **{("two_shot", chunks): us for chunks, us in ((1, 96.0), (2, 97.0), (4, 99.0), (8, 98.0))},
}


@pytest.mark.parametrize("algorithm", ["auto", "one_shot", "two_shot"])
def test_of_ways_that_are_about_as_fast_it_is_what_auto_chooses(algorithm: Any) -> None:
    # Among two ranks that is one-shot, and by the default length of a chunk 4 for this message of 4 MiB.
    tuned = {"algorithm": algorithm == "auto", "chunks": True}
    message = {4096 * KIB: {None: 900.0, **ABOUT_AS_FAST}}
    (step,) = plan(times("int8", message), route(algorithm=algorithm), 2, **tuned).steps
    expected = "one_shot" if algorithm == "auto" else algorithm
    assert (step.route.algorithm, step.route.pipeline_chunks) == (expected, 4)
    slow = {way: 1.06 * us if way[1] == 4 else us for way, us in ABOUT_AS_FAST.items()}
    (step,) = plan(times("int8", {4096 * KIB: {None: 900.0, **slow}}), route(algorithm=algorithm), 2, **tuned).steps
    assert step.route.pipeline_chunks == (1 if algorithm == "two_shot" else 2)


def test_chunks_that_were_not_measured_stand_for_the_nearest_that_were() -> None:
    five = {5120 * KIB: {None: 900.0, ("one_shot", 5): 100.0, ("two_shot", 1): 96.0, ("two_shot", 4): 99.0}}
    (step,) = plan(times("int8", five), route(algorithm="two_shot"), 2, algorithm=False, chunks=True).steps
    assert step.route.pipeline_chunks == 4


# The files


def test_a_file_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    written = tuning(WAYS)
    assert Tuning.read(write(written, tmp_path / "tuning.json")) == written


@pytest.mark.parametrize(
    ("spoil", "word"),
    [
        (lambda text: text[: len(text) // 2], "JSON"),
        (lambda text: "[]", "object"),
        (lambda text: text.replace('"version": 1', '"version": 2'), "version"),
        (lambda text: text.replace("one_shot", "no_shot"), "algorithm"),
        (lambda text: text.replace("90.0", "-90.0"), "plain_microseconds"),
        (lambda text: text.replace("90.0", "NaN"), "plain_microseconds"),
    ],
)
def test_a_spoilt_file_is_named_with_what_is_wrong(tmp_path: Path, spoil: Callable[[str], str], word: str) -> None:
    path = write(tuning(WAYS), tmp_path / "tuning.json")
    path.write_text(spoil(path.read_text()))
    with pytest.raises(TuningError, match=word) as caught:
        Tuning.read(path)
    assert str(path) in str(caught.value)


def test_a_new_tuning_keeps_other_codecs_of_the_same_ranks() -> None:
    int4, int8 = by_size(float, float, "int4"), by_size(float, float, "int8")
    newer = by_size(float, lambda size: 0.5 * size, "int8")
    assert tuning(newer).with_codecs_of(tuning(int4, int8)).codecs == (newer, int4)
    assert tuning(newer).with_codecs_of(tuning(int4, torch_version="1.0")).codecs == (newer,)


def test_the_digest_is_that_of_what_decides() -> None:
    same = tuning(WAYS).model_copy(update={"environment": {"note": "another day"}})
    assert same.digest() == tuning(WAYS).digest()
    assert tuning(by_size(float, float)).digest() != tuning(WAYS).digest()


def test_each_kind_of_ranks_has_a_file_of_its_own(cache: Path) -> None:
    here = Key.here(torch.device("cpu"), 2)
    path = cache_file(here)
    assert path.parent == cache and path.name.endswith("-gloo-2-ranks.json")
    others = [{"world_size": 4}, {"backend": "nccl"}, {"hardware": "NVIDIA H200"}]
    assert len({path, *(cache_file(here.model_copy(update=other)) for other in others)}) == 4


# What an installation goes by


def test_those_of_the_cache_that_fit_are_found_by_the_number_of_ranks(caplog: pytest.LogCaptureFixture) -> None:
    pair, four = tuning(WAYS), tuning(by_size(float, lambda size: 0.5 * size), world_size=4)
    for one in (pair, four):
        write(one, cache_file(one.key))
    tunings = Tunings(None, 4)
    assert tunings.statement() == {"tuning of 2 ranks": pair.digest(), "tuning of 4 ranks": four.digest()}
    threshold = {ranks: tunings.plan(route(), ranks, algorithm=True, chunks=True) for ranks in (2, 4)}
    assert {ranks: found and found.min_bytes for ranks, found in threshold.items()} == {2: 16 * KIB, 4: KIB}
    assert not caplog.records
    assert str(cache_file(pair.key)) in tunings.describe()["2 ranks"]


def test_where_nothing_fits_the_log_and_the_report_say_why(caplog: pytest.LogCaptureFixture) -> None:
    tunings = Tunings(None, 2)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "megacomp tune --tp 2" in record.message and "defaults" in record.message
    assert tunings.plan(route(), 2, algorithm=True, chunks=True) is None
    assert len(caplog.records) == 1, "said once"
    assert tunings.describe()["2 ranks"].startswith("defaults: no tuning of 2 ranks in ")


def test_without_a_home_there_is_no_cache(no_home: None, caplog: pytest.LogCaptureFixture) -> None:
    assert cache_file(tuning(WAYS).key) is None
    policy = Policy(load(section(min_bytes="tuned"))[0])
    assert isinstance(policy.decide(SITE, "all_reduce", 4096, FEATURES, torch.bfloat16, 2), Route)
    assert policy.tunings is not None and "no home folder" in policy.tunings.describe()["2 ranks"]
    assert caplog.messages and all("no home folder" in message for message in caplog.messages)


def test_other_versions_count_for_nothing(caplog: pytest.LogCaptureFixture) -> None:
    old = tuning(WAYS, torch_version="1.0", megacomp_version="0.0.1")
    path = write(old, cache_file(old.key))
    tunings = Tunings(None, 2)
    (message,) = caplog.messages
    for word in (str(path), "torch 1.0, not", "megacomp 0.0.1, not"):
        assert word in message
    assert tunings.plan(route(), 2, algorithm=True, chunks=True) is None and not tunings.statement()


def test_another_number_of_ranks_or_another_codec_is_said_at_its_first_message(
    caplog: pytest.LogCaptureFixture,
) -> None:
    found = tuning(WAYS)
    write(found, cache_file(found.key))
    tunings = Tunings(None, None)
    assert not caplog.records
    assert tunings.plan(route(), 4, algorithm=True, chunks=True) is None
    assert tunings.plan(route("int4"), 2, algorithm=True, chunks=True) is None
    assert "4 ranks" in caplog.messages[0] and "there is one for 2" in caplog.messages[0]
    assert "int4" in caplog.messages[1]
    assert set(tunings.describe()) == {"2 ranks", "4 ranks", "2 ranks, int4"}


def test_a_world_that_no_tuning_divides_is_warned_of_at_once(caplog: pytest.LogCaptureFixture) -> None:
    four = tuning(WAYS, world_size=4)
    write(four, cache_file(four.key))
    Tunings(None, 8)
    assert not caplog.records
    Tunings(None, 2)
    assert "there is one for 4" in caplog.messages[0]


def test_a_spoilt_file_of_the_cache_is_ignored_and_named(caplog: pytest.LogCaptureFixture) -> None:
    path = write(tuning(WAYS), cache_file(tuning(WAYS).key))
    path.write_text("{")
    Tunings(None, None)
    assert str(path) in caplog.messages[0] and "ignored" in caplog.messages[0]


# Through the configuration


def section(**communication: Any) -> dict[str, Any]:
    return {"megacomp": {"communication": {"codec": "int8"} | communication, "backend": "reference"}}


def decide(policy: Policy, size: int, world_size: int = 2, collective: Collective = "all_reduce") -> Route | Decline:
    rows = size // FEATURES // 2
    return policy.decide(SITE, collective, rows, FEATURES, torch.bfloat16, world_size)


TUNED = {"min_bytes": "tuned", "algorithm": "tuned", "pipeline_chunks": "tuned"}


def ways(policy: Policy, sizes: list[int], collective: Collective = "all_reduce") -> list[Any]:
    outcomes = [decide(policy, size, collective=collective) for size in sizes]
    return [(o.algorithm, o.pipeline_chunks) if isinstance(o, Route) else o for o in outcomes]


@pytest.mark.parametrize("collective", ["all_reduce", "reduce_scatter", "all_gather"])
def test_a_policy_goes_by_the_file_it_names(tmp_path: Path, collective: Collective) -> None:
    path = write(tuning(WAYS), tmp_path / "tuning.json")
    more = {"collectives": [collective], "tuning": str(path)}
    policy = Policy(load(section(**TUNED, **more))[0])
    assert ways(policy, [8 * KIB, 16 * KIB, 32 * KIB, 33 * KIB, 256 * KIB, 1024 * KIB], collective) == [
        Decline.BELOW_MIN_BYTES,
        ("one_shot", 1),
        ("one_shot", 1),
        ("one_shot", 2),
        ("two_shot", 4),
        ("two_shot", 4),
    ]
    partly = Policy(load(section(min_bytes=0, algorithm="tuned", **more))[0])
    assert ways(partly, [KIB, 256 * KIB], collective) == [("one_shot", "auto"), ("one_shot", "auto")]


def test_a_rule_alone_goes_by_the_file(tmp_path: Path) -> None:
    one_shot = {8: 200.0, 16: 20.0, 64: 50.0, 256: 80.0}
    measured = {
        size * KIB: {None: 100.0, ("one_shot", 1): us, ("two_shot", 1): 40.0 if size > 8 else 200.0}
        for size, us in one_shot.items()
    }
    path = write(tuning(times("int8", measured)), tmp_path / "tuning.json")

    def found(**rule: Any) -> list[Any]:
        more = {"min_bytes": 32 * KIB, "pipeline_chunks": 1, "tuning": str(path)}
        policy = Policy(load(section(**more, rules=[{"module": "mlp", **rule}]))[0])
        other = policy.decide(Site("layers.0.attention", "attention", 0, 2), "all_reduce", 24, 512, torch.bfloat16, 2)
        assert other is Decline.BELOW_MIN_BYTES, "the section itself is not tuned"
        return ways(policy, list(measured))

    below, fastest = Decline.BELOW_MIN_BYTES, [("one_shot", 1), ("two_shot", 1), ("two_shot", 1)]
    assert found(min_bytes="tuned", algorithm="tuned") == [below, *fastest]
    assert found(algorithm="tuned") == [below, below, *fastest[1:]]
    assert found(min_bytes="tuned", algorithm="two_shot") == [below, *[("two_shot", 1)] * 3]


def test_where_compression_never_pays_nothing_is_compressed(tmp_path: Path) -> None:
    path = write(tuning(by_size(float, lambda size: 2.0 * size)), tmp_path / "tuning.json")
    policy = Policy(load(section(min_bytes="tuned", tuning=str(path)))[0])
    assert ways(policy, [KIB, 2**30]) == [Decline.BELOW_MIN_BYTES] * 2


def test_without_a_tuning_the_defaults_hold() -> None:
    tuned, default = Policy(load(section(**TUNED))[0]), Policy(load(section())[0])
    for size in (KIB, 64 * KIB - 1024, 64 * KIB, 2**26):
        assert decide(tuned, size) == decide(default, size)


def test_below_its_own_threshold_a_rule_leaves_exact_and_no_coarser_codec_takes_over(tmp_path: Path) -> None:
    fine = by_size(float, lambda size: size * (0.5 if size >= 64 * KIB else 2.0), "int8")
    coarse = by_size(float, lambda size: 0.5 * size, "int4")
    path = write(tuning(fine, coarse), tmp_path / "tuning.json")
    tuned = {"min_bytes": "tuned", "tuning": str(path)}
    policy = Policy(load(section(**tuned, codec="int4", rules=[{"layers": "0", "codec": "int8"}]))[0])
    assert decide(policy, 32 * KIB) is Decline.BELOW_MIN_BYTES
    chosen = decide(policy, 64 * KIB)
    assert isinstance(chosen, Route) and chosen.codec.name == "int8"
    exact = section(**tuned, rules=[{"module": "mlp", "codec": None}])
    assert ways(Policy(load(exact)[0]), [KIB, 2**20]) == [Decline.EXACT] * 2


@pytest.mark.parametrize("content", [None, "{"])
def test_a_file_that_was_asked_for_must_be_there(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "tuning.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=r"megacomp\.communication\.tuning: .*tuning\.json"):
        megacomp.install(section(min_bytes="tuned", tuning=str(path)))


def test_nothing_is_read_where_nothing_is_tuned(caplog: pytest.LogCaptureFixture) -> None:
    assert Policy(load(section())[0]).tunings is None
    assert not caplog.records


def test_the_report_says_what_was_used(tmp_path: Path) -> None:
    path = write(tuning(WAYS), tmp_path / "tuning.json")
    with megacomp.install(section(min_bytes="tuned", tuning=str(path))) as installation:
        report = installation.report()
    assert list(report.tuning) == ["2 ranks"] and report.to_dict()["tuning"] == report.tuning
    assert "tuning of 2 ranks" in str(report)


def test_ranks_compare_what_their_tunings_say(tmp_path: Path) -> None:
    settings = load(section(min_bytes="tuned"))[0]
    before = Door(settings).statement()
    write(tuning(WAYS), cache_file(tuning(WAYS).key))
    (line,) = differences({0: before, 1: Door(settings).statement()}, lambda who: f"on rank {who[0]}")
    assert line.startswith("tuning of 2 ranks: absent on rank 0; ") and line.endswith("on rank 1")


def _install_with_caches(folders: list[str]) -> str | None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", folders[dist.get_rank()])
        try:
            megacomp.install(section(min_bytes="tuned")).uninstall()
        except megacomp.AgreementError as error:
            return str(error)
    return None


def test_ranks_with_unequal_tunings_are_told_so(
    ranks: RankPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = []
    for name, found in (("a", tuning(WAYS)), ("b", tuning(by_size(float, float)))):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / name))
        write(found, cache_file(found.key))
        folders.append(str(tmp_path / name))
    assert ranks.run(_install_with_caches, [folders[0]] * 2) == [None, None]
    for error in ranks.run(_install_with_caches, folders):
        assert "tuning of 2 ranks" in error and "on rank 0" in error and "on rank 1" in error
