"""Time to first token over a link of a chosen rate, uncompressed and compressed, with real processes on one machine.

python -m benchmarks.ttft_link --out benchmarks/results/ttft-link.json \\
    --chart docs/images/ttft.png --write docs/performance.md

Each rank lives in a network namespace; tbf gives every cable its rate (benchmarks.shaped_link). A Llama-shaped model
with random weights prefills prompts under DeepSpeed and Megatron-core, uncompressed and compressed in turn, everything
else equal; the settings are those that `megacomp tune` finds at each rate. One large all_reduce is measured alone. For
each prefill the share p of the uncompressed time that the all_reduces of row-parallel layers take gives, with r times
fewer bytes, Amdahl's limit 1 / (1 - p + p / r) of what compression can gain. Needs root and iproute2.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table

from benchmarks import shaped_link
from benchmarks.markdown import check_table, replace_table
from benchmarks.ttft_link_worker import Task
from megacomp.launch import command, files, ranked
from megacomp.launch.errors import LaunchError

MODULE = "benchmarks.ttft_link"
WORKER = "benchmarks.ttft_link_worker"
ENGINES = ("deepspeed", "megatron")

HALF = 0.5
COLLECTIVE_AIMS = {1000.0: 3.5, 10000.0: 1.5}
"""Speed-up of a 32 MiB all_reduce at 4.25 bits among two ranks, by Mbit/s."""
FRACTION_AIM = 0.9
"""Of Amdahl's limit, wherever collectives take half of the time or more."""
SLOWEST_AIM = 0.97
"""Compressed is nowhere slower than so."""


@dataclass(frozen=True)
class Prefill:
    """One prompt under one engine at one rate: medians, ranges, and what they could be at best.

    share: of the uncompressed time inside the all_reduces of row-parallel layers. ratio: how many times fewer bytes
    the compressed ones send. limit: Amdahl's. fraction: of it achieved.
    """

    tp: int
    mbit: float
    engine: str
    prompt: int
    plain_ms: float
    plain_range_ms: tuple[float, float]
    compressed_ms: float
    compressed_range_ms: tuple[float, float]
    compressed: bool
    share: float
    ratio: float

    @classmethod
    def of(cls, tp: int, mbit: float, measured: dict[str, Any]) -> Prefill:
        """From what the worker wrote."""
        plain, compressed = measured["plain_ms"], measured["compressed_ms"]
        shares = [inside / total for inside, total in zip(measured["collectives_ms"], plain, strict=True)]
        is_compressed = measured["compressed_messages"] > 0
        return cls(
            tp=tp,
            mbit=mbit,
            engine=measured["engine"],
            prompt=measured["prompt"],
            plain_ms=statistics.median(plain),
            plain_range_ms=(min(plain), max(plain)),
            compressed_ms=statistics.median(compressed),
            compressed_range_ms=(min(compressed), max(compressed)),
            compressed=is_compressed,
            share=statistics.median(shares),
            ratio=measured["wire_ratio"] if is_compressed else 1.0,
        )

    @property
    def speedup(self) -> float:
        return self.plain_ms / self.compressed_ms

    @property
    def limit(self) -> float:
        return 1 / (1 - self.share + self.share / self.ratio)

    @property
    def fraction(self) -> float:
        return self.speedup / self.limit


def prefills(results: dict[str, Any]) -> Iterator[Prefill]:
    """All of them."""
    for run in results["runs"]:
        for rate in run["rates"]:
            for measured in rate["ttft"]:
                yield Prefill.of(run["tp"], rate["mbit"], measured)


def collectives(results: dict[str, Any]) -> dict[tuple[int, float], dict[str, Any]]:
    """The large all_reduce alone, by ranks and Mbit/s."""
    return {
        (run["tp"], rate["mbit"]): rate["collective"]
        for run in results["runs"]
        for rate in run["rates"]
        if "collective" in rate
    }


def aims(results: dict[str, Any]) -> list[tuple[str, float, float]]:
    """(aim, what was reached, what was aimed at) of each aim that these results can tell of."""
    found = []
    alone = collectives(results)
    for mbit, aim in COLLECTIVE_AIMS.items():
        if (2, mbit) in alone:
            found.append((f"all_reduce alone, TP 2, {_rate(mbit)}: times faster", alone[2, mbit]["speedup"], aim))
    everything = list(prefills(results))
    if bound := [one.fraction for one in everything if one.share >= HALF]:
        found.append(("TTFT, least fraction of Amdahl's limit where collectives take half", min(bound), FRACTION_AIM))
    if everything:
        found.append(("TTFT, least speed-up", min(one.speedup for one in everything), SLOWEST_AIM))
    return found


def write_model(folder: Path, hidden: int, layers: int, positions: int) -> None:
    """A Llama of random weights, bf16: 64 features a head, four queries to a key, an MLP 2.75 times as wide."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=4096,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 256,
        max_position_embeddings=positions,
        bos_token_id=None,
        eos_token_id=None,
    )
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).bfloat16().save_pretrained(folder)


def main(
    tp: Annotated[list[int] | None, typer.Option(min=2, help="Ranks. May be repeated. Default: 2 and 4.")] = None,
    mbit: Annotated[
        list[float] | None, typer.Option(min=1, help="Rates. May be repeated. Default: 50, 200, 1000, 10000.")
    ] = None,
    prompt: Annotated[
        list[int] | None, typer.Option(min=8, help="Prompt lengths. May be repeated. Default: 128, 512, 2048.")
    ] = None,
    engine: Annotated[list[str] | None, typer.Option(help="May be repeated. Default: both.")] = None,
    codec: Annotated[str, typer.Option(help="The name of a preset.")] = "mxfp4",
    hidden: Annotated[int, typer.Option(min=256, help="A multiple of 1024, or what TP allows.")] = 1024,
    layers: Annotated[int, typer.Option(min=1)] = 4,
    collective_mib: Annotated[int, typer.Option(min=0, help="Size of the all_reduce alone; 0 for none.")] = 32,
    seconds: Annotated[float, typer.Option(help="For each combination; at least 3 repetitions, at most 25.")] = 6.0,
    out: Annotated[Path | None, typer.Option(help="Write the results to this JSON file.")] = None,
    chart: Annotated[Path | None, typer.Option(help="Draw TTFT against link speed into this file.")] = None,
    write: Annotated[Path | None, typer.Option(help="Replace the tables in this markdown file.")] = None,
    given: Annotated[
        Path | None, typer.Option("--from", help="Measure nothing: show, draw and write these results.")
    ] = None,
) -> None:
    """Measure every combination; about 20 minutes on two cores."""
    files.check_figure(chart)
    files.check_writable(out)
    check_table(write, MODULE)
    if given is not None:
        results = json.loads(given.read_text())
    else:
        if why := shaped_link.problem():
            raise LaunchError(f"this needs links of a chosen rate, and here there are none: {why}")
        if unknown := set(engine or ENGINES) - set(ENGINES):
            raise LaunchError(f"--engine {unknown.pop()}: there is no such engine; allowed: {', '.join(ENGINES)}")
        prompts = sorted(prompt or (128, 512, 2048))
        results = {
            "model": {"hidden": hidden, "layers": layers, "intermediate": hidden * 11 // 4, "dtype": "bf16"},
            "codec": codec,
            "link": {"burst_seconds": shaped_link.BURST_SECONDS, "smallest_burst": shaped_link.SMALLEST_BURST},
            "runs": [],
        }
        with tempfile.TemporaryDirectory(prefix="megacomp-ttft-") as scratch:
            model = Path(scratch) / "model"
            write_model(model, hidden, layers, max(prompts))
            for ranks in tp or (2, 4):
                task = Task(
                    model=str(model),
                    hidden=hidden,
                    engines=list(engine or ENGINES),
                    mbits=sorted(mbit or (50.0, 200.0, 1000.0, 10000.0)),
                    prompts=prompts,
                    codec=codec,
                    collective_mib=collective_mib,
                    seconds=seconds,
                    fewest=3,
                    most=25,
                    scratch=scratch,
                    out=str(Path(scratch) / f"{ranks}.json"),
                )
                results["runs"].append(_run(task, ranks, Path(scratch) / f"task-{ranks}.json"))
        if out is not None:
            files.write_json(out, results)
    console = command.results()
    console.print(_table(results))
    for (ranks, rate), alone in collectives(results).items():
        console.print(f"all_reduce of {_mib(alone)}, TP {ranks}, {_rate(rate)}: {_alone(alone)}", highlight=False)
    for aim, reached, wanted in aims(results):
        verdict = "reached" if reached >= wanted else "missed"
        console.print(f"{aim}: {reached:.2f}, aimed at {wanted:.2f}: {verdict}", highlight=False)
    if chart is not None:
        _chart(results, chart)
    if write is not None:
        replace_table(write, MODULE, _markdown(results))


def _run(task: Task, ranks: int, file: Path) -> dict[str, Any]:
    task.write(file)
    with shaped_link.interruptible(), shaped_link.network(ranks) as link:
        link.shape(None)
        code = shaped_link.run(link, ["-m", WORKER, str(file)])
    if code:
        raise LaunchError(f"the ranks ended with exit code {code}")
    return json.loads(Path(task.out).read_text())


def _rate(mbit: float) -> str:
    return f"{mbit / 1000:g} Gbit/s" if mbit >= 1000 else f"{mbit:g} Mbit/s"


def _mib(alone: dict[str, Any]) -> str:
    return f"{alone['bytes'] / 2**20:.0f} MiB"


def _alone(alone: dict[str, Any]) -> str:
    plain, compressed = alone["median_ms"]["plain"], alone["median_ms"]["compressed"]
    return f"{plain:.1f} ms plain, {compressed:.1f} ms compressed, {alone['speedup']:.2f} times faster"


HEADINGS = ("plain, ms", "compressed, ms", "faster", "collectives", "limit", "of it")


def _cells(one: Prefill) -> list[str]:
    """What stands below `HEADINGS`."""
    return [
        f"{one.plain_ms:.0f} ± {_half(one.plain_range_ms):.0f}",
        f"{one.compressed_ms:.0f} ± {_half(one.compressed_range_ms):.0f}" + ("" if one.compressed else " (exact)"),
        f"{one.speedup:.2f}",
        f"{one.share:.0%}",
        f"{one.limit:.2f}",
        f"{one.fraction:.0%}",
    ]


def _half(extremes: tuple[float, float]) -> float:
    """Half of the range."""
    return (extremes[1] - extremes[0]) / 2


def _table(results: dict[str, Any]) -> Table:
    model = results["model"]
    table = Table(
        title=f"TTFT, {model['layers']} layers of {model['hidden']}, {results['codec']}: medians ± half the range"
    )
    for heading in ("TP", "link", "engine", "prompt"):
        table.add_column(heading)
    for heading in HEADINGS:
        table.add_column(heading, justify="right")
    for one in prefills(results):
        table.add_row(str(one.tp), _rate(one.mbit), one.engine, str(one.prompt), *_cells(one))
    return table


def _markdown(results: dict[str, Any]) -> str:
    """The tables of docs/performance.md."""
    lines = []
    if large := collectives(results):
        size = _mib(next(iter(large.values())))
        lines += [f"| all_reduce of {size} bf16, alone | TP | plain, ms | {results['codec']}, ms | times faster |"]
        lines += ["|---|---|---|---|---|"]
    for (ranks, mbit), alone in large.items():
        medians = alone["median_ms"]
        cells = [f"{medians['plain']:.1f}", f"{medians['compressed']:.1f}", f"{alone['speedup']:.2f}"]
        lines.append(f"| {_rate(mbit)} | {ranks} | {' | '.join(cells)} |")
    lines += ["", f"| link | TP | engine | prompt | {' | '.join(HEADINGS)} |", "|---" * (4 + len(HEADINGS)) + "|"]
    for one in prefills(results):
        lines.append(f"| {_rate(one.mbit)} | {one.tp} | {one.engine} | {one.prompt} | {' | '.join(_cells(one))} |")
    lines += ["", "| aim | reached | aimed at |", "|---|---|---|"]
    lines += [f"| {aim} | {reached:.2f} | {wanted:.2f} |" for aim, reached, wanted in aims(results)]
    return "\n".join(lines)


def _chart(results: dict[str, Any], path: Path) -> None:
    """TTFT of the longest prompt against link speed, a panel for each number of ranks."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    everything = list(prefills(results))
    longest = max(one.prompt for one in everything)
    engine = everything[0].engine
    sizes = sorted({one.tp for one in everything})
    figure, panels = pyplot.subplots(
        1, len(sizes), figsize=(5 * len(sizes), 4.2), layout="constrained", sharey=True, squeeze=False
    )
    for axes, tp in zip(panels[0], sizes, strict=True):
        shown = [one for one in everything if (one.tp, one.prompt, one.engine) == (tp, longest, engine)]
        rates = [one.mbit for one in shown]
        for label, color, medians, ranges in (
            ("uncompressed", "#555555", [o.plain_ms for o in shown], [o.plain_range_ms for o in shown]),
            (results["codec"], "#d1495b", [o.compressed_ms for o in shown], [o.compressed_range_ms for o in shown]),
        ):
            errors = [
                [median - low for median, (low, _) in zip(medians, ranges, strict=True)],
                [high - median for median, (_, high) in zip(medians, ranges, strict=True)],
            ]
            axes.errorbar(rates, medians, errors, marker="o", capsize=3, color=color, label=label)
        for one in shown:
            place = (one.mbit, one.compressed_ms)
            axes.annotate(f"{one.speedup:.2f}x", place, (0, -16), textcoords="offset points", ha="center", fontsize=9)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xticks(rates, [_rate(rate) for rate in rates])
        axes.minorticks_off()
        axes.margins(x=0.12, y=0.2)
        axes.set_xlabel("link between ranks")
        axes.set_title(f"{tp} ranks")
        axes.grid(alpha=0.3)
    panels[0][0].set_ylabel("time to first token, ms")
    panels[0][0].legend()
    model = results["model"]
    figure.suptitle(
        f"{longest} tokens, {model['layers']} Llama layers of {model['hidden']} under {engine}; CPU ranks, shaped link",
        fontsize=10,
    )
    files.write_figure(figure, path)
    pyplot.close(figure)


app = ranked.single(main)

if __name__ == "__main__":
    app()
