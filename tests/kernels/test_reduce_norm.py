"""reduce_norm is what it says, and the same bits whoever runs it."""

import pytest
import torch
import triton
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import DTYPES, KINDS, SPECS, hard_values, pair, same_bits

from megacomp import codecs
from megacomp.kernels import compiled, reduce_norm, sums_rows
from megacomp.kernels.launch_config import LaunchConfig, launch_problem, using
from megacomp.kernels.tiles import Tile

interpreted = [
    pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="needs TRITON_INTERPRET=1"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]
needs_compiler = pytest.mark.skipif(compiled.compiler_problem() is not None, reason="needs a C++ compiler")

HIDDEN_SIZES = (1, 7, 8, 31, 32, 33, 96, 128, 200, 256, 325)


def wires_of(spec, peers, rows, features, seed=0, hard=False):
    codec, _ = pair(spec)
    make = hard_values if hard else ordinary_values
    return torch.stack([codec.encode(make(rows, features, torch.float32, seed + 5 * peer)) for peer in range(peers)])


def ordinary_values(rows, features, dtype, seed=0):
    return torch.randn(rows, features, generator=torch.Generator().manual_seed(seed)).to(dtype)


def run(
    spec, wires, residual, *, backend, weight=None, bias=None, eps=1e-5, dtype=None, sums=None
):  # -> (new residual, normalized)
    format, features = codecs.get(spec).format, residual.shape[1]
    if weight is None:
        weight = 0.5 + torch.rand(features, generator=torch.Generator().manual_seed(features))
    new_residual = torch.full(residual.shape, -7.0, dtype=residual.dtype)
    normalized = torch.full(residual.shape, -7.0, dtype=dtype or residual.dtype)
    reduce_norm(format, wires, residual, weight, eps, new_residual, normalized, backend, bias, sums)
    return new_residual, normalized


def assert_same(spec, wires, residual, backend, **options):
    found = run(spec, wires, residual, backend=backend, **options)
    expected = run(spec, wires, residual, backend="reference", **options)
    for name, ours, definition in zip(("new_residual", "normalized"), found, expected, strict=True):
        assert same_bits(ours, definition), name
    return expected


# The definition


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("features", [1, 325, 4096])
@pytest.mark.parametrize("bias", [False, True])
def test_is_decode_sum_plus_bias_plus_residual_and_the_norm_of_that(dtype, features, bias):
    rows, eps = 20, 1e-3
    residual = ordinary_values(rows, features, dtype, seed=1)
    weight, bias = ordinary_values(1, features, dtype, 2)[0], ordinary_values(1, features, dtype, 3)[0] * bias
    wires = wires_of("int8", 3, rows, features)
    new_residual, normalized = run("int8", wires, residual, backend="reference", weight=weight, bias=bias, eps=eps)
    # In float64, from what the codec itself says the wires hold.
    decoded = [codecs.get("int8", backend="reference").decode(wire, features, torch.float32) for wire in wires]
    exact = torch.stack(decoded).double().sum(0) + bias.double() + residual.double()
    spacing = torch.finfo(dtype).eps
    torch.testing.assert_close(new_residual.double(), exact, rtol=spacing / 2, atol=1e-6)
    values = new_residual.double()
    exact = values / (values.square().mean(1, keepdim=True) + eps).sqrt() * weight.double()
    # One rounding to the dtype, and a handful to float32.
    rtol = spacing / 2 + 4 * torch.finfo(torch.float32).eps
    torch.testing.assert_close(normalized.double(), exact, rtol=rtol, atol=2.0**-25)


def test_is_the_norm_of_pytorch():
    features, eps = 768, 1e-6
    residual = ordinary_values(9, features, torch.float32)
    weight = ordinary_values(1, features, torch.float32, 4)[0]
    new_residual, normalized = run(
        "mxfp4", wires_of("mxfp4", 2, 9, features), residual, backend="reference", weight=weight, eps=eps
    )
    expected = torch.nn.functional.rms_norm(new_residual, (features,), weight, eps)
    torch.testing.assert_close(normalized, expected, rtol=1e-6, atol=1e-6)


def test_rounds_once_where_separate_steps_round_three_times():
    # In units of the last place of 256 in bf16, 2: partials of half a unit, bias and residual.
    wires = torch.stack([codecs.get("mxint8", backend="reference").encode(torch.full((1, 32), 0.5))] * 2)
    residual, bias = torch.full((1, 32), 256.0, dtype=torch.bfloat16), torch.full((32,), 0.5)
    new_residual, _ = run("mxint8", wires, residual, backend="reference", bias=bias)
    assert (new_residual == 258).all()  # 257.5; one after the other, 256 + 1 falls back to 256
    assert (residual + 1 == 256).all()


@pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=interpreted)])
def test_what_is_not_finite_spoils_its_own_row_only(backend):
    residual = ordinary_values(4, 96, torch.bfloat16)
    residual[1, 5] = torch.inf
    partial = ordinary_values(4, 96, torch.float32)
    partial[2, 40] = torch.nan
    wires = codecs.get("mxfp4", backend="reference").encode(partial)[None]
    new_residual, normalized = run("mxfp4", wires, residual, backend=backend)
    assert new_residual[1].isinf().nonzero().tolist() == [[5]]
    assert normalized[1].isnan().nonzero().tolist() == [[5]] and (normalized[1, :5] == 0).all()
    assert new_residual[2].isnan().nonzero().flatten().tolist() == list(range(32, 64))
    assert normalized[2].isnan().all()
    assert normalized[[0, 3]].isfinite().all()


def test_keeps_the_residual_and_its_dtype():
    residual = ordinary_values(5, 64, torch.float32)
    before = residual.clone()
    new_residual, normalized = run(
        "mxfp4", wires_of("mxfp4", 2, 5, 64), residual, backend="reference", dtype=torch.bfloat16
    )
    assert torch.equal(residual, before)
    assert new_residual.dtype is torch.float32 and normalized.dtype is torch.bfloat16


def test_no_rows():
    wires = wires_of("mxfp4", 2, 1, 64)[:, :0]
    new_residual, normalized = run("mxfp4", wires, torch.empty(0, 64), backend="reference")
    assert new_residual.shape == normalized.shape == (0, 64)


# The compiled definition


@needs_compiler
@pytest.mark.parametrize(
    ("dtype", "features", "bias"),
    [(torch.bfloat16, 1536, True), (torch.float16, 515, False), (torch.float32, 96, True)],
)
def test_compiled_equals_the_definition(dtype, features, bias):
    bias = ordinary_values(1, features, torch.bfloat16, 3)[0] if bias else None
    for rows in (1, 2, 37):
        residual = hard_values(rows, features, dtype, seed=rows)
        wires = wires_of("int8", 2, rows, features, seed=7)
        assert_same("int8", wires, residual, "compiled", bias=bias, dtype=dtype)


@needs_compiler
def test_compiled_in_slices_equals_the_definition_in_one():
    features = 2048
    rows = 2 * sums_rows(10_000, features, torch.device("cpu")) + 1
    residual = ordinary_values(rows, features, torch.bfloat16, seed=1)
    wires = wires_of("mxfp4", 2, rows, features)
    in_slices = run("mxfp4", wires, residual, backend="compiled")
    whole = run("mxfp4", wires, residual, backend="reference", sums=torch.full((rows, features), torch.nan))
    assert all(map(same_bits, in_slices, whole))


# The kernel, interpreted


class TestKernel:
    pytestmark = interpreted

    @pytest.mark.parametrize("spec", SPECS, ids=str)
    def test_every_format(self, spec):
        rows, features = KINDS + 1, 325  # a short last block whatever the block
        residual = hard_values(rows, features, torch.bfloat16, seed=3)
        assert_same(spec, wires_of(spec, 2, rows, features, hard=True), residual, "triton")

    @settings(max_examples=30)
    @given(
        spec=st.sampled_from(SPECS),
        dtype=st.sampled_from(DTYPES),
        normalized_dtype=st.sampled_from(DTYPES),
        weight_dtype=st.sampled_from(DTYPES),
        bias=st.booleans(),
        peers=st.integers(1, 4),
        rows=st.integers(1, 9),
        features=st.one_of(st.sampled_from(HIDDEN_SIZES), st.integers(1, 400)),
        eps=st.sampled_from([0.0, 1e-6, 1e-5, 1]),
        seed=st.integers(0, 2**16),
    )
    def test_any_shape_and_dtype(
        self, spec, dtype, normalized_dtype, weight_dtype, bias, peers, rows, features, eps, seed
    ):
        residual = hard_values(rows, features, dtype, seed)
        weight = ordinary_values(1, features, weight_dtype, seed + 1)[0]
        bias = ordinary_values(1, features, weight_dtype, seed + 2)[0] if bias else None
        wires = wires_of(spec, peers, rows, features, seed, hard=True)
        assert_same(spec, wires, residual, "triton", weight=weight, bias=bias, eps=eps, dtype=normalized_dtype)

    @pytest.mark.parametrize("spec", ["mxfp4", "nvfp4", "int8", {"preset": "int4", "rotation": 128}], ids=str)
    @pytest.mark.parametrize("features", [2568, 4096, 5120])
    def test_hidden_sizes_of_models(self, spec, features):
        wires = wires_of(spec, 2, 3, features)
        assert_same(spec, wires, ordinary_values(3, features, torch.bfloat16), "triton")
        # In float32 the order in which squares are added shows.
        assert_same(spec, wires, ordinary_values(3, features, torch.float32), "triton")

    @pytest.mark.parametrize("tile", [Tile(8, 8, 8), Tile(32, 8, 16), Tile(64, 64, 2), Tile(128, 16, 4)], ids=str)
    def test_the_tile_changes_no_bit(self, tile):
        residual = hard_values(11, 230, torch.float16)
        with using("reduce_norm", LaunchConfig(tile, num_warps=4)):
            assert_same("mxfp4", wires_of("mxfp4", 2, 11, 230), residual, "triton")

    def test_strides(self):
        rows, features = 6, 160
        wires = wires_of("nvfp4", 5, 2 * rows, features)[1:4, ::2]
        residual = ordinary_values(features, rows, torch.bfloat16).T
        weight = ordinary_values(features, 2, torch.float32).T[1]
        assert_same("nvfp4", wires, residual, "triton", weight=weight, bias=weight.flip(0))

    def test_neighbours_keep_to_their_rows(self):
        """Several rows to a program, the last program partly empty: nothing is written behind the last row."""
        rows, features = 5, 64
        guarded = torch.full((2, rows + 3, features), -7.0, dtype=torch.bfloat16)
        wires, residual = wires_of("mxfp4", 2, rows, features), ordinary_values(rows, features, torch.bfloat16)
        format, weight = codecs.get("mxfp4").format, torch.ones(features)
        reduce_norm(format, wires, residual, weight, 1e-5, *guarded[:, :rows].unbind(), "triton")
        assert (guarded[:, rows:] == -7).all()
        expected = run("mxfp4", wires, residual, backend="reference", weight=weight)
        assert all(map(same_bits, guarded[:, :rows].unbind(), expected))


def test_rows_too_wide_for_a_program_run_the_definition():
    format = codecs.get("mxfp4").format
    assert launch_problem("reduce_norm", format, 32768, torch.device("cpu")) is None
    assert "65536 values" in launch_problem("reduce_norm", format, 32769, torch.device("cpu"))
    residual = ordinary_values(1, 32769, torch.bfloat16)
    assert_same("mxfp4", wires_of("mxfp4", 1, 1, 32769), residual, "triton")
