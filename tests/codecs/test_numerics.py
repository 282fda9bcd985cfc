"""Whole codecs against independent numpy definitions, and in dB against what theory allows."""

import numpy as np
import pytest
import reference
import torch

from megacomp import codecs
from megacomp.kernels import ELEMENTS
from megacomp.kernels.rotation import hadamard


def round_trip(spec, x, dtype=torch.float32):
    codec = codecs.get(spec, backend="reference")
    return codec.decode(codec.encode(x), x.shape[1], dtype)


def varied_rows(rows, features, seed=0):
    """Normal rows over twelve decades, with a zero block, outliers and a constant block."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, features, generator=generator) * torch.logspace(-7, 5, rows)[:, None]
    x[:, ::37] *= 20
    x[0, :64] = 0
    x[1, :64] = x[1, 0]
    return x


@pytest.mark.parametrize("element", ELEMENTS)
@pytest.mark.parametrize("block_size", [8, 16, 32, 64, 128])
def test_microscaling_follows_the_ocp_rules(element, block_size):
    x = varied_rows(7, 200)
    spec = {"format": "mx", "element": element, "block_size": block_size}
    expected = reference.mx_quantize(x.double().numpy(), element, block_size)
    assert np.array_equal(round_trip(spec, x).double().numpy(), expected)


def test_a_short_exponent_clamps_at_both_ends():
    x = torch.randn(40, 64, generator=torch.Generator().manual_seed(1)) * torch.logspace(-9, 9, 40)[:, None]
    expected = reference.mx_quantize(x.double().numpy(), "fp4_e2m1", 32, exponent_range=(-15, 15))
    spec = {"format": "mx", "element": "fp4_e2m1", "scale": "e5m0"}
    assert np.array_equal(round_trip(spec, x).double().numpy(), expected)


def test_e8m0_reaches_the_smallest_and_largest_float32():
    tiny, huge = torch.finfo(torch.float32).smallest_normal, torch.finfo(torch.float32).max
    x = torch.tensor([[tiny] * 16 + [0.0] * 16, [2.0**-127] * 32, [huge] * 32])
    expected = reference.mx_quantize(x.double().numpy(), "fp4_e2m1", 32)
    assert np.array_equal(round_trip("mxfp4", x).double().numpy(), expected)
    assert expected[0, 0] == tiny and expected[1, 0] == 2.0**-127 and expected[2, 0] == 6 * 2.0**125


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("scale", ["bf16", "fp16", "e4m3"])
def test_signed_max_integers(bits, scale):
    x = varied_rows(12, 256)[2:]
    spec = {"format": "int", "bits": bits, "block_size": 32, "scale": scale}
    expected = reference.signed_max_quantize(x.numpy(), bits, 32, scale)
    assert np.array_equal(round_trip(spec, x).numpy(), expected)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("scale", ["bf16", "fp16"])
def test_asymmetric_integers(bits, scale):
    x = varied_rows(12, 256)[2:] + 3
    spec = {"format": "int", "bits": bits, "block_size": 64, "scale": scale, "symmetric": False}
    expected = reference.asymmetric_quantize(x.numpy(), bits, 64, scale)
    assert np.array_equal(round_trip(spec, x).numpy(), expected)


def test_nvfp4_uses_two_level_scales():
    x = varied_rows(12, 256)[2:]
    blocks = x.numpy().reshape(10, -1, 16)
    amax = np.abs(blocks).max(-1)
    row = amax.max(-1, keepdims=True) * np.float32(1 / (448 * 6))
    stored = reference.round_e4m3(amax * np.float32(1 / 6) * (np.float32(1) / row)) * row
    inverse = np.divide(np.float32(1), stored, out=np.zeros_like(stored), where=stored != 0)[..., None]
    expected = reference.round_to_element(blocks * inverse, "fp4_e2m1") * stored[..., None]
    assert np.array_equal(round_trip("nvfp4", x).numpy(), expected.reshape(10, -1).astype(np.float32))


@pytest.mark.parametrize("element", ["fp3_e2m0", "fp4_e2m1", "fp5_e2m2", "fp6_e2m3"])
def test_the_better_of_two_exponents_is_never_worse_by_block(element):
    x = torch.randn(16, 512, generator=torch.Generator().manual_seed(2))
    spec = {"format": "mx", "element": element}
    squared = [
        ((round_trip({**spec, "scale_rounding": rounding}, x) - x) ** 2).view(16, -1, 32).sum(-1)
        for rounding in ("best", "floor")
    ]
    # Errors are compared to within 1/128 of the coarsest step.
    assert (squared[0] <= squared[1] * 1.01 + 1e-6).all()
    assert squared[0].sum() < squared[1].sum()


@pytest.mark.parametrize("spec", [{"preset": "int4"}, {"preset": "int3"}, {"preset": "nvfp4", "scale_search": True}])
def test_the_scale_search_gains(spec):
    x = torch.randn(16, 1024, generator=torch.Generator().manual_seed(3))
    searched = reference.sqnr_db(x.numpy(), round_trip({**spec, "scale_search": True}, x).numpy())
    plain = reference.sqnr_db(x.numpy(), round_trip({**spec, "scale_search": False}, x).numpy())
    assert searched > plain + 0.2


def test_scale_search_finds_the_least_squared_error_of_its_candidates():
    x = varied_rows(12, 256)[2:]
    blocks = x.numpy().reshape(10, -1, 32).astype(np.float64)
    extreme = np.where(blocks.max(-1) >= -blocks.min(-1), blocks.max(-1), blocks.min(-1))
    candidates = [-extreme / 8 * factor for factor in (1, 0.95, 0.9, 0.85, 0.8)] + [np.abs(blocks).max(-1) / 7]
    errors = []
    for candidate in candidates:
        scale = reference.round_bf16(candidate.astype(np.float32)).astype(np.float64)[..., None]
        codes = np.clip(np.rint(blocks / scale), -8, 7)
        errors.append(((codes * scale - blocks) ** 2).sum(-1))
    spec = {"format": "int", "bits": 4, "scale": "bf16", "scale_search": True}
    measured = ((round_trip(spec, x).numpy().reshape(10, -1, 32) - blocks) ** 2).sum(-1)
    assert (measured <= np.min(errors, axis=0) * 1.01).all()


@pytest.mark.parametrize("size", [32, 64, 128, 256])
def test_the_rotation_is_the_orthonormal_hadamard_matrix(size):
    matrix = np.array([[1.0]])
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    x = torch.randn(5, 512, generator=torch.Generator().manual_seed(4))
    expected = (x.double().numpy().reshape(5, -1, size) @ matrix / np.sqrt(size)).reshape(5, -1)
    assert reference.sqnr_db(expected, hadamard(x, size).numpy()) > 130
    assert reference.sqnr_db(x.numpy(), hadamard(hadamard(x, size), size).numpy()) > 130


def test_rotation_recovers_what_outlier_features_cost():
    x = torch.randn(64, 1024, generator=torch.Generator().manual_seed(5))
    x[:, ::97] *= 40
    plain = reference.sqnr_db(x.numpy(), round_trip("int4", x).numpy())
    rotated = reference.sqnr_db(x.numpy(), round_trip({"preset": "int4", "rotation": 128}, x).numpy())
    assert rotated > plain + 3


@pytest.mark.parametrize(
    ("name", "least_db"),
    [
        # A b-bit uniform quantizer of Gaussian blocks; floors measured once, 0.3 dB below.
        ("int8", 44.2),
        ("int6", 33.1),
        ("int5", 27.0),
        ("int4", 21.2),
        ("int3", 15.3),
        ("int2", 9.1),
        ("mxint8", 41.3),
        ("mxfp8_e4m3", 30.3),
        ("mxfp6_e2m3", 30.6),
        ("mxfp4", 18.5),
        ("nvfp4", 20.1),
    ],
)
def test_presets_keep_their_quality_on_gaussian_data(name, least_db):
    x = torch.randn(64, 4096, generator=torch.Generator().manual_seed(6))
    assert reference.sqnr_db(x.numpy(), round_trip(name, x).numpy()) > least_db
