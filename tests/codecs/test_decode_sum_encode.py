"""decode_sum_encode gives the bits of its two steps, however it goes about it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megacomp import codecs
from megacomp.kernels import sums_rows
from megacomp.kernels.compiled import compiler_problem

SPECS = [
    *codecs.presets(),
    {"preset": "int4", "rotation": 64},
    {"preset": "mxfp4", "scale": "e5m0"},
    {"format": "int", "bits": 4, "block_size": 128, "scale": "fp16", "symmetric": False},
]


def wires_of(codec, peers, rows, features, seed=0):
    generator = torch.Generator().manual_seed(seed)
    partials = [torch.randn(rows, features, generator=generator) for _ in range(peers)]
    return torch.stack([codec.encode(partial) for partial in partials])


def in_two_steps(codec, wires, features, gather_codec):
    return gather_codec.encode(codec.decode_sum(wires, features, torch.float32))


@settings(max_examples=60)
@given(
    spec=st.sampled_from(SPECS),
    gather_spec=st.sampled_from(SPECS),
    peers=st.integers(1, 4),
    rows=st.integers(0, 9),
    features=st.integers(1, 300),
    buffer_rows=st.sampled_from([None, 3, 4, 9]),
)
def test_equals_its_two_steps(spec, gather_spec, peers, rows, features, buffer_rows):
    codec, gather_codec = (codecs.get(name, backend="reference") for name in (spec, gather_spec))
    wires = wires_of(codec, peers, rows, features)
    sums = None if buffer_rows is None else torch.full((buffer_rows, features), torch.nan)
    wire = codec.decode_sum_encode(wires, features, gather_codec, sums=sums)
    assert torch.equal(wire, in_two_steps(codec, wires, features, gather_codec))


def test_a_nan_of_any_peer_arrives():
    codec, gather_codec = codecs.get("int8", backend="reference"), codecs.get("mxfp4", backend="reference")
    poisoned = torch.randn(3, 128)
    poisoned[1, 70] = float("inf")
    wires = torch.stack([codec.encode(torch.randn(3, 128)), codec.encode(poisoned)])
    total = gather_codec.decode(codec.decode_sum_encode(wires, 128, gather_codec), 128, torch.float32)
    assert total[1, 64:].isnan().all()
    total[1, 64:] = 0
    assert total.isfinite().all()


def test_writes_where_it_is_told():
    codec, gather_codec = codecs.get("int6", backend="reference"), codecs.get("nvfp4", backend="reference")
    wires = wires_of(codec, 2, 5, 96)
    places = torch.full((2, 5, gather_codec.row_bytes(96)), 255, dtype=torch.uint8)
    returned = codec.decode_sum_encode(wires, 96, gather_codec, out=places[1])
    assert returned.data_ptr() == places[1].data_ptr()
    assert torch.equal(places[1], in_two_steps(codec, wires, 96, gather_codec))
    assert (places[0] == 255).all()


@pytest.mark.skipif(compiler_problem() is not None, reason="needs a C++ compiler")
@pytest.mark.parametrize("spec", ["mxfp4", {"preset": "int4", "rotation": 128}], ids=str)
def test_compiled_in_slices_equals_the_definition(spec):
    features = 2048
    rows = 2 * sums_rows(10_000, features, torch.device("cpu")) + 1
    codec, definition = codecs.get(spec), codecs.get(spec, backend="reference")
    wires = wires_of(codec, 2, rows, features)
    wire = codec.decode_sum_encode(wires, features, codec)
    assert torch.equal(wire, in_two_steps(definition, wires, features, definition))


def test_wrong_tensors_are_refused():
    codec, gather_codec = codecs.get("mxfp4"), codecs.get("int8")
    wires = wires_of(codec, 2, 3, 32)
    with pytest.raises(ValueError, match=r"\[peers, rows, row_bytes\]"):
        codec.decode_sum_encode(wires[0], 32, gather_codec)
    with pytest.raises(ValueError, match=r"wires must be uint8 \[2, 3, 40\]"):
        codec.decode_sum_encode(wires, 64, gather_codec)
    with pytest.raises(ValueError, match=r"out must be uint8 \[3, 72\]"):
        codec.decode_sum_encode(wires, 32, gather_codec, out=wires[0].clone())
