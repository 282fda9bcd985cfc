"""torch.compile passes through the codecs: operators that keep their word, no graph break, few compilations."""

import json

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from megacomp import codecs

SPECS = [
    "mxfp4",
    {"preset": "int4", "rotation": 64},
    {"format": "int", "bits": 5, "block_size": 16, "scale": "bf16", "symmetric": False},
]
FEATURES = 100


def tensors(spec):
    codec = codecs.get(spec, backend="reference")
    x = torch.randn(6, FEATURES, generator=torch.Generator().manual_seed(0))
    return codec, x, torch.stack([codec.encode(x), codec.encode(-3 * x)])


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("operator", ["encode", "decode_sum", "decode_sum_encode"])
def test_operators_do_what_they_declare(operator, spec):
    codec, x, wires = tensors(spec)
    gather_codec = codecs.get("int8", backend="reference")
    arguments = {
        "encode": (x, codec.key),
        "encode_out": (x, codec.key, torch.empty_like(wires[0])),
        "decode_sum": (wires, codec.key, FEATURES, torch.bfloat16),
        "decode_sum_out": (wires, codec.key, torch.empty_like(x)),
        "decode_sum_encode": (wires, codec.key, FEATURES, gather_codec.key),
        "decode_sum_encode_out": (wires, codec.key, FEATURES, gather_codec.key, gather_codec.encode(x)),
    }
    for name in (operator, f"{operator}_out"):
        torch.library.opcheck(getattr(torch.ops.megacomp, name), arguments[name])


def compiled(function, backend="aot_eager"):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    return torch.compile(function, fullgraph=True, backend=counter), counter


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_equals_eager_for_any_number_of_rows(backend):
    codec, gather_codec = (codecs.get(name, backend="reference") for name in ("mxfp4", "int8"))

    def layer(x):
        features = x.shape[1]
        wires = torch.stack([codec.encode(x * 2), codec.encode(x.half())])
        total = codec.decode_sum(wires, features, torch.bfloat16)
        passed_on = codec.decode_sum_encode(wires, features, gather_codec)
        return total + 1, gather_codec.decode(passed_on, features, x.dtype) * 2

    function, counter = compiled(layer, backend)
    for rows in (4, 6, 7, 33, 128):
        x = torch.randn(rows, 64)
        for left, right in zip(function(x), layer(x), strict=True):
            assert left.dtype == right.dtype and torch.equal(left, right)
    assert counter.frame_count <= 2  # the rows as a constant, then as a variable


def test_what_is_written_to_is_written_to():
    codec, gather_codec = (codecs.get(name, backend="reference") for name in ("mxfp4", "int8"))

    def into(x, wires, total, passed_on):
        codec.encode(x, out=wires[0])
        codec.encode(x + 1, out=wires[1])
        written = codec.decode_sum(wires, x.shape[1], x.dtype, out=total)
        codec.decode_sum_encode(wires, x.shape[1], gather_codec, out=passed_on)
        return written * 2

    function, _ = compiled(into)
    x = torch.randn(5, 64)
    outcomes = []
    for call in (function, into):
        wires = torch.zeros(2, 5, codec.row_bytes(64), dtype=torch.uint8)
        total, passed_on = torch.zeros_like(x), torch.zeros(5, gather_codec.row_bytes(64), dtype=torch.uint8)
        outcomes.append((call(x, wires, total, passed_on), wires, total, passed_on))
    assert all(torch.equal(left, right) for left, right in zip(*outcomes, strict=True))
    assert outcomes[0][1].any() and outcomes[0][3].any()


def test_a_codec_made_while_compiling_follows_its_specification():
    spec = {"preset": "int4"}

    def layer(x, name):
        named, described = (codecs.get(given, backend="reference") for given in (name, spec))
        return named.encode(x), described.encode(x)

    function, _ = compiled(layer)
    x = torch.randn(3, 64)
    for name, rotation in (("mxfp4", None), ("int8", None), ("int8", 32)):
        spec["rotation"] = rotation
        for left, right in zip(function(x, name), layer(x, name), strict=True):
            assert torch.equal(left, right)


def test_no_gradient_is_kept_and_none_is_lost():
    codec = codecs.get("int8")
    x = torch.randn(3, 64, requires_grad=True)
    function, _ = compiled(lambda x: (codec.encode(x), x * 2))
    wire, doubled = function(x)
    assert torch.equal(wire, codec.encode(x)) and not wire.requires_grad
    doubled.sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, 2))


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_key_makes_the_codec_it_came_from(backend):
    for spec in (*codecs.presets(), *SPECS):
        codec = codecs.get(spec, backend=backend)
        again = codecs.from_key(codec.key)
        assert again == codec and again.backend == backend
    in_another_order = dict(reversed(codec.spec.items()))
    assert codecs.get(in_another_order, backend=backend).key == codec.key
    assert json.loads(codec.key) == {"backend": backend, "spec": dict(codec.spec)}
