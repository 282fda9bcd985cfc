"""What the Triton kernels become on each GPU: registers, spills, shared memory, instructions and bytes per value.

python -m benchmarks.compile_report --out benchmarks/results/compile.json

Needs no GPU: the package launches its kernels on tensors without data, a driver that only names a GPU makes Triton
compile them as it would there, and the assembly is read instead of run.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple
from unittest.mock import patch

import torch
import triton
import typer
from rich.console import Console
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from benchmarks.markdown import check_table, replace_table
from megacomp import codecs
from megacomp.launch import files, ranked
from megacomp.launch.errors import LaunchError
from megacomp.launch.made_up import with_tables
from megacomp.version import __version__

MODULE = "benchmarks.compile_report"

CODECS: tuple[str | dict[str, Any], ...] = (
    *("mxfp4", "nvfp4", "int4", {"preset": "int4", "rotation": 128}, "int8"),
    *("static4", "static4_paper"),
)
OPERATIONS: tuple[tuple[str, int], ...] = (
    *(("encode", 1), ("decode_sum", 2), ("decode_sum", 4), ("decode_sum", 8)),
    *(("decode_sum_encode", 4), ("reduce_norm", 2)),
)
"""Operations and the number of wires they read."""

ARCHITECTURES = (80, 90, 100)
SHARED_MEMORY_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""The most shared memory a block may have (CUDA C++ Programming Guide, technical specifications)."""


FEATURES = 4096
ROWS = 1000
"""Any number will do that neither is 1 nor divides by 16: Triton compiles such for special."""


@dataclass(frozen=True)
class Case:
    """One call to compile.

    Attributes:
        operation: ``"encode"``, ``"decode_sum"``, ``"decode_sum_encode"`` (into the same codec) or ``"reduce_norm"``.
        codec: its specification as JSON, or a preset's name.
        peers: wires that are read.
        features: values per row.
        architecture: 90 for sm_90.
        dtype: of the values: ``"bfloat16"``, ``"float16"`` or ``"float32"``.
    """

    operation: str
    codec: str
    peers: int
    features: int
    architecture: int
    dtype: str = "bfloat16"


class Launch(NamedTuple):
    """A kernel as it would be launched."""

    kernel: CompiledKernel
    programs: int


class _NoGPU(DriverBase):
    """A driver whose current GPU has an architecture and nothing else."""

    def __init__(self, architecture: int) -> None:
        self._architecture = architecture

    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._architecture, 32)

    def get_current_device(self) -> int:
        return self._architecture  # kernels are kept per device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError("nothing is launched")

    def get_benchmarker(self) -> Any:
        raise NotImplementedError("nothing is launched")


@contextmanager
def captured_launches(architecture: int) -> Iterator[list[Launch]]:
    """Within the ``with`` block kernels are compiled for ``architecture`` and listed instead of launched."""
    launches: list[Launch] = []
    run = JITFunction.run

    def capture(self: JITFunction, *args: Any, grid: tuple[int, ...], warmup: bool, **options: Any) -> CompiledKernel:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        launches.append(Launch(kernel, math.prod(grid)))
        return kernel

    driver.set_active(_NoGPU(architecture))
    with ExitStack() as stack:
        stack.enter_context(patch.object(JITFunction, "run", capture))
        for module in ("backend", "dequant_gemm", "launch_config"):  # tensors without data pass for a GPU's
            stack.enter_context(patch(f"megacomp.kernels.{module}.device_problem", return_value=None))
        # Not from Triton's cache, which does not see changes in the Python that computes constants.
        stack.enter_context(triton.knobs.compilation.scope())
        triton.knobs.compilation.always_compile = True
        yield launches


def compile_case(case: Case) -> list[Launch]:
    """The launches of a case; more than one where an operation takes several steps."""
    codec = with_tables(codecs.get(_spec(case.codec), backend="triton"), case.peers, case.features)
    value_dtype = getattr(torch, case.dtype)

    def empty(*shape: int, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    wires = empty(case.peers, ROWS, codec.row_bytes(case.features))
    with captured_launches(case.architecture) as launches:
        if case.operation == "encode":
            codec.sender(0).encode(empty(ROWS, case.features, dtype=value_dtype), wires[0])
        elif case.operation == "decode_sum":
            codec.decode_sum(wires, case.features, value_dtype)
        elif case.operation == "reduce_norm":
            rows = empty(ROWS, case.features, dtype=value_dtype)
            codec.reduce_norm(wires, rows, rows[0], 1e-5, rows, rows)
        else:
            codec.decode_sum_encode(wires, case.features, codec.summed)
    return launches


def fewest_bytes(operation: str, codec: codecs.Codec, peers: int, features: int, dtype: torch.dtype) -> float:
    """Bytes per value that must move: every input read once, every output written once; but for tables."""
    wire = codec.row_bytes(features) / features
    return {
        "encode": dtype.itemsize + wire,
        "decode_sum": peers * wire + dtype.itemsize,
        "decode_sum_encode": peers * wire + wire,
        "reduce_norm": peers * wire + 3 * dtype.itemsize,
    }[operation]


def reports(cases: Sequence[Case]) -> list[dict[str, Any]]:
    """:func:`report` of every case, on all cores."""
    # Forked: a compilation takes half a second, importing torch two. No thread has been started yet.
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), mp_context=context) as pool:
        return [kernel for kernels in pool.map(report, cases) for kernel in kernels]


def report(case: Case) -> list[dict[str, Any]]:
    """What :func:`describe` says of each kernel of a case, and which case it is."""
    codec = codecs.get(_spec(case.codec))
    moved = fewest_bytes(case.operation, codec, case.peers, case.features, getattr(torch, case.dtype))
    head = {**asdict(case), "codec": codec.name, "fewest_bytes_per_value": moved}
    return [{**head, **describe(launch, ROWS * case.features)} for launch in compile_case(case)]


def resources(kernel: CompiledKernel) -> dict[str, Any]:
    """What a kernel takes of a multiprocessor, and how often it names memory that spilled registers go to."""
    return _resources(kernel, *_disassemble(kernel.asm["cubin"]))


def _resources(kernel: CompiledKernel, usage: str, listing: str) -> dict[str, Any]:
    return {
        "kernel": kernel.metadata.name.strip("_"),
        "warps": kernel.metadata.num_warps,
        "registers": _usage(usage, "REG"),
        "stack_bytes": _usage(usage, "STACK") + _usage(usage, "LOCAL"),
        "local_accesses": len(re.findall(r"\s(?:LDL|STL)[.\s]", listing)),
        "shared_bytes": kernel.metadata.shared,
    }


def describe(launch: Launch, values: int) -> dict[str, Any]:
    """A kernel without loops read from its assembly: :func:`resources`, and what is executed; JSON-able.

    ``instructions`` are those of the way through the kernel, whose branches all lead forwards; what is out of line
    (the division of extreme numbers) and the padding behind the end are not counted. ``instructions_per_value`` adds
    them up over all threads, those without a value included. ``loads`` and ``stores`` count a thread's accesses to
    global memory by their bytes.
    """
    kernel = launch.kernel
    usage, listing = _disassemble(kernel.asm["cubin"])
    opcodes = _way_through(listing)
    count = Counter(opcode.split(".")[0] for opcode in opcodes)
    threads_per_value = 32 * kernel.metadata.num_warps * launch.programs / values
    return {
        **_resources(kernel, usage, listing),
        "barriers": count["BAR"],
        "shuffles": count["SHFL"],
        "instructions": len(opcodes),
        "threads_per_value": threads_per_value,
        "instructions_per_value": round(len(opcodes) * threads_per_value, 2),
        "loads": _accesses(kernel.asm["ptx"], "ld"),
        "stores": _accesses(kernel.asm["ptx"], "st"),
    }


def _operation(text: str) -> tuple[str, int]:
    """ "decode_sum:4" as the operation and the wires it reads; LaunchError for what is none."""
    name, _, peers = text.partition(":")
    known = dict(OPERATIONS)
    if name not in known or not (peers or "1").isdecimal() or int(peers or 1) < 1:
        raise LaunchError(f"--operation {text}: give {', '.join(known)}, with a number of wires after a colon")
    return name, int(peers or 1)


def _spec(codec: str) -> Any:
    return json.loads(codec) if codec.startswith("{") else codec


def _is_one_kernel(operation: str, codec: str) -> bool:
    """Static codecs have kernels of their own for encode and decode_sum, and for nothing else."""
    return operation in ("encode", "decode_sum") or not codecs.get(_spec(codec)).static


def _disassemble(cubin: bytes) -> tuple[str, str]:
    """(resource usage, SASS), by the tools that come with Triton."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        commands = (
            [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name],
            [triton.knobs.nvidia.nvdisasm.path, "-c", file.name],
        )
        usage, listing = (
            subprocess.run(command, check=True, capture_output=True, text=True).stdout for command in commands
        )
    return usage, listing


def _usage(usage: str, resource: str) -> int:
    found = re.search(rf"\b{resource}:(\d+)", usage)
    if found is None:
        raise ValueError(f"cuobjdump tells no {resource}: {usage}")
    return int(found[1])


def _way_through(listing: str) -> list[str]:
    """The opcodes from a kernel's first instruction to its last EXIT.

    Raises:
        ValueError: there is a loop on the way, so their number does not tell how many are executed.
    """
    body, _, _ = listing.partition("\n$__internal")
    opcodes: list[str] = []
    labels: set[str] = set()
    backward: list[int] = []
    end = 0
    for line in body.splitlines():
        label = re.match(r"(\.L_\w+):", line)
        instruction = re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)(.*)", line)
        if label:
            labels.add(label[1])
        elif instruction:
            opcodes.append(instruction[1])
            target = re.search(r"\.L_\w+", instruction[2])
            if target and target[0] in labels:
                backward.append(len(opcodes))
            elif instruction[1] == "EXIT":
                end = len(opcodes)
    if any(position < end for position in backward):
        raise ValueError("a kernel with a loop: its instructions cannot be counted by reading")
    return opcodes[:end]


def _accesses(ptx: str, kind: str) -> dict[str, int]:
    """{bytes: how many} of the accesses to global memory, widest first."""
    found = re.findall(rf"\b{kind}\.global(?:\.\w+|::\w+)*?(?:\.v(\d))?\.[a-z](\d+)\s", ptx)
    count = Counter(int(length or 1) * int(bits) // 8 for length, bits in found)
    return {str(width): count[width] for width in sorted(count, reverse=True)}


def _assembler(architecture: int) -> str:
    """Version of the ptxas that Triton uses for ``architecture``."""
    tools = triton.knobs.nvidia
    return str((tools.ptxas_blackwell if architecture >= 100 else tools.ptxas).version)


def _plain(accesses: dict[str, int]) -> str:
    return " + ".join(f"{count}x{width}" for width, count in accesses.items())


def markdown(kernels: Sequence[dict[str, Any]]) -> str:
    """The table of docs/performance.md: a line for each case, its architectures side by side."""
    lines: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for kernel in kernels:
        head = (_title(kernel), kernel["codec"], f"{kernel['fewest_bytes_per_value']:.3f}", kernel["kernel"])
        lines.setdefault(head, []).append(kernel)
    architectures = list(dict.fromkeys(kernel["architecture"] for kernel in kernels))
    names = ", ".join(f"sm_{architecture}" for architecture in architectures)
    rows = [
        f"Triton {triton.__version__}, bf16, hidden {kernels[0]['features']}; where three numbers stand, for {names}.",
        "",
        "| kernel | codec | bytes per value | instructions per value | per byte | registers | shared | shuffles |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (title, codec, moved, _), found in lines.items():
        figures = [
            " / ".join(f"{kernel['instructions_per_value']:.1f}" for kernel in found),
            " / ".join(
                f"{kernel['instructions_per_value'] / kernel['fewest_bytes_per_value']:.1f}" for kernel in found
            ),
            *(_alike(kernel[name] for kernel in found) for name in ("registers", "shared_bytes", "shuffles")),
        ]
        rows.append(f"| {title} | {codec} | {moved} | {' | '.join(figures)} |")
    return "\n".join(rows)


def _title(kernel: dict[str, Any]) -> str:
    return kernel["operation"] + (f" of {kernel['peers']}" if kernel["operation"] != "encode" else "")


def _alike(numbers: Iterable[int]) -> str:
    """The numbers, or the one number that all of them are."""
    numbers = list(numbers)
    return str(numbers[0]) if len(set(numbers)) == 1 else " / ".join(map(str, numbers))


def main(
    out: Annotated[Path | None, typer.Option(help="JSON file for the results.")] = None,
    write: Annotated[Path | None, typer.Option(help="Replace the table in this markdown file.")] = None,
    codec: Annotated[list[str] | None, typer.Option(help="Preset or JSON; may be repeated.")] = None,
    features: Annotated[list[int] | None, typer.Option(min=1, help="Values per row; may be repeated.")] = None,
    sm: Annotated[list[int] | None, typer.Option(help="Architecture, 90 for sm_90; may be repeated.")] = None,
    operation: Annotated[list[str] | None, typer.Option(help="Such as decode_sum:4; may be repeated.")] = None,
    dtype: Annotated[str, typer.Option(help="Of the values: bfloat16, float16 or float32.")] = "bfloat16",
) -> None:
    """Compiles every case and prints a table."""
    files.check_writable(out)
    check_table(write, MODULE)
    operations = [_operation(text) for text in operation] if operation else OPERATIONS
    specs = codec or [spec if isinstance(spec, str) else json.dumps(spec) for spec in CODECS]
    kernels = reports(
        [
            Case(name, spec, peers, width, architecture, dtype)
            for spec in specs
            for name, peers in operations
            if _is_one_kernel(name, spec)
            for width in features or [FEATURES]
            for architecture in sm or ARCHITECTURES
        ]
    )
    table = Table(title=f"Triton {triton.__version__}, {dtype}")
    for heading in ("kernel", "codec"):
        table.add_column(heading, no_wrap=True)
    for heading in ("features", "sm", "registers", "spills", "shared", "barriers", "shuffles"):
        table.add_column(heading, justify="right")
    for heading in ("instructions / value", "bytes / value"):
        table.add_column(heading, justify="right")
    for heading in ("loads", "stores"):
        table.add_column(heading, no_wrap=True)
    for kernel in kernels:
        numbers = [kernel[name] for name in ("features", "architecture", "registers", "local_accesses", "shared_bytes")]
        table.add_row(
            _title(kernel),
            kernel["codec"],
            *map(str, [*numbers, kernel["barriers"], kernel["shuffles"]]),
            f"{kernel['instructions_per_value']:.1f}",
            f"{kernel['fewest_bytes_per_value']:.3f}",
            _plain(kernel["loads"]),
            _plain(kernel["stores"]),
        )
    Console(width=None if sys.stdout.isatty() else 180).print(table)
    if write is not None:
        replace_table(write, MODULE, markdown(kernels))
    if out is not None:
        versions = {
            "megacomp": __version__,
            "torch": torch.__version__,
            "triton": triton.__version__,
            "ptxas": {f"sm_{architecture}": _assembler(architecture) for architecture in sm or ARCHITECTURES},
        }
        files.write_json(out, {"versions": versions, "kernels": kernels})


app = ranked.single(main)

if __name__ == "__main__":
    app()
