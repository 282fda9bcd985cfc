"""Wires of any bytes decode to something of the right shape, alike on every backend; wrong sizes are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from damage import damaged, fuzz
from hypothesis import given
from hypothesis import strategies as st

from megacomp import codecs
from megacomp.codecs import Codec, StaticCodec
from megacomp.kernels import StaticTables

PEERS, ROWS, FEATURES = 2, 3, 96
FAMILIES: dict[str, Any] = {
    "mx": "mxfp4",
    "mx, 3 bits": {"format": "mx", "element": "fp3_e2m0", "block_size": 8, "scale": "bf16", "scale_search": True},
    "nvfp4": "nvfp4",
    "int": "int8",
    "int, rotated": {"preset": "int4", "rotation": 32},
    "int, asymmetric": {"format": "int", "bits": 5, "block_size": 16, "scale": "fp16", "symmetric": False},
    "static": {"preset": "static4", "outlier_features": 3},
    "static, as published": {"preset": "static4_paper", "outlier_features": 0.05},
}


def _tables(codec: StaticCodec, ranks: int) -> StaticTables:
    generator = torch.Generator().manual_seed(ranks)
    scale = torch.rand(ranks, FEATURES, generator=generator) + 0.5
    return StaticTables(
        scale,
        scale / 2 if codec.format.asymmetric else None,
        scale + 1 if codec.format.row_scale else None,
        torch.arange(codec.format.outliers(FEATURES)) * 5,
    )


def _codec(family: str, backend: str = "reference") -> Codec:
    codec = codecs.get(FAMILIES[family], backend=backend)
    if isinstance(codec, StaticCodec):
        return codec.calibrated(_tables(codec, PEERS), _tables(codec, 1))
    return codec


def _wires(codec: Codec) -> torch.Tensor:
    x = torch.randn(PEERS, ROWS, FEATURES, generator=torch.Generator().manual_seed(0))
    return torch.stack([codec.sender(rank).encode(x[rank]) for rank in range(PEERS)])


def _of(data: bytes, shape: tuple[int, ...]) -> torch.Tensor:
    """The first bytes of `data`, zeros where they do not suffice, as a wire."""
    size = torch.Size(shape).numel()
    return torch.frombuffer(bytearray(data[:size].ljust(size, b"\0")), dtype=torch.uint8).view(shape).clone()


@pytest.mark.parametrize("family", FAMILIES)
@fuzz
@given(data=st.data(), dtype=st.sampled_from(codecs.DTYPES))
def test_damaged_wires_of_the_right_size(family: str, data: st.DataObject, dtype: torch.dtype) -> None:
    codec = _codec(family)
    good = _wires(codec)
    any_bytes = damaged(good.numpy().tobytes()) | st.binary(max_size=good.numel())
    wires = _of(data.draw(any_bytes), tuple(good.shape))
    for wire, peers in ((wires, codec), (wires[:1], codec.summed)):
        got = peers.decode_sum(wire, FEATURES, dtype)
        assert (got.shape, got.dtype) == ((ROWS, FEATURES), dtype)
        # A row is a world of its own: what is wrong with one shows in no other.
        intact = (wire == good[: len(wire)]).all(-1).all(0)
        expected = peers.decode_sum(good[: len(wire)], FEATURES, dtype)
        assert torch.equal(got[intact], expected[intact])
    second = codecs.get("int8", backend="reference")
    assert codec.decode_sum_encode(wires, FEATURES, second).shape == (ROWS, second.row_bytes(FEATURES))


@pytest.mark.parametrize("family", [family for family in FAMILIES if "static" not in family])
def test_any_bytes_decode_alike_on_every_backend(family: str) -> None:
    """Ranks that were sent the same damaged bytes still hold the same values."""
    reference, triton = _codec(family), _codec(family, "triton")
    shape = _wires(reference).shape
    wires = torch.randint(256, shape, generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    one, other = (codec.decode_sum(wires, FEATURES, torch.float32) for codec in (reference, triton))
    assert torch.equal(one.isnan(), other.isnan())
    assert torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0))


@pytest.mark.parametrize("family", FAMILIES)
@fuzz
@given(
    shape=st.lists(st.integers(0, 4) | st.integers(40, 200), min_size=0, max_size=4),
    dtype=st.sampled_from([torch.uint8, torch.int8, torch.float32, torch.bool]),
    features=st.sampled_from([FEATURES, FEATURES - 1, 1, 0, -1, 2**40]),
)
def test_wires_of_other_sizes(family: str, shape: list[int], dtype: torch.dtype, features: int) -> None:
    codec = _codec(family)
    good = _wires(codec)
    if (tuple(shape), dtype, features) == (tuple(good.shape), good.dtype, FEATURES):
        return
    wire = torch.zeros(shape, dtype=dtype)
    try:
        got = codec.decode_sum(wire, features, torch.bfloat16)
    except ValueError:
        return
    assert dtype is torch.uint8 and got.shape == (shape[1], features) and shape[2] == codec.row_bytes(features)


@pytest.mark.parametrize("family", FAMILIES)
def test_truncated_and_misaligned_wires(family: str) -> None:
    codec = _codec(family)
    good = _wires(codec)
    size, peers, rows = "wires must be uint8", "wires of all peers are", "rows that start at multiples of 8 bytes"
    for bad, message in (
        (good[..., :-8], size),
        (good[..., :-1], size),
        (good[:0], peers),
        (good[0], peers),
        (torch.cat([good, good], -1), size),
        (good.transpose(0, 1).transpose(1, 2), size),
        (torch.zeros(good.numel() + 1, dtype=torch.uint8)[1:].view(good.shape), rows),
    ):
        with pytest.raises(ValueError, match=message):
            codec.decode_sum(bad, FEATURES, torch.float32)
        with pytest.raises(ValueError, match=message):
            codec.decode_sum_encode(bad, FEATURES, codecs.get("int8"))
