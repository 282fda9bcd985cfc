"""`megacomp tune`: from which size on compression pays among these ranks, and how it is best sent."""

from __future__ import annotations

import json
import math
import os
import socket
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import torch.distributed as dist
import typer
from rich.table import Table

from megacomp import config as configuration
from megacomp.collectives import Route
from megacomp.kernels.launch_config import NO_CACHE, cache_folder
from megacomp.launch import autotune, command, distributed, engines, environment, files, kernel_bench, ranked
from megacomp.launch.errors import LaunchError
from megacomp.tuning import Key, Plan, Tuning, TuningError, cache_file, plan

CODECS = ("mxfp4", '{"preset": "int4", "rotation": 128}', "int8")

TUNED = {"min_bytes": "tuned", "algorithm": "tuned", "pipeline_chunks": "tuned"}


def run(
    ctx: typer.Context,
    codec: Annotated[
        list[str] | None,
        typer.Option(help="A codec: the name of a preset, or a JSON object. May be repeated. Default: three of them."),
    ] = None,
    config: Annotated[
        Path | None, typer.Option("--config", help="A DeepSpeed JSON: the codecs and the backend of its section.")
    ] = None,
    max_bytes: Annotated[
        int, typer.Option(min=1024, help="The largest message, in bytes of the uncompressed tensor on one rank.")
    ] = 64 * 2**20,
    features: Annotated[int, typer.Option(min=32, help="Values per row: the hidden size.")] = 4096,
    dtype: command.DtypeOption = command.DtypeName.BF16,
    repeats: Annotated[int, typer.Option(min=3, help="Repetitions; fewer where a slow link makes them long.")] = 15,
    tp: Annotated[int | None, typer.Option("--tp", help="Ranks. Default: those a launcher started, else 2.")] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help='Write this file, for "tuning" in the configuration, and not the user\'s cache.'),
    ] = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="Draw latency against size into this file.")] = None,
) -> None:
    """Find, for each size of message, the fastest way to all_reduce it, and from which size on compression pays.

    Measures plain against each codec, algorithm and number of chunks, over the link that these ranks are joined by,
    each verified against its definition first. Settings that are "tuned" in a configuration then go by it.
    """
    routes = _routes(codec, config)
    files.check_writable(out)
    files.check_figure(plot)
    if out is None and cache_folder("tuning") is None:
        raise LaunchError(f"{NO_CACHE}; name a file (--out)")
    if tp is None and distributed.launched_world_size() is None:
        tp = 2
    world_size = distributed.ensure_ranks(tp, "megacomp.launch.tune", ranked.arguments(ctx))
    if world_size < 2:
        raise LaunchError("one rank sends nothing: tuning takes at least two (--tp 2)")
    device = distributed.default_device()
    with distributed.process_group(world_size, device), command.progress() as progress:
        key = Key.here(device, world_size)
        path = cache_file(key) if out is None else out
        assert path is not None  # there is a cache
        sizes = autotune.messages(max_bytes, features, engines.DTYPES[dtype.value])
        task = progress.add_task("sizes and codecs", total=len(sizes) * len(routes))
        ranks = autotune.GroupRanks(None, device)
        codecs = autotune.tune(routes, sizes, ranks, repeats=repeats, done=lambda: progress.advance(task))
        measured = Tuning(
            key=key,
            hosts=_hosts(),
            dtype=dtype.value,
            codecs=tuple(codecs),
            environment=environment.describe(device),
        )
        tuning = _write(measured, path)
    plans = [
        plan(times, route, world_size, algorithm=True, chunks=True)
        for route, times in zip(routes, tuning.codecs, strict=False)
    ]
    console = command.results()
    console.print(_table(tuning, routes, plans))
    for route, found in zip(routes, plans, strict=True):
        console.print(f"{_name(route)}: {_verdict(found)}", highlight=False)
    console.print(f"Written: {path}", highlight=False, soft_wrap=True)
    section = {**TUNED, **({} if out is None else {"tuning": str(out)})}
    console.print(f'To go by it: "communication": {json.dumps(section)}', highlight=False, soft_wrap=True)
    if plot is not None and command.is_main_rank():
        _chart(tuning, routes, plans, plot)
        console.print(f"Written: {plot}", highlight=False, soft_wrap=True)


def _routes(specs: Sequence[str] | None, config: Path | None) -> list[Route]:
    """What to tune: codecs named one by one, or those of a configuration, or `CODECS`."""
    if config is not None and specs:
        raise LaunchError("give either --codec or --config")
    if config is not None:
        routes = autotune.routes_of(configuration.load(config)[0])
        if not routes:
            raise LaunchError(f"{config} compresses nothing: every codec in it is null")
        return routes
    try:
        return [Route(kernel_bench.codec_of(spec)) for spec in dict.fromkeys(specs or CODECS)]
    except ValueError as error:
        raise LaunchError(str(error)) from None


def _hosts() -> int:
    names: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(names, socket.gethostname())
    return len(set(names))


def _write(measured: Tuning, path: Path) -> Tuning:
    """Write what rank 0 makes of `measured` and of the file there is, on every host, and return it on every rank."""
    content: list[Any] = [None]
    if command.is_main_rank():
        with suppress(FileNotFoundError, TuningError):  # nothing to keep
            measured = measured.with_codecs_of(Tuning.read(path))
        content = [measured.to_dict()]
    dist.broadcast_object_list(content, src=0)
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_json(path, content[0])
    dist.barrier()
    return Tuning.model_validate_json(json.dumps(content[0]))


def _table(tuning: Tuning, routes: Sequence[Route], plans: Sequence[Plan]) -> Table:
    hosts = f" on {tuning.hosts} hosts" if tuning.hosts > 1 else ""
    table = Table(title=f"{tuning.key.world_size} ranks{hosts}, {tuning.key.backend}, {tuning.dtype}: all_reduce, ms")
    table.add_column("bytes", justify="right")
    table.add_column("plain", justify="right")
    for route in routes:
        table.add_column(_name(route), justify="right")
    for index, size in enumerate(tuning.codecs[0].sizes):
        cells = []
        for times, found in zip(tuning.codecs, plans, strict=False):
            best = min(times.sizes[index].timings, key=lambda timing: timing.microseconds)
            speedup = times.sizes[index].plain_microseconds / best.microseconds
            style = "green" if size.bytes >= found.min_bytes else "dim"
            way = f"{best.algorithm} x{best.pipeline_chunks}"
            cells.append(f"[{style}]{best.microseconds / 1e3:.3f}, {speedup:.2f}x, {way}[/]")
        table.add_row(_size(size.bytes), f"{size.plain_microseconds / 1e3:.3f}", *cells)
    return table


def _name(route: Route) -> str:
    return route.codec.name if route.gather_codec is None else f"{route.codec.name} + {route.gather_codec.name}"


def _verdict(found: Plan) -> str:
    if found.min_bytes == math.inf:
        return 'not faster than plain at the largest size: with min_bytes "tuned" nothing is compressed'
    return f"pays from {_size(int(found.min_bytes))} on"


def _size(count: int) -> str:
    """Bytes as people write them: 4 KiB."""
    for unit, size in (("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.4g} {unit}"
    return f"{count} B"


def _chart(tuning: Tuning, routes: Sequence[Route], plans: Sequence[Plan], path: Path) -> None:
    """Latency against size, plain and the fastest way of each codec, with the sizes from which on it pays."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    sizes = tuning.codecs[0].sizes
    plain = [size.plain_microseconds / 1e3 for size in sizes]
    axes.plot([size.bytes for size in sizes], plain, color="black", linewidth=2, label="plain")
    for route, found, times in zip(routes, plans, tuning.codecs, strict=False):
        best = {size.bytes: min(timing.microseconds for timing in size.timings) / 1e3 for size in times.sizes}
        pays = "never faster" if found.min_bytes == math.inf else f"faster from {_size(int(found.min_bytes))}"
        (line,) = axes.plot(list(best), list(best.values()), marker=".", label=f"{_name(route)}: {pays}")
        if found.min_bytes in best:
            crossover = (found.min_bytes, best[int(found.min_bytes)])
            axes.plot(*crossover, marker="o", markersize=11, fillstyle="none", color=line.get_color())
            axes.axvline(found.min_bytes, color=line.get_color(), linewidth=0.8, linestyle=":")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    ticks = [size.bytes for size in sizes][::2]
    axes.set_xticks(ticks, [_size(tick) for tick in ticks], rotation=45)
    axes.set_xlabel("bytes of the uncompressed tensor on one rank")
    axes.set_ylabel("latency, ms")
    axes.set_title(f"all_reduce among {tuning.key.world_size} ranks over {tuning.key.backend}: {tuning.key.hardware}")
    axes.grid(alpha=0.3)
    axes.legend()
    files.write_figure(figure, path)
    pyplot.close(figure)


app = ranked.single(run)

if __name__ == "__main__":
    app()
