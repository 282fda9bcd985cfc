"""`megacomp bench`: how long things take on this machine, each beside its baseline."""

from __future__ import annotations

import json
from enum import Enum
from typing import Annotated, Any

import typer
from rich.table import Table

from megacomp import codecs
from megacomp.collectives import Route
from megacomp.launch import command, distributed, engines, environment, files
from megacomp.launch.errors import LaunchError
from megacomp.launch.measure import measure

_MIB = 2**20

app = typer.Typer(cls=command.RankedGroup, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


class AlgorithmName(str, Enum):
    """The choices of --algorithm."""

    AUTO = "auto"
    ONE_SHOT = "one_shot"
    TWO_SHOT = "two_shot"


class DistributionName(str, Enum):
    """The choices of --distribution."""

    GAUSSIAN = "gaussian"
    OUTLIERS = "outliers"


@app.callback()
def _group() -> None:
    """How long things take on this machine."""


@app.command("collective", cls=command.RankedCommand)
def collective(
    ctx: typer.Context,
    codec: Annotated[
        str, typer.Option(help="A codec: the name of a preset, or a JSON object as in the configuration.")
    ] = "mxfp4",
    gather_codec: Annotated[
        str | None, typer.Option(help="The codec of two-shot's second hop. Default: the same.")
    ] = None,
    algorithm: Annotated[AlgorithmName, typer.Option(help="auto chooses by ranks and rows.")] = AlgorithmName.AUTO,
    pipeline_chunks: Annotated[str, typer.Option(help="Pieces the message is sent in: a number, or auto.")] = "auto",
    mebibytes: Annotated[int, typer.Option("--mib", min=1, help="Size of the message, uncompressed.")] = 32,
    features: Annotated[int, typer.Option(min=1, help="Values per row: the hidden size.")] = 4096,
    distribution: Annotated[
        DistributionName, typer.Option(help="Of the values; for the error, not the times.")
    ] = DistributionName.GAUSSIAN,
    repeats: Annotated[int, typer.Option(min=1, help="Measured repetitions.")] = 15,
    dtype: command.DtypeOption = command.DtypeName.BF16,
    tp: Annotated[int | None, typer.Option("--tp", help="Ranks. Default: those a launcher started, else 2.")] = None,
    json_file: command.JsonOption = None,
) -> None:
    """A compressed all_reduce against the plain one, in alternation, with what encoding and decoding take."""
    chunks = int(pipeline_chunks) if pipeline_chunks.isdigit() else pipeline_chunks
    try:
        gather = _codec(gather_codec) if gather_codec is not None else None
        route = Route(_codec(codec), gather, algorithm.value, chunks)  # type: ignore[arg-type]
    except ValueError as error:
        raise LaunchError(str(error)) from None
    files.check_writable(json_file)
    if tp is None and distributed.launched_world_size() is None:
        tp = 2
    ranks = distributed.ensure_ranks(tp, "megacomp.launch.bench", ["collective", *command.arguments(ctx)])
    device = distributed.default_device()
    element = engines.DTYPES[dtype.value]
    with distributed.process_group(ranks, device):
        result = measure(
            route,
            rows=max(1, mebibytes * _MIB // (features * element.itemsize)),
            features=features,
            dtype=element,
            device=device,
            distribution=distribution.value,
            repeats=repeats,
        )
        result["environment"] = environment.describe(device)
    command.results().print(_table(result))
    if json_file is not None and command.is_main_rank():
        files.write_json(json_file, result)


def _codec(spec: str) -> codecs.Codec:
    """The codec of a preset's name or of a JSON object; ValueError if there is none."""
    return codecs.get(json.loads(spec) if spec.startswith("{") else spec)


def _table(result: dict[str, Any]) -> Table:
    message, route, stages = result["message"], result["route"], result["stages"]
    shown = Table(
        title=f"all_reduce of {message['bytes'] / _MIB:.0f} MiB {message['dtype']}, "
        f"{route['world_size']} ranks over {result['environment']['backend']}"
    )
    shown.add_column("")
    shown.add_column("plain", justify="right")
    shown.add_column(f"{route['codec']}, {route['algorithm']}", justify="right")
    plain, compressed = result["plain"], result["compressed"]
    shown.add_row("median, ms", f"{plain['median_ms']:.2f}", f"{compressed['median_ms']:.2f}")
    for name in ("min", "max"):
        shown.add_row(f"{name}, ms", f"{plain[f'{name}_ms']:.2f}", f"{compressed[f'{name}_ms']:.2f}")
    for stage in ("encode", "wire", "decode"):
        shown.add_row(f"{stage}, ms", "", f"{stages[f'{stage}_ms']:.2f}")
    shown.add_row("speed-up", "", f"{result['speedup']:.2f} x")
    traffic, noise = result["traffic"], result["sqnr_db"]
    shown.add_row("bytes sent per rank", f"{traffic['ring']:,}", f"{traffic['sent']:,}")
    shown.add_row("SQNR, dB", f"{noise['plain']:.1f}", f"{noise['compressed']:.1f}")
    return shown


if __name__ == "__main__":
    app()
