"""`megacomp plan`'s model beside published measurements and our own; writes the table of docs/planning.md.

python -m benchmarks.planning_published --write docs/planning.md

One set of constants (launch/hardware.py) for all rows. Where a publication's setting is not known in full, what was
assumed is said in the row. Our own are those of benchmarks.ttft_link, as committed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from benchmarks import ttft_link
from benchmarks.markdown import check_table, replace_table
from megacomp import codecs
from megacomp.collectives import Route
from megacomp.launch import ranked
from megacomp.launch.engines.architecture import Architecture
from megacomp.launch.hardware import GPUS, LINKS, MEMORY_SHARE, Gpu, Link
from megacomp.launch.planning import (
    VALUE_BYTES,
    System,
    Transport,
    Workload,
    all_gather_s,
    all_reduce_s,
    compressed_s,
    compute_s,
)

Spec = str | Mapping[str, object]

MODULE = "benchmarks.planning_published"
RESULTS = Path(__file__).parent / "results"

MIB = 2**20
FEATURES = 8192

_LLAMA_70B = {
    "model_type": "llama",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
}
LLAMA_2_70B = Architecture.parse({**_LLAMA_70B, "vocab_size": 32000, "max_position_embeddings": 4096})
LLAMA_3_70B = Architecture.parse({**_LLAMA_70B, "vocab_size": 128256, "max_position_embeddings": 131072})

# AMD Instinct MI300X data sheet: 1,307 TFLOPS bf16, 5.3 TB/s, 192 GB; 304 compute units of 64 lanes to 2.1 GHz. Every
# GPU has a link of 64 GB/s each way to every other of its host; of these, as of PCIe's, 75 % (assumed).
MI300X = Gpu("AMD Instinct MI300X", 1307, 5300, 192, 40.9, "")
INFINITY_FABRIC = {peers: Link("Infinity Fabric", 48.0 * peers, "nvlink") for peers in (1, 3)}
# NVIDIA L40 data sheet: 181 TFLOPS bf16, 864 GB/s, 48 GB, PCIe Gen4 x16; 142 SMs to 2.49 GHz.
L40 = Gpu("NVIDIA L40", 181, 864, 48, 45.3, "pcie4")

# A core that encodes and decodes as benchmarks.codec finds mxfp4: 2.5 bytes per value at 3.4 GB/s. Links up to 1 Gbit/s
# hide all of it but the ends.
CORE = Gpu("a core of a CPU", 0.1, 3.4 / MEMORY_SHARE, None, 1.0, "")
FASTEST_FOR_CORE = 1000.0
"""Mbit/s: beyond, codecs and gloo compete for the cores, and the model knows no CPU."""

INT4_FP16_32 = {"format": "int", "bits": 4, "block_size": 32, "scale": "fp16"}
INT4_128 = {"format": "int", "bits": 4, "block_size": 128, "scale": "bf16", "symmetric": False}


@dataclass(frozen=True)
class Row:
    """One published figure and the model's.

    published: (lowest, highest), equal for a single figure.
    assumed: what of the setting is our assumption.
    """

    source: str
    what: str
    unit: str
    published: tuple[float, float]
    model: float
    assumed: str = ""

    @property
    def error(self) -> float:
        """Relative, of the model; 0 within the published range."""
        low, high = self.published
        nearest = min(max(self.model, low), high)
        return self.model / nearest - 1


def rows() -> list[Row]:
    """Every published figure the model applies to."""
    h200 = _system("h200-nvlink", 8)
    two_mi300x, four_mi300x = System(MI300X, INFINITY_FABRIC[1], 2), System(MI300X, INFINITY_FABRIC[3], 4)
    l40 = System(L40, LINKS["pcie4"], 8)
    nccl = "all_reduce_bench (ml-engineering), 8 x H200"
    flashinfer, vllm, quick = "FlashInfer #3759, 8 x H200", "vLLM #39783", "QuickReduce, MI300X"
    flash, microscaled = "Flash Communication, L40 PCIe", "arXiv 2411.09510"
    return [
        Row(nccl, "plain, 1 MiB", "us", (45.9, 45.9), _plain_us(h200, MIB)),
        Row(nccl, "plain, 64 MiB", "us", (338.9, 338.9), _plain_us(h200, 64 * MIB)),
        Row(nccl, "plain, 512 MiB", "us", (2086, 2086), _plain_us(h200, 512 * MIB)),
        Row(flashinfer, "fp8 two-shot, 8 MB", "us", (41.4, 41.4), _kernel_us(h200, "mxfp8_e4m3", 8 * MIB)),
        Row(flashinfer, "the same, over NCCL", "x", (1.95, 1.95), _ratio(h200, "mxfp8_e4m3", 8 * MIB)),
        Row(flashinfer, "fp8 two-shot, 512 MB", "us", (1833, 1833), _kernel_us(h200, "mxfp8_e4m3", 512 * MIB)),
        Row(flashinfer, "the same, over NCCL", "x", (1.33, 1.33), _ratio(h200, "mxfp8_e4m3", 512 * MIB)),
        Row(vllm + ", 8 x H200", "int8 two-shot, 64 MiB", "us", (264.6, 264.6), _kernel_us(h200, "int8", 64 * MIB)),
        Row(quick, "plain (RCCL), 2 GPUs, 64 MB", "us", (1464, 1464), _plain_us(two_mi300x, 64 * MIB)),
        Row(quick, "Q4 two-shot, 2 GPUs, 64 MB", "us", (468, 468), _kernel_us(two_mi300x, INT4_FP16_32, 64 * MIB)),
        Row(
            flash,
            "INT4 two-step over ring, 64 MB and more",
            "x",
            (3.18, 3.18),
            _ratio(l40, INT4_128, 64 * MIB),
            "8 GPUs, groups of 128",
        ),
        Row(
            microscaled + ", 8 x L4",
            "TTFT, Llama-2-70B, two-shot over ring",
            "x",
            (2.08, 2.08),
            _ttft_ratio(LLAMA_2_70B, _system("l4-pcie", 8), Route(codecs.get("mxfp4"), algorithm="two_shot"), 256),
            "256 tokens, mxfp4; the paper gathers (one-shot): next row",
        ),
        Row(
            microscaled + ", 8 x L4",
            "the same, one-shot over one-shot in bf16",
            "x",
            (2.08, 2.08),
            _gather_ratio(LLAMA_2_70B, _system("l4-pcie", 8), 256),
            "that the paper's uncompressed baseline gathers, too",
        ),
        Row(
            microscaled + ", A100 NVLink",
            "TTFT, Llama-2-70B: a slow-down",
            "x",
            (0.0, 1.0),
            _ttft_ratio(LLAMA_2_70B, _system("a100-nvlink", 4), Route(codecs.get("mxfp4"), algorithm="one_shot"), 256),
            "4 GPUs, 256 tokens, mxfp4",
        ),
        Row(
            flash,
            "TTFT, up to",
            "x",
            (2.06, 2.06),
            _ttft_ratio(LLAMA_3_70B, l40, Route(codecs.get(INT4_128), algorithm="two_shot"), 1024, "one_kernel"),
            "Llama-3-70B, 8 GPUs, 1,024 tokens",
        ),
        Row(
            quick,
            "TTFT, 4 GPUs",
            "x",
            (1.44, 1.44),
            _ttft_ratio(
                LLAMA_3_70B, four_mi300x, Route(codecs.get(INT4_FP16_32), algorithm="two_shot"), 4096, "one_kernel"
            ),
            "Llama-3-70B, 4,096 tokens",
        ),
        Row(
            vllm + ", 4 x H200",
            "TTFT, Llama-3.3-70B, int8",
            "x",
            (1.03, 1.08),
            _ttft_ratio(
                LLAMA_3_70B,
                _system("h200-nvlink", 4),
                Route(codecs.get("int8"), algorithm="two_shot"),
                4096,
                "one_kernel",
            ),
            "4,096 tokens",
        ),
        *_shaped_links(),
    ]


def _shaped_links() -> Iterator[Row]:
    """All_reduces over links of a chosen rate, which benchmarks.ttft_link measured."""
    results = json.loads((RESULTS / "ttft-link.json").read_text())
    features = results["model"]["hidden"]
    for (ranks, mbit), alone in ttft_link.collectives(results).items():
        if mbit > FASTEST_FOR_CORE:
            continue
        # As LINKS has Ethernet: 94 % of the bits are payload.
        system = System(CORE, Link("shaped", 0.94 * mbit / 8000, "network", hop_us=30), ranks)
        size = alone["bytes"]
        route = Route(codecs.get(results["codec"]), algorithm=alone["algorithm"])
        plain = all_reduce_s(system, size)
        compressed = compressed_s(system, route, size // (features * VALUE_BYTES), features)
        source, what = f"ours, {ranks} CPU ranks, {mbit:g} Mbit/s", f"plain, {size // MIB} MiB"
        median, speedup = alone["median_ms"]["plain"], alone["speedup"]
        yield Row(source, what, "ms", (median, median), 1e3 * plain)
        yield Row(source, f"{results['codec']}, the same", "x", (speedup, speedup), plain / compressed)


def _system(gpu: str, ranks: int) -> System:
    return System(GPUS[gpu], LINKS[GPUS[gpu].link], ranks)


def _plain_us(system: System, message_bytes: int) -> float:
    return 1e6 * all_reduce_s(system, message_bytes)


def _kernel_us(system: System, codec: Spec, message_bytes: int) -> float:
    route = Route(codecs.get(codec), algorithm="two_shot")
    return 1e6 * compressed_s(system, route, message_bytes // (FEATURES * VALUE_BYTES), FEATURES, "one_kernel")


def _ratio(system: System, codec: Spec, message_bytes: int) -> float:
    return _plain_us(system, message_bytes) / _kernel_us(system, codec, message_bytes)


def _ttft_ratio(
    architecture: Architecture, system: System, route: Route, prompt: int, transport: Transport = "collectives"
) -> float:
    computing, reductions = _forward(architecture, system, prompt)
    plain = all_reduce_s(system, prompt * architecture.hidden_size * VALUE_BYTES)
    compressed = compressed_s(system, route, prompt, architecture.hidden_size, transport)
    return (computing + reductions * plain) / (computing + reductions * compressed)


def _gather_ratio(architecture: Architecture, system: System, prompt: int) -> float:
    """mxfp4 one-shot against sending every rank's bf16 partial to everyone; adding them up is taken to cost nothing."""
    computing, reductions = _forward(architecture, system, prompt)
    features = architecture.hidden_size
    plain = all_gather_s(system, prompt * features * VALUE_BYTES)
    compressed = compressed_s(system, Route(codecs.get("mxfp4"), algorithm="one_shot"), prompt, features)
    return (computing + reductions * plain) / (computing + reductions * compressed)


def _forward(architecture: Architecture, system: System, prompt: int) -> tuple[float, int]:
    return (
        compute_s(architecture, system, Workload(prompt), first_token=True),
        2 * architecture.num_layers,
    )


def table() -> str:
    """The markdown table: measured, model, error."""
    lines = [
        "| source | figure | measured | model | error | assumed |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows():
        low, high = row.published
        if low == 0:
            published = f"below {high:g} x"
        else:
            published = f"{low:.4g}" + ("" if low == high else f" to {high:.4g}") + f" {row.unit}"
        model = f"{row.model:.2f}" if row.unit == "x" else f"{row.model:.4g}"
        error = f"{row.error:+.0%}"
        lines.append(f"| {row.source} | {row.what} | {published} | {model} {row.unit} | {error} | {row.assumed} |")
    return "\n".join(lines)


def main(
    write: Annotated[Path | None, typer.Option(help="Replace the table in this markdown file.")] = None,
) -> None:
    """Prints the table, or puts it between its marks in a file."""
    if write is None:
        typer.echo(table())
        return
    check_table(write, MODULE)
    replace_table(write, MODULE, table())


app = ranked.single(main)

if __name__ == "__main__":
    app()
