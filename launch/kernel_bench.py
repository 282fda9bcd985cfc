"""The kernels on this machine: whether they equal their definitions, how fast they are, how they are best launched.

Needs torch and triton only. Times on CUDA are those of a CUDA graph of many calls over as many sets of buffers as
exceed the L2 cache four times, divided by the calls: neither the host nor the cache plays a part, and what one
launch costs does. Contenders alternate, graph by graph, so that clocks that drift disturb all alike.
"""

from __future__ import annotations

import contextlib
import gc
import json
import math
import statistics
import time
import types
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch.utils.dlpack import from_dlpack, to_dlpack

from megacomp import codecs
from megacomp.codecs import BlockCodec, Codec, StaticCodec
from megacomp.kernels import StaticTables
from megacomp.kernels import launch_config as launching
from megacomp.kernels.block_format import BlockFormat, WireFields
from megacomp.kernels.decode_sum import decode_sum_definition
from megacomp.kernels.encode import encode_definition
from megacomp.kernels.launch_config import LaunchConfig, Measurement
from megacomp.kernels.packing import pieces_per_block
from megacomp.launch.made_up import OUTLIER_EVERY, OUTLIER_GAIN, with_tables

MIB = 2**20
RELATIVE_ERROR = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-20}
"""The most a sum may differ from the one in float64, in norm: a unit in the last place, and the float32 sums'
own error with rotations."""


def codec_of(spec: str, backend: str = "auto") -> Codec:
    """The codec of a preset's name or of a JSON object; ValueError if there is none."""
    return codecs.get(json.loads(spec) if spec.startswith("{") else spec, backend=backend)


def _decoder(codec: Codec, rank: int) -> Codec:
    """What decodes a wire of ``rank`` alone."""
    if not isinstance(codec, StaticCodec) or codec.tables is None or codec.sum_tables is None:
        return codec
    own = slice(rank, rank + 1)
    tables = codec.tables
    offset, weight = (None if table is None else table[own] for table in (tables.offset, tables.weight))
    return codec.calibrated(StaticTables(tables.scale[own], offset, weight, tables.kept), codec.sum_tables)


@dataclass(frozen=True)
class Case:
    """One kernel on one message.

    Attributes:
        operation: ``"encode"``, ``"decode_sum"`` or ``"decode_sum_encode"`` (into the same codec). A static codec
            takes the latter's two steps.
        spec: the codec: a preset's name, or a JSON object as in the configuration.
        peers: wires that are read; 1 for encode.
        rows, features: of the message.
        dtype: of its values.
    """

    operation: str
    spec: str
    peers: int
    rows: int
    features: int
    dtype: torch.dtype = torch.bfloat16

    def codec(self, backend: str) -> Codec:
        """The codec, with tables if it needs some."""
        return with_tables(codec_of(self.spec, backend), self.peers, self.features)

    @property
    def message_bytes(self) -> int:
        """Of the uncompressed message."""
        return self.rows * self.features * self.dtype.itemsize

    @property
    def moved_bytes(self) -> int:
        """The fewest bytes that go through memory: every input read once, every output written once."""
        wire = self.rows * codec_of(self.spec).row_bytes(self.features)
        return {
            "encode": self.message_bytes + wire,
            "decode_sum": self.peers * wire + self.message_bytes,
            "decode_sum_encode": self.peers * wire + wire,
        }[self.operation]

    def describe(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "operation": self.operation,
            "codec": codec_of(self.spec).name,
            "peers": self.peers,
            "rows": self.rows,
            "features": self.features,
            "dtype": str(self.dtype).removeprefix("torch."),
            "message_bytes": self.message_bytes,
            "moved_bytes": self.moved_bytes,
        }


# Whether they are right


def check_values(rows: int, features: int, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """``[rows, features]`` on the CPU: normal values with outlier features, and in every fourth row something hard.

    NaN, infinities, zeros of both signs, subnormals, the largest finite values, all exponents mixed, ties.
    """
    x = torch.randn(rows, features, generator=generator)
    x[:, ::OUTLIER_EVERY] *= OUTLIER_GAIN
    finfo = torch.finfo(dtype)
    place = torch.randint(features, (rows, 2), generator=generator)
    for row in range(3, rows, 4):
        kind = row // 4 % 8
        if kind == 0:
            x[row, place[row, 0]] = torch.nan
        elif kind == 1:
            x[row, place[row]] = torch.tensor([torch.inf, -torch.inf])
        elif kind == 2:
            x[row] = torch.where(x[row] < 0, -0.0, 0.0)
        elif kind == 3:
            x[row] = (x[row] * 4).round() * finfo.smallest_normal / 8
        elif kind == 4:
            x[row] = finfo.max * x[row].sign()
        elif kind == 5:
            x[row] *= torch.exp2(torch.randint(-30, 15, (features,), generator=generator).float())
        elif kind == 6:
            x[row] = (x[row] * 2).round() / 2
        else:
            x[row] = x[row, 0]
    return x.clamp(-finfo.max, finfo.max).to(dtype) if dtype is torch.float16 else x.to(dtype)


def ordinary(x: torch.Tensor) -> torch.Tensor:
    """Which rows of ``check_values`` have normal values only."""
    return torch.arange(x.shape[0]) % 4 != 3


def check(case: Case, device: torch.device, seed: int, large: bool = False) -> dict[str, Any]:
    """Whether the kernel of ``case`` gives what its definition gives on the CPU, on fresh random data.

    The definition's float32 arithmetic is the numerics of every backend, so the comparison is bit for bit, all NaNs
    being one; the outputs are filled with something else beforehand. decode_sum is compared with the sum in float64
    as well. Input rows are a view with a stride of its own.

    Args:
        case: what to check.
        device: where the kernel runs.
        seed: of the data.
        large: launch the kernel as one would for a large message; for a static codec make it one.

    Returns:
        A JSON-able dict: the case; ``launch``, as of ``describe_launch``; ``passed``; ``wrong``, the values or bytes
        that differ;
        ``float64_error``, relative, in norm, or None; ``error``, what was raised, or None.
    """
    if large and isinstance(codec_of(case.spec), StaticCodec):
        # By the processors that the kernel goes by: so many rows more are two or more for each of its programs.
        processors = launching.gpu_processors(launching.current_gpu())
        case, large = replace(case, rows=case.rows + 2 * processors), False
    result = {**case.describe(), "launch": None, "passed": False, "wrong": None, "float64_error": None, "error": None}
    try:
        with _as_large(case) if large else contextlib.nullcontext():
            result["launch"] = describe_launch(case)
            wrong, error = _compare(case, device, torch.Generator().manual_seed(seed))
        within = error is None or error <= RELATIVE_ERROR[case.dtype]
        result |= {"passed": wrong == 0 and within, "wrong": wrong, "float64_error": error}
    except Exception as error:  # whatever the compiler, the launch or the device raises is the result
        result["error"] = describe_error(error)
    return result


def _as_large(case: Case) -> contextlib.AbstractContextManager[None]:
    format, layout, dtype = _launched(case)
    return launching.using(case.operation, launching.candidates(case.operation, format, layout, dtype)[0])


def _compare(case: Case, device: torch.device, generator: torch.Generator) -> tuple[int, float | None]:
    definition, kernel = case.codec("reference"), case.codec("triton")
    features, dtype = case.features, case.dtype
    partials = [check_values(case.rows, features, dtype, generator) for _ in range(case.peers)]
    wires = torch.stack([definition.sender(rank).encode(x) for rank, x in enumerate(partials)])
    if case.operation == "encode":
        spread = torch.zeros(case.rows, features + 16, dtype=dtype, device=device)
        spread[:, :features] = partials[0].to(device)
        out = torch.full(wires.shape[1:], 0xA5, dtype=torch.uint8, device=device)
        kernel.sender(0).encode(spread[:, :features], out)
        return int((out.cpu() != wires[0]).sum()), None
    if case.operation == "decode_sum_encode":
        expected = definition.decode_sum_encode(wires, features, definition.summed)
        out = torch.full(expected.shape, 0xA5, dtype=torch.uint8, device=device)
        kernel.decode_sum_encode(wires.to(device), features, kernel.summed, out)
        return int((out.cpu() != expected).sum()), None
    expected = definition.decode_sum(wires, features, dtype)
    poisoned = torch.full((case.rows, features), 12345.0, dtype=dtype, device=device)
    found = kernel.decode_sum(wires.to(device), features, dtype, poisoned).cpu()
    decoded = [_decoder(definition, rank).decode(wire, features, torch.float32) for rank, wire in enumerate(wires)]
    exact = torch.stack(decoded).double().sum(0)
    rows = ordinary(exact)
    error = (found.double() - exact)[rows].norm() / exact[rows].norm()
    return differing(found, expected), float(error)


def differing(found: torch.Tensor, expected: torch.Tensor) -> int:
    """How many values differ in their bits, all NaNs being one."""
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[expected.element_size()]
    different = found.view(bits) != expected.view(bits)
    if expected.is_floating_point():
        different &= ~(found.isnan() & expected.isnan())
    return int(different.sum())


def describe_error(error: BaseException) -> str:
    """One line of an exception, of bounded length."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"


# How fast they are


@dataclass
class Buffers:
    """What a case reads and writes, several times over."""

    case: Case
    values: list[torch.Tensor] = field(default_factory=list)
    wires: list[torch.Tensor] = field(default_factory=list)
    """uint8 ``[peers, rows, row_bytes]`` of each set; ``[1, ...]`` and written for encode."""
    sums: list[torch.Tensor] = field(default_factory=list)
    """Wires written by decode_sum_encode."""

    @classmethod
    def of(cls, case: Case, device: torch.device, sets: int) -> Buffers:
        """Random inputs and outputs that hold something else than the result."""
        codec = case.codec("auto" if device.type == "cpu" else "triton")
        shape = (case.peers, case.rows, codec.row_bytes(case.features))
        buffers = cls(case)
        for _ in range(sets):
            x = _random(case, device)
            wires = torch.full(shape, 0xA5, dtype=torch.uint8, device=device)
            if case.operation != "encode":
                for rank, wire in enumerate(wires):
                    x.copy_(_random(case, device))
                    codec.sender(rank).encode(x, wire)
            if case.operation == "decode_sum_encode":
                buffers.sums.append(torch.full(shape[1:], 0xA5, dtype=torch.uint8, device=device))
            else:
                buffers.values.append(x if case.operation == "encode" else x.fill_(12345.0))
            buffers.wires.append(wires)
        return buffers

    def calls(self, backend: str) -> list[Callable[[], object]]:
        """The operation on each set."""
        codec, features = self.case.codec(backend), self.case.features
        if self.case.operation == "encode":
            return [
                _bind(codec.sender(0).encode, x, wires[0]) for x, wires in zip(self.values, self.wires, strict=True)
            ]
        if self.case.operation == "decode_sum":
            pairs = zip(self.wires, self.values, strict=True)
            return [_bind(codec.decode_sum, wires, features, out.dtype, out) for wires, out in pairs]
        pairs = zip(self.wires, self.sums, strict=True)
        return [_bind(codec.decode_sum_encode, wires, features, codec.summed, out) for wires, out in pairs]

    def compiled_calls(self) -> list[Callable[[], object]]:
        """torch.compile of the definition on each set. The fields of wires are passed as tensors of their own: this
        is as fast as its kernels get (kernels/compiled.py)."""
        case, codec = self.case, self.case.codec("reference")
        if not isinstance(codec, BlockCodec):
            raise ValueError(f"codec {codec.name} is not measured beside torch.compile")
        format = codec.format
        features = format.padded_features(case.features)
        if features != case.features:
            raise ValueError(f"{case.features} features are not whole blocks")

        def fields(wire: torch.Tensor) -> WireFields:
            return format.fields(wire, features).map(lambda view: from_dlpack(to_dlpack(view)))

        if case.operation == "encode":
            encode = _compile(encode_definition, case)
            pairs = zip(self.values, self.wires, strict=True)
            return [_bind(encode, format, x, fields(wires[0])) for x, wires in pairs]
        peers = [[fields(wire) for wire in wires] for wires in self.wires]
        if case.operation == "decode_sum":
            decode = _compile(_decode_sum_rows, case)
            return [_bind(decode, format, group, out) for group, out in zip(peers, self.values, strict=True)]
        both = _compile(_decode_sum_encode_rows, case)
        return [_bind(both, format, group, fields(out)) for group, out in zip(peers, self.sums, strict=True)]

    def wrong(self) -> int:
        """Values or bytes that differ from the definition's: in the first and last rows of the first and last set."""
        definition, features = self.case.codec("reference"), self.case.features
        count = min(4, self.case.rows)
        total = 0
        for rows in (slice(0, count), slice(self.case.rows - count, None)):
            for index in {0, len(self.wires) - 1}:
                given = self.wires[index][:, rows].cpu()
                if self.case.operation == "encode":
                    total += differing(given[0], definition.sender(0).encode(self.values[index][rows].cpu()))
                elif self.case.operation == "decode_sum":
                    out = self.values[index][rows].cpu()
                    total += differing(out, definition.decode_sum(given, features, out.dtype))
                else:
                    expected = definition.decode_sum_encode(given, features, definition.summed)
                    total += differing(self.sums[index][rows].cpu(), expected)
        return total


def _random(case: Case, device: torch.device) -> torch.Tensor:
    return torch.randn(case.rows, case.features, device=device, dtype=case.dtype)


def _bind(function: Callable[..., object], *arguments: Any) -> Callable[[], object]:
    return lambda: function(*arguments)


def _decode_sum_rows(format: BlockFormat, peers: Sequence[WireFields], out: torch.Tensor) -> None:
    count = 1 if format.rotation else pieces_per_block(format.element.bits)
    pieces = out.view(out.shape[0], -1, count, format.block_size // count).unbind(2)
    decode_sum_definition(format, peers, pieces)


def _decode_sum_encode_rows(format: BlockFormat, peers: Sequence[WireFields], fields: WireFields) -> None:
    plane = fields.planes[0]
    features = plane.shape[-1] * 8 // format.element.planes[0]
    sums = torch.empty(plane.shape[0], features, dtype=torch.float32, device=plane.device)
    _decode_sum_rows(format, peers, sums)
    encode_definition(format, sums, fields)


def _compile(definition: Callable[..., Any], case: Case) -> Callable[..., Any]:
    """A compiled copy under a name of its own: what is compiled is counted, and limited, per code object."""
    name = f"{definition.__name__}_{zlib.crc32(repr(case).encode()):08x}"
    code = definition.__code__.replace(co_name=name)
    copy = types.FunctionType(code, definition.__globals__, name, definition.__defaults__)
    return torch.compile(copy, fullgraph=True, dynamic=False)


@triton.jit
def _copy_kernel(source, target, words, size: tl.constexpr):  # type: ignore[no-untyped-def]
    word = tl.program_id(0).to(tl.int64) * size + tl.arange(0, size)
    tl.store(target + word, tl.load(source + word, word < words), word < words)


def _triton_copy(source: torch.Tensor, target: torch.Tensor) -> None:
    words = source.numel()
    _copy_kernel[(triton.cdiv(words, 4096),)](source, target, words, 4096, num_warps=4)


def copy_calls(moved_bytes: int, device: torch.device, sets: int) -> dict[str, list[Callable[[], object]]]:
    """Copies that read and write ``moved_bytes`` together: torch's own, and a Triton kernel of 16-byte accesses."""
    words = 16 * max(1, moved_bytes // 128)
    pairs = [
        (
            torch.randint(2**31, (words,), dtype=torch.int32, device=device),
            torch.zeros(words, dtype=torch.int32, device=device),
        )
        for _ in range(sets)
    ]
    return {
        "copy_torch": [_bind(target.copy_, source) for source, target in pairs],
        "copy_triton": [_bind(_triton_copy, source, target) for source, target in pairs],
    }


def buffer_sets(moved_bytes: int, device: torch.device) -> int:
    """How many sets of buffers exceed the L2 cache four times."""
    if device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(1, min(256, math.ceil(4 * cache / moved_bytes)))


def warm_up(device: torch.device, seconds: float = 0.5) -> None:
    """Copies until the clocks have risen."""
    calls = copy_calls(512 * MIB, device, 1)["copy_torch"]
    start = time.perf_counter()
    while time.perf_counter() - start < seconds:
        for _ in range(20):
            calls[0]()
        torch.cuda.synchronize(device)


MIN_CALLS = 8
"""Calls of a graph: the start of the graph itself is a few microseconds."""


def graph_times(contenders: Mapping[str, Sequence[Callable[[], object]]], repeats: int) -> dict[str, dict[str, Any]]:
    """Microseconds per call of each contender, or why there are none.

    Returns:
        ``{name: {median_us, min_us, max_us, eager_us}}``, or ``{name: {error}}`` for a contender that failed;
        ``eager_us`` is without the graph, back to back: what the host needs per call, where that is more.
    """
    graphs: dict[str, tuple[torch.cuda.CUDAGraph, int]] = {}
    results: dict[str, dict[str, Any]] = {}
    for name, calls in contenders.items():
        try:
            count = max(MIN_CALLS, len(calls))
            for index in range(count):  # compiles
                calls[index % len(calls)]()
            eager = _event_us(lambda calls=calls, count=count: [calls[i % len(calls)]() for i in range(count)])  # type: ignore[misc]
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                for index in range(count):
                    calls[index % len(calls)]()
            graph.replay()
            torch.cuda.synchronize()
            graphs[name] = (graph, count)
            results[name] = {"eager_us": eager / count}
        except Exception as error:  # a contender that fails is a result
            results[name] = {"error": describe_error(error)}
            if context_is_lost():
                raise
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(repeats):
        events = []
        for name, (graph, count) in graphs.items():
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            stop.record()
            events.append((name, count, start, stop))
        torch.cuda.synchronize()
        for name, count, start, stop in events:
            times[name].append(1e3 * start.elapsed_time(stop) / count)
    for name, samples in times.items():
        results[name] |= {"median_us": statistics.median(samples), "min_us": min(samples), "max_us": max(samples)}
    return results


def _event_us(call: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    stop.record()
    torch.cuda.synchronize()
    return 1e3 * start.elapsed_time(stop)


def context_is_lost() -> bool:
    """Whether an illegal access or the like has made the GPU unusable for this process."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def time_case(case: Case, device: torch.device, repeats: int, compiled: bool = False) -> dict[str, Any]:
    """Times one case on a GPU, beside copies of as many bytes and, with ``compiled``, torch.compile of the definition.

    Returns:
        A JSON-able dict: the case; ``launch``; ``contenders`` as of ``graph_times``; ``gb_per_s``;
        ``copy_gb_per_s``, of the faster copy; ``percent_of_copy``; ``times_compiled``; ``wrong``, differing values
        in the first and last rows. Figures that could not be had are None, and ``error`` says why, or is None.
    """
    result: dict[str, Any] = {
        **case.describe(),
        **dict.fromkeys(("launch", "sets", "contenders", "wrong", "error")),
        **dict.fromkeys(("median_us", "gb_per_s", "copy_gb_per_s", "percent_of_copy", "times_compiled")),
    }
    try:
        result["sets"] = sets = buffer_sets(case.moved_bytes, device)
        result["launch"] = describe_launch(case)
        buffers = Buffers.of(case, device, sets)
        contenders = {"kernel": buffers.calls("triton"), **copy_calls(case.moved_bytes, device, sets)}
        if compiled:
            # First: what it writes is then overwritten, and what is checked is the kernel's.
            contenders = {"compiled": buffers.compiled_calls(), **contenders}
        times = graph_times(contenders, repeats)
        for call in contenders["kernel"]:
            call()
        result |= {"contenders": times, "wrong": buffers.wrong()}
        result |= figures(case.moved_bytes, times)
    except Exception as error:  # out of memory, or a kernel that fails: the next case may do better
        result["error"] = describe_error(error)
    finally:
        buffers = contenders = None  # type: ignore[assignment]
        gc.collect()
        if not context_is_lost():
            torch.cuda.empty_cache()
    return result


def figures(moved_bytes: int, times: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What the times of ``graph_times`` come to; None for what failed."""

    def median(name: str) -> float | None:
        return times.get(name, {}).get("median_us")

    kernel, compiled = median("kernel"), median("compiled")
    copies = [us for us in (median("copy_torch"), median("copy_triton")) if us is not None]
    copy = min(copies, default=None)
    return {
        "error": times["kernel"].get("error"),
        "median_us": kernel,
        "gb_per_s": moved_bytes / kernel / 1e3 if kernel else None,
        "copy_gb_per_s": moved_bytes / copy / 1e3 if copy else None,
        "percent_of_copy": 100 * copy / kernel if kernel and copy else None,
        "times_compiled": compiled / kernel if kernel and compiled else None,
    }


def describe_launch(case: Case) -> dict[str, Any] | None:
    """How the case's kernel is launched; JSON-able; None for static codecs, whose launches follow from the shape."""
    if not isinstance(codec_of(case.spec), BlockCodec):
        return None
    format, layout, dtype = _launched(case)
    return _flat(launching.launch_config(case.operation, format, layout, case.rows, dtype))


def _launched(case: Case) -> tuple[BlockFormat, Any, torch.dtype]:
    """The format, layout and dtype by which a launch is configured."""
    codec = codec_of(case.spec)
    assert isinstance(codec, BlockCodec)
    format = codec.format
    dtype = torch.float32 if case.operation == "decode_sum_encode" else case.dtype
    return format, format.layout(case.features), dtype


def time_small_message(spec: str, device: torch.device, repeats: int) -> dict[str, Any]:
    """Microseconds per step of a 4 KiB message, one row of 2048 bf16 values, in graphs of 64 steps.

    Returns:
        ``{codec, message_bytes, encode, decode_sum, message}``, as of ``graph_times``; ``message`` is an encode and a
        decode_sum of two wires, one after the other.
    """
    case = Case("encode", spec, 1, 1, 2048)
    decode = replace(case, operation="decode_sum", peers=2)
    (encodes,) = Buffers.of(case, device, 1).calls("triton")
    (decodes,) = Buffers.of(decode, device, 1).calls("triton")

    def message() -> None:
        encodes()
        decodes()

    contenders: dict[str, list[Callable[[], object]]]
    contenders = {"encode": [encodes] * 64, "decode_sum": [decodes] * 64, "message": [message] * 64}
    return {
        "codec": codec_of(spec).name,
        "message_bytes": case.message_bytes,
        **graph_times(contenders, repeats),
    }


def time_case_on_cpu(case: Case, repeats: int) -> dict[str, Any]:
    """Times one case on the CPU: the compiled definition against the eager one, in alternation.

    Returns:
        A JSON-able dict: the case; ``contenders`` as of ``graph_times``; ``median_us`` and ``gb_per_s`` of the
        compiled one; ``times_reference``.
    """
    buffers = Buffers.of(case, torch.device("cpu"), 1)
    calls = {backend: buffers.calls(backend)[0] for backend in ("compiled", "reference")}
    times: dict[str, list[float]] = {backend: [] for backend in calls}
    calls["compiled"]()  # compiles
    for _ in range(repeats):
        for backend, call in calls.items():
            start = time.perf_counter()
            call()
            times[backend].append(1e6 * (time.perf_counter() - start))
    contenders = {
        backend: {"median_us": statistics.median(samples), "min_us": min(samples), "max_us": max(samples)}
        for backend, samples in times.items()
    }
    compiled, reference = (contenders[backend]["median_us"] for backend in ("compiled", "reference"))
    return {
        **case.describe(),
        "contenders": contenders,
        "median_us": compiled,
        "gb_per_s": case.moved_bytes / compiled / 1e3,
        "times_reference": reference / compiled,
    }


# How they are best launched


TUNED_PEERS = 4
"""Wires that decode_sum is tuned with: a configuration serves any number."""


def tuning_cases(spec: str, features: int, mebibytes: Sequence[int]) -> list[list[Case]]:
    """For each operation the messages to tune it on; none for static codecs, whose launches have no choice."""
    if not isinstance(codec_of(spec), BlockCodec):
        return []
    rows = [rows_of(size, features) for size in mebibytes]
    return [
        [Case(operation, spec, 1 if operation == "encode" else TUNED_PEERS, count, features) for count in rows]
        for operation in launching.OPERATIONS
    ]


def rows_of(mebibytes: int, features: int, dtype: torch.dtype = torch.bfloat16) -> int:
    """Rows of a message of about that size."""
    return max(1, mebibytes * MIB // (features * dtype.itemsize))


def tune(
    cases: Sequence[Case], device: torch.device, repeats: int
) -> Iterator[tuple[Measurement | None, dict[str, Any]]]:
    """Tries the candidates on messages of one operation, codec and hidden size.

    Every candidate is compared with the definition first; those that fail are not timed.

    Yields:
        For each case the measurement to record, or None if there is none, and a JSON-able report: the case; ``tried``,
        the candidates with ``median_us``, or ``error``; ``best``.
    """
    format, layout, dtype = _launched(cases[0])
    operation = cases[0].operation
    right: list[LaunchConfig] = []
    failed: list[dict[str, Any]] = []
    for config in launching.candidates(operation, format, layout, dtype):
        with launching.using(operation, config):
            # Rows that divide by 16, as those of large messages do: Triton compiles such by themselves.
            checked = check(replace(cases[0], rows=48), device, seed=time.time_ns() % 2**31)
        if checked["passed"]:
            right.append(config)
        else:
            problem = checked["error"] or f"{checked['wrong']} wrong, float64_error {checked['float64_error']}"
            failed.append({"launch": _flat(config), "error": problem})
    for case in cases:
        report: dict[str, Any] = {**case.describe(), "tried": list(failed), "best": None, "error": None}
        try:
            found = _fastest(case, right, device, repeats, report)
        except Exception as error:  # out of memory: the next message may be smaller
            report["error"] = describe_error(error)
            found = None
        torch.cuda.empty_cache()
        yield found, report


def _fastest(
    case: Case, configs: Sequence[LaunchConfig], device: torch.device, repeats: int, report: dict[str, Any]
) -> Measurement | None:
    format, layout, dtype = _launched(case)
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    guessed = launching.guess(case.operation, format, layout, case.rows, dtype, processors)
    buffers = Buffers.of(case, device, buffer_sets(case.moved_bytes, device))
    by_name = {str(index): config for index, config in enumerate(dict.fromkeys((*configs, guessed)))}
    contenders = {
        name: _configured(case.operation, config, buffers.calls("triton")) for name, config in by_name.items()
    }
    times = graph_times(contenders, repeats)
    report["tried"] += [{"launch": _flat(by_name[name]), **figures} for name, figures in times.items()]
    medians = {by_name[name]: figures["median_us"] for name, figures in times.items() if "median_us" in figures}
    # The guess itself may be another one for a small message; only what was compared with the definition counts.
    eligible = {config: median for config, median in medians.items() if config in configs}
    if not eligible:
        return None
    best = min(eligible, key=lambda config: eligible[config])
    report["best"] = _flat(best)
    return launching.measurement(
        case.operation, format, layout, case.rows, dtype, best, eligible[best], medians.get(guessed, eligible[best])
    )


def _configured(
    operation: str, config: LaunchConfig, calls: Sequence[Callable[[], object]]
) -> list[Callable[[], object]]:
    def configured(call: Callable[[], object]) -> Callable[[], object]:
        def run() -> None:
            with launching.using(operation, config):
                call()

        return run

    return [configured(call) for call in calls]


def _flat(config: LaunchConfig) -> dict[str, int]:
    return {**vars(config.tile), "num_warps": config.num_warps}
