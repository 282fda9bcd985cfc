"""What every codec promises: row-wise wires, any shape and dtype, honest NaNs, one rounding of the sum."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megacomp import codecs

SPECS = [
    *codecs.presets(),
    {"preset": "int4", "rotation": 128},
    {"preset": "mxfp4", "rotation": 32, "scale": "e5m0"},
    {"format": "int", "bits": 4, "block_size": 128, "scale": "fp16", "symmetric": False},
    {"format": "int", "bits": 7, "block_size": 16, "scale": "bf16", "symmetric": False, "rotation": 64},
    {"format": "mx", "element": "fp3_e2m0", "block_size": 8, "scale": "bf16", "scale_search": True},
    {"format": "mx", "element": "int3", "block_size": 8, "scale": "e5m0", "scale_rounding": "best"},
]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def same(a, b):
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(0), b.nan_to_num(0))


@settings(max_examples=60)
@given(
    spec=st.sampled_from(SPECS),
    dtype=st.sampled_from(DTYPES),
    rows=st.integers(0, 9),
    features=st.integers(1, 300),
    seed=st.integers(0, 2**16),
)
def test_any_shape_row_by_row(spec, dtype, rows, features, seed):
    codec = codecs.get(spec, backend="reference")
    x = torch.randn(rows, features, generator=torch.Generator().manual_seed(seed)).to(dtype)
    wire = codec.encode(x)
    assert wire.shape == (rows, codec.row_bytes(features)) and wire.dtype == torch.uint8
    assert codec.row_bytes(features) % 8 == 0
    decoded = codec.decode(wire, features, dtype)
    assert decoded.shape == x.shape and decoded.dtype == dtype and decoded.isfinite().all()
    for row in range(rows):
        assert torch.equal(codec.encode(x[row : row + 1]), wire[row : row + 1])
        assert torch.equal(codec.decode(wire[row : row + 1], features, dtype), decoded[row : row + 1])


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_wires_are_deterministic_whatever_the_strides(spec):
    codec = codecs.get(spec, backend="reference")
    x = torch.randn(6, 320, generator=torch.Generator().manual_seed(0))
    wire = codec.encode(x)
    scattered = torch.randn(6, 2, 320).transpose(0, 1)[1]
    scattered.copy_(x)
    column_major = x.t().contiguous().t()
    dirty = torch.full((2, 6, wire.shape[1]), 255, dtype=torch.uint8)
    assert torch.equal(codec.encode(scattered), wire)
    assert torch.equal(codec.encode(column_major), wire)
    assert torch.equal(codec.encode(x, out=dirty[1]), wire)
    strided_out = torch.empty(320, 6).t()
    assert torch.equal(codec.decode(wire, 320, torch.float32, out=strided_out), codec.decode(wire, 320, torch.float32))


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_sum_is_formed_in_float32_in_peer_order_and_rounded_once(spec, dtype):
    codec = codecs.get(spec, backend="reference")
    generator = torch.Generator().manual_seed(1)
    wires = torch.stack([codec.encode(torch.randn(4, 256, generator=generator).to(dtype)) for _ in range(4)])
    total = codec.decode_sum(wires, 256, dtype)
    in_float32 = codec.decode_sum(wires, 256, torch.float32)
    assert torch.equal(total, in_float32.to(dtype))
    if not codec.format.rotation:
        expected = codec.decode(wires[0], 256, torch.float32)
        for wire in wires[1:]:
            expected = expected + codec.decode(wire, 256, torch.float32)
        assert torch.equal(in_float32, expected)


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_inf_are_never_hidden_and_never_spread(spec, poison):
    codec = codecs.get(spec, backend="reference")
    clean = torch.randn(3, 512, generator=torch.Generator().manual_seed(2))
    x = clean.clone()
    x[1, 300] = poison
    block = max(codec.format.block_size, codec.format.rotation)
    start = 300 // block * block
    decoded = codec.decode_sum(torch.stack([codec.encode(clean), codec.encode(x)]), 512, torch.float32)
    assert decoded[1, start : start + block].isnan().all()
    decoded[1, start : start + block] = 0
    assert decoded.isfinite().all()
    zeroed = x.clone()
    zeroed[1, start : start + block] = 0
    planes = [codec.format.fields(codec.encode(tensor), 512).planes for tensor in (x, zeroed)]
    assert all(torch.equal(poisoned, zero) for poisoned, zero in zip(*planes, strict=True))


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_zero_is_exact_and_extremes_stay_finite(spec):
    # A rotation of the largest float32 numbers overflows, and shows it as NaN; hence without.
    codec = codecs.get({**codecs.get(spec).spec, "rotation": None}, backend="reference")
    for dtype in DTYPES:
        info = torch.finfo(dtype)
        x = torch.zeros(4, 256, dtype=dtype)
        x[1] = info.max
        x[1, ::2] = -info.max
        x[2] = info.smallest_normal
        x[3, :128] = info.tiny / 4  # subnormal
        decoded = codec.decode(codec.encode(x), 256, torch.float32)
        assert not decoded[0].any()
        assert decoded.isfinite().all()
        assert (decoded.abs() <= x.abs().float().amax(1, keepdim=True) * 4).all()


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_signs_survive(spec):
    """A sum of mirrored partials is zero: no codec has a bias on symmetric data beyond its asymmetric range."""
    codec = codecs.get({**codecs.get(spec).spec, "rotation": None}, backend="reference")
    x = torch.randn(8, 256, generator=torch.Generator().manual_seed(3))
    decoded = codec.decode(codec.encode(x), 256, torch.float32)
    large = x.abs() > x.abs().amax(1, keepdim=True) / 2
    assert (decoded[large].sign() == x[large].sign()).all()


def test_a_spec_makes_the_codec_it_came_from():
    for spec in SPECS:
        codec = codecs.get(spec)
        assert codecs.get(codec.spec) == codec
        assert codecs.get(codec, backend="reference").backend == "reference"


def test_bits_per_value():
    assert codecs.get("mxfp4").bits_per_value(4096) == 4.25
    assert codecs.get("int8").bits_per_value(4096) == 8.25
    assert codecs.get("int6").bits_per_value(4096) == 6.5
    assert codecs.get("int4").bits_per_value(4096) == 4.25 + 64 / 4096  # the row scale, padded to 8 bytes
    assert codecs.get({"format": "mx", "element": "fp4_e2m1", "scale": "e5m0"}).bits_per_value(4096) == 4.15625
    for element, bits in {"fp3_e1m1": 3, "fp4_e2m1": 4, "fp5_e2m2": 5}.items():
        for block_size in (8, 16, 32):  # the table of METHODS section 1
            codec = codecs.get({"format": "mx", "element": element, "block_size": block_size})
            assert codec.bits_per_value(4096) == bits + 8 / block_size


@pytest.mark.parametrize(
    ("spec", "key", "message"),
    [
        ("mxfp5", "preset", "did you mean 'mxfp"),
        (5, "", "a preset's name or an object"),
        ({}, "format", "missing"),
        ({"format": "fp"}, "format", "allowed: mx, int"),
        ({"preset": "int4", "format": "int"}, "format", "exclude each other"),
        ({"format": "mx", "elment": "fp4_e2m1"}, "elment", "did you mean 'element'"),
        ({"format": "mx", "element": "fp4_e3m1"}, "element", "did you mean"),
        ({"format": "mx", "block_size": 24}, "block_size", "allowed: 8, 16, 32, 64, 128"),
        ({"format": "int", "block_size": 8}, "block_size", "allowed: 16, 32, 64, 128"),
        ({"format": "int", "bits": 9}, "bits", "allowed: 2, 3, 4, 5, 6, 7, 8"),
        ({"format": "int", "bits": True}, "bits", "True is not allowed"),
        ({"format": "int", "scale": "e8m0"}, "scale", "allowed: e4m3, bf16, fp16"),
        ({"format": "int", "symmetric": False}, "scale", "asymmetric"),
        ({"format": "int", "symmetric": False, "scale": "bf16", "scale_search": True}, "scale_search", "asymmetric"),
        ({"format": "mx", "scale_search": True}, "scale_search", "scale_rounding"),
        ({"format": "mx", "element": "int8", "scale": "bf16"}, "scale", 'format "int"'),
        ({"format": "mx", "scale": "bf16", "scale_rounding": "best"}, "scale_rounding", "e8m0"),
        ({"preset": "int4", "rotation": 100}, "rotation", "allowed: null, 32, 64, 128, 256"),
    ],
)
def test_a_wrong_spec_is_named(spec, key, message):
    with pytest.raises(codecs.CodecError, match=message) as error:
        codecs.get(spec)
    assert error.value.key == key


def test_wrong_tensors_are_refused():
    codec = codecs.get("mxfp4")
    with pytest.raises(ValueError, match="not int64"):
        codec.encode(torch.ones(2, 32, dtype=torch.int64))
    with pytest.raises(ValueError, match="rows, features"):
        codec.encode(torch.ones(32))
    with pytest.raises(ValueError, match=r"out must be uint8 \[2, 24\]"):
        codec.encode(torch.ones(2, 32), out=torch.empty(2, 32, dtype=torch.uint8))
    with pytest.raises(ValueError, match="multiples of 8"):
        codec.encode(torch.ones(2, 32), out=torch.empty(2, 25, dtype=torch.uint8)[:, :24])
    with pytest.raises(ValueError, match="wires must be uint8"):
        codec.decode_sum(torch.empty(2, 3, 8, dtype=torch.uint8), 32, torch.float32)
    with pytest.raises(ValueError, match="not float64"):
        codec.decode(torch.empty(3, 24, dtype=torch.uint8), 32, torch.float64)
