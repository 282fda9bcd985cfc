"""`megacomp bench`: how long things take on this machine, each beside its baseline."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table

from megacomp.collectives import Route
from megacomp.kernels import launch_config as launching
from megacomp.launch import command, distributed, engines, environment, files, kernel_bench, ranked
from megacomp.launch.errors import LaunchError
from megacomp.launch.measure import measure

_MIB = 2**20

KERNEL_CODECS = ("mxfp4", "nvfp4", '{"preset": "int4", "rotation": 128}', "int8")

app = typer.Typer(cls=ranked.RankedGroup, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


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


@app.command("collective", cls=ranked.RankedCommand)
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
    chunks = int(pipeline_chunks) if pipeline_chunks.isdecimal() else pipeline_chunks
    try:
        gather = kernel_bench.codec_of(gather_codec) if gather_codec is not None else None
        route = Route(kernel_bench.codec_of(codec), gather, algorithm.value, chunks)  # type: ignore[arg-type]
    except ValueError as error:
        raise LaunchError(str(error)) from None
    files.check_writable(json_file)
    if tp is None and distributed.launched_world_size() is None:
        tp = 2
    ranks = distributed.ensure_ranks(tp, "megacomp.launch.bench", ["collective", *ranked.arguments(ctx)])
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


@app.command("kernels", cls=ranked.RankedCommand)
def kernels(
    codec: Annotated[
        list[str] | None,
        typer.Option(help="A codec: the name of a preset, or a JSON object. May be repeated. Default: four of them."),
    ] = None,
    tune: Annotated[
        bool, typer.Option("--tune", help="First find the best launch configurations for this GPU, and keep them.")
    ] = False,
    mebibytes: Annotated[
        list[int] | None,
        typer.Option("--mib", min=1, help="Size of a message, uncompressed. May be repeated. Default: 1, 16, 256."),
    ] = None,
    hidden: Annotated[int, typer.Option(min=1, help="Values per row: the hidden size.")] = 4096,
    peers: Annotated[int, typer.Option(min=1, help="Wires that are decoded.")] = 4,
    repeats: Annotated[int, typer.Option(min=1, help="Measured repetitions.")] = 15,
    out: Annotated[Path | None, typer.Option("--out", help="Write the results to this file as well.")] = None,
) -> None:
    """encode, decode_sum and decode_sum_encode: on a GPU against copies, on a CPU against the uncompiled definition."""
    specs = codec or list(KERNEL_CODECS)
    try:
        for spec in specs:
            kernel_bench.codec_of(spec)
    except ValueError as error:
        raise LaunchError(str(error)) from None
    files.check_writable(out)
    on_gpu = torch.cuda.is_available()
    if tune and not on_gpu:
        raise LaunchError("--tune measures launch configurations on a CUDA GPU, and there is none here")
    if tune and launching.cache_folder("kernels") is None:
        raise LaunchError(f"--tune keeps what it finds in the cache, and {launching.NO_CACHE}")
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    sizes = mebibytes or ([1, 16, 256] if on_gpu else [16])
    result: dict[str, Any] = {"environment": environment.describe(device), "tuning": [], "cases": []}
    if on_gpu:
        kernel_bench.warm_up(device)
    with command.progress() as progress:
        if tune:
            groups = [cases for spec in specs for cases in kernel_bench.tuning_cases(spec, hidden, sizes)]
            for cases in progress.track(groups, description="tuning"):
                tuned = list(kernel_bench.tune(cases, device, repeats))
                result["tuning"] += [report for _, report in tuned]
                found = [measurement for measurement, _ in tuned if measurement is not None]
                result["cache_file"] = str(launching.record(torch.cuda.get_device_name(device), found))
        cases = [
            kernel_bench.Case(operation, spec, count, kernel_bench.rows_of(size, hidden), hidden)
            for spec in specs
            for operation, count in (("encode", 1), ("decode_sum", peers), ("decode_sum_encode", peers))
            for size in sizes
        ]
        for case in progress.track(cases, description="timing"):
            if on_gpu:
                result["cases"].append(kernel_bench.time_case(case, device, repeats))
            else:
                result["cases"].append(kernel_bench.time_case_on_cpu(case, repeats))
    command.results().print(_kernel_table(result["cases"], on_gpu))
    if tune:
        command.results().print(f"launch configurations: {result['cache_file']}")
    if out is not None:
        files.write_json(out, result)


def _kernel_table(cases: Sequence[dict[str, Any]], on_gpu: bool) -> Table:
    shown = Table(title="times of one call; bytes read and written" + ("" if on_gpu else "; compiled definitions"))
    shown.add_column("operation")
    shown.add_column("codec")
    figures = ("median_us", "gb_per_s", *(("percent_of_copy",) if on_gpu else ("times_reference",)))
    for heading in ("MiB", "us", "GB/s", "% of a copy" if on_gpu else "times uncompiled"):
        shown.add_column(heading, justify="right")
    for case in cases:
        wires = f" of {case['peers']}" if case["operation"] != "encode" else ""
        cells = [case.get("error") or "" if case[figure] is None else f"{case[figure]:.1f}" for figure in figures]
        shown.add_row(case["operation"] + wires, case["codec"], f"{case['message_bytes'] / _MIB:g}", *cells)
    return shown


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
