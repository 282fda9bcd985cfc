"""Speed of the codecs on a CPU: compiled against eager, encode and decode_sum of two wires, one thread.

python -m benchmarks.codec --out benchmarks/results/codec-cpu.json
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

CODECS: tuple[str | dict[str, Any], ...] = (
    "mxfp4",
    "int4",
    {"preset": "int4", "scale_search": False},
    {"preset": "int4", "rotation": 128},
    "int5",
    "int8",
    "mxfp8_e4m3",
    "nvfp4",
)
PEERS = 2


def measure(spec: str | dict[str, Any], rows: int, features: int, repeats: int) -> dict[str, Any]:
    """Times of one codec on ``rows * features`` Gaussian bf16 values, eager and compiled in alternation.

    Returns a JSON-able dict: codec, bits_per_value, and for encode and decode_sum the medians in milliseconds of both
    backends, their ratio, and the compiled speed in GB/s of the bf16 tensor.
    """
    x = torch.randn(rows, features, generator=torch.Generator().manual_seed(0)).bfloat16()
    backends = {backend: codecs.get(spec, backend=backend) for backend in ("reference", "compiled")}
    codec = backends["compiled"]
    wires = torch.stack([codec.encode(x)] * PEERS)
    out = torch.empty_like(x)
    operations: dict[str, Callable[[codecs.Codec], object]] = {
        "encode": lambda codec: codec.encode(x, wires[0]),
        "decode_sum": lambda codec: codec.decode_sum(wires, features, x.dtype, out),
    }
    result: dict[str, Any] = {"codec": codec.name, "bits_per_value": codec.bits_per_value(features)}
    for name, operation in operations.items():
        operation(codec)  # compiles
        times: dict[str, list[float]] = {backend: [] for backend in backends}
        for _ in range(repeats):
            for backend, instance in backends.items():
                start = time.perf_counter()
                operation(instance)
                times[backend].append(1e3 * (time.perf_counter() - start))
        eager, compiled = (statistics.median(times[backend]) for backend in ("reference", "compiled"))
        result[name] = {
            "eager_ms": eager,
            "compiled_ms": compiled,
            "speedup": eager / compiled,
            "compiled_gb_per_s": x.nbytes / compiled / 1e6,
        }
    return result


def main(
    out: Annotated[Path | None, typer.Option(help="JSON file for the results.")] = None,
    rows: Annotated[int, typer.Option(min=2)] = 4096,
    features: Annotated[int, typer.Option(min=1)] = 4096,
    repeats: Annotated[int, typer.Option(min=1)] = 5,
) -> None:
    """Measures every codec of the list and prints a table."""
    files.check_writable(out)
    torch.set_num_threads(1)
    results = []
    table = Table(title=f"{rows} x {features} bf16 values, one thread, medians of {repeats}")
    table.add_column("codec")
    for heading in ("bits", "encode ms", "eager", "ratio", f"decode_sum of {PEERS} ms", "eager", "ratio"):
        table.add_column(heading, justify="right")
    for spec in CODECS:
        result = measure(spec, rows, features, repeats)
        results.append(result)
        cells = [result["codec"], f"{result['bits_per_value']:.2f}"]
        for name in ("encode", "decode_sum"):
            times = result[name]
            cells += [f"{times['compiled_ms']:.1f}", f"{times['eager_ms']:.0f}", f"{times['speedup']:.1f}x"]
        table.add_row(*cells)
    Console().print(table)
    if out is not None:
        described = environment.describe(torch.device("cpu"))
        message = {"rows": rows, "features": features, "dtype": "bfloat16", "peers": PEERS}
        files.write_json(out, {"message": message, "results": results, "environment": described})


app = ranked.single(main)

if __name__ == "__main__":
    app()
