"""What the GEMM of grouped weights compiles to, for GPUs that need not be there."""

import pytest
from uninterpreted import printed

COMPILE = """
import functools, itertools, json
from unittest.mock import patch
import torch
from benchmarks.compile_report import ARCHITECTURES, SHARED_MEMORY_LIMIT, captured_launches, resources
from megacomp import codecs
from megacomp.kernels.dequant_gemm import dequant_gemm
from megacomp.kernels.dequant_gemm_encode import dequant_gemm_encode
from megacomp.kernels.grouped_weight import GroupedWeight

def empty(*shape, dtype=torch.int32):
    return torch.empty(shape, dtype=dtype, device="meta")

inputs, outputs = 8192, 3584
resources_of = functools.cache(resources)  # cases share kernels
kernels = []
cases = [*itertools.product(ARCHITECTURES, (1, 16, 64, 4096), (True,), (None, "mxfp4", "int8"))]
cases += itertools.product((90,), (1, 64, 4096), (False,), (None, "mxfp4"))
for architecture, rows, ordered, codec in cases:
    groups = inputs // 128
    weight = GroupedWeight(
        empty(inputs // 8, outputs),
        empty(groups, outputs, dtype=torch.float16),
        empty(groups, outputs, dtype=torch.uint8),
        bits=4,
        word_groups=None if ordered else empty(inputs // 8),
        input_index=None if ordered else empty(inputs),
    )
    with captured_launches(architecture) as launches, patch(
        "megacomp.kernels.dequant_gemm.gpu_processors", return_value=132
    ):
        x = empty(rows, inputs, dtype=torch.bfloat16)
        if codec is None:
            dequant_gemm(x, weight, "triton")
        else:
            format = codecs.get(codec).format
            wire = empty(rows, format.row_bytes(outputs), dtype=torch.uint8)
            dequant_gemm_encode(format, x, weight, wire, "triton", "triton")
    for launch in launches:
        case = {"architecture": architecture, "rows": rows, "ordered": ordered, "codec": codec}
        matrix_instructions = any(name in launch.kernel.asm["ptx"] for name in ("mma.sync", "wgmma", "tcgen05.mma"))
        limit = SHARED_MEMORY_LIMIT[architecture]
        kernels.append(
            {**case, **resources_of(launch.kernel), "limit": limit, "matrix_instructions": matrix_instructions}
        )
print(json.dumps(kernels))
"""


@pytest.fixture(scope="module")
def kernels():
    """Every kernel of an 8192 x 3584 weight (an eighth of Llama-70B's gate), from a process whose Triton compiles."""
    return printed(COMPILE)


def names(kernels, rows, codec):
    """Of the kernels for so many rows on sm_90, in the order of their launches."""
    return [
        kernel["kernel"]
        for kernel in kernels
        if (kernel["rows"], kernel["codec"], kernel["architecture"], kernel["ordered"]) == (rows, codec, 90, True)
    ]


def test_few_rows_are_summed_in_two_steps_and_many_in_one(kernels):
    for rows in (1, 16):
        assert names(kernels, rows, None) == ["dequant_gemm_kernel", "sum_splits_kernel"]
    assert names(kernels, 64, None) == ["dequant_gemm_kernel"]
    assert names(kernels, 4096, None) == ["dequantize_kernel"]  # and cuBLAS


@pytest.mark.parametrize("codec", ["mxfp4", "int8"])
def test_encoding_adds_no_kernel_up_to_the_rows_that_cublas_multiplies(kernels, codec):
    for rows in (1, 16):
        assert names(kernels, rows, codec) == ["dequant_gemm_kernel", "sum_splits_encode_kernel"]
    assert names(kernels, 64, codec) == ["dequant_gemm_encode_kernel"]
    assert names(kernels, 4096, codec) == ["dequantize_kernel", "encode_kernel"]


def test_nothing_spills_and_shared_memory_suffices(kernels):
    for kernel in kernels:
        assert kernel["stack_bytes"] == kernel["local_accesses"] == 0, kernel
        assert kernel["shared_bytes"] <= kernel["limit"], kernel


def test_tensor_cores_multiply(kernels):
    products = [kernel for kernel in kernels if kernel["kernel"].startswith("dequant_gemm")]
    # For 1, 16 and 64 rows in order, for 1 and 64 in none.
    assert len(products) == 3 * 3 * 3 + 2 * 2
    assert all(kernel["matrix_instructions"] for kernel in products)
