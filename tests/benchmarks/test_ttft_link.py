"""What is concluded from times to first token, of times that are made up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from benchmarks import ttft_link
from benchmarks.markdown import END, replace_table
from benchmarks.ttft_link import Prefill, aims
from benchmarks.ttft_link_worker import PlainCollectives
from megacomp.launch.errors import LaunchError


def measured(plain: float, inside: float, compressed: float, **changes: Any) -> dict[str, Any]:
    """One prompt, three repetitions around these milliseconds."""
    return {
        "engine": "deepspeed",
        "prompt": 512,
        "compressed_messages": 8,
        "wire_ratio": 4.0,
        "plain_ms": [plain - 1, plain, plain + 2],
        "collectives_ms": [inside / plain * (plain - 1), inside, inside / plain * (plain + 2)],
        "compressed_ms": [compressed, compressed - 1, compressed + 1],
        **changes,
    }


def alone(plain: float, compressed: float) -> dict[str, Any]:
    return {
        "bytes": 32 * 2**20,
        "median_ms": {"plain": plain, "compressed": compressed},
        "speedup": plain / compressed,
    }


RESULTS = {
    "model": {"hidden": 1024, "layers": 4},
    "codec": "mxfp4",
    "runs": [
        {
            "tp": 2,
            "rates": [
                {"mbit": 50.0, "ttft": [measured(1000.0, 800.0, 440.0)]},
                {"mbit": 1000.0, "ttft": [measured(250.0, 50.0, 200.0)], "collective": alone(280.0, 80.0)},
                {
                    "mbit": 10000.0,
                    "ttft": [measured(210.0, 10.0, 220.0, compressed_messages=0)],
                    "collective": alone(30.0, 30.0),
                },
            ],
        },
    ],
}


def test_amdahls_limit_and_how_much_of_it() -> None:
    one = Prefill.of(2, 50.0, measured(1000.0, 800.0, 440.0))
    assert (one.plain_ms, one.plain_range_ms, one.compressed_range_ms) == (1000.0, (999.0, 1002.0), (439.0, 441.0))
    assert one.share == pytest.approx(0.8)
    assert one.limit == pytest.approx(1 / (0.2 + 0.8 / 4))
    assert one.speedup == pytest.approx(1000 / 440)
    assert one.fraction == pytest.approx(1000 / 440 / 2.5)


def test_what_is_left_exact_has_nothing_to_gain() -> None:
    one = Prefill.of(2, 50.0, measured(1000.0, 800.0, 1000.0, compressed_messages=0))
    assert one.limit == 1.0 and not one.compressed


def test_the_aims_are_held_against_the_worst() -> None:
    reached = {aim: (value, wanted) for aim, value, wanted in aims(RESULTS)}
    assert [pair[1] for pair in reached.values()] == [3.5, 1.5, 0.9, 0.97]
    values = [pair[0] for pair in reached.values()]
    # Of the three prompts only the first spends half of its time in collectives.
    assert values == pytest.approx([3.5, 1.0, 1000 / 440 / 2.5, 210 / 220])


def test_results_are_shown_drawn_and_written_again(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    results, chart, page = (tmp_path / name for name in ("results.json", "ttft.png", "page.md"))
    results.write_text(json.dumps(RESULTS))
    page.write_text(f"before\n<!-- table: python -m benchmarks.ttft_link -->\nold\n{END}\nafter\n")
    arguments = ["--from", str(results), "--chart", str(chart), "--write", str(page)]
    done = CliRunner().invoke(ttft_link.app, arguments)
    assert done.exit_code == 0, done.output
    assert "aimed at 3.50: reached" in done.output and "aimed at 1.50: missed" in done.output
    assert chart.read_bytes().startswith(b"\x89PNG")
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert "| 1 Gbit/s | 2 | 280.0 | 80.0 | 3.50 |" in text
    assert "| 50 Mbit/s | 2 | deepspeed | 512 | 1000 ± 2 | 440 ± 1 | 2.27 | 80% | 2.50 | 91% |" in text


def test_a_page_without_a_place_is_not_written(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("nothing here")
    with pytest.raises(LaunchError, match=r"page\.md has no place for the table"):
        replace_table(page, "benchmarks.ttft_link", "table")
    assert page.read_text() == "nothing here"


def test_only_the_collectives_of_sites_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    class Reducing(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            torch.distributed.all_reduce(x)
            return x

    site, other = Reducing(2, 2), Reducing(2, 2)

    class Known:
        imported = True

        def sites(self, model: torch.nn.Module) -> dict[torch.nn.Module, None]:
            return {site: None}

    calls: list[int] = []

    def original(x: torch.Tensor) -> None:
        calls.append(1)

    monkeypatch.setattr("benchmarks.ttft_link_worker.FRAMEWORKS", [Known()])
    monkeypatch.setattr(torch.distributed, "all_reduce", original)
    watch = PlainCollectives(torch.nn.Sequential(site, other, site))
    with watch.watched():
        watch._module(torch.zeros(1, 2))
    watch._module(torch.zeros(1, 2))
    assert torch.distributed.all_reduce is original
    assert len(watch.take()) == 2 and len(calls) == 6 and not watch.take()
