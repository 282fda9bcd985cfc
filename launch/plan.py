"""`megacomp plan`: what compression would do on hardware one does not have. A model, not a measurement."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Group
from rich.table import Table
from rich.text import Text

from megacomp.launch import command, files, planning, ranked
from megacomp.launch.engines.architecture import Architecture
from megacomp.launch.errors import LaunchError
from megacomp.launch.hardware import GPUS, LINKS, Gpu, Link
from megacomp.launch.planning import Plan, System, Workload

LABEL = "MODEL, not measured"

_OWN_ISSUE = 0.01
"""Thread instructions (10^12) per GB/s of memory of a GPU that is in no table: ten to a byte, as A100 and H100 have."""

_GPU_NAMES, _NETWORK_NAMES = ", ".join(GPUS), ", ".join(planning.networks())


def run(
    model: Annotated[
        Path, typer.Option("--model", help="A Hugging Face model folder, or its config.json; weights are not read.")
    ],
    tp: Annotated[int, typer.Option("--tp", min=1, help="Tensor-parallel ranks, over all nodes.")],
    gpu: Annotated[str | None, typer.Option("--gpu", help=f"One of: {_GPU_NAMES}.")] = None,
    nodes: Annotated[int, typer.Option(min=1, help="Hosts the ranks are spread over.")] = 1,
    link: Annotated[
        str | None, typer.Option("--link", help=f"What joins several nodes, one of: {_NETWORK_NAMES}.")
    ] = None,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of the prompt.")] = 1024,
    batch: Annotated[int, typer.Option(min=1, help="Sequences at a time.")] = 1,
    weight_bits: Annotated[float, typer.Option(min=1, help="Bits per weight: 16, or about 4.3 for GPTQ.")] = 16,
    codec: Annotated[
        list[str] | None,
        typer.Option(
            help="A codec: the name of a preset, or a JSON object as in the configuration. May be repeated, in order "
            "of preference. Default: int8, int6, int4 with rotation 128, nvfp4, mxfp4."
        ),
    ] = None,
    tflops: Annotated[
        float | None, typer.Option(min=0.001, help="Your own: dense bf16 peak, 10^12 operations per second.")
    ] = None,
    memory_gbs: Annotated[float | None, typer.Option(min=0.001, help="Your own: memory bandwidth, GB/s.")] = None,
    memory_gb: Annotated[float | None, typer.Option(min=0.001, help="Your own: memory size, GB.")] = None,
    link_gbs: Annotated[
        float | None,
        typer.Option(
            min=1e-6,
            help="Your own: GB/s that collectives reach one way (nccl-tests' busbw), of the slowest link there is.",
        ),
    ] = None,
    link_us: Annotated[float | None, typer.Option(min=0, help="Your own: microseconds of one step over it.")] = None,
    json_file: command.JsonOption = None,
    plot: Annotated[
        Path | None,
        typer.Option("--plot", help="Draw the first token against prompt and link into this file (extra: plot)."),
    ] = None,
) -> None:
    """Predict the first token and those after it, uncompressed and for each codec, and recommend a section.

    A MODEL of compute and links from data sheets, not a measurement: `megacomp tune` measures on ranks you have.
    """
    files.check_writable(json_file)
    files.check_figure(plot)
    architecture = Architecture.read(model)
    system = _own(_system(gpu, tp, nodes, link, tflops, memory_gbs, link_gbs), tflops, memory_gbs, memory_gb)
    system = _own_link(system, link_gbs, link_us)
    workload = Workload(prompt, batch, weight_bits)
    planned = planning.plan(architecture, system, workload, [_spec(one) for one in codec] if codec else planning.CODECS)
    command.results().print(_shown(architecture, system, workload, planned))
    if json_file is not None:
        files.write_json(json_file, _document(model, system, workload, planned))
    if plot is not None:
        _draw(plot, architecture, system, workload, planned)


def _system(
    gpu: str | None,
    tp: int,
    nodes: int,
    network: str | None,
    tflops: float | None,
    memory_gbs: float | None,
    link_gbs: float | None,
) -> System:
    if network is not None and network not in planning.networks():
        raise LaunchError(f"unknown --link {network!r}; networks between nodes: {_NETWORK_NAMES}")
    if network is not None and nodes == 1:
        raise LaunchError(f"--link {network} joins nodes: give --nodes as well; inside of one it is the GPU's own")
    between = None if network is None else LINKS[network]
    if gpu is None:
        if tflops is None or memory_gbs is None or (link_gbs is None and between is None):
            raise LaunchError(f"give --gpu ({_GPU_NAMES}), or your own --tflops, --memory-gbs and --link-gbs")
        own = Gpu("own numbers", tflops, memory_gbs, None, _OWN_ISSUE * memory_gbs, "")
        # Inside of a node nothing is known then: taken to be no slower than what joins the nodes.
        inside = link_gbs if between is None else between.gbs
        return System(own, Link("own numbers", inside or 0.0, "pcie"), tp, nodes, between)
    if gpu not in GPUS:
        raise LaunchError(f"unknown --gpu {gpu!r}; there are {_GPU_NAMES}")
    return System(GPUS[gpu], LINKS[GPUS[gpu].link], tp, nodes, between)


def _own(system: System, tflops: float | None, memory_gbs: float | None, memory_gb: float | None) -> System:
    """`system` with the user's own numbers of the GPU in the place of the table's."""
    given = {"tflops": tflops, "memory_gbs": memory_gbs, "memory_gb": memory_gb}
    numbers: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    return replace(system, gpu=replace(system.gpu, **numbers)) if numbers else system


def _own_link(system: System, gbs: float | None, hop_us: float | None) -> System:
    """`system` with the user's own numbers of its slowest kind of link: between nodes, or else inside of one."""
    numbers: dict[str, Any] = {} if gbs is None else {"gbs": gbs, "gbs_beyond": None}
    if hop_us is not None:
        numbers["hop_us"] = hop_us
    if not numbers:
        return system
    if system.network is not None:
        return replace(system, network=replace(system.network, **numbers))
    return replace(system, link=replace(system.link, **numbers))


def _spec(text: str) -> str | Mapping[str, Any]:
    """A codec as the configuration writes it; LaunchError for text that is neither a name nor an object."""
    if not text.startswith("{"):
        return text
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise LaunchError(f"--codec {text!r} is not valid JSON: {error}") from None


def _shown(architecture: Architecture, system: System, workload: Workload, planned: Plan) -> Group:
    """Everything the command prints."""
    reductions = 2 * architecture.num_layers
    table = Table(
        title=f"{LABEL}: {_place(system)}; {workload.batch} x {workload.prompt:,} tokens",
        caption=f"{LABEL}. {reductions} reductions of {_size(planned.message_bytes)} each; "
        f"share of the uncompressed first token: {1 - planned.compute_s / planned.ttft_s:.0%}",
    )
    for column in (
        "codec",
        "algorithm",
        "bits",
        "first token, ms",
        "",
        "per token, ms",
        "a reduction, ms",
        "pays from",
    ):
        table.add_column(column, justify="left" if column in ("codec", "algorithm") else "right")
    table.add_row(
        "uncompressed",
        "ring",
        "16",
        f"{1e3 * planned.ttft_s:.1f}",
        "",
        f"{1e3 * planned.token_s:.2f}",
        f"{1e3 * planned.message_s:.3f}",
        "",
        end_section=True,
    )
    for one in planned.forecasts:
        table.add_row(
            one.name,
            one.algorithm.replace("_", "-"),
            f"{one.bits_per_value:.2f}",
            f"{1e3 * one.ttft_s:.1f}",
            f"{planned.ttft_s / one.ttft_s:.2f}x",
            f"{1e3 * one.token_s:.2f}",
            f"{1e3 * one.message_s:.3f}",
            "never" if one.pays_from is None else _size(one.pays_from),
            style="bold" if one == planned.best else None,
        )
    gain = planned.ttft_s / planned.planned_ttft_s
    lines = [
        "",
        f"Recommended by this model: first token {1e3 * planned.planned_ttft_s:.1f} ms ({gain:.2f}x), "
        f"per token {1e3 * planned.planned_token_s:.2f} ms",
        json.dumps(planned.section, indent=2),
        *(f"* {note}" for note in planned.notes),
        f"* {LABEL}; constants and their sources: megacomp/launch/hardware.py, errors: docs/planning.md",
    ]
    return Group(table, *map(Text, lines))


def _place(system: System) -> str:
    link = system.link.name if system.nodes == 1 or system.network is None else system.network.name
    hosts = "" if system.nodes == 1 else f" in {system.nodes} nodes"
    return f"{system.ranks} x {system.gpu.name}{hosts}, {link} ({system.ring_gbs:g} GB/s)"


def _size(size: int) -> str:
    """Bytes for people: 48 KiB, 12 MiB."""
    value, unit = float(size), "B"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            break
        value /= 1024
    return f"{value:.3g} {unit}"


def _document(model: Path, system: System, workload: Workload, planned: Plan) -> dict[str, Any]:
    return {
        "kind": LABEL,
        "model": str(model),
        "system": {
            "gpu": asdict(system.gpu),
            "link": asdict(system.link),
            "network": None if system.network is None else asdict(system.network),
            "ranks": system.ranks,
            "nodes": system.nodes,
            "ring_gbs": system.ring_gbs,
        },
        "workload": asdict(workload),
        **asdict(planned),
    }


def _draw(path: Path, architecture: Architecture, system: System, workload: Workload, planned: Plan) -> None:
    """The first token against the prompt's length and against the link, the plan's own point marked."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    forecast = planned.best or min(planned.forecasts, key=lambda one: one.ttft_s)
    name = f"{forecast.name}, {forecast.algorithm.replace('_', '-')}"
    prompts = sorted({min(2**power, architecture.max_positions) for power in range(5, 15)} | {workload.prompt})
    over_prompts = planning.over_prompts(architecture, system, workload, forecast, prompts)
    own = system.ring_gbs
    speeds = sorted({10 ** (power / 4) for power in range(-4, 12)} | {own})
    systems = {speed: _own_link(system, speed, None) for speed in speeds}
    over_links = planning.over_links(architecture, systems, workload, forecast)

    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for axes, curve, at, label in (
        (panels[0], over_prompts, workload.prompt, "prompt, tokens"),
        (panels[1], over_links, own, "link, GB/s each way"),
    ):
        axes.plot(curve.x, [1e3 * value for value in curve.plain], marker=".", label="uncompressed bf16")
        axes.plot(curve.x, [1e3 * value for value in curve.compressed], marker=".", label=name)
        axes.axvline(at, color="grey", linewidth=0.8, linestyle="--")
        axes.set(xscale="log", yscale="log", xlabel=label, ylabel="time to first token, ms")
        axes.grid(alpha=0.3, which="both")
        axes.legend()
    panels[0].set_title(f"at {own:g} GB/s")
    panels[1].set_title(f"at {workload.batch} x {workload.prompt} tokens")
    figure.suptitle(f"{LABEL}: {_place(system)}", fontsize=11)
    files.write_figure(figure, path)
    pyplot.close(figure)


app = ranked.single(run)

if __name__ == "__main__":
    app()
