"""What the GEMM of grouped weights compiles to, for GPUs that need not be there."""

import pytest
from uninterpreted import printed

COMPILE = """
import itertools, json
from unittest.mock import patch
import torch
from benchmarks.compile_report import ARCHITECTURES, SHARED_MEMORY_LIMIT, captured_launches, resources
from megacomp.kernels.dequant_gemm import dequant_gemm
from megacomp.kernels.grouped_weight import GroupedWeight

def empty(*shape, dtype=torch.int32):
    return torch.empty(shape, dtype=dtype, device="meta")

inputs, outputs = 8192, 3584
kernels = []
cases = [*itertools.product(ARCHITECTURES, (1, 16, 64, 4096), (True,))]
cases += itertools.product((90,), (1, 64, 4096), (False,))
for architecture, rows, ordered in cases:
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
        dequant_gemm(empty(rows, inputs, dtype=torch.bfloat16), weight, "triton")
    for launch in launches:
        case = {"architecture": architecture, "rows": rows, "ordered": ordered}
        matrix_instructions = any(name in launch.kernel.asm["ptx"] for name in ("mma.sync", "wgmma", "tcgen05.mma"))
        limit = SHARED_MEMORY_LIMIT[architecture]
        kernels.append(
            {**case, **resources(launch.kernel), "limit": limit, "matrix_instructions": matrix_instructions}
        )
print(json.dumps(kernels))
"""


@pytest.fixture(scope="module")
def kernels():
    """Every kernel of an 8192 x 3584 weight (an eighth of Llama-70B's gate), from a process whose Triton compiles."""
    return printed(COMPILE)


def test_few_rows_are_summed_in_two_steps_and_many_in_one(kernels):
    steps = {rows: sum(kernel["rows"] == rows for kernel in kernels) for rows in (1, 16, 64, 4096)}
    assert steps == {1: 8, 16: 6, 64: 4, 4096: 4}


def test_nothing_spills_and_shared_memory_suffices(kernels):
    for kernel in kernels:
        assert kernel["stack_bytes"] == kernel["local_accesses"] == 0, kernel
        assert kernel["shared_bytes"] <= kernel["limit"], kernel


def test_tensor_cores_multiply(kernels):
    products = [kernel for kernel in kernels if kernel["kernel"].startswith("dequant_gemm")]
    assert len(products) == 11
    assert all(kernel["matrix_instructions"] for kernel in products)
