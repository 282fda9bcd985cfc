"""What fusing the sum, the residual and the norm saves on a CPU: reduce_norm against the three steps, one thread.

python -m benchmarks.reduce_norm --out benchmarks/results/reduce-norm-cpu.json
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from megacomp import codecs
from megacomp.launch import environment, files, ranked

CODECS = ("mxfp4", "nvfp4", "int8")
PEERS = 2


def measure(name: str, rows: int, features: int, repeats: int) -> dict[str, Any]:
    """Medians in milliseconds of both ways for one codec, in alternation, and their ratio; JSON-able."""
    codec = codecs.get(name)
    residual = torch.randn(rows, features, generator=torch.Generator().manual_seed(0)).bfloat16()
    weight = torch.ones(features, dtype=torch.bfloat16)
    total, new_residual, normalized = (torch.empty_like(residual) for _ in range(3))
    wires = torch.stack([codec.encode(residual)] * PEERS)

    def separate() -> None:
        codec.decode_sum(wires, features, torch.bfloat16, out=total)
        torch.nn.functional.rms_norm(total.add_(residual), (features,), weight, 1e-5)

    def fused() -> None:
        codec.reduce_norm(wires, residual, weight, 1e-5, new_residual, normalized)

    ways: dict[str, Callable[[], None]] = {"separate_ms": separate, "fused_ms": fused}
    times: dict[str, list[float]] = {way: [] for way in ways}
    fused()  # compiles
    for _ in range(repeats):
        for way, call in ways.items():
            start = time.perf_counter()
            call()
            times[way].append(1e3 * (time.perf_counter() - start))
    medians = {way: statistics.median(times[way]) for way in ways}
    return {"codec": codec.name, **medians, "speedup": medians["separate_ms"] / medians["fused_ms"]}


@torch.inference_mode()
def main(
    out: Annotated[Path | None, typer.Option(help="JSON file for the results.")] = None,
    rows: Annotated[int, typer.Option(min=2)] = 2048,
    features: Annotated[int, typer.Option(min=1)] = 4096,
    repeats: Annotated[int, typer.Option(min=1)] = 15,
) -> None:
    """Measures every codec of the list and prints a table."""
    files.check_writable(out)
    torch.set_num_threads(1)
    results = [measure(name, rows, features, repeats) for name in CODECS]
    table = Table(title=f"{PEERS} wires of {rows} x {features} bf16 values, one thread, medians of {repeats}")
    for heading in ("codec", "one after the other, ms", "fused, ms", "ratio"):
        table.add_column(heading, justify="left" if heading == "codec" else "right")
    for result in results:
        cells = (f"{result['separate_ms']:.1f}", f"{result['fused_ms']:.1f}", f"{result['speedup']:.1f}x")
        table.add_row(result["codec"], *cells)
    Console().print(table)
    if out is not None:
        message = {"rows": rows, "features": features, "dtype": "bfloat16", "peers": PEERS}
        described = environment.describe(torch.device("cpu"))
        files.write_json(out, {"message": message, "results": results, "environment": described})


app = ranked.single(main)

if __name__ == "__main__":
    app()
