"""Independent definitions in numpy: written from the standards and METHODS, sharing nothing with the package."""

from __future__ import annotations

import numpy as np

# OCP Microscaling Formats (MX) v1.0, tables 2 to 6: the non-negative values, in order of their codes.
FP4_E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
FP6_E2M3 = [i / 8 for i in range(16)] + [2 + i / 4 for i in range(8)] + [4 + i / 2 for i in range(8)]
FP6_E3M2 = (
    [i / 16 for i in range(8)]
    + [0.5 + i / 8 for i in range(4)]
    + [1 + i / 4 for i in range(4)]
    + [2 + i / 2 for i in range(4)]
    + [4 + i for i in range(4)]
    + [8 + 2 * i for i in range(4)]
    + [16 + 4 * i for i in range(4)]
)


def minifloat_values(exponent_bits: int, mantissa_bits: int) -> list[float]:
    """The non-negative values of a minifloat in order of their codes, from (1 + M / 2^m) * 2^(E - bias)."""
    bias = 2 ** (exponent_bits - 1) - 1
    values = []
    for code in range(2 ** (exponent_bits + mantissa_bits)):
        exponent, mantissa = divmod(code, 2**mantissa_bits)
        significand = mantissa / 2**mantissa_bits + (1 if exponent else 0)
        values.append(significand * 2.0 ** (max(exponent, 1) - bias))
    return values


def element_values(name: str) -> list[float]:
    """The non-negative finite values of an element, ascending."""
    if name.startswith("int"):
        bits = int(name[3:])
        return [code * 2.0 ** -(bits - 2) for code in range(2 ** (bits - 1))]
    exponent_bits, mantissa_bits = int(name[-3]), int(name[-1])
    values = minifloat_values(exponent_bits, mantissa_bits)
    if name == "fp8_e4m3":
        return values[:-1]  # S.1111.111 is NaN
    if name == "fp8_e5m2":
        return values[:-4]  # the top exponent is Inf and NaN
    return values


def round_to_element(y: np.ndarray, name: str) -> np.ndarray:
    """Nearest value of the element, ties to the even mantissa (IEEE 754), saturating; float64."""
    values = np.array(element_values(name))
    magnitude = np.abs(y)
    upper = np.clip(np.searchsorted(values, magnitude), 1, len(values) - 1)
    lower = upper - 1
    below, above = magnitude - values[lower], values[upper] - magnitude
    mantissa_bits = 0 if name == "fp3_e2m0" else 1
    # Consecutive codes alternate in parity; without a mantissa both are odd and IEEE 754 takes the larger.
    even_is_upper = (upper % 2 == 0) if mantissa_bits else (upper > 0)
    if not mantissa_bits:
        even_is_upper = upper != 1  # between 0 and the smallest value, 0 is even
    pick_upper = (above < below) | ((above == below) & even_is_upper)
    return np.sign(y) * np.where(pick_upper, values[upper], values[lower])


def emax(name: str) -> int:
    """Exponent of the element's largest value (OCP MX v1.0, section 6.3)."""
    return int(np.floor(np.log2(element_values(name)[-1])))


def mx_quantize(
    x: np.ndarray, element: str, block_size: int, exponent_range: tuple[int, int] = (-127, 127)
) -> np.ndarray:
    """Microscaling with a power-of-two scale by the OCP rules; float64 of ``[rows, features]``."""
    rows, features = x.shape
    padded = np.zeros((rows, -(-features // block_size) * block_size))
    padded[:, :features] = x
    blocks = padded.reshape(rows, -1, block_size)
    amax = np.abs(blocks).max(-1, keepdims=True)
    exponent = np.frexp(amax)[1] - 1 - emax(element)
    exponent = np.clip(np.where(amax > 0, exponent, exponent_range[0]), *exponent_range)
    quantized = round_to_element(blocks * 2.0**-exponent, element) * 2.0**exponent
    return quantized.reshape(rows, -1)[:, :features]


def round_bf16(x: np.ndarray) -> np.ndarray:
    """float32 to bfloat16 precision, nearest, ties to even."""
    bits = x.astype(np.float32).view(np.uint32).astype(np.uint64)
    return (((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 << 16) & 0xFFFFFFFF).astype(np.uint32).view(np.float32)


def round_fp16(x: np.ndarray) -> np.ndarray:
    return np.clip(x, -65504, 65504).astype(np.float16).astype(np.float32)


def round_e4m3(x: np.ndarray) -> np.ndarray:
    return round_to_element(x.astype(np.float64), "fp8_e4m3").astype(np.float32)


ROUND_SCALE = {"bf16": round_bf16, "fp16": round_fp16, "e4m3": round_e4m3}


def signed_max_quantize(x: np.ndarray, bits: int, block_size: int, scale: str) -> np.ndarray:
    """Integer blocks whose extreme lands on the lowest code: scale = -extreme / 2^(bits - 1) (METHODS section 5)."""
    rows, features = x.shape
    blocks = x.astype(np.float32).reshape(rows, -1, block_size)
    lowest = np.float32(2 ** (bits - 1))
    highest, least = blocks.max(-1), blocks.min(-1)
    extreme = np.where(highest >= -least, highest, least)
    exact = -extreme / lowest
    if scale == "e4m3":
        row = np.abs(blocks).max((1, 2))[:, None] * np.float32(1 / (448 * 2 ** (bits - 1)))
        inverse_row = np.divide(np.float32(1), row, out=np.zeros_like(row), where=row > 0)
        stored = round_e4m3(exact * inverse_row) * row
    else:
        stored = ROUND_SCALE[scale](exact)
    inverse = np.divide(np.float32(1), stored, out=np.zeros_like(stored), where=stored != 0)[..., None]
    codes = np.clip(np.rint(blocks * inverse), -lowest, lowest - 1)
    return (codes * stored[..., None]).reshape(rows, features)


def asymmetric_quantize(x: np.ndarray, bits: int, block_size: int, scale: str) -> np.ndarray:
    """Integer blocks between a stored minimum and maximum."""
    rows, features = x.shape
    blocks = x.astype(np.float32).reshape(rows, -1, block_size)
    steps = np.float32(2**bits - 1)
    step = np.float32(1 / (2**bits - 1))
    stored = ROUND_SCALE[scale](blocks.max(-1) * step - blocks.min(-1) * step)
    minimum = ROUND_SCALE[scale](blocks.min(-1))[..., None]
    inverse = np.divide(np.float32(1), stored, out=np.zeros_like(stored), where=stored != 0)[..., None]
    codes = np.clip(np.rint((blocks - minimum) * inverse), 0, steps)
    return (codes * stored[..., None] + minimum).reshape(rows, features)


def sqnr_db(exact: np.ndarray, approximate: np.ndarray) -> float:
    """Signal to quantization noise ratio in dB."""
    noise = ((exact.astype(np.float64) - approximate.astype(np.float64)) ** 2).sum()
    return float(10 * np.log10((exact.astype(np.float64) ** 2).sum() / noise))
