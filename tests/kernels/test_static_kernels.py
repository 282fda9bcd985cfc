"""Static codecs: every backend, and a numpy of its own, give the same wires and sums bit for bit."""

from __future__ import annotations

import importlib
from typing import Any
from unittest import mock

import numpy as np
import pytest
import static_reference
import torch
import triton
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import DTYPES, KINDS, hard_values, same_bits
from static_cases import tables

from megacomp import codecs
from megacomp.kernels import StaticFormat, StaticTables, static_decode_sum, static_encode
from megacomp.kernels.compiled import compiler_problem
from megacomp.kernels.launch_config import LONGEST_ROW, launch_problem

# The interpreter computes with numpy, which warns of the overflows that the inputs are made for.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

interpreted = pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="needs TRITON_INTERPRET=1")
CPU = torch.device("cpu")

FORMATS = {
    "static4": StaticFormat(4, 0.0125, row_scale=True, asymmetric=True),
    "static4_paper": StaticFormat(4, 1 / 64),
    "2 bits, no outlier": StaticFormat(2, 0, row_scale=True),
    "3 bits, one outlier": StaticFormat(3, 1, row_scale=True, asymmetric=True),
    "5 bits, most are outliers": StaticFormat(5, 0.7, asymmetric=True),
    "6 bits": StaticFormat(6, 3, row_scale=True, asymmetric=True),
    "8 bits": StaticFormat(8, 2, row_scale=True),
}
SHAPES = [(1, torch.float32), (7, torch.bfloat16), (33, torch.float16), (64, torch.bfloat16)]


def encoded(format: StaticFormat, known: StaticTables, x: torch.Tensor, backend: str, rank: int = 0) -> torch.Tensor:
    dirty = torch.full((len(x), format.row_bytes(x.shape[1])), 0xA5, dtype=torch.uint8)
    static_encode(format, known, rank, x, dirty, backend)
    return dirty


def summed(
    format: StaticFormat, known: StaticTables, wires: torch.Tensor, dtype: torch.dtype, backend: str
) -> torch.Tensor:
    dirty = torch.full((wires.shape[1], known.features), -7.0, dtype=dtype)
    static_decode_sum(format, known, wires, dirty, backend)
    return dirty


def numbers(format: StaticFormat, known: StaticTables, rank: int) -> static_reference.Numbers:
    scale, offset, weight = (
        None if table is None else table[rank].numpy() for table in (known.scale, known.offset, known.weight)
    )
    assert scale is not None
    return static_reference.Numbers(format.bits, scale, offset, weight, known.kept.numpy())


def assert_all_agree(
    format: StaticFormat, known: StaticTables, partials: list[torch.Tensor], out_dtype: torch.dtype, *backends: str
) -> None:
    """The wires of the ranks' ``partials`` and their sum: the same from numpy and every backend."""
    wires, total = [], np.float32(0)
    with np.errstate(all="ignore"):
        for rank, x in enumerate(partials):
            wire = static_reference.encode(x.float().numpy(), numbers(format, known, rank))
            wires.append(torch.from_numpy(wire))
            total = static_reference.decode(wire, numbers(format, known, rank)) + (total if rank else np.float32(-0.0))
            for backend in backends:
                assert torch.equal(encoded(format, known, x, backend, rank), wires[rank]), backend
    expected = torch.from_numpy(total).to(out_dtype)
    for backend in backends:
        assert same_bits(summed(format, known, torch.stack(wires), out_dtype, backend), expected), backend


@interpreted
@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
def test_every_format_on_every_kind_of_row(format: StaticFormat) -> None:
    for features, dtype, rows in ((250, torch.bfloat16, KINDS + 1), *((*shape, 2) for shape in SHAPES)):
        if format.outliers(features) <= features:
            partials = [hard_values(rows, features, dtype, seed) for seed in (0, 5)]
            assert_all_agree(format, tables(format, features, 2), partials, dtype, "reference", "triton")


@interpreted
@settings(max_examples=12)
@given(
    bits=st.integers(2, 8),
    outliers=st.sampled_from([0, 1, 5, 0.0125, 0.3, 0.99]),
    row_scale=st.booleans(),
    asymmetric=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    out_dtype=st.sampled_from(DTYPES),
    peers=st.integers(1, 3),
    rows=st.integers(1, 3),
    features=st.one_of(st.sampled_from([8, 32, 128, 256]), st.integers(5, 200)),
    seed=st.integers(0, 2**16),
)
def test_any_format_shape_and_dtype(
    bits: int,
    outliers: float,
    row_scale: bool,
    asymmetric: bool,
    dtype: torch.dtype,
    out_dtype: torch.dtype,
    peers: int,
    rows: int,
    features: int,
    seed: int,
) -> None:
    format = StaticFormat(bits, outliers, row_scale, asymmetric)
    partials = [hard_values(rows, features, dtype, seed + peer) for peer in range(peers)]
    assert_all_agree(format, tables(format, features, peers, seed), partials, out_dtype, "reference", "triton")


@interpreted
@pytest.mark.parametrize("name", ["static4", "static4_paper"])
def test_the_hidden_size_of_a_model(name: str) -> None:
    format, features = FORMATS[name], 4096
    partials = [hard_values(3, features, torch.bfloat16, seed) for seed in (5, 1)]
    assert_all_agree(format, tables(format, features, 2), partials, torch.bfloat16, "reference", "triton")


@pytest.mark.skipif(compiler_problem() is not None, reason="needs a C++ compiler")
@pytest.mark.parametrize(
    ("name", "features", "dtype"),
    [
        ("static4", 250, torch.bfloat16),
        ("static4_paper", 128, torch.float32),
    ],
)
def test_compiled_equals_the_definition(name: str, features: int, dtype: torch.dtype) -> None:
    format = FORMATS[name]
    known = tables(format, features, 2)
    partials = [hard_values(4 * KINDS + 1, features, dtype, seed) for seed in (0, 5)]
    assert_all_agree(format, known, partials, dtype, "reference", "compiled")
    assert_all_agree(format, known, [x[1:3] for x in partials], dtype, "compiled")
    assert_all_agree(format, known, [x[8:9] for x in partials], dtype, "compiled")
    # Past the slices of one call.
    rows = 2 * 2**20 // features + 3
    large = torch.randn(rows, features, generator=torch.Generator().manual_seed(0)).to(dtype)
    wires = torch.stack([encoded(format, known, large, "compiled", rank) for rank in range(2)])
    ends = torch.tensor([0, 1, rows // 2 - 1, rows // 2, rows - 1])
    assert_all_agree(format, known, [large[ends]] * 2, dtype, "reference")
    assert torch.equal(wires[1, ends], encoded(format, known, large[ends], "reference", 1))
    total = summed(format, known, wires, dtype, "compiled")
    assert same_bits(total[ends], summed(format, known, wires[:, ends], dtype, "reference"))


@interpreted
def test_programs_of_few_rows_and_parts_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU with many processors, and with hidden sizes that one program does not hold."""
    encoding, decoding = (
        importlib.import_module(f"megacomp.kernels.static_{name}") for name in ("encode", "decode_sum")
    )
    format = StaticFormat(4, 70, row_scale=True, asymmetric=True)  # more outliers than a warp has threads
    features = 100
    known, partials = tables(format, features, 2), [hard_values(3, features, torch.bfloat16, seed) for seed in (0, 5)]
    for processors, most in ((1, 8192), (100, 8192), (1, 32), (100, 16)):
        monkeypatch.setattr(encoding, "gpu_processors", lambda gpu, processors=processors: processors)
        monkeypatch.setattr(encoding, "MOST_VALUES", most)
        monkeypatch.setattr(decoding, "MOST_VALUES", most)
        assert_all_agree(format, known, partials, torch.bfloat16, "triton")


@interpreted
@pytest.mark.parametrize("name", ["static4", "static4_paper"])
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_tensors_of_any_strides(name: str, backend: str) -> None:
    format, features, rows, dtype = FORMATS[name], 104, 5, torch.bfloat16
    known, x = tables(format, features, 2), hard_values(rows, features, torch.bfloat16)
    size = format.row_bytes(features)
    wire = encoded(format, known, x, "reference")
    every_other_row = torch.full((2 * rows, features), 9.0, dtype=dtype)[::2]
    columns_of_many = torch.full((rows, 3 * features), 9.0, dtype=dtype)[:, features : 2 * features]
    column_major = torch.empty(features, rows, dtype=dtype).t()
    every_other_column = torch.empty(rows, 2 * features, dtype=dtype)[:, ::2]
    views = (every_other_row, columns_of_many, column_major, every_other_column)
    for view in views:
        view.copy_(x)
        assert torch.equal(encoded(format, known, view, backend), wire)
    assert torch.equal(encoded(format, known, x[:1].expand(3, features), backend), wire[:1].expand(3, size))

    message = torch.full((3, rows + 4, size + 16), 0xA5, dtype=torch.uint8)
    static_encode(format, known, 0, x, message[1, 2 : 2 + rows, 8 : 8 + size], backend)
    assert torch.equal(message[1, 2 : 2 + rows, 8 : 8 + size], wire)
    message[1, 2 : 2 + rows, 8 : 8 + size] = 0xA5
    assert (message == 0xA5).all()

    wires = torch.stack([wire, encoded(format, known, x.flip(0), "reference", 1)])
    expected = summed(format, known, wires, dtype, "reference")
    message[::2, 1 : 1 + rows, 16:] = wires
    assert same_bits(summed(format, known, message[::2, 1 : 1 + rows, 16:], dtype, backend), expected)
    for view in views:
        static_decode_sum(format, known, wires, view, backend)
        assert same_bits(view, expected)
    assert columns_of_many._base is not None and (columns_of_many._base[:, :features] == 9).all()


@interpreted
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_rows_are_independent(backend: str) -> None:
    for name, rows in (("static4", KINDS), ("static4_paper", 7)):
        format, features = FORMATS[name], 100
        known, x = tables(format, features, 2), hard_values(rows, features, torch.float32)
        wire = encoded(format, known, x, backend)
        wires = torch.stack([wire, encoded(format, known, x.flip(0), backend, 1)])
        total = summed(format, known, wires, torch.float32, backend)
        for start, stop in ((0, 0), (0, 1), (1, 4), (4, rows)):
            assert torch.equal(encoded(format, known, x[start:stop], backend), wire[start:stop])
            assert same_bits(summed(format, known, wires[:, start:stop], torch.float32, backend), total[start:stop])
        again = encoded(format, known, x[3:4].repeat(4, 1), backend)
        assert torch.equal(again, wire[3:4].repeat(4, 1))


@interpreted
@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("name", ["static4", "static4_paper", "8 bits", "2 bits, no outlier"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_inf_are_never_hidden_and_never_spread(poison: float, name: str, backend: str) -> None:
    format, features = FORMATS[name], 320
    known = tables(format, features, 2)
    kept = torch.zeros(features, dtype=torch.bool)
    kept[known.kept] = True
    clean = torch.randn(3, features, generator=torch.Generator().manual_seed(0))
    for column in (int(kept.int().argmax()), int(kept.int().argmin())):  # an outlier feature, if there are any; another
        poisoned = clean.clone()
        poisoned[1, column] = poison
        wires = torch.stack([encoded(format, known, x, backend, rank) for rank, x in enumerate((clean, poisoned))])
        total = summed(format, known, wires, torch.float32, backend)
        assert total[[0, 2]].isfinite().all()
        assert torch.equal(total[1].isnan(), torch.ones_like(kept) if format.row_scale else kept)


@pytest.mark.parametrize("name", ["static4", "static4_paper", "6 bits", "8 bits"])
def test_outliers_keep_bf16(name: str) -> None:
    format, features = FORMATS[name], 320
    known = tables(format, features)
    x = torch.randn(5, features, generator=torch.Generator().manual_seed(0)) * torch.logspace(-30, 30, 5)[:, None]
    total = summed(format, known, encoded(format, known, x, "reference")[None], torch.float32, "reference")
    assert torch.equal(total[:, known.kept], x[:, known.kept].bfloat16().float())
    assert not torch.equal(total, x.bfloat16().float())


def test_steps_are_within_half_a_step() -> None:
    """Values the tables reach come back within half a step of theirs, and a row of zeros as zeros if rows scale."""
    for name in ("static4", "static4_paper", "3 bits, one outlier", "8 bits"):
        format, features = FORMATS[name], 320
        known = tables(format, features)
        generator = torch.Generator().manual_seed(0)
        zero = float(format.zero_code)
        steps = torch.rand(6, features, generator=generator) * (2 * zero - 1) - zero
        offset = torch.zeros(1) if known.offset is None else known.offset
        x = steps * known.scale + offset
        if known.weight is not None:
            x *= torch.logspace(-20, 20, 6)[:, None]
        wire = encoded(format, known, x, "reference")
        back = summed(format, known, wire[None], torch.float32, "reference")
        step = known.scale.expand_as(x)
        if known.weight is not None:
            row_scale = static_reference.bf16_values(
                static_reference.bf16_bits((x.abs() * known.weight).amax(1, keepdim=True).numpy())
            )
            step = step * torch.from_numpy(row_scale)
            lowest, highest = ((known.scale * end + offset) * torch.from_numpy(row_scale) for end in (-zero, zero - 1))
            x = x.clamp(lowest, highest)
        numeric = torch.ones(features, dtype=torch.bool)
        numeric[known.kept] = False
        assert ((back - x).abs() <= step * 0.5001)[:, numeric].all()
        if format.row_scale:
            zeros = encoded(format, known, torch.zeros(1, features), "reference")
            assert not summed(format, known, zeros[None], torch.float32, "reference").any()


def test_bits_per_value() -> None:
    assert codecs.get("static4").bits_per_value(4096) == 4.15625
    assert codecs.get("static4_paper").bits_per_value(4096) == 4.1875
    for bits in range(2, 9):  # the paper's count: bits for every feature, 16 for an outlier
        spec: dict[str, Any] = {"format": "static", "bits": bits, "outlier_features": 64}
        exact = bits + (16 - bits) * 64 / 4096
        assert codecs.get({**spec, "row_scale": False}).bits_per_value(4096) == exact
        assert exact + 16 / 4096 <= codecs.get({**spec, "row_scale": True}).bits_per_value(4096) <= exact + 64 / 4096


def test_rows_that_a_program_cannot_hold_are_named() -> None:
    for features, problem in ((LONGEST_ROW, None), (LONGEST_ROW + 1, "encode of 32769 features")):
        found = launch_problem("encode", FORMATS["static4"], features, CPU)
        assert (found is None) == (problem is None) and (problem or "") in (found or "")


@interpreted
def test_rows_of_any_length_are_decoded() -> None:
    format, features = FORMATS["static4"], LONGEST_ROW + 1
    assert launch_problem("decode_sum", format, features, CPU) is None
    known = tables(format, features, 2)
    wires = torch.stack(
        [encoded(format, known, hard_values(2, features, torch.bfloat16), "reference", r) for r in (0, 1)]
    )
    expected = summed(format, known, wires, torch.bfloat16, "reference")
    assert same_bits(summed(format, known, wires, torch.bfloat16, "triton"), expected)


def test_tables_are_checked_and_copied_once(monkeypatch: pytest.MonkeyPatch) -> None:
    known = tables(FORMATS["static4"], 320, 2)
    meta = known.to(torch.device("meta"))
    assert known.to(torch.device("meta")) is meta and meta.scale.is_meta and meta.kept.is_meta
    assert known.to(CPU) is known and known.digest == tables(FORMATS["static4"], 320, 2).digest
    assert known.digest != tables(FORMATS["static4"], 320, 2, seed=1).digest
    known = tables(FORMATS["static4"], 320, 2)
    with monkeypatch.context() as patched, pytest.raises(MemoryError):
        patched.setattr(torch.Tensor, "to", mock.Mock(side_effect=MemoryError))
        known.to(torch.device("meta"))
    assert known.to(torch.device("meta")).scale.is_meta
    for kept in ([3, 2], [2, 2], [-1, 2], [2, 320]):
        with pytest.raises(ValueError, match="ascending, of 0 to 319"):
            StaticTables(known.scale, known.offset, known.weight, torch.tensor(kept))
