"""Every kernel reads each byte of its inputs once and writes each byte of its output once, and touches no other."""

from contextlib import contextmanager

import numpy as np
import pytest
import torch
import triton
from kernel_cases import hard_values, pair
from triton.runtime.interpreter import InterpreterBuilder

from benchmarks.compile_report import fewest_bytes
from megacomp.kernels import reduce_norm
from megacomp.kernels.launch_config import launch_config

pytestmark = [
    pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="needs TRITON_INTERPRET=1"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

SPECS = ["mxfp4", "nvfp4", {"preset": "int4", "rotation": 128}, "int8", "int5", {"preset": "mxfp4", "scale": "e5m0"}]


class Accesses:
    """How often each byte was read and written: counted once per access of a program, whose lanes may share it."""

    def __init__(self):
        self.read, self.written = [], []

    def reads_of(self, tensor):
        return self._count(self.read, tensor)

    def writes_of(self, tensor):
        return self._count(self.written, tensor)

    @staticmethod
    def _count(accesses, tensor):
        counts = np.zeros(tensor.nbytes, dtype=int)
        for addresses in accesses:
            offsets = addresses - tensor.data_ptr()
            np.add.at(counts, offsets[(offsets >= 0) & (offsets < tensor.nbytes)], 1)
        return counts


def touched(pointers, mask):
    addresses = np.broadcast_to(pointers.data, mask.data.shape)[mask.data].astype(np.int64)
    width = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
    return (addresses[:, None] + np.arange(width)).ravel()


@contextmanager
def counted():
    accesses = Accesses()
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def counting_load(self, pointers, mask, *rest):
        accesses.read.append(np.unique(touched(pointers, mask)))
        return load(self, pointers, mask, *rest)

    def counting_store(self, pointers, value, mask, *rest):
        accesses.written.append(touched(pointers, mask))
        return store(self, pointers, value, mask, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "create_masked_load", counting_load)
        patch.setattr(InterpreterBuilder, "create_masked_store", counting_store)
        yield accesses


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("operation", ["encode", "decode_sum", "decode_sum_encode"])
def test_each_byte_moves_once(operation, spec):
    rows, features, peers = 2, 4096, 2
    definition, kernel = pair(spec)
    x = hard_values(rows, features, torch.bfloat16)
    wires = torch.stack([definition.encode(x), definition.encode(x.flip(0))])
    wire, total = torch.empty_like(wires[0]), torch.empty_like(x)
    with counted() as accesses:
        if operation == "encode":
            kernel.encode(x, out=wire)
        elif operation == "decode_sum":
            kernel.decode_sum(wires, features, x.dtype, out=total)
        else:
            kernel.decode_sum_encode(wires, features, kernel, out=wire)
    source = x if operation == "encode" else wires
    target = total if operation == "decode_sum" else wire

    writes = accesses.writes_of(target)
    assert (writes == 1).all()
    assert sum(map(len, accesses.written)) == target.nbytes
    reads = accesses.reads_of(source)
    assert sum(map(len, accesses.read)) == reads.sum()
    needed = np.ones_like(reads)
    if operation != "encode":
        layout = definition.format.layout(features)
        reads_of_rows, needed_of_rows = reads.reshape(peers * rows, -1), needed.reshape(peers * rows, -1)
        for start, stop in layout.padding:
            needed_of_rows[:, start:stop] = 0
        if layout.row_scale >= 0:  # read by every program that works on a part of the row
            row_scale = reads_of_rows[:, layout.row_scale : layout.row_scale + 4]
            tile = launch_config(operation, definition.format, layout, rows, x.dtype).tile
            assert row_scale.min() >= 1 and row_scale.max() <= max(1, layout.blocks // tile.blocks)
            row_scale[:] = 1
    assert (reads == needed).all()
    # What docs/performance.md and the compile report say is what was counted, padding that need not be read aside.
    fewest = fewest_bytes(operation, kernel, peers, features, x.dtype)
    assert (needed.size + target.nbytes) / x.numel() == fewest


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_the_norm_costs_no_second_look(spec):
    rows, features, peers = 3, 4096, 2
    definition, kernel = pair(spec)
    wires = torch.stack([definition.encode(torch.randn(rows, features)) for _ in range(peers)])
    residual, weight = torch.randn(rows, features, dtype=torch.bfloat16), torch.ones(features, dtype=torch.bfloat16)
    outputs = torch.empty_like(residual), torch.empty_like(residual)
    with counted() as accesses:
        reduce_norm(definition.format, wires, residual, weight, 1e-5, *outputs, kernel.backend)
    layout = definition.format.layout(features)
    needed = np.ones((peers * rows, layout.row_bytes), dtype=int)
    for start, stop in layout.padding:
        needed[:, start:stop] = 0
    assert (accesses.reads_of(wires).reshape(needed.shape) == needed).all()
    assert (accesses.reads_of(residual) == 1).all()
    # By each program, from the cache but for the first ones.
    tile = launch_config("reduce_norm", definition.format, layout, rows, torch.bfloat16).tile
    programs = tile.programs(layout, rows)
    assert (accesses.reads_of(weight) == programs).all()
    assert all((accesses.writes_of(output) == 1).all() for output in outputs)
    assert sum(map(len, accesses.written)) == sum(output.nbytes for output in outputs)
    moved = wires.nbytes + residual.nbytes + sum(output.nbytes for output in outputs)
    assert moved / residual.numel() == fewest_bytes("reduce_norm", kernel, peers, features, torch.bfloat16)
