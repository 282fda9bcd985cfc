"""Multiplying by grouped weights: every backend against the dense matrix in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import quantized_models as models
import torch

from megacomp.gptq import QuantizedLinear, ordering
from megacomp.gptq.shards import LinearShard
from megacomp.kernels import dequant_gemm as kernel
from megacomp.kernels.compiled import compiler_problem
from megacomp.kernels.dequant_gemm import Int4Pack, dequant_gemm, dequant_gemm_definition, resolve_gemm_backend
from megacomp.kernels.grouped_weight import GroupedWeight, dequantize, pack_codes, unpack_codes

IN, OUT = 256, 64


def _weight(
    bits: int = 4, group_size: int = 32, symmetric: bool = False, start: int = 0, in_features: int = IN
) -> tuple[GroupedWeight, torch.Tensor]:
    """A weight of the input features from `start` on, and its dense equivalent in float64."""
    one = models.linear(in_features, OUT, bits=bits, group_size=group_size, symmetric=symmetric)
    given = torch.arange(start, in_features)
    rows = ordering.arrange(one.g_idx, given, 32 // bits)
    weight = ordering.group_weight(
        one.codes[rows.inputs].to(torch.uint8),
        one.scales[rows.groups],
        one.zeros[rows.groups].to(torch.uint8),
        bits,
        rows,
    )
    return weight, one.dense()[start:].double()


def _x(rows: int, features: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(rows, features, generator=torch.Generator().manual_seed(1)).to(dtype)


def _sqnr_db(expected: torch.Tensor, got: torch.Tensor) -> float:
    return 20 * torch.log10(expected.norm() / (got.double() - expected).norm()).item()


@pytest.mark.parametrize("bits", [4, 8])
def test_packing_is_reversible(bits: int) -> None:
    codes = torch.randint(2**bits, (64, 10), dtype=torch.uint8)
    assert torch.equal(unpack_codes(pack_codes(codes, bits), bits), codes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["reference", "compiled", "auto", "triton"])
@pytest.mark.parametrize("start", [0, 60], ids=["equal groups", "unequal groups"])
def test_backends_equal_the_dense_product(dtype: torch.dtype, backend: str, start: int) -> None:
    if backend == "compiled" and (problem := compiler_problem()):
        pytest.skip(problem)
    weight, dense = _weight(start=start)
    assert (weight.word_groups is None) is (start == 0)
    for rows in (1, 5, 100):
        x = _x(rows, len(dense), dtype)
        y = dequant_gemm(x, weight, backend)
        assert y.dtype == dtype and y.shape == (rows, OUT)
        # float32 sums; bf16 and fp16 weights and results besides, 8 and 11 bits.
        floor = {torch.float32: 110, torch.bfloat16: 48, torch.float16: 64}[dtype]
        assert _sqnr_db(x.double() @ dense, y) > floor


@pytest.mark.parametrize(("bits", "group_size", "symmetric"), [(4, -1, False), (8, 64, True), (8, 32, False)])
def test_compiled_dequantization_is_the_definition(bits: int, group_size: int, symmetric: bool) -> None:
    if problem := compiler_problem():
        pytest.skip(problem)
    weight, _ = _weight(bits, group_size, symmetric)
    # A product with the identity shows the weights themselves, bit for bit.
    x = torch.eye(IN)
    assert torch.equal(dequant_gemm(x, weight, "compiled"), dequant_gemm_definition(x, weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("start", [0, 60], ids=["equal groups", "unequal groups"])
def test_many_rows_multiply_weights_that_the_kernel_dequantizes(dtype: torch.dtype, start: int) -> None:
    for bits, symmetric in ((4, False), (8, True)):
        weight, _ = _weight(bits, symmetric=symmetric, start=start)
        # A product with the identity shows the weights themselves, bit for bit.
        eye = torch.eye(weight.rows, IN - start, dtype=dtype)
        eye = torch.cat([eye, eye.new_zeros(kernel.TRITON_MAX_ROWS, IN - start)])
        y = dequant_gemm(eye, weight, "triton")
        gathered = eye if weight.input_index is None else eye[:, weight.input_index]
        assert torch.equal(y, (gathered.float() @ dequantize(weight, dtype).float()).to(dtype))


@pytest.mark.parametrize(
    ("bits", "group_size", "symmetric"), [(4, 32, True), (4, 128, False), (8, 64, False), (4, -1, True)]
)
@pytest.mark.parametrize("rows", [1, 16, 17])
def test_split_inputs_of_the_triton_kernel_are_summed(
    bits: int, group_size: int, symmetric: bool, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, dense = _weight(bits, group_size, symmetric, in_features=1024)
    launch = kernel.guess_gemm(rows, weight, processors=64)
    assert (launch.splits > 1) is (rows <= 16)
    monkeypatch.setattr(kernel, "gpu_processors", lambda gpu: 64)
    x = _x(rows, 1024, torch.float32)
    y = dequant_gemm(x, weight, "triton")
    assert _sqnr_db(x.double() @ dense, y) > 110
    assert torch.equal(dequant_gemm(x, weight, "triton"), y)


@pytest.mark.parametrize(("group_size", "symmetric"), [(32, False), (64, True), (128, False)])
@pytest.mark.parametrize("rows", [1, 16, 64])
def test_pytorchs_int4_gemm(group_size: int, symmetric: bool, rows: int) -> None:
    weight, dense = _weight(group_size=group_size, symmetric=symmetric)
    x = _x(rows, IN, torch.bfloat16)
    cache = Int4Pack()
    assert resolve_gemm_backend("auto", x, weight, cache) == "int4pack"
    assert _sqnr_db(x.double() @ dense, dequant_gemm(x, weight, int4pack=cache)) > 40


def test_who_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, _ = _weight()
    uneven, _ = _weight(start=60)
    cache = Int4Pack()
    x = _x(4, IN, torch.bfloat16)
    many = _x(kernel.INT4PACK_MAX_ROWS + 1, IN, torch.bfloat16)
    assert resolve_gemm_backend("auto", x, weight, None) == "reference"
    assert resolve_gemm_backend("auto", x, uneven, cache) == "reference"
    assert resolve_gemm_backend("auto", x.float(), weight, cache) == "reference"
    assert resolve_gemm_backend("auto", many, weight, cache) == "reference"
    assert resolve_gemm_backend("reference", x, weight, cache) == "reference"
    monkeypatch.setattr(kernel, "COMPILED_MIN_VALUES", 0)
    monkeypatch.setattr(kernel, "compiler_problem", lambda: None)
    assert resolve_gemm_backend("auto", many, weight, cache) == "compiled"
    assert resolve_gemm_backend("auto", x.to("meta"), weight, cache) == "dense"
    monkeypatch.setattr(kernel, "compiler_problem", lambda: "no compiler")
    assert resolve_gemm_backend("auto", many, weight, cache) == "reference"
    with pytest.raises(RuntimeError, match='backend "compiled": no compiler'):
        resolve_gemm_backend("compiled", many, weight, cache)


@pytest.mark.parametrize("backend", ["reference", "compiled"])
def test_the_default_device_of_torch_plays_no_part(backend: str) -> None:
    if backend == "compiled" and (problem := compiler_problem()):
        pytest.skip(problem)
    weight, _ = _weight(start=60)
    x = _x(5, IN - 60, torch.float32)
    with torch.device("meta"):
        product = dequant_gemm(x, weight, backend)
    assert torch.equal(product, dequant_gemm(x, weight, backend))


def test_rows_that_fill_up_words_are_zero() -> None:
    weight, dense = _weight(start=60)
    assert weight.rows > len(dense) and weight.input_index is not None
    x = torch.eye(len(dense))
    assert torch.equal(dequant_gemm_definition(x, weight), dense.float())


def test_the_module_keeps_its_weights_whatever_dtype_the_model_is_cast_to() -> None:
    weight, _ = _weight()
    linear = QuantizedLinear(LinearShard(weight, None, IN, OUT, "local"), Path("somewhere"))
    before = dequantize(linear.grouped_weight)
    assert linear.bfloat16() is linear and linear.double() is linear
    assert linear.scales.dtype == torch.float16 and torch.equal(dequantize(linear.grouped_weight), before)
    assert linear.to("meta").codes.is_meta
    stored = sum(buffer.nbytes for buffer in linear.buffers())
    assert stored < 0.85 * IN * OUT  # packed: half a byte, and scales, zeros and index
    assert "bits=4" in repr(linear) and "order=local" in repr(linear)


def test_the_module_takes_any_leading_dimensions() -> None:
    weight, _ = _weight()
    linear = QuantizedLinear(LinearShard(weight, None, IN, OUT, "local"), Path("somewhere"))
    x = _x(6, IN, torch.float32)
    assert torch.equal(linear(x.view(2, 3, IN)), linear(x).view(2, 3, OUT))
    assert linear(x[0]).shape == (OUT,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_the_module_gives_has_the_dtype_of_its_input_whatever_that_of_its_bias(dtype: torch.dtype) -> None:
    weight, _ = _weight()
    bias = torch.arange(OUT, dtype=torch.float32)
    plain, biased = (
        QuantizedLinear(LinearShard(weight, own, IN, OUT, "local"), Path("somewhere")) for own in (None, bias)
    )
    x = _x(6, IN, dtype)
    y = biased(x)
    assert y.dtype == dtype and torch.equal(y, plain(x) + bias.to(dtype))
