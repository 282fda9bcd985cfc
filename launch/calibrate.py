"""`megacomp calibrate`: the tables of static codecs, from a text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from megacomp import codecs
from megacomp.calibration import Calibration
from megacomp.launch import command, engines, files, ranked, text
from megacomp.launch.calibration import calibrate, pick_sequences, write
from megacomp.launch.distributed import ensure_ranks
from megacomp.launch.engines.checkpoint import model_digest
from megacomp.launch.errors import LaunchError


def run(
    ctx: typer.Context,
    model: command.ModelOption,
    out: Annotated[Path, typer.Option("--out", help="The calibration file to write: .safetensors.")],
    text_file: command.TextOption = None,
    tokens_file: command.TokensOption = None,
    codec: Annotated[
        list[str] | None,
        typer.Option(
            "--codec",
            help="A static codec to calibrate: the name of a preset, or a JSON object; may be given several times. "
            "Default: static4.",
        ),
    ] = None,
    engine: command.EngineOption = command.EngineName.DEEPSPEED,
    tp: command.TpOption = None,
    simulate_tp: command.SimulateTpOption = None,
    dtype: command.DtypeOption = command.DtypeName.BF16,
    sequence_length: command.SequenceLengthOption = None,
    sequences: command.SequencesOption = 128,
    seed: command.SeedOption = 0,
    batch_size: command.BatchSizeOption = 8,
) -> None:
    """Runs a text through the model and writes what static codecs need to know of every site and rank.

    The file is for this model and this number of ranks. Interrupted, the same command goes on where it was.
    """
    chosen = [_static(name) for name in codec or ["static4"]]
    files.check_writable(out)
    ranks_wanted = command.requested_ranks(tp, simulate_tp)
    architecture = engines.check(model, engine.value, tp=ranks_wanted)
    tokens = text.read(model, architecture, text_file, tokens_file, sequence_length)
    digest = model_digest(model)
    ranks = 1 if simulate_tp is not None else ensure_ranks(tp, "megacomp.launch.calibrate", ranked.arguments(ctx))
    if (simulate_tp or ranks) == 1:
        raise LaunchError("one rank reduces nothing: give --tp N or --simulate-tp N, as the model will run")

    drawn = pick_sequences(tokens, sequences, seed)
    with (
        command.build_engine(model, engine.value, ranks, dtype.value, simulate_tp=simulate_tp) as built,
        command.progress() as progress,
    ):
        task = progress.add_task("sequences", total=None)
        calibration = calibrate(
            built,
            drawn,
            chosen,
            digest,
            batch_size=batch_size,
            state=out.with_name(f".{out.name}.state"),
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    if command.is_main_rank():
        write(calibration, out)
    command.results().print(_table(calibration, out, drawn.numel()))


def _static(name: str) -> codecs.StaticCodec:
    made = command.codec(name)
    if not isinstance(made, codecs.StaticCodec):
        allowed = ", ".join(codecs.presets(static=True))
        raise LaunchError(f"--codec {name}: a block codec needs no calibration; static codecs: {allowed}")
    return made


def _table(calibration: Calibration, out: Path, tokens: int) -> Table:
    shown = Table(title=f"{out}: TP {calibration.tp}, hidden {calibration.features}, {tokens:,} tokens")
    for title in ("codec", "bits per value", "sites", "outlier features"):
        shown.add_column(title, justify="left" if title == "codec" else "right")
    for name, spec in calibration.codecs.items():
        made = codecs.get(spec)
        assert isinstance(made, codecs.StaticCodec)
        bits = f"{made.bits_per_value(calibration.features):.3f}"
        outliers = str(made.format.outliers(calibration.features))
        shown.add_row(name, bits, str(len(calibration.sites)), outliers)
    return shown


app = ranked.single(run)

if __name__ == "__main__":
    app()
