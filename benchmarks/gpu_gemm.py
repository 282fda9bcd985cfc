"""The int4 GEMM on a CUDA GPU: whether dequant_gemm is right, then how fast it and the MLPs of one rank are.

Part of `python -m benchmarks.gpu`; needs torch and triton only. **No communication is in any figure.** What the naive
scheme's all_gather would add is modelled, never measured: ALL_GATHER_MODEL.

1. dequant_gemm against the product, in float64, of the dequantized weight; dequant_gemm_encode against dequant_gemm
   and then encode, bit for bit; and whether two calls give the same bits.
2. Each linear of the MLPs of Llama-70B and Granite-20B as one of 1, 2, 4 and 8 ranks holds it, int4 in groups of 128
   with zeros, beside bf16 by cuBLAS: ``x @ W.t()`` and ``x @ W``, whichever is faster; for few rows beside PyTorch's
   own int4 GEMM too (``torch_int4``, which torchao's tile-packed weights run on), unless it does not work there.
3. The second linear of several ranks, whose product is a partial: dequant_gemm_encode beside dequant_gemm and then
   encode.
4. The whole MLP of one rank. ``tp_aware``: the rows of the second weight sorted by group, its inputs arriving in that
   order. ``replicated``: the second weight's rows stay on their ranks, so parts of every group are here, padded to
   whole words, and inputs are gathered at run time. ``bf16``: cuBLAS. Both int4 schemes gather the inputs of the first
   weight by its own act-order, in the kernel.

Times are those of CUDA graphs that rotate through sets of weights four times as large as the L2 cache.
"""

from __future__ import annotations

import gc
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from megacomp import codecs
from megacomp.codecs import BlockCodec
from megacomp.kernels.dequant_gemm import TRITON_MAX_ROWS, dequant_gemm, guess_gemm, resolve_gemm_backend
from megacomp.kernels.dequant_gemm_encode import dequant_gemm_encode
from megacomp.kernels.grouped_weight import WORD_BITS, GroupedWeight, dequantize, unpack_codes
from megacomp.kernels.launch_config import gpu_processors
from megacomp.launch import kernel_bench
from megacomp.launch.kernel_bench import describe_error

Calls = Sequence[Callable[[], torch.Tensor]]

Go = Callable[[str], bool]
"""Told what is to be begun, says whether there is time for it."""

GROUP_SIZE = 128
FLOORS_DB = {"bfloat16": 48.0, "float16": 64.0}
"""Those of tests/gptq/test_dequant_gemm.py: rounded weights and results leave no more."""

TIMED_FLOOR_DB = 40.0
"""Between two results in bf16, both rounded, of which one had its weights rounded to bf16 too."""

FEW_ROWS = 16
"""Up to here decoding: the time goes to reading weights."""

ENCODED = ("mxfp4", "int8")
"""Codecs of products."""

ENCODED_ROWS = (1, FEW_ROWS, 64, TRITON_MAX_ROWS)
"""Beyond, dequant_gemm_encode is two steps itself."""

TORCH_INT4_TILES = 8
"""Tiles of 16 inputs that PyTorch's int4 GEMM has side by side: the most, and what torchao takes."""

NVLINK_GB_PER_S = 450.0
"""One direction of an H100's or H200's NVLink, by its data sheet."""

ALL_GATHER_MODEL = (
    f"modelled, not measured: (ranks - 1) / ranks * rows * inner * 2 bytes / {NVLINK_GB_PER_S:g} GB/s, no latency"
)
NOTE = "per-rank compute; no communication is in these times"


@dataclass(frozen=True)
class Mlp:
    """The sizes of a model's MLP; gated: its first linear computes gate and up together."""

    hidden: int
    inner: int
    gated: bool

    def linears(self, ranks: int) -> dict[str, tuple[int, int]]:
        """in_features and out_features of what one of the ranks holds."""
        inner = self.inner // ranks
        return {"up": (self.hidden, inner * (2 if self.gated else 1)), "down": (inner, self.hidden)}

    def activate(self, y: torch.Tensor) -> torch.Tensor:
        if not self.gated:
            return F.gelu(y, approximate="tanh")
        gate, up = y.chunk(2, dim=1)
        return F.silu(gate) * up


MLPS = {"Llama-70B": Mlp(8192, 28672, gated=True), "Granite-20B": Mlp(6144, 24576, gated=False)}
LARGE_ROWS = 4096
ROWS = (1, 2, 4, 8, FEW_ROWS, LARGE_ROWS)


def check_grid(quick: bool) -> list[dict[str, Any]]:
    """The arguments of :func:`check`; ``encoded``: the codec of the product, None for none."""
    return [
        {
            "operation": "dequant_gemm" if encoded is None else "dequant_gemm_encode",
            "spec": f"{bits} bits, {order}, {rows} rows, {dtype}" + (f", {encoded}" if encoded else ""),
            "bits": bits,
            "order": order,
            "rows": rows,
            "dtype": dtype,
            "in_features": 4096,
            "out_features": 544,
            "encoded": encoded,
        }
        for bits in (4, 8)
        for dtype in (("bfloat16",) if quick else tuple(FLOORS_DB))
        for order in ("sorted", "gathered", "unequal")
        for rows in ((1, 64) if quick else (1, 16, 64, 200))
        for encoded in ((None, *ENCODED) if bits == 4 else (None,))
    ]


def time_grid(quick: bool) -> list[tuple[str, int, tuple[int, ...]]]:
    """Models, ranks and rows, in the order of interest."""
    if quick:
        return [("Llama-70B", 8, (1, FEW_ROWS, LARGE_ROWS))]
    return [(model, ranks, ROWS) for model in MLPS for ranks in (8, 4, 2, 1)]


def random_weight(
    in_features: int,
    out_features: int,
    order: str,
    generator: torch.Generator,
    bits: int = 4,
    symmetric: bool = False,
    ranks: int = 1,
) -> GroupedWeight:
    """Random codes on the generator's device, in groups of GROUP_SIZE.

    order: "sorted", row k multiplies feature k; "gathered", rows in act-order; "unequal", one of ``ranks`` shares of
    rows in act-order: parts of every group, each filled up to whole words, and every group's scales.
    """
    device = generator.device
    codes_per_word = WORD_BITS // bits
    words, groups = in_features // codes_per_word, in_features // GROUP_SIZE
    word_groups = index = None
    if order == "gathered":
        index = torch.randperm(in_features, generator=generator, device=device).int()
    elif order == "unequal":
        groups *= ranks
        word_groups, index = _unequal(in_features, groups, codes_per_word, generator)
        words = len(word_groups)
    shape = (groups, out_features)
    return GroupedWeight(
        codes=torch.randint(
            -(2**31), 2**31, (words, out_features), dtype=torch.int32, generator=generator, device=device
        ),
        scales=((torch.rand(shape, generator=generator, device=device) + 0.5) * 0.1 / in_features**0.5).half(),
        zeros=None
        if symmetric
        else torch.randint(2**bits, shape, dtype=torch.uint8, generator=generator, device=device),
        bits=bits,
        word_groups=word_groups,
        input_index=index,
    )


def _unequal(
    in_features: int, groups: int, codes_per_word: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """word_groups and input_index of the first features of an act-order weight of so many groups."""
    device = generator.device
    group_of = torch.randperm(groups * GROUP_SIZE, generator=generator, device=device)[:in_features] // GROUP_SIZE
    order = group_of.argsort(stable=True)
    counts = torch.bincount(group_of, minlength=groups)
    words = (counts + codes_per_word - 1) // codes_per_word
    word_groups = torch.arange(groups, device=device).repeat_interleave(words)
    group = word_groups.repeat_interleave(codes_per_word)
    place = torch.arange(len(group), device=device) - (words.cumsum(0) - words)[group] * codes_per_word
    inputs = order[(counts.cumsum(0) - counts)[group] + torch.minimum(place, counts[group] - 1)]
    return word_groups.int(), inputs.int()


def check(case: Mapping[str, Any], device: torch.device, seed: int) -> dict[str, Any]:
    """The kernel on one of :func:`check_grid`; JSON-able, with ``error`` wherever it did not pass."""
    found = {**case, "codec": case["spec"], "seed": seed, "launch": None, "sqnr_db": None, "passed": False}
    try:
        generator = torch.Generator(device).manual_seed(seed)
        rows, features = case["rows"], case["in_features"]
        weight = random_weight(
            features, case["out_features"], case["order"], generator, case["bits"], symmetric=seed % 2 == 0, ranks=4
        )
        dtype = getattr(torch, case["dtype"])
        x = torch.randn(rows, features, generator=generator, device=device).to(dtype)
        found["launch"] = describe_launch(x, weight)
        if case["encoded"] is None:
            first, second = (dequant_gemm(x, weight, "triton") for _ in range(2))
            problem = _wrong_product(x, weight, first, found)
        else:
            codec = block_codec(case["encoded"])
            first, second = (_encoded(codec, x, weight) for _ in range(2))
            differing = int((first != codec.encode(dequant_gemm(x, weight, "triton"))).sum())
            problem = f"{differing} bytes are not those of two steps" if differing else None
        if problem is None and not torch.equal(first, second):
            problem = "two calls give different bits"
        found |= {"passed": problem is None, "error": problem}
    except Exception as error:  # the next case may do better
        found["error"] = describe_error(error)
    return found


def _wrong_product(x: torch.Tensor, weight: GroupedWeight, got: torch.Tensor, found: dict[str, Any]) -> str | None:
    """What is wrong with a product, whose ``sqnr_db`` is added to what was found; None if nothing is."""
    inputs = x if weight.input_index is None else x[:, weight.input_index]
    decibels = sqnr_db(inputs.double() @ dequantize(weight).double(), got)
    found["sqnr_db"] = _finite(decibels)
    floor = FLOORS_DB[found["dtype"]]
    return None if decibels > floor else f"SQNR {decibels:.1f} dB, not above {floor:g}"


def block_codec(spec: str) -> BlockCodec:
    codec = codecs.get(spec, backend="triton")
    assert isinstance(codec, BlockCodec)
    return codec


def _encoded(codec: BlockCodec, x: torch.Tensor, weight: GroupedWeight) -> torch.Tensor:
    """The product's wire, in one step where there is one."""
    wire = torch.empty(len(x), codec.row_bytes(weight.out_features), dtype=torch.uint8, device=x.device)
    dequant_gemm_encode(codec.format, x, weight, wire, "triton", "triton")
    return wire


def torch_int4_problem(device: torch.device) -> str | None:
    """Why PyTorch's own int4 GEMM is not timed on ``device``; None if it is: it multiplies, and rightly."""
    generator = torch.Generator(device).manual_seed(1)
    weight = random_weight(256, 64, "sorted", generator)
    x = torch.randn(3, 256, generator=generator, device=device).bfloat16()
    try:
        decibels = sqnr_db(x.double() @ dequantize(weight).double(), torch_int4(weight)(x))
    except Exception as error:  # another PyTorch, or one built without it
        return describe_error(error)
    return None if decibels > TIMED_FLOOR_DB else f"SQNR {decibels:.1f} dB, not above {TIMED_FLOOR_DB:g}"


def torch_int4(weight: GroupedWeight) -> Callable[[torch.Tensor], torch.Tensor]:
    """What multiplies by PyTorch's own int4 GEMM for GPUs, with a copy of the weight in its layout.

    bf16, 4 bits, equal groups in order; scales are rounded to bf16, and it adds what 8 stands for.
    """
    assert weight.group_size is not None and weight.input_index is None
    codes = unpack_codes(weight.codes, weight.bits).t()
    scales = weight.scales.float()
    offsets = torch.zeros_like(scales) if weight.zeros is None else (8.0 - weight.zeros) * scales
    scales_and_offsets = torch.stack((scales, offsets), dim=-1).bfloat16()
    packed = torch.ops.aten._convert_weight_to_int4pack(
        (codes[:, ::2] << 4 | codes[:, 1::2]).contiguous(), TORCH_INT4_TILES
    )
    group_size = weight.group_size
    return lambda x: torch.ops.aten._weight_int4pack_mm(x, packed, group_size, scales_and_offsets)


def describe_launch(x: torch.Tensor, weight: GroupedWeight) -> dict[str, Any]:
    """What multiplies, and the kernel's launch if that does."""
    backend = resolve_gemm_backend("triton", x, weight, None)
    if backend != "triton":
        return {"backend": backend}
    return {"backend": backend, **vars(guess_gemm(len(x), weight, gpu_processors(x.device.index)))}


def sqnr_db(expected: torch.Tensor, got: torch.Tensor) -> float:
    return float(20 * torch.log10(expected.double().norm() / (got.double() - expected.double()).norm()))


def _finite(figure: float) -> float | None:
    return figure if math.isfinite(figure) else None


def where(case: Mapping[str, Any]) -> str:
    """Which linear, or MLP, it is, in words, as far as the case says."""
    rows = f", {case['rows']} rows" if "rows" in case else ""
    codec = f", {case['encoded']}" if "encoded" in case else ""
    return f"{case['model']}, TP {case['ranks']}, {case.get('linear', 'MLP')}{rows}{codec}"


def time_mlp(
    model: str,
    ranks: int,
    rows: Sequence[int],
    device: torch.device,
    repeats: int,
    go: Go,
    mlps: Mapping[str, Mlp] = MLPS,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields what was timed at so many rows, and what it is, as long as ``go`` agrees.

    "gemms": one linear. "products": the second linear of several ranks, encoded. "mlps": the whole MLP of one rank.
    ``go`` is asked before every measurement, and before weights are made for several of them.
    """
    generator = torch.Generator(device).manual_seed(ranks)
    mlp = mlps[model]
    case = {"model": model, "ranks": ranks}
    for name, shape in mlp.linears(ranks).items():
        case |= {"linear": name, "in_features": shape[0], "out_features": shape[1]}
        if go(where(case)):
            yield from _time_linear(case, shape, rows, device, repeats, go, generator)
    case = {"model": model, "ranks": ranks, "note": NOTE}
    if go(where(case)):
        yield from (("mlps", found) for found in _time_whole(case, mlp, rows, device, repeats, go, generator))


def _time_linear(
    case: dict[str, Any],
    shape: tuple[int, int],
    rows: Sequence[int],
    device: torch.device,
    repeats: int,
    go: Go,
    generator: torch.Generator,
) -> Iterator[tuple[str, dict[str, Any]]]:
    values = shape[0] * shape[1]
    weights = [random_weight(*shape, "sorted", generator) for _ in range(kernel_bench.buffer_sets(values // 2, device))]
    dense = [dequantize(weight, torch.bfloat16) for weight in weights[: kernel_bench.buffer_sets(2 * values, device)]]
    transposed = [one.t().contiguous().t() for one in dense]

    problem = torch_int4_problem(device)
    torchs = [torch_int4(weight) for weight in weights] if problem is None else []

    def inputs(count: int) -> torch.Tensor:
        return torch.randn(count, shape[0], generator=generator, device=device).bfloat16()

    def contenders(x: torch.Tensor) -> dict[str, Calls]:
        few = torchs if len(x) <= FEW_ROWS else []
        return {
            "int4": [lambda weight=weight: dequant_gemm(x, weight, "triton") for weight in weights],  # type: ignore[misc]
            "bf16": [lambda one=one: torch.matmul(x, one) for one in transposed],  # type: ignore[misc]
            "bf16_untransposed": [lambda one=one: torch.matmul(x, one) for one in dense],  # type: ignore[misc]
            **({"torch_int4": [lambda multiply=multiply: multiply(x) for multiply in few]} if few else {}),  # type: ignore[misc]
        }

    def encoders(x: torch.Tensor, codec: BlockCodec) -> dict[str, Calls]:
        return {
            "one_step": [lambda weight=weight: _encoded(codec, x, weight) for weight in weights],  # type: ignore[misc]
            "two_steps": [
                lambda weight=weight: codec.encode(dequant_gemm(x, weight, "triton"))  # type: ignore[misc]
                for weight in weights
            ],
        }

    for count in rows:
        what = {**case, "rows": count}
        if not go(where(what)):
            continue
        x = inputs(count)
        found = _timed(what, contenders(x), repeats, lambda x=x: describe_launch(x, weights[0]))  # type: ignore[misc]
        found["torch_int4_problem"] = problem
        found["times_torch_int4"] = times_as_fast(found["contenders"] or {}, "int4", "torch_int4")
        yield "gemms", found
    if case["linear"] == "down" and case["ranks"] > 1:
        for count, spec in itertools.product(ENCODED_ROWS, ENCODED):
            what = {**case, "rows": count, "encoded": spec}
            if go(where(what)):
                yield "products", _timed(what, encoders(inputs(count), block_codec(spec)), repeats, against="two_steps")


def _time_whole(
    case: dict[str, Any],
    mlp: Mlp,
    rows: Sequence[int],
    device: torch.device,
    repeats: int,
    go: Go,
    generator: torch.Generator,
) -> Iterator[dict[str, Any]]:
    up, down = mlp.linears(case["ranks"]).values()
    values = up[0] * up[1] + down[0] * down[1]
    sets = range(kernel_bench.buffer_sets(values // 2, device))
    # One rank has every group entire, in either scheme.
    order = "gathered" if case["ranks"] == 1 else "unequal"
    ups = [random_weight(*up, "gathered", generator) for _ in sets]
    sorted_downs = [random_weight(*down, "sorted", generator) for _ in sets]
    downs = [random_weight(*down, order, generator, ranks=case["ranks"]) for _ in sets]
    dense = [
        (torch.randn(shape[1], shape[0], generator=generator, device=device) / shape[0] ** 0.5).bfloat16().t()
        for _ in range(kernel_bench.buffer_sets(2 * values, device))
        for shape in (up, down)
    ]

    def quantized(x: torch.Tensor, first: GroupedWeight, second: GroupedWeight) -> Callable[[], torch.Tensor]:
        return lambda: dequant_gemm(mlp.activate(dequant_gemm(x, first, "triton")), second, "triton")

    def plain(x: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> Callable[[], torch.Tensor]:
        return lambda: torch.matmul(mlp.activate(torch.matmul(x, first)), second)

    for count in rows:
        what = {**case, "rows": count}
        if not go(where(what)):
            continue
        x = torch.randn(count, mlp.hidden, generator=generator, device=device).bfloat16()
        contenders: dict[str, Calls] = {
            "tp_aware": [quantized(x, *pair) for pair in zip(ups, sorted_downs, strict=True)],
            "replicated": [quantized(x, *pair) for pair in zip(ups, downs, strict=True)],
            "bf16": [plain(x, *pair) for pair in zip(dense[::2], dense[1::2], strict=True)],
        }
        found = _timed(what, contenders, repeats)
        ranks = case["ranks"]
        found["all_gather_modelled_us"] = (ranks - 1) / ranks * count * mlp.inner * 2 / NVLINK_GB_PER_S / 1e3
        yield found


def _timed(
    case: dict[str, Any],
    contenders: Mapping[str, Calls],
    repeats: int,
    launch: Callable[[], dict[str, Any]] | None = None,
    against: str = "bf16",
) -> dict[str, Any]:
    """The case with its ``contenders`` as of ``graph_times``, how many ``times_...`` as fast as those ``against`` whom
    it is the first is, and what went wrong.
    """
    found = {**case, **dict.fromkeys(("launch", "contenders", f"times_{against}", "sqnr_db", "error"))}
    try:
        if launch is not None:
            found["launch"] = launch()
            # The first sets are the same weight, quantized and dense.
            decibels = sqnr_db(contenders["bf16"][0](), contenders["int4"][0]())
            found["sqnr_db"] = _finite(decibels)
            if not decibels > TIMED_FLOOR_DB:
                found["error"] = f"SQNR {decibels:.1f} dB, not above {TIMED_FLOOR_DB:g}"
        repeats = repeats if case["rows"] <= FEW_ROWS else min(5, repeats)
        found["contenders"] = times = kernel_bench.graph_times(contenders, repeats)
        failed = [f"{name}: {figures['error']}" for name, figures in times.items() if "error" in figures]
        found["error"] = found["error"] or next(iter(failed), None)
        found[f"times_{against}"] = times_as_fast(times, next(iter(contenders)), against)
    except Exception as error:  # out of memory, or a kernel that fails
        found["error"] = describe_error(error)
    gc.collect()
    if not kernel_bench.context_is_lost():
        torch.cuda.empty_cache()
    return found


def times_as_fast(times: Mapping[str, Mapping[str, Any]], name: str, against: str) -> float | None:
    """How many times as fast as the fastest whose name begins with ``against``; None if either has no time."""
    ours = times.get(name, {}).get("median_us")
    theirs = [
        figures["median_us"] for key, figures in times.items() if key.startswith(against) and "median_us" in figures
    ]
    return min(theirs) / ours if ours and theirs else None
