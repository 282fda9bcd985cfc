"""`megacomp plan`: the model's limits and directions, published measurements, and what the command says."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from benchmarks import markdown
from benchmarks import planning_published as published
from megacomp import codecs, config
from megacomp.collectives import Route, wire_bytes
from megacomp.launch import cli, planning
from megacomp.launch.errors import LaunchError
from megacomp.launch.hardware import GPUS, LINKS, Gpu, Link
from megacomp.launch.planning import System, Workload

ROOT = Path(__file__).resolve().parents[2]
MODEL = published.LLAMA_2_70B
CONFIG = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "max_position_embeddings": 4096,
}


def _system(gpu: str, ranks: int, **changes: Any) -> System:
    found = GPUS[gpu]
    return System(found, replace(LINKS[found.link], **changes), ranks)


def _call(*arguments: Any) -> Any:
    return CliRunner().invoke(cli.app, ["plan", *(str(argument) for argument in arguments)])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


# Against publications: a quarter for whole systems, of whose setting some things are assumed, and for collectives of
# at least 8 MB. Small messages depend on NCCL's version: a third off and more.
TOLERANCE = {"plain, 1 MiB": 0.40}


@pytest.mark.parametrize("row", published.rows(), ids=lambda row: f"{row.source}: {row.what}")
def test_the_model_is_near_what_was_published(row: published.Row) -> None:
    assert abs(row.error) <= TOLERANCE.get(row.what, 0.26)


def test_the_documented_table_is_the_model_of_today() -> None:
    text = (ROOT / "docs" / "planning.md").read_text()
    assert f"<!-- table: python -m benchmarks.planning_published -->\n{published.table()}\n{markdown.END}" in text


def test_slow_links_get_a_codec_and_fast_ones_for_short_prompts_do_not() -> None:
    slow = planning.plan(MODEL, _system("l4-pcie", 8), Workload(prompt=256))
    assert slow.best is not None and slow.best.algorithm == "two_shot"
    assert slow.ttft_s / slow.planned_ttft_s > 1.5
    fast = planning.plan(MODEL, _system("a100-nvlink", 4), Workload(prompt=256))
    assert fast.best is None
    assert fast.section == {"megacomp": {"communication": {"codec": None}}}
    assert fast.planned_ttft_s == fast.ttft_s


SYSTEMS = st.builds(
    lambda gpu, ranks, gbs: _system(gpu, ranks, gbs=gbs, gbs_beyond=None),
    st.sampled_from(sorted(GPUS)),
    st.sampled_from([1, 2, 4, 8]),
    st.floats(0.05, 1000),
)


@settings(max_examples=60)
@given(SYSTEMS, st.integers(1, 4096), st.integers(1, 8))
def test_a_plan_is_never_slower_than_no_plan_and_is_a_section(system: System, prompt: int, batch: int) -> None:
    planned = planning.plan(MODEL, system, Workload(prompt, batch))
    assert planned.planned_ttft_s <= planned.ttft_s
    assert planned.planned_token_s <= planned.token_s
    communication = config.load(planned.section)[0].communication
    if planned.best is None:
        assert communication.codec is None
    else:
        assert planned.best.pays_from is not None
        assert planned.best.pays_from <= communication.min_bytes <= planned.message_bytes


@settings(max_examples=60)
@given(
    SYSTEMS,
    st.floats(1, 100),
    st.sampled_from(["mxfp4", "int8", "nvfp4"]),
    st.sampled_from(["one_shot", "two_shot"]),
    st.integers(1024, 32768),
)
def test_a_faster_link_never_gains_more(system: System, factor: float, codec: str, algorithm: Any, rows: int) -> None:
    # Of long messages: NCCL changes its protocol among short ones.
    route = Route(codecs.get(codec), algorithm=algorithm)
    slower = replace(system, link=replace(system.link, gbs=system.link.gbs / factor))

    def saved(on: System) -> float:
        plain = planning.all_reduce_s(on, rows * 8192 * planning.VALUE_BYTES)
        return plain - planning.compressed_s(on, route, rows, 8192)

    if saved(slower) > 0:
        assert saved(system) <= saved(slower) * (1 + 1e-9)


@settings(max_examples=60)
@given(SYSTEMS, st.integers(1, 2**20), st.integers(1, 2**20), st.floats(1, 10))
def test_more_bytes_and_slower_links_take_longer(system: System, some: int, more: int, factor: float) -> None:
    slower = replace(system, link=replace(system.link, gbs=system.link.gbs / factor))
    for collective in (planning.all_reduce_s, planning.all_gather_s, planning.all_to_all_s):
        assert collective(system, some) <= collective(system, some + more)
        assert collective(system, some) <= collective(slower, some)


@pytest.mark.parametrize("codec", ["mxfp4", "int8", "nvfp4"])
def test_on_a_slow_link_the_gain_is_the_ratio_of_bytes(codec: str) -> None:
    """Both against what megacomp.collectives counts; between two ranks both algorithms send the same."""
    rows, features = 4096, 8192
    for ranks in (2, 4, 8):
        system = _system("h200-nvlink", ranks, gbs=1e-3)
        plain = planning.all_reduce_s(system, rows * features * planning.VALUE_BYTES)
        times = {}
        for algorithm in ("one_shot", "two_shot"):
            route = Route(codecs.get(codec), algorithm=algorithm)  # type: ignore[arg-type]
            traffic = wire_bytes(route, rows, features, torch.bfloat16, rank=0, world_size=ranks)
            times[algorithm] = planning.compressed_s(system, route, rows, features)
            assert plain / times[algorithm] == pytest.approx(traffic.ring / traffic.sent, rel=1e-3)
        assert (times["one_shot"] == pytest.approx(times["two_shot"], rel=1e-3)) is (ranks == 2)


def test_one_rank_reduces_nothing() -> None:
    planned = planning.plan(MODEL, _system("h200-nvlink", 1), Workload())
    assert planned.best is None and planned.message_s == 0 and planned.compute_s == planned.ttft_s


def test_compute_is_a_roofline() -> None:
    """Long prompts take the time of their operations, single tokens that of the weights."""
    gpu = Gpu("round numbers", 100, 1000, None, 1000, "")
    system = System(gpu, Link("none", 1, "pcie"), 1)
    weights = 2 * sum(rows * columns for rows, columns in MODEL.linear_shapes().values())
    long = planning.compute_s(MODEL, system, Workload(prompt=4096), first_token=True)
    assert long == pytest.approx(weights * 4096 / 0.7e14, rel=0.15)
    token = planning.compute_s(MODEL, system, Workload(prompt=1), first_token=False)
    assert token == pytest.approx(weights / 0.85e12, rel=0.02)
    quarter = planning.compute_s(MODEL, system, Workload(prompt=1, weight_bits=4), first_token=False)
    assert quarter == pytest.approx(token / 4, rel=0.05)


def test_across_hosts_the_network_decides_and_all_to_all_sends_more() -> None:
    gpu = GPUS["h100-nvlink"]
    inside = System(gpu, LINKS["nvlink4"], 8)
    across = System(gpu, LINKS["nvlink4"], 8, 2, LINKS["ethernet-100g"])
    single = System(gpu, LINKS["nvlink4"], 2, 2, LINKS["ethernet-100g"])
    assert across.ring_gbs == LINKS["ethernet-100g"].gbs
    size = 64 * 2**20
    assert planning.all_reduce_s(across, size) > 10 * planning.all_reduce_s(inside, size)
    # Four GPUs of a host send half of their messages across, a ring seven eighths of one message.
    assert planning.all_to_all_s(across, size) / planning.all_gather_s(across, size / 8) == pytest.approx(
        2 / (7 / 8), rel=0.05
    )
    assert planning.all_to_all_s(single, size) == pytest.approx(planning.all_gather_s(single, size / 2), rel=0.05)
    with pytest.raises(LaunchError, match="ethernet-100g"):
        System(gpu, LINKS["nvlink4"], 8, 2)
    with pytest.raises(LaunchError, match="equal numbers"):
        System(gpu, LINKS["nvlink4"], 8, 3, LINKS["ethernet-100g"])


def test_pays_from_is_the_first_size_that_pays_for_good() -> None:
    system, route = _system("l40s-pcie", 4), Route(codecs.get("mxfp4"), algorithm="two_shot")
    found = planning.pays_from(system, route, 4096)
    assert found is not None

    def pays(rows: int) -> bool:
        plain = planning.all_reduce_s(system, rows * 4096 * planning.VALUE_BYTES)
        return planning.compressed_s(system, route, rows, 4096) * planning.PAYS <= plain

    first = found // (4096 * planning.VALUE_BYTES)
    assert pays(first) and not pays(first - 1)
    assert all(pays(first * 2**power) for power in range(10))


def test_every_gpu_and_network_is_complete() -> None:
    for gpu in GPUS.values():
        assert gpu.link in LINKS and LINKS[gpu.link].wiring != "network"
        # What one byte's time is worth in instructions: an order of magnitude, against slips of units.
        assert 5 < 1000 * gpu.issue / gpu.memory_gbs < 60
    assert set(planning.networks()) == {name for name in LINKS if name.startswith(("ethernet", "infiniband"))}


def test_the_command_prints_a_table_and_writes_section_and_chart(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    out, chart = tmp_path / "plan.json", tmp_path / "plan.png"
    result = _call("--model", folder, "--gpu", "l4-pcie", "--tp", 8, "--prompt", 512, "--json", out, "--plot", chart)
    assert result.exit_code == 0, result.output
    assert "MODEL, not measured" in result.output and '"megacomp"' in result.output
    written = json.loads(out.read_text())
    assert written["kind"] == "MODEL, not measured"
    assert config.load(written["section"])[0].communication.codec == {"preset": "int4", "rotation": 128}
    assert len(written["forecasts"]) == 10
    assert chart.read_bytes().startswith(b"\x89PNG")


def test_the_command_takes_a_config_alone_codecs_and_own_numbers(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    own = ("--tflops", 50, "--memory-gbs", 300, "--link-gbs", 0.125, "--link-us", 100)
    codec = ("--codec", "mxfp4", "--codec", '{"preset": "int8", "block_size": 128}')
    result = _call("--model", folder / "config.json", "--tp", 2, *own, *codec, "--json", out)
    assert result.exit_code == 0, result.output
    written = json.loads(out.read_text())
    assert written["system"]["ring_gbs"] == 0.125
    assert [one["codec"] for one in written["forecasts"]][::2] == ["mxfp4", {"preset": "int8", "block_size": 128}]
    assert written["ttft_s"] / written["planned_ttft_s"] > 3


def test_a_link_without_latency_is_one(folder: Path, tmp_path: Path) -> None:
    def ttft_s(*link: Any) -> float:
        out = tmp_path / "plan.json"
        own = ("--tflops", 50, "--memory-gbs", 300, "--link-gbs", 10, *link)
        result = _call("--model", folder, "--tp", 4, "--prompt", 8, "--codec", "mxfp4", *own, "--json", out)
        assert result.exit_code == 0, result.output
        return json.loads(out.read_text())["ttft_s"]

    assert ttft_s("--link-us", 0) < ttft_s("--link-us", 1) < ttft_s()
    assert ttft_s("--link-us", 0) == pytest.approx(ttft_s("--link-us", 1e-9))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--gpu", "b9000", "--tp", 2), "unknown --gpu 'b9000'.*h200-nvlink"),
        (("--tp", 2), "give --gpu .*--link-gbs"),
        (("--gpu", "l4-pcie", "--tp", 3), "does not divide"),
        (("--gpu", "l4-pcie", "--tp", 2, "--link", "ethernet-10g"), "give --nodes"),
        (("--gpu", "l4-pcie", "--tp", 2, "--nodes", 2), "need a network.*infiniband-400g"),
        (("--gpu", "l4-pcie", "--tp", 2, "--nodes", 2, "--link", "nvlink4"), "unknown --link"),
        (("--gpu", "l4-pcie", "--tp", 2, "--codec", "mxfp5"), "mxfp5"),
        (("--gpu", "l4-pcie", "--tp", 2, "--codec", "{"), "not valid JSON"),
        (("--gpu", "l4-pcie", "--tp", 2, "--json", "/nowhere/plan.json"), "no folder"),
        (("--gpu", "l4-pcie", "--tp", 2, "--plot", "plan.foo"), "plan.foo: its suffix must be one of .*png"),
    ],
)
def test_what_cannot_be_planned_is_refused(arguments: tuple[Any, ...], message: str, folder: Path) -> None:
    result = _call("--model", folder, *arguments)
    assert result.exit_code == 2
    assert re.search(message, " ".join(result.output.split())), result.output


def test_a_static_codec_is_planned_and_its_calibration_asked_for(folder: Path) -> None:
    result = _call("--model", folder, "--gpu", "l4-pcie", "--tp", 8, "--prompt", 256, "--codec", "static4")
    assert result.exit_code == 0, result.output
    output = " ".join(result.output.split())
    assert '"codec": "static4"' in output and "the file of its calibration (megacomp calibrate)" in output


def test_notes_say_what_does_not_fit(folder: Path) -> None:
    result = _call("--model", folder, "--gpu", "l4-pcie", "--tp", 2, "--prompt", 8192)
    assert "do not fit into the 24 GB" in result.output and "4096 tokens" in result.output
