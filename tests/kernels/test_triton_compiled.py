"""What the Triton kernels compile to, for GPUs that need not be there: no spills, wide accesses, nothing too large."""

import json

import pytest
from uninterpreted import printed

from benchmarks.compile_report import ARCHITECTURES, SHARED_MEMORY_LIMIT
from megacomp import codecs

OPERATIONS = [("encode", 1), ("decode_sum", 2), ("decode_sum_encode", 2), ("reduce_norm", 2)]
HOT = ["mxfp4", "nvfp4", "int8", json.dumps({"preset": "int4", "rotation": 128})]
HIDDEN = 4096
SHORT_LAST_ROTATION = 2880
SHORT_LAST_BLOCK = 2568

CASES = [
    *((*operation, spec, HIDDEN, sm) for operation in OPERATIONS for spec in HOT for sm in ARCHITECTURES),
    *((*operation, spec, SHORT_LAST_ROTATION, 90) for operation in OPERATIONS[:2] for spec in HOT),
    *((*operation, spec, SHORT_LAST_BLOCK, 90) for operation in OPERATIONS[:2] for spec in (HOT[0], HOT[3])),
    *(
        (*operation, spec, HIDDEN, 90)
        for operation in OPERATIONS[:1]
        for spec in (
            *(name for name in codecs.presets() if name not in HOT),
            json.dumps({"preset": "mxfp4", "scale": "e5m0"}),
            json.dumps({"format": "mx", "element": "int2", "block_size": 8}),
            json.dumps({"format": "int", "bits": 4, "block_size": 128, "scale": "fp16", "symmetric": False}),
        )
    ),
]
STATIC = [("encode", 1), ("decode_sum", 4)]
STATIC_CASES = [
    *(
        (*operation, spec, HIDDEN, sm)
        for operation in STATIC
        for spec in ("static4", "static4_paper")
        for sm in ARCHITECTURES
    ),
    *((*operation, "static4", features, 90) for operation in STATIC for features in (2568, 2880)),
    *((*operation, json.dumps({"preset": "static4", "bits": 3}), HIDDEN, 90) for operation in STATIC),
    ("encode", 1, "static4", 8192, 90),
]

COMPILE = """
import json, sys
from benchmarks.compile_report import Case, reports
cases = [Case(name, spec, peers, features, sm) for name, peers, spec, features, sm in json.load(sys.stdin)]
print(json.dumps(reports(cases)))
"""


@pytest.fixture(scope="module")
def kernels():
    """The report of every kernel of every case, from a process whose Triton compiles."""
    return printed(COMPILE, CASES + STATIC_CASES)


def named(kernel):
    return {name: kernel[name] for name in ("operation", "codec", "features", "architecture")}


def test_each_operation_is_one_kernel(kernels):
    assert len(kernels) == len(CASES) + len(STATIC_CASES)
    names = {f"{name}_kernel" for name, _ in OPERATIONS} | {f"static_{name}_kernel" for name, _ in STATIC}
    assert {kernel["kernel"] for kernel in kernels} == names


def test_nothing_spills(kernels):
    spilling = [named(kernel) for kernel in kernels if kernel["stack_bytes"] or kernel["local_accesses"]]
    assert not spilling


def test_shared_memory_is_within_the_chip(kernels):
    for kernel in kernels:
        assert kernel["shared_bytes"] <= SHARED_MEMORY_LIMIT[kernel["architecture"]], named(kernel)


def moved(accesses, least_width, kernel):
    """Bytes per value that accesses of at least this width can move."""
    wide = sum(count * int(width) for width, count in accesses.items() if int(width) >= least_width)
    return wide * kernel["threads_per_value"]


def test_values_and_codes_move_in_wide_accesses(kernels):
    hot = {codecs.get(json.loads(spec) if spec.startswith("{") else spec).name for spec in HOT}
    kernels = [kernel for kernel in kernels if kernel["codec"] in hot]
    assert len(kernels) == len(ARCHITECTURES) * len(HOT) * len(OPERATIONS) + 2 * (len(HOT) + 2)
    for kernel in kernels:
        name, _, rotation = kernel["codec"].partition("+rotation")
        codec = codecs.get({"preset": name, "rotation": int(rotation) if rotation else None})
        code_bytes = codec.format.element.bits / 8
        # A block of 16 nibbles has no more than 8 bytes; rows are multiples of 8 bytes, and of 16 where they can be.
        whole = codec.row_bytes(kernel["features"]) % 16 == 0 and codec.format.block_size * code_bytes >= 16
        width = 16 if whole else 8
        # Triton knows of strides that divide by 16 and of no others.
        value_width = 16 if kernel["features"] % 16 == 0 else 1
        reads, writes = kernel["loads"], kernel["stores"]
        if kernel["operation"] == "reduce_norm":
            # The residual and the norm's weight besides the wires.
            assert moved(reads, width, kernel) >= kernel["peers"] * code_bytes + (4 if value_width >= width else 0)
            assert moved(reads, value_width, kernel) >= 4, named(kernel)
            assert moved(writes, value_width, kernel) >= 4, named(kernel)
            continue
        if kernel["operation"] == "encode":
            assert moved(reads, value_width, kernel) >= 2, named(kernel)
        else:
            assert moved(reads, width, kernel) >= kernel["peers"] * code_bytes, named(kernel)
        if kernel["operation"] == "decode_sum":
            assert moved(writes, value_width, kernel) >= 2, named(kernel)
        else:
            assert moved(writes, width, kernel) >= code_bytes, named(kernel)


def test_static_codecs_move_values_and_codes_in_wide_accesses(kernels):
    kernels = [kernel for kernel in kernels if kernel["kernel"].startswith("static") and kernel["features"] == HIDDEN]
    kernels = [kernel for kernel in kernels if kernel["codec"] in ("static4", "static4_paper")]
    assert len(kernels) == len(STATIC) * 2 * len(ARCHITECTURES)
    for kernel in kernels:
        reads, writes = kernel["loads"], kernel["stores"]
        if kernel["operation"] == "encode":
            assert moved(reads, 16, kernel) >= 2, named(kernel)
            assert moved(writes, 8, kernel) >= 0.5, named(kernel)
        else:
            assert moved(reads, 8, kernel) >= kernel["peers"] * 0.5, named(kernel)
            assert moved(writes, 16, kernel) >= 2, named(kernel)
            # Between what all threads write and the outliers that go over it.
            assert kernel["barriers"], named(kernel)
