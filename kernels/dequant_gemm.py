"""dequant_gemm: activations ``[rows, in_features]`` times a :class:`GroupedWeight` -> ``[rows, out_features]``."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megacomp.kernels.compiled import compiled, compiler_problem, isolated
from megacomp.kernels.grouped_weight import GroupedWeight, dequantize, group_floats, unpack_codes

__all__ = ["Int4Pack", "dequant_gemm", "dequant_gemm_definition", "resolve_gemm_backend"]

INT4PACK_MAX_ROWS = 64
"""Up to here PyTorch's int4 GEMM is the faster one. Measured on one thread of an AMD EPYC with AVX-512, bf16,
4096 x 4096: it takes 0.4 ms for 1 row, 2.9 for 16, 11 for 64, 90 for 512; dequantizing first 12, 13, 16 and 46 ms."""

INT4PACK_GROUP_SIZES = (32, 64, 128, 256)

COMPILED_MIN_VALUES = 2**20
"""Smaller weights are dequantized eagerly in a few milliseconds; compiling takes seconds for each shape."""

VALUES_PER_SLICE = 2**20
"""Weights that are dequantized at a time."""


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
    """What multiplies: ``"reference"``, ``"dense"`` (dequantize, then the device's own GEMM), ``"compiled"`` (the same
    with a compiled dequantization) or ``"int4pack"`` (PyTorch's int4 GEMM for CPUs).

    Raises:
        RuntimeError: ``compiled`` was asked for and there is no compiler.
    """
    if backend == "reference":
        return "reference"
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
        buffer = torch.empty(weight.rows * outputs, dtype=dtype)
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
