"""`megacomp inspect`: where a model's outliers are, and what each codec keeps of its sums."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from megacomp.launch import command, engines, environment, files, ranked, text
from megacomp.launch.calibration import pick_sequences
from megacomp.launch.distributed import ensure_ranks
from megacomp.launch.errors import LaunchError
from megacomp.launch.inspection import Inspection, inspect, plot

CODECS = ("mxfp4", "nvfp4", '{"preset": "int4", "rotation": 128}', "static4", "int8")


def run(
    ctx: typer.Context,
    model: command.ModelOption,
    text_file: command.TextOption = None,
    tokens_file: command.TokensOption = None,
    codec: Annotated[
        list[str] | None,
        typer.Option(
            "--codec",
            help="A codec to judge: the name of a preset, or a JSON object; may be given several times. "
            f"Default: {', '.join(CODECS)}.",
        ),
    ] = None,
    engine: command.EngineOption = command.EngineName.DEEPSPEED,
    tp: command.TpOption = None,
    simulate_tp: command.SimulateTpOption = None,
    dtype: command.DtypeOption = command.DtypeName.BF16,
    json_file: command.JsonOption = None,
    plot_file: Annotated[
        Path | None, typer.Option("--plot", help="Draw a heat map of feature ranges into this file.")
    ] = None,
    sequence_length: command.SequenceLengthOption = None,
    sequences: command.SequencesOption = 32,
    seed: command.SeedOption = 0,
    batch_size: command.BatchSizeOption = 8,
) -> None:
    """Ranges, kurtosis and outlier features of the partials at every site, and each codec's SQNR on them.

    Static codecs are calibrated on half of the sequences and everything is reported of the other half.
    """
    codecs = [command.codec(spec) for spec in codec or CODECS]
    files.check_writable(json_file)
    files.check_figure(plot_file)
    architecture = engines.check(model, engine.value, tp=command.requested_ranks(tp, simulate_tp))
    tokens = pick_sequences(text.read(model, architecture, text_file, tokens_file, sequence_length), sequences, seed)
    ranks = 1 if simulate_tp is not None else ensure_ranks(tp, "megacomp.launch.inspect", ranked.arguments(ctx))
    if (simulate_tp or ranks) == 1:
        raise LaunchError("one rank reduces nothing: give --tp N or --simulate-tp N, as the model will run")
    with (
        command.build_engine(model, engine.value, ranks, dtype.value, simulate_tp=simulate_tp) as built,
        command.progress() as progress,
    ):
        task = progress.add_task("sequences", total=None)
        inspection = inspect(
            built,
            tokens,
            codecs,
            batch_size=batch_size,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
        described = environment.describe(built.device)
    for table in (_distribution(inspection), _codecs(inspection)):
        command.results().print(table)
    if json_file is not None and command.is_main_rank():
        files.write_json(json_file, {**inspection.to_dict(), "environment": described})
    if plot_file is not None and command.is_main_rank():
        plot(inspection, plot_file)


def _distribution(result: Inspection) -> Table:
    """What the partials of every site look like."""
    shown = Table(
        title=_title(result),
        caption="in tokens: the largest share of tokens in which one of these is among the row's largest 1 %; "
        "on ranks: what two ranks' sets of the 1/64 of the features of largest range have in common",
    )
    shown.add_column("site")
    for heading in ("range, max/median", "kurtosis", "row norms, p99/p50", "outlier features", "in tokens", "on ranks"):
        shown.add_column(heading, justify="right")
    for name, site in result.sites.items():
        shown.add_row(
            name,
            f"{site.range_max / site.range_median:,.1f}" if site.range_median else "",
            "" if site.kurtosis is None else f"{site.kurtosis:,.1f}",
            "" if site.norm_spread is None else f"{site.norm_spread:.2f}",
            " ".join(str(outlier.feature) for outlier in site.outliers),
            f"{max(outlier.token_share for outlier in site.outliers):.0%}",
            f"{site.rank_overlap:.0%}",
        )
    return shown


def _codecs(result: Inspection) -> Table:
    """What the codecs keep of every site's sum."""
    calibrated = result.calibration_sequences
    shown = Table(
        title="SQNR of the sum, dB, every partial encoded once",
        caption=f"static codecs were calibrated on {calibrated} other sequences" if calibrated else None,
    )
    shown.add_column("site")
    for name, bits in result.bits_per_value.items():
        shown.add_column(f"{name}\n{bits:.3f} bits", justify="right")
    for site, found in result.sites.items():
        shown.add_row(site, *(_decibels(found.sqnr_db[name]) for name in result.bits_per_value))
    shown.add_section()
    shown.add_row("mean", *(_decibels(result.mean_sqnr_db[name]) for name in result.bits_per_value))
    return shown


def _title(result: Inspection) -> str:
    simulated = "simulated " if result.simulated else ""
    return f"{result.engine}, {simulated}TP {result.tp}, {result.dtype}, {result.sequences} x {result.length}"


def _decibels(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


app = ranked.single(run)

if __name__ == "__main__":
    app()
