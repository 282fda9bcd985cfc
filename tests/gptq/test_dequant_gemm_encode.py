"""The product of a grouped weight, encoded where it is computed: the bits of dequant_gemm and then encode."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton

from benchmarks.gpu_gemm import random_weight
from megacomp import codecs
from megacomp.codecs import BlockCodec
from megacomp.kernels import dequant_gemm as gemm
from megacomp.kernels import dequant_gemm_encode as kernel
from megacomp.kernels.dequant_gemm import dequant_gemm
from megacomp.kernels.dequant_gemm_encode import dequant_gemm_encode, encodes_products

pytestmark = [
    pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="needs TRITON_INTERPRET=1"),
    # The interpreter computes with numpy, which warns of NaN and Inf.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

IN = 512
BLOCKS = [
    *("mxfp4", "int8", "mxfp6_e2m3", "mxfp8_e4m3", "mxint8"),
    {"format": "mx", "element": "fp3_e2m0", "block_size": 8, "scale": "bf16", "scale_search": True},
    {"format": "int", "bits": 4, "block_size": 64, "scale": "fp16", "symmetric": False},
    {"format": "mx", "element": "int5", "block_size": 64},
]
WHOLE_ROWS = ["int4", {"preset": "mxfp4", "scale": "e5m0"}]
OTHERS = [*WHOLE_ROWS, {"preset": "mxfp4", "rotation": 32}, {"format": "mx", "element": "int4", "block_size": 128}]


def block_codec(spec: Any, backend: str = "triton") -> BlockCodec:
    codec = codecs.get(spec, backend=backend)
    assert isinstance(codec, BlockCodec)
    return codec


def encoded_twice(
    spec: Any, x: torch.Tensor, outputs: int, backend: str = "triton", **weight: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """(in one step, in two)."""
    one = random_weight(IN, outputs, weight.pop("order", "sorted"), torch.Generator().manual_seed(1), **weight)
    codec = block_codec(spec, backend)
    expected = codec.encode(dequant_gemm(x, one, backend))
    wire = torch.full_like(expected, 0xA5)
    dequant_gemm_encode(codec.format, x, one, wire, backend, backend)
    return wire, expected


def random_x(rows: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(rows, IN, generator=torch.Generator().manual_seed(rows)).to(dtype)


@pytest.fixture(params=[1, 64], ids=["whole", "split"])
def processors(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Of the GPU there might be: with many, the inputs of few rows are split."""
    monkeypatch.setattr(gemm, "gpu_processors", lambda gpu: request.param)
    return request.param


@pytest.fixture
def one_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Encoding a product that is there is an error."""

    def encode(*arguments: object) -> None:
        raise AssertionError("two steps")

    monkeypatch.setattr(kernel, "encode", encode)


@pytest.mark.parametrize("spec", BLOCKS, ids=str)
@pytest.mark.parametrize("outputs", [128, 72], ids=["whole blocks", "short last block"])
@pytest.mark.parametrize("rows", [1, 17])
@pytest.mark.usefixtures("processors", "one_step")
def test_one_step_equals_two(spec: Any, outputs: int, rows: int) -> None:
    wire, expected = encoded_twice(spec, random_x(rows), outputs)
    assert torch.equal(wire, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("order", ["sorted", "gathered", "unequal"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.usefixtures("processors", "one_step")
def test_whatever_the_weight_and_the_dtype(dtype: torch.dtype, order: str, bits: int) -> None:
    wire, expected = encoded_twice("mxfp4", random_x(16, dtype), 128, order=order, bits=bits, ranks=2)
    assert torch.equal(wire, expected)


def test_few_rows_on_many_processors_are_split() -> None:
    weight = random_weight(IN, 128, "sorted", torch.Generator().manual_seed(1))
    assert [gemm.guess_gemm(rows, weight, 64).splits > 1 for rows in (1, 16, 17)] == [True, True, False]


@pytest.mark.parametrize("spec", ["mxfp4", "int8"])
@pytest.mark.usefixtures("processors", "one_step")
def test_nan_and_inf_of_the_inputs_arrive(spec: str) -> None:
    x = random_x(3, torch.float32)
    x[0, 5], x[2, 9] = torch.nan, torch.inf
    wire, expected = encoded_twice(spec, x, 72)
    assert torch.equal(wire, expected)
    values = block_codec(spec).decode(wire, 72, torch.float32)
    assert values[0].isnan().all() and values[2].isnan().any() and values[1].isfinite().all()


@pytest.mark.usefixtures("processors", "one_step")
def test_a_product_that_the_dtype_cannot_hold_is_rounded_first() -> None:
    # Beyond fp16 it is infinite, as it is in two steps; in float32 it would be a number.
    x = torch.full((2, IN), 60000.0, dtype=torch.float16)
    wire, expected = encoded_twice("int8", x, 64, symmetric=True)
    assert torch.equal(wire, expected)
    assert block_codec("int8").decode(wire, 64, torch.float32).isnan().any()


@pytest.mark.usefixtures("processors", "one_step")
def test_any_strides_of_inputs_and_wires() -> None:
    codec = block_codec("mxfp4")
    weight = random_weight(IN, 64, "sorted", torch.Generator().manual_seed(1))
    x = random_x(2 * IN).t()[:, :IN].contiguous().t()[:5]
    assert x.stride(1) != 1
    wire = torch.zeros(5, 2 * codec.row_bytes(64), dtype=torch.uint8)[:, : codec.row_bytes(64)]
    dequant_gemm_encode(codec.format, x, weight, wire, "triton", "triton")
    assert torch.equal(wire, codec.encode(dequant_gemm(x.contiguous(), weight, "triton")))


@pytest.mark.parametrize("spec", OTHERS, ids=str)
def test_formats_whose_blocks_are_not_in_a_tile_take_two_steps(spec: Any, processors: int) -> None:
    assert not encodes_products(block_codec(spec).format)
    wire, expected = encoded_twice(spec, random_x(3), 256)
    assert torch.equal(wire, expected)


def test_what_no_triton_kernel_multiplies_or_encodes_takes_two_steps() -> None:
    for spec in BLOCKS:
        assert encodes_products(block_codec(spec).format)
    for rows, backend in ((gemm.TRITON_MAX_ROWS + 1, "triton"), (3, "reference"), (0, "triton")):
        wire, expected = encoded_twice("int8", random_x(rows), 64, backend)
        assert torch.equal(wire, expected)
    # Who encodes and who multiplies is asked for apart.
    weight, x = random_weight(IN, 64, "sorted", torch.Generator().manual_seed(1)), random_x(3)
    codec = block_codec("int8")
    for backends in (("triton", "reference"), ("reference", "triton")):
        wire = torch.zeros(3, codec.row_bytes(64), dtype=torch.uint8)
        dequant_gemm_encode(codec.format, x, weight, wire, *backends)
        assert torch.equal(wire, codec.encode(dequant_gemm(x, weight, backends[1])))
