"""dequant_gemm: activations ``[rows, in_features]`` times a :class:`GroupedWeight` -> ``[rows, out_features]``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from megacomp.kernels.compiled import compiled, compiler_problem, isolated
from megacomp.kernels.grouped_weight import GroupedWeight, dequantize, group_floats, unpack_codes
from megacomp.kernels.launch_config import device_problem, gpu_processors, on_device_of
from megacomp.kernels.tiles import INTERPRETED, round_to

__all__ = [
    "TILE_OUTPUTS",
    "GemmLaunch",
    "Int4Pack",
    "dequant_gemm",
    "dequant_gemm_definition",
    "gemm_tile",
    "guess_gemm",
    "launch_gemm",
    "launch_of",
    "multiplies_codes",
    "resolve_gemm_backend",
    "split_sums",
]

INT4PACK_MAX_ROWS = 64
"""Up to here PyTorch's int4 GEMM is the faster one. Measured on one thread of an AMD EPYC with AVX-512, bf16,
4096 x 4096: it takes 0.4 ms for 1 row, 2.9 for 16, 11 for 64, 90 for 512; dequantizing first 12, 13, 16 and 46 ms."""

INT4PACK_GROUP_SIZES = (32, 64, 128, 256)

COMPILED_MIN_VALUES = 2**20
"""Smaller weights are dequantized eagerly in a few milliseconds; compiling takes seconds for each shape."""

VALUES_PER_SLICE = 2**20
"""Weights that are dequantized at a time."""

TRITON_MAX_ROWS = 256
"""Beyond, a GPU dequantizes once and multiplies densely instead of dequantizing for each tile of rows: a guess, not
measured yet. By its bandwidth and peak compute an H200 would spend 5 % of 4096 rows of bf16 on that."""

TILE_OUTPUTS = 64
"""Outputs of a tile, whatever the launch: blocks of an encoded product lie in one tile."""


class Int4Pack:
    """A copy of a weight as PyTorch's int4 GEMM for CPUs wants it, made when it first is of use."""

    def __init__(self) -> None:
        self._packed: tuple[torch.Tensor, torch.Tensor] | None = None

    def of(self, weight: GroupedWeight) -> tuple[torch.Tensor, torch.Tensor]:
        """Its codes, and bf16 ``[groups, out_features, 2]``: scales, and what 8 stands for."""
        if self._packed is None:
            codes = unpack_codes(weight.codes, weight.bits).t().to(torch.int32).contiguous()
            scales = weight.scales.float()
            offsets = torch.zeros_like(scales) if weight.zeros is None else (8.0 - weight.zeros) * scales
            self._packed = (
                torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1),
                torch.stack((scales, offsets), dim=-1).bfloat16(),
            )
        return self._packed


def dequant_gemm(
    x: torch.Tensor, weight: GroupedWeight, backend: str = "auto", int4pack: Int4Pack | None = None
) -> torch.Tensor:
    """x @ W, accumulated in float32.

    Args:
        x: bf16, fp16 or fp32 ``[rows, in_features]``, on the device of the weight.
        weight: the weight; with an ``input_index``, ``x[:, input_index]`` is what its rows multiply.
        backend: one of ``megacomp.kernels.backend.BACKENDS``. ``reference`` is the definition; ``auto`` may round
            scales to bf16, for few rows of bf16 on a CPU (PyTorch's int4 GEMM takes no others): an error of the size
            that rounding the weights to bf16 makes.
        int4pack: where a copy for that GEMM is kept between calls; without, it is not used.

    Returns:
        ``[rows, out_features]`` of the dtype of ``x``.
    """
    match resolve_gemm_backend(backend, x, weight, int4pack):
        case "int4pack":
            assert int4pack is not None and weight.group_size is not None
            packed, scales = int4pack.of(weight)
            gathered = _gather(x, weight).contiguous()
            return torch.ops.aten._weight_int4pack_mm_for_cpu(gathered, packed, weight.group_size, scales)
        case "compiled":
            return _compiled_gemm(x, weight)
        case "triton":
            return _dequant_gemm_triton(x, weight)
        case "dense":
            return _gather(x, weight) @ dequantize(weight, x.dtype)
        case _:
            return dequant_gemm_definition(x, weight)


def dequant_gemm_definition(x: torch.Tensor, weight: GroupedWeight) -> torch.Tensor:
    """The definition, in PyTorch; what every backend approximates.

    1. Dequantize in float32 and round to the dtype of ``x``. 2. Gather the inputs of the rows. 3. Multiply and sum in
    float32. 4. Round once, to the dtype of ``x``.
    """
    return (_gather(x, weight).float() @ dequantize(weight, x.dtype).float()).to(x.dtype)


def resolve_gemm_backend(backend: str, x: torch.Tensor, weight: GroupedWeight, int4pack: Int4Pack | None) -> str:
    """What multiplies.

    ``"reference"``; ``"triton"`` (on GPUs); ``"dense"`` (dequantize, then the device's own GEMM);
    ``"compiled"`` (the same with a compiled dequantization); ``"int4pack"`` (PyTorch's int4 GEMM for CPUs).

    Raises:
        RuntimeError: ``compiled`` or ``triton`` was asked for and cannot run here.
    """
    if backend == "reference":
        return "reference"
    if backend == "triton" and (problem := device_problem(x.device)) is not None:
        raise RuntimeError(f'backend "triton": {problem}')
    if backend == "triton" or (backend == "auto" and x.device.type == "cuda" and device_problem(x.device) is None):
        return "triton"
    if x.device.type != "cpu":
        return "dense"
    if backend == "auto":
        if x.shape[0] <= INT4PACK_MAX_ROWS and int4pack is not None and _fits_int4pack(x, weight):
            return "int4pack"
        if weight.rows * weight.out_features < COMPILED_MIN_VALUES:
            return "reference"
    problem = compiler_problem()
    if problem is None:
        return "compiled"
    if backend == "compiled":
        raise RuntimeError(f'backend "compiled": {problem}')
    return "reference"


def multiplies_codes(backend: str, x: torch.Tensor, weight: GroupedWeight) -> bool:
    """Whether a Triton kernel multiplies the codes themselves: few rows, on a GPU or where Triton was asked for."""
    return 0 < len(x) <= TRITON_MAX_ROWS and resolve_gemm_backend(backend, x, weight, None) == "triton"


def _fits_int4pack(x: torch.Tensor, weight: GroupedWeight) -> bool:
    return (
        x.dtype == torch.bfloat16
        and weight.bits == 4
        and weight.group_size in INT4PACK_GROUP_SIZES
        and weight.out_features % 64 == 0
    )


def _gather(x: torch.Tensor, weight: GroupedWeight) -> torch.Tensor:
    return x if weight.input_index is None else x[:, weight.input_index]


def _compiled_gemm(x: torch.Tensor, weight: GroupedWeight) -> torch.Tensor:
    """Dequantizing, and gathering the inputs, by compiled code; then PyTorch's GEMM: slice by slice of the outputs.

    A slice's dense weights are multiplied while they are in the cache, and all slices use one buffer.
    """
    # CPUs multiply fp16 some forty times slower than fp32.
    dtype = torch.float32 if x.dtype == torch.float16 else x.dtype
    scales, zeros = group_floats(weight)
    words = weight.codes.view(len(scales) if weight.word_groups is None else len(weight.codes), -1, weight.out_features)
    mode = torch.is_inference_mode_enabled()
    with torch.no_grad():
        if weight.input_index is not None and len(x) > 1:
            # A single row cannot share a compiled function with many, and costs nothing.
            x = x.contiguous()
            torch._dynamo.maybe_mark_dynamic(x, 0)
            inputs = compiled(_gather_definition, (x.shape[1], weight.rows, x.dtype, mode))(x, weight.input_index)
        else:
            inputs = _gather(x, weight)
        inputs = inputs.to(dtype)
        y = x.new_empty(len(x), weight.out_features)
        outputs = min(weight.out_features, max(64, VALUES_PER_SLICE // weight.rows // 64 * 64))
        buffer = torch.empty(weight.rows * outputs, dtype=dtype, device=x.device)
        for start in range(0, weight.out_features, outputs):
            part = slice(start, min(start + outputs, weight.out_features))
            dense = buffer[: weight.rows * (part.stop - start)].view(weight.rows, -1)
            slots = dense.view(*words.shape[:2], weight.codes_per_word, -1).unbind(2)
            key = (words.shape, dense.shape, len(scales), weight.bits, x.dtype, dtype, mode)
            compiled(_dequantize_definition, key)(
                weight.bits,
                x.dtype,
                isolated(words[..., part]),
                isolated(scales[:, part]),
                isolated(zeros[:, part]),
                weight.word_groups,
                [isolated(slot) for slot in slots],
            )
            y[:, part] = inputs @ dense
    return y


def _dequantize_definition(
    bits: int,
    rounded_to: torch.dtype,
    words: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    word_groups: torch.Tensor | None,
    slots: Sequence[torch.Tensor],
) -> None:
    """`dequantize` in the form that compiles well.

    words: ``[groups, words of each, out_features]``, or ``[words, 1, out_features]`` with ``word_groups``.
    scales, zeros: float32 ``[groups, out_features]``. slots: shaped as ``words``, written: the rows whose codes are in
    the 1st, 2nd ... place of a word.
    """
    if word_groups is not None:
        scales, zeros = scales[word_groups], zeros[word_groups]
    scales, zeros = scales.unsqueeze(1), zeros.unsqueeze(1)
    for slot, out in enumerate(slots):
        codes = (words >> (slot * bits)) & (2**bits - 1)
        out.copy_(((codes.float() - zeros) * scales).to(rounded_to))


def _gather_definition(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return x[:, index]


@dataclass(frozen=True)
class GemmLaunch:
    """How the Triton twin is launched.

    Attributes:
        rows, outputs: of a tile of the result.
        words: of codes per step along the inputs.
        splits: into how many stretches the inputs are cut, each summed by programs of its own.
        num_warps, num_stages: Triton's.
    """

    rows: int
    outputs: int
    words: int
    splits: int
    num_warps: int
    num_stages: int


def guess_gemm(rows: int, weight: GroupedWeight, processors: int) -> GemmLaunch:
    """A launch by shape: for few rows the inputs are split until each of the ``processors`` has four programs.

    Nothing here was measured on a GPU yet. The tiles compile without spills for sm_80, sm_90 and sm_100, and a step is
    within one group wherever groups are equal.
    """
    few = rows <= 16
    words = (128 if few else 64) // weight.codes_per_word
    if weight.group_size is not None:
        words = math.gcd(words, weight.group_size // weight.codes_per_word)
    # A tensor core's step is 16 inputs at least.
    words = max(words, 16 // weight.codes_per_word)
    tile_rows = 16 if few else 64
    programs = triton.cdiv(rows, tile_rows) * triton.cdiv(weight.out_features, TILE_OUTPUTS)
    steps = triton.cdiv(len(weight.codes), words)
    splits = 1
    while few and splits < 16 and 2 * splits * programs <= 4 * processors and 4 * splits <= steps:
        splits *= 2
    return GemmLaunch(tile_rows, TILE_OUTPUTS, words, splits, num_warps=4, num_stages=4 if few else 3)


def _dequant_gemm_triton(x: torch.Tensor, weight: GroupedWeight) -> torch.Tensor:
    """Few rows multiply codes, many a weight that is dequantized before.

    Sums of split inputs are added in order by a second kernel: every call gives the same bits.
    """
    if len(x) > TRITON_MAX_ROWS:
        return _gather(x, weight) @ _dequantize_triton(weight, x.dtype)
    rows, outputs = len(x), weight.out_features
    result = x.new_empty(rows, outputs)
    if rows == 0:
        return result
    with on_device_of(x):
        launch = launch_of(x, weight)
        if launch.splits == 1:
            launch_gemm(_dequant_gemm_kernel, launch, x, weight, result)
        else:
            sums = split_sums(launch, x, weight)
            count = rows * outputs
            _sum_splits_kernel[(triton.cdiv(count, 1024),)](sums, result, count, launch.splits, 1024)
    return result


def launch_of(x: torch.Tensor, weight: GroupedWeight) -> GemmLaunch:
    """How ``x`` and ``weight`` are multiplied on the GPU that has them, whatever becomes of the product."""
    return guess_gemm(len(x), weight, gpu_processors(x.device.index))


def split_sums(launch: GemmLaunch, x: torch.Tensor, weight: GroupedWeight) -> torch.Tensor:
    """The sums of each stretch of the inputs, float32 ``[splits, rows, out_features]``; to be added in order."""
    sums = x.new_empty(launch.splits, len(x), weight.out_features, dtype=torch.float32)
    launch_gemm(_dequant_gemm_kernel, launch, x, weight, sums)
    return sums


def launch_gemm(
    kernel: Any, launch: GemmLaunch, x: torch.Tensor, weight: GroupedWeight, out: torch.Tensor, *more: object
) -> None:
    """Runs ``kernel``, which takes what :func:`gemm_tile` does, ``out`` in front, and ``more`` behind.

    Multiply-adds are fused where the kernel says so and nowhere else: kernels that do different things with a tile
    then get the same bits of it.
    """
    if x.stride(1) != 1:
        x = x.contiguous()
    rows, outputs = len(x), weight.out_features
    group_words = 0 if weight.word_groups is not None else len(weight.codes) // len(weight.scales)
    kernel[(triton.cdiv(rows, launch.rows), triton.cdiv(outputs, launch.outputs), launch.splits)](
        out, x, weight.codes, weight.scales, weight.zeros, weight.word_groups, weight.input_index,
        rows, outputs, len(weight.codes), x.stride(0),
        weight.bits, group_words, launch.rows, launch.outputs, launch.words, launch.splits, *more,
        num_warps=launch.num_warps, num_stages=launch.num_stages, enable_fp_fusion=False,
    )  # fmt: skip


@triton.jit
def _dequant_gemm_kernel(
    out, x, codes, scales, zeros, word_groups, input_index, rows, out_features, words, x_stride,
    bits: tl.constexpr, group_words: tl.constexpr,
    block_rows: tl.constexpr, block_outputs: tl.constexpr, block_words: tl.constexpr, splits: tl.constexpr,
):  # fmt: skip
    total, row, output = gemm_tile(
        x, codes, scales, zeros, word_groups, input_index, rows, out_features, words, x_stride,
        bits, group_words, block_rows, block_outputs, block_words, splits,
    )  # fmt: skip
    target = out + row.to(tl.int64)[:, None] * out_features + output[None, :]
    if splits > 1:
        target += tl.program_id(2).to(tl.int64) * rows * out_features
    exists = (row < rows)[:, None] & (output < out_features)[None, :]
    tl.store(target, round_to(total, out.dtype.element_ty), exists)


@triton.jit
def gemm_tile(
    x, codes, scales, zeros, word_groups, input_index, rows, out_features, words, x_stride,
    bits: tl.constexpr, group_words: tl.constexpr,
    block_rows: tl.constexpr, block_outputs: tl.constexpr, block_words: tl.constexpr, splits: tl.constexpr,
):  # fmt: skip
    """One tile of the result in float32, or of the sums of one of ``splits`` stretches of the inputs.

    ``group_words``: words of every group; 0: ``word_groups`` has the group of each word. ``zeros``, ``word_groups`` and
    ``input_index`` may be None.

    Returns (the tile ``[block_rows, block_outputs]``, anything where there is no row or output; its rows; its outputs).
    """
    codes_per_word: tl.constexpr = 32 // bits
    block_inputs: tl.constexpr = block_words * codes_per_word
    row = tl.program_id(0) * block_rows + tl.arange(0, block_rows)
    output = tl.program_id(1) * block_outputs + tl.arange(0, block_outputs)
    row_exists = (row < rows)[:, None]
    output_exists = output < out_features
    x_rows = x + row.to(tl.int64)[:, None] * x_stride
    places = tl.reshape(tl.arange(0, codes_per_word) * bits, (1, codes_per_word, 1))
    total = tl.zeros((block_rows, block_outputs), tl.float32)
    blocks = tl.cdiv(words, block_words)
    blocks_per_split = tl.cdiv(blocks, splits)
    first = tl.program_id(2) * blocks_per_split
    for block in range(first, tl.minimum(first + blocks_per_split, blocks)):
        word = block * block_words + tl.arange(0, block_words)
        place = block * block_inputs + tl.arange(0, block_inputs)
        place_exists = place < words * codes_per_word
        feature = place
        if input_index is not None:
            feature = tl.load(input_index + place, place_exists, 0)
        inputs = tl.load(x_rows + feature[None, :], row_exists & place_exists[None, :], 0.0)
        word_exists = (word < words)[:, None] & output_exists[None, :]
        packed = tl.load(codes + word.to(tl.int64)[:, None] * out_features + output[None, :], word_exists, 0)
        code = (tl.reshape(packed, (block_words, 1, block_outputs)) >> places) & (2**bits - 1)
        # The bits of 2**23 + code: no conversion instruction.
        code = (code | 0x4B000000).to(tl.float32, bitcast=True)
        if group_words > 0 and group_words % block_words == 0:
            # One group: its scales multiply the sums, which are fewer than the weights.
            group = block // (group_words // block_words) * out_features + output
            zero = tl.reshape(_load_zeros(zeros, group, output_exists, bits), (1, 1, block_outputs))
            weight = tl.reshape(code - (8388608.0 + zero), (block_inputs, block_outputs))
            scale = tl.load(scales + group, output_exists, 0.0).to(tl.float32)
            total = tl.fma(_dot(inputs, weight), tl.broadcast_to(scale[None, :], total.shape), total)
        else:
            word_group = word // group_words if group_words > 0 else tl.load(word_groups + word, word < words, 0)
            group = word_group[:, None] * out_features + output[None, :]
            weight = _scaled(code, scales, zeros, group, word_exists, bits)
            total += _dot(inputs, tl.reshape(weight, (block_inputs, block_outputs)))
    return total, row, output


def _dequantize_triton(weight: GroupedWeight, dtype: torch.dtype) -> torch.Tensor:
    """Twin of :func:`dequantize`, bit for bit."""
    words, outputs = weight.codes.shape
    dense = torch.empty(weight.rows, outputs, dtype=dtype, device=weight.codes.device)
    group_words = 0 if weight.word_groups is not None else words // len(weight.scales)
    with on_device_of(weight.codes):
        _dequantize_kernel[(triton.cdiv(words, 4), triton.cdiv(outputs, 256))](
            weight.codes, weight.scales, weight.zeros, weight.word_groups, dense, outputs, words,
            weight.bits, group_words, block_words=4, block_outputs=256, enable_fp_fusion=False,
        )  # fmt: skip
    return dense


@triton.jit
def _dequantize_kernel(
    codes, scales, zeros, word_groups, out, out_features, words,
    bits: tl.constexpr, group_words: tl.constexpr, block_words: tl.constexpr, block_outputs: tl.constexpr,
):  # fmt: skip
    word = tl.program_id(0) * block_words + tl.arange(0, block_words)
    output = tl.program_id(1) * block_outputs + tl.arange(0, block_outputs)
    exists = (word < words)[:, None] & (output < out_features)[None, :]
    packed = tl.load(codes + word.to(tl.int64)[:, None] * out_features + output[None, :], exists, 0)
    word_group = word // group_words if group_words > 0 else tl.load(word_groups + word, word < words, 0)
    group = word_group[:, None] * out_features + output[None, :]
    for slot in tl.static_range(32 // bits):
        code = (packed >> (slot * bits)) & (2**bits - 1)
        code = tl.reshape((code | 0x4B000000).to(tl.float32, bitcast=True), (block_words, 1, block_outputs))
        weight = tl.reshape(_scaled(code, scales, zeros, group, exists, bits), (block_words, block_outputs))
        row = word.to(tl.int64) * (32 // bits) + slot
        tl.store(out + row[:, None] * out_features + output[None, :], round_to(weight, out.dtype.element_ty), exists)


@triton.jit
def _scaled(code, scales, zeros, group, exists, bits: tl.constexpr):
    """float32 weights ``[words, slots, outputs]`` of 2**23 + codes; ``group``: of each word, ``[words, outputs]``."""
    zero = _load_zeros(zeros, group, exists, bits)
    scale = tl.load(scales + group, exists, 0.0).to(tl.float32)
    shape: tl.constexpr = (group.shape[0], 1, group.shape[1])
    return (code - (8388608.0 + tl.reshape(zero, shape))) * tl.reshape(scale, shape)


@triton.jit
def _load_zeros(zeros, group, exists, bits: tl.constexpr):
    if zeros is None:
        return tl.full(group.shape, 2 ** (bits - 1), tl.float32)
    else:
        return tl.load(zeros + group, exists, 0).to(tl.float32)


@triton.jit
def _dot(inputs, weight):
    """The product, in float32, of inputs and of weights rounded to their dtype."""
    rounded = round_to(weight, inputs.dtype)
    if INTERPRETED:
        # The interpreter multiplies bfloat16 wrongly.
        return tl.dot(inputs.to(tl.float32), rounded.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(inputs, rounded, input_precision="ieee")


@triton.jit
def _sum_splits_kernel(partials, out, count, splits: tl.constexpr, block: tl.constexpr):
    """out = the partials ``[splits, count]``, summed in order."""
    place = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    exists = place < count
    total = tl.load(partials + place, exists, 0.0)
    for split in tl.static_range(1, splits):
        total += tl.load(partials + tl.full((), split, tl.int64) * count + place, exists, 0.0)
    tl.store(out + place, round_to(total, out.dtype.element_ty), exists)
