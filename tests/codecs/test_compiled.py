"""The compiled backend equals the definition bit for bit, wires and sums alike."""

import pytest
import torch

from megacomp import codecs
from megacomp.kernels import compiled
from megacomp.kernels.backend import resolve_backend

needs_compiler = pytest.mark.skipif(compiled.compiler_problem() is not None, reason="needs a C++ compiler")


@needs_compiler
@pytest.mark.parametrize(
    "spec",
    [
        "mxfp4",
        "int8",
        {"preset": "int4", "rotation": 128},
        {"format": "int", "bits": 4, "block_size": 128, "scale": "fp16", "symmetric": False},
    ],
    ids=str,
)
def test_compiled_equals_the_definition(spec):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 384, generator=generator) * torch.logspace(-40, 37, 64)[:, None]
    x[3, 5], x[4, 100] = float("nan"), float("inf")
    x[5] = 0
    x[6, :40] = -0.0
    # Past the slices of one call, odd row counts, two, and one.
    large = x.bfloat16().repeat(44, 1)[:2767]
    for rows in (large, large[:37], large[:2], large[:1]):
        definition, compiled_ = (codecs.get(spec, backend=backend) for backend in ("reference", "compiled"))
        wire = definition.encode(rows)
        assert torch.equal(compiled_.encode(rows), wire)
        wires = torch.stack([wire, wire.flip(0)])
        expected = definition.decode_sum(wires, 384, torch.bfloat16)
        total = compiled_.decode_sum(wires, 384, torch.bfloat16)
        assert torch.equal(total.isnan(), expected.isnan())
        assert torch.equal(total.nan_to_num(0), expected.nan_to_num(0))


@needs_compiler
def test_auto_compiles_on_the_cpu_only_where_rows_are_many():
    def resolved(backend: str, rows: int, device: str) -> str:
        return resolve_backend(backend, "encode", codecs.get("mxfp4").format, 256, rows, torch.device(device))

    assert resolved("auto", 2, "cpu") == "compiled"
    assert resolved("auto", 1, "cpu") == "reference"
    assert resolved("auto", 2, "meta") == "reference"
    assert resolved("reference", 2, "cpu") == "reference"


def test_the_compiler_is_tried_on_the_cpu_whatever_the_default_device(monkeypatch):
    tried = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: tried.append)
    with torch.device("meta"):
        assert compiled.compiler_problem.__wrapped__() is None
    assert [x.device.type for x in tried] == ["cpu"]


def test_without_a_compiler_auto_falls_back_with_one_logged_reason(caplog):
    compiled.compiler_problem.cache_clear()
    try:
        # Not monkeypatch: undoing it would delete the setting, and with it the compiler of every later test.
        with torch._inductor.config.patch({"cpp.cxx": ("/nonexistent/c++",)}):
            codec = codecs.get("mxfp4")
            for _ in range(3):
                codec.encode(torch.randn(8, 64))
            assert sum("no working C++ compiler" in record.message for record in caplog.records) == 1
            with pytest.raises(RuntimeError, match='backend "compiled": no working C\\+\\+ compiler'):
                codecs.get("mxfp4", backend="compiled").encode(torch.randn(8, 64))
    finally:
        compiled.compiler_problem.cache_clear()
