"""The wire of static codecs, read and written in numpy from docs/codecs.md, sharing nothing with the package."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

SMALLEST_NORMAL = np.float32(2.0**-126)
NAN_BF16 = 0x7FC0


@dataclass(frozen=True)
class Numbers:
    """What is known of one rank's partials: float32 ``[features]``, ``offset`` and ``weight`` or None; and ``kept``."""

    bits: int
    scale: np.ndarray
    offset: np.ndarray | None
    weight: np.ndarray | None
    kept: np.ndarray


def bf16_bits(x: np.ndarray) -> np.ndarray:
    """uint32 bits of finite float32 as BF16: to nearest, ties to even, saturating, zeros positive."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32).astype(np.uint64)
    magnitude = bits & 0x7FFFFFFF
    rounded = np.minimum((magnitude + 0x7FFF + (magnitude >> 16 & 1)) >> 16, 0x7F7F)
    return np.where(rounded == 0, 0, rounded | (bits >> 31) << 15).astype(np.uint32)


def bf16_values(bits: np.ndarray) -> np.ndarray:
    """float32 of such bits."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def plane_widths(bits: int) -> list[int]:
    return [width for width in (8, 4, 2, 1) if bits & width]


def padded(count: int, bits: int) -> int:
    """How many codes ``count`` codes are packed as."""
    multiple = 8 // plane_widths(bits)[-1]
    return -(-count // multiple) * multiple


def packed(codes: np.ndarray, bits: int) -> list[np.ndarray]:
    """The planes of ``codes [rows, padded]``."""
    planes = []
    for width in plane_widths(bits):
        size = codes.shape[1] * width // 8
        plane = np.zeros((len(codes), size), np.uint32)
        for slot in range(8 // width):
            plane |= (codes[:, slot * size : (slot + 1) * size] & (2**width - 1)) << (slot * width)
        planes.append(plane.astype(np.uint8))
        codes = codes >> width
    return planes


def unpacked(row: np.ndarray, start: int, count: int, bits: int) -> tuple[np.ndarray, int]:
    """(the first ``count`` codes packed from byte ``start`` of every row on, where they end)."""
    codes = np.zeros((len(row), padded(count, bits)), np.uint32)
    shift = 0
    for width in plane_widths(bits):
        size = codes.shape[1] * width // 8
        for slot in range(8 // width):
            field = row[:, start : start + size].astype(np.uint32) >> (slot * width) & (2**width - 1)
            codes[:, slot * size : (slot + 1) * size] |= field << shift
        start, shift = start + size, shift + width
    return codes[:, :count], start


def encode(x: np.ndarray, numbers: Numbers) -> np.ndarray:
    """The wire, uint8, of float32 ``x [rows, features]``."""
    bits, kept = numbers.bits, numbers.kept
    rows, features = x.shape
    finite = np.isfinite(x).all(1)[:, None]
    values = np.where(finite, x, np.float32(0))
    row_scale = None
    if numbers.weight is not None:
        row_scale = bf16_bits((np.abs(values) * numbers.weight).max(1, keepdims=True))
        stored = bf16_values(row_scale)
        inverse = np.divide(np.float32(1), stored, out=np.zeros_like(stored), where=stored >= SMALLEST_NORMAL)
        values = values * inverse
    if numbers.offset is not None:
        values = values - numbers.offset
    zero = 2 ** (bits - 1)
    steps = np.clip(np.rint(values / numbers.scale), -zero, zero - 1)
    codes = np.full((rows, padded(features, bits)), zero, np.uint32)
    codes[:, :features] = (steps + zero).astype(np.uint32)
    outliers = np.where(finite, bf16_bits(np.where(finite, x, 0)[:, kept]), NAN_BF16)
    codes[:, kept] = outliers & (2**bits - 1)
    rest = np.zeros((rows, padded(len(kept), 16 - bits)), np.uint32)
    rest[:, : len(kept)] = outliers >> bits
    parts = [*packed(codes, bits), *packed(rest, 16 - bits)]
    if row_scale is not None:
        parts.append(np.zeros((rows, sum(part.shape[1] for part in parts) % 2), np.uint8))
        parts.append(np.where(finite, row_scale, NAN_BF16).astype("<u2").view(np.uint8))
    parts.append(np.zeros((rows, -sum(part.shape[1] for part in parts) % 8), np.uint8))
    return np.concatenate(parts, 1)


def decode(wire: np.ndarray, numbers: Numbers) -> np.ndarray:
    """float32 ``[rows, features]`` of a wire."""
    bits, kept = numbers.bits, numbers.kept
    codes, end = unpacked(wire, 0, len(numbers.scale), bits)
    rest, end = unpacked(wire, end, len(kept), 16 - bits)
    values = (codes.astype(np.float32) - np.float32(2 ** (bits - 1))) * numbers.scale
    if numbers.offset is not None:
        values = values + numbers.offset
    if numbers.weight is not None:
        end += end % 2
        values = values * bf16_values(np.ascontiguousarray(wire[:, end : end + 2]).view("<u2"))
    values[:, kept] = bf16_values(rest << bits | codes[:, kept])
    return values
