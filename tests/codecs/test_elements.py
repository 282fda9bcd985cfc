"""Elements against the standard's own tables and a brute-force nearest value."""

import numpy as np
import pytest
import reference
import torch

from megacomp.kernels import ELEMENTS


@pytest.mark.parametrize(
    ("name", "table"),
    [("fp4_e2m1", reference.FP4_E2M1), ("fp6_e2m3", reference.FP6_E2M3), ("fp6_e3m2", reference.FP6_E3M2)],
)
def test_values_are_those_of_the_ocp_tables(name, table):
    values = ELEMENTS[name].dequantize(torch.arange(len(table), dtype=torch.float32))
    assert values.tolist() == table


@pytest.mark.parametrize("name", [name for name in ELEMENTS if name.startswith("fp")])
def test_every_float_code_has_its_value_and_back(name):
    element = ELEMENTS[name]
    positive = reference.element_values(name)
    sign = 2 ** (element.bits - 1)
    codes = torch.tensor([*range(len(positive)), *range(sign + 1, sign + len(positive))], dtype=torch.float32)
    expected = torch.tensor(positive + [-value for value in positive[1:]])
    assert torch.equal(element.dequantize(codes), expected)
    assert torch.equal(element.quantize(expected), codes)


@pytest.mark.parametrize("bits", range(2, 9))
def test_every_integer_code_has_its_value_and_back(bits):
    element = ELEMENTS[f"int{bits}"]
    integers = torch.arange(-(2 ** (bits - 1)) + 1, 2 ** (bits - 1), dtype=torch.float32)
    values = integers / 2 ** (bits - 2)
    assert torch.equal(element.dequantize(element.quantize(values)), values)
    assert element.max_value == values.max()


@pytest.mark.parametrize("name", ELEMENTS)
def test_rounding_is_to_nearest_even_and_saturates(name):
    values = np.array(reference.element_values(name))
    midpoints = (values[1:] + values[:-1]) / 2
    edges = np.concatenate([values, midpoints])
    probes = np.concatenate(
        [
            edges,
            np.nextafter(edges.astype(np.float32), np.float32(np.inf)),
            np.nextafter(edges.astype(np.float32), np.float32(0)),
            values[-1] * np.array([1.01, 1.5, 2, 1e10]),
            np.random.default_rng(0).uniform(0, 1.2 * values[-1], 5000),
            np.array([1e-30, 1e-40]),
        ]
    ).astype(np.float32)
    probes = np.concatenate([probes, -probes])
    element = ELEMENTS[name]
    rounded = element.dequantize(element.quantize(torch.from_numpy(probes)))
    assert np.array_equal(np.abs(rounded.numpy()), np.abs(reference.round_to_element(probes, name)))
    assert not (torch.sign(rounded) * torch.sign(torch.from_numpy(probes)) < 0).any()
