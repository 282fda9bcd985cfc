"""A compressed all_reduce of 32 MiB against the plain one, codec by codec, over the ranks of a launcher.

OMP_NUM_THREADS=1 deepspeed --num_gpus 2 --module benchmarks.collective --out FILE.json

One message at a time and with other sizes: `megacomp bench collective`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table

from megacomp import codecs
from megacomp.collectives import Route
from megacomp.launch import command, distributed, environment, files, ranked
from megacomp.launch.measure import measure

CODECS: tuple[str | dict[str, Any], ...] = ("mxfp4", "int4", {"preset": "int4", "rotation": 128}, "int8")


def main(
    ctx: typer.Context,
    rows: Annotated[int, typer.Option(min=1)] = 4096,
    features: Annotated[int, typer.Option(min=1)] = 4096,
    repeats: Annotated[int, typer.Option(min=1)] = 15,
    tp: Annotated[int, typer.Option(help="Ranks to start without a launcher.")] = 2,
    out: Annotated[Path | None, typer.Option(help="Write the results to this JSON file.")] = None,
) -> None:
    """Measure every codec on bf16 partials of rows x features values."""
    files.check_writable(out)
    ranks = distributed.ensure_ranks(
        distributed.launched_world_size() or tp, "benchmarks.collective", ranked.arguments(ctx)
    )
    device = distributed.default_device()
    with distributed.process_group(ranks, device), command.progress() as progress:
        results = [
            measure(Route(codecs.get(spec)), rows=rows, features=features, device=device, repeats=repeats)
            for spec in progress.track(CODECS, description="codecs")
        ]
        described = environment.describe(device)
    command.results().print(_table(results, torch.bfloat16.itemsize * rows * features))
    if out is not None and command.is_main_rank():
        files.write_json(out, {"rows": results, "environment": described})


def _table(results: list[dict[str, Any]], message_bytes: int) -> Table:
    table = Table(title=f"all_reduce of {message_bytes / 2**20:.0f} MiB bf16, medians in ms")
    table.add_column("codec")
    for heading in ("plain", "compressed", "speed-up", "encode", "wire", "decode", "ratio", "SQNR dB"):
        table.add_column(heading, justify="right")
    for result in results:
        table.add_row(
            result["route"]["codec"],
            f"{result['plain']['median_ms']:.1f}",
            f"{result['compressed']['median_ms']:.1f}",
            f"{result['speedup']:.2f}",
            *(f"{result['stages'][f'{stage}_ms']:.1f}" for stage in ("encode", "wire", "decode")),
            f"{result['traffic']['payload_ratio']:.2f}",
            f"{result['sqnr_db']['compressed']:.1f}",
        )
    return table


app = ranked.single(main)

if __name__ == "__main__":
    app()
