"""`megacomp search`: the codec of each site, by what each costs the model."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from megacomp import config as configuration
from megacomp.launch import command, engines, environment, files, ranked, text
from megacomp.launch.calibration import pick_sequences
from megacomp.launch.distributed import ensure_ranks
from megacomp.launch.engines.checkpoint import model_digest
from megacomp.launch.errors import LaunchError
from megacomp.launch.search_report import HEADINGS, cells, check_folder, compared, summary, verdict, write
from megacomp.launch.searching import Budget, Search, ladder, search


def run(
    ctx: typer.Context,
    model: command.ModelOption,
    out: Annotated[Path, typer.Option("--out", help='The configuration to write: JSON with the "megacomp" section.')],
    max_perplexity_increase: Annotated[
        str | None, typer.Option("--max-perplexity-increase", metavar="SHARE", help="The budget: 1%, or 0.01.")
    ] = None,
    max_kl: Annotated[
        float | None,
        typer.Option(
            "--max-kl",
            help="Instead, or as well: the KL divergence from the uncompressed model, in nats per token.",
        ),
    ] = None,
    text_file: command.TextOption = None,
    tokens_file: command.TokensOption = None,
    codec: Annotated[
        list[str] | None,
        typer.Option(
            "--codec",
            help="A codec to choose from: the name of a preset, or a JSON object; may be given several times. "
            "Default: ten of them, from 2 to 8 bits. A site can always stay exact.",
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            "--config",
            help="A DeepSpeed JSON that the new one is a copy of, but for the codecs. Of its section, weights, "
            "backend, algorithm and calibration are obeyed meanwhile.",
        ),
    ] = None,
    engine: command.EngineOption = command.EngineName.DEEPSPEED,
    tp: command.TpOption = None,
    simulate_tp: command.SimulateTpOption = None,
    dtype: command.DtypeOption = command.DtypeName.BF16,
    report: Annotated[
        Path | None,
        typer.Option("--report", help="A folder for report.md, pareto.png and sites.png; it is made if need be."),
    ] = None,
    json_file: command.JsonOption = None,
    time_limit: Annotated[
        float | None,
        typer.Option("--time-limit", min=0, metavar="MINUTES", help="End early, with what is known by then."),
    ] = None,
    sequence_length: command.SequenceLengthOption = None,
    sequences: command.SequencesOption = 128,
    seed: command.SeedOption = 0,
    batch_size: command.BatchSizeOption = 8,
) -> None:
    """Find the codec of each site: the fewest bits by which the whole model stays within a budget.

    Every codec is measured at every site alone, the sites' codecs are chosen by that, and full runs verify them. Static
    codecs are calibrated on half of the sequences and everything is measured on the other half.

    What ran is kept beside OUT: interrupted, or with another budget, the same command goes on from there.
    """
    budget = _budget(max_perplexity_increase, max_kl)
    named = [command.codec(spec) for spec in codec or ()]
    section, rest = configuration.load(config) if config is not None else (None, {})
    for path in (out, json_file):
        files.check_writable(path)
    check_folder(report)
    weights = section.weights.checkpoint if section is not None else None
    architecture = engines.check(model, engine.value, tp=command.requested_ranks(tp, simulate_tp), weights=weights)
    tokens = pick_sequences(text.read(model, architecture, text_file, tokens_file, sequence_length), sequences, seed)
    digest = model_digest(model)
    ranks = 1 if simulate_tp is not None else ensure_ranks(tp, "megacomp.launch.search", ranked.arguments(ctx))
    if (simulate_tp or ranks) == 1:
        raise LaunchError("one rank reduces nothing: give --tp N or --simulate-tp N, as the model will run")

    with (
        command.build_engine(model, engine.value, ranks, dtype.value, section, simulate_tp) as built,
        command.progress() as progress,
    ):
        task = progress.add_task("", total=None)
        result = search(
            built,
            tokens,
            named or ladder(architecture.hidden_size),
            budget,
            digest,
            out,
            base=section,
            batch_size=batch_size,
            time_limit=None if time_limit is None else 60 * time_limit,
            progress=lambda what, done, total: progress.update(task, description=what, completed=done, total=total),
        )
        described = environment.describe(built.device)
    if command.is_main_rank():
        files.write_json(out, {**rest, configuration.SECTION: result.section})
        if json_file is not None:
            files.write_json(json_file, {**result.to_dict(), "environment": described})
        if report is not None:
            write(result, described, report)
    console = command.results()
    console.print(_table(result))
    console.print(verdict(result), highlight=False, soft_wrap=True)
    console.print(f"Written: {', '.join(str(path) for path in (out, report, json_file) if path)}", soft_wrap=True)


def _budget(increase: str | None, kl: float | None) -> Budget:
    """The budget of the options; LaunchError if there is none, or a number that is no share or none of nats."""
    share = None
    if increase is not None:
        number, percent = increase.removesuffix("%"), increase.endswith("%")
        try:
            share = float(number) / (100 if percent else 1)
        except ValueError:
            share = math.nan
        # A bare 1 would be meant as one percent.
        if not 0 < share < (math.inf if percent else 1):
            raise LaunchError(f"--max-perplexity-increase {increase}: give a share above 0, such as 1% or 0.01")
    if kl is not None and not 0 < kl < math.inf:
        raise LaunchError(f"--max-kl {kl}: give nats per token, above 0")
    if share is None and kl is None:
        raise LaunchError("give a budget: --max-perplexity-increase 1%, or --max-kl 0.01")
    return Budget(share, kl)


def _table(result: Search) -> Table:
    """Every single codec and the best mix, by bits."""
    shown = Table(title=f"{summary(result)}, perplexity {result.baseline_perplexity:.4f}")
    for heading in HEADINGS:
        shown.add_column(heading, justify="left" if heading == HEADINGS[0] else "right")
    for measured in compared(result):
        shown.add_row(*cells(measured, result), style="bold" if measured is result.best else "")
    return shown


app = ranked.single(run)

if __name__ == "__main__":
    app()
