"""Tables against an independent numpy reading of arXiv 2411.07942, and searched scales against a dense grid."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "codecs"))
import reference
from torch_defaults import default_dtype

from megacomp import codecs
from megacomp.calibration import Statistics, tables_of
from megacomp.codecs import StaticCodec
from megacomp.kernels import StaticTables

Messages = Sequence[Sequence[np.ndarray]]
"""The float32 partials [rows, features] of every rank, message by message."""


class _Site(NamedTuple):
    name: str = "layers.0.mlp"


def static(spec: Any) -> StaticCodec:
    made = codecs.get(spec, backend="reference")
    assert isinstance(made, StaticCodec)
    return made


def statistics_of(messages: Messages, *calibrated: StaticCodec) -> Statistics:
    statistics = Statistics(calibrated)
    for index in range(statistics.passes):
        if index:
            statistics.next_pass()
        for partials in messages:
            for rank, partial in enumerate(partials):
                statistics.partial(_Site(), rank, len(partials), torch.from_numpy(partial))
            statistics.total(_Site(), torch.from_numpy(sum_of(partials)))
    statistics.finish()
    return statistics


def sum_of(partials: Sequence[np.ndarray]) -> np.ndarray:
    return np.sum(np.stack(partials), axis=0)


def messages(features: int, ranks: int, rows: Sequence[int], seed: int = 0) -> list[list[np.ndarray]]:
    """Features of unequal widths, means and tails, in rows of unequal size; the same on every rank, values aside."""
    generator = np.random.default_rng(seed)
    width = np.exp(generator.normal(size=features))
    mean = np.where(generator.random(features) < 0.2, 3.0, 0.0)

    def partial(count: int) -> np.ndarray:
        normal = generator.normal(size=(count, features))
        heavy = generator.laplace(size=(count, features))
        values = np.where(np.arange(features) % 3 == 0, heavy, normal) + mean
        return (values * width * np.exp(generator.normal(size=(count, 1)) / 2)).astype(np.float32)

    return [[partial(count) for _ in range(ranks)] for count in rows]


def paper_tables(senders: Sequence[Sequence[np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """(scale float32 [senders, features], kept) of each sender's messages, METHODS section 3."""
    extremes = []
    for sent in senders:
        exact = [x.astype(np.float64) for x in sent]
        low, high = exact[0].min(0), exact[0].max(0)
        for x in exact[1:]:
            low = (1 - 0.01) * low + 0.01 * x.min(0)
            high = (1 - 0.01) * high + 0.01 * x.max(0)
        extremes.append(np.maximum(np.abs(low), np.abs(high)))
    scale = (np.stack(extremes) / 7).astype(np.float32)
    ranges = np.sum([2 * extreme for extreme in extremes], axis=0)
    features = len(ranges)
    order = sorted(range(features), key=lambda feature: (-ranges[feature], feature))
    return scale, np.sort(order[: features // 64])


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("features", [64, 200, 256])
def test_the_published_rule_bit_for_bit(features: int, ranks: int) -> None:
    calibration = messages(features, ranks, [40, 1, 25, 60])
    codec = static("static4_paper")
    partials, total = tables_of(statistics_of(calibration, codec), codec, _Site().name)
    scale, kept = paper_tables([[message[rank] for message in calibration] for rank in range(ranks)])
    assert np.array_equal(partials.scale.numpy(), scale) and np.array_equal(partials.kept.numpy(), kept)
    scale, kept = paper_tables([[sum_of(message) for message in calibration]])
    assert np.array_equal(total.scale.numpy(), scale) and np.array_equal(total.kept.numpy(), kept)
    assert partials.offset is partials.weight is total.offset is total.weight is None
    assert len(kept) == features // 64


def test_the_default_dtype_of_torch_decides_nothing() -> None:
    codec, calibration = static("static4"), messages(64, 2, [40, 25])
    expected = tables_of(statistics_of(calibration, codec), codec, _Site().name)
    with default_dtype(torch.float16):
        found = tables_of(statistics_of(calibration, codec), codec, _Site().name)
    assert [tables.digest for tables in found] == [tables.digest for tables in expected]


def test_of_equal_ranges_the_first_features_are_kept() -> None:
    calibration = messages(256, 2, [30, 30])
    for message in calibration:
        for x in message:
            x[:, 150] = 1000
            x[:, [200, 61, 20, 90]] = 50 * np.abs(x[:, 3:4]) + 100
    codec = static("static4_paper")
    kept = tables_of(statistics_of(calibration, codec), codec, _Site().name)[0].kept
    assert kept.tolist() == [20, 61, 90, 150]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_published_codes_and_their_sum(dtype: torch.dtype) -> None:
    features, ranks = 256, 3
    calibration = messages(features, ranks, [50, 50])
    codec = static("static4_paper")
    tables, sum_tables = tables_of(statistics_of(calibration, codec), codec, _Site().name)
    codec = codec.calibrated(tables, sum_tables)
    scale, kept = tables.scale.numpy(), tables.kept.numpy()
    quantized = np.setdiff1d(np.arange(features), kept)
    # Beyond what was seen, so that codes saturate at both ends; whole and half steps.
    (fresh,) = messages(features, ranks, [80], seed=1)
    fresh[0][:16] = np.arange(-8, 8)[:, None] * scale[0]
    fresh[1][:16] = (np.arange(-8, 8)[:, None] + 0.5) * scale[1]
    inputs = [torch.from_numpy(2 * x).to(dtype) for x in fresh]
    total = np.zeros((80, features), np.float32)
    wires = []
    for rank, x in enumerate(inputs):
        wire = codec.sender(rank).encode(x)
        wires.append(wire)
        values = x.float().numpy()
        codes = np.clip(np.rint(values / scale[rank]), -8, 7)
        assert codes.min() == -8 and codes.max() == 7
        packed = wire.numpy()[:, : features // 2]
        # Low halves of the bytes hold the first half of the features.
        found = np.concatenate([packed & 15, packed >> 4], axis=1).astype(np.int64) - 8
        assert np.array_equal(found[:, quantized], codes[:, quantized])
        decoded = np.where(np.isin(np.arange(features), kept), reference.round_bf16(values), codes * scale[rank])
        total = total + decoded.astype(np.float32)
    result = codec.decode_sum(torch.stack(wires), features, torch.float32)
    assert np.array_equal(result.numpy(), total)
    again = codec.summed.decode(codec.summed.encode(result), features, torch.float32).numpy()
    codes = np.clip(np.rint(total / sum_tables.scale[0].numpy()), -8, 7) * sum_tables.scale[0].numpy()
    kept_sums = np.isin(np.arange(features), sum_tables.kept.numpy())
    assert np.array_equal(again, np.where(kept_sums, reference.round_bf16(total), codes))


def test_the_published_bits() -> None:
    assert static("static4_paper").bits_per_value(4096) == 4.1875


def row_scales(tables: StaticTables, sender: int, x: np.ndarray) -> np.ndarray:
    """What each row of x is divided by, [rows, 1]."""
    if tables.weight is None:
        return np.ones((len(x), 1), np.float32)
    return reference.round_bf16((np.abs(x) * tables.weight[sender].numpy()).max(1, keepdims=True))


def squared_errors(x: np.ndarray, rows: np.ndarray, bits: int, scale: np.ndarray, offset: np.ndarray) -> np.ndarray:
    """Of quantizing x [rows, features] in steps of scale from offset, float64 [features]."""
    lowest = 2 ** (bits - 1)
    steps = np.clip(np.rint((x / rows - offset) / scale), -lowest, lowest - 1)
    return (((steps * scale + offset) * rows - x).astype(np.float64) ** 2).sum(0)


@pytest.mark.parametrize("row_scale", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
def test_searched_scales_are_as_good_as_any(bits: int, symmetric: bool, row_scale: bool) -> None:
    features, outliers = 24, 3
    options = {"bits": bits, "outlier_features": outliers, "symmetric": symmetric, "row_scale": row_scale}
    codec = static({"format": "static", "range": "search", **options})
    calibration = messages(features, 2, [300, 200, 400])
    found = tables_of(statistics_of(calibration, codec), codec, _Site().name)
    senders = [[np.concatenate([message[rank] for message in calibration]) for rank in range(2)]]
    senders.append([np.concatenate([sum_of(message) for message in calibration])])
    for tables, values in zip(found, senders, strict=True):
        assert (tables.offset is None) == symmetric and (tables.weight is None) == (not row_scale)
        residual = np.zeros(features)
        for sender, x in enumerate(values):
            rows = row_scales(tables, sender, x)
            offset = np.zeros(features, np.float32) if tables.offset is None else tables.offset[sender].numpy()
            mine = squared_errors(x, rows, bits, tables.scale[sender].numpy(), offset)
            residual += mine
            best = np.full(features, np.inf)
            reach = np.abs(x / rows).max(0) / (2 ** (bits - 1) - 1)
            for factor in np.geomspace(1 / 30, 1.4, 120).astype(np.float32):
                # Steps at whole multiples of the scale, or half a step beside them.
                for shift in (0, factor / 2)[: 1 if symmetric else 2]:
                    best = np.minimum(best, squared_errors(x, rows, bits, factor * reach, shift * reach))
            # With many bits hardly anything is clipped, errors go with the square of the scale, and steps of 3 % tell.
            assert (mine / best).max() < (1.03 if bits <= 5 else 1.12) and (mine / best).mean() < 1.02
            if row_scale:
                square = (x.astype(np.float64) ** 2).mean(0)
                rms = np.sqrt(np.maximum(square, 1e-4 * square.mean()))
                assert np.allclose(tables.weight[sender].numpy(), 1 / rms, rtol=1e-6)
        assert set(tables.kept.tolist()) == set(np.argsort(-residual)[:outliers].tolist())


def test_searched_scales_beat_the_published_ones_where_there_are_tails() -> None:
    calibration = messages(64, 2, [400])
    searched = static({"format": "static", "outlier_features": 1 / 64, "symmetric": True, "row_scale": False})
    published = static("static4_paper")
    statistics = statistics_of(calibration, searched, published)
    noise = []
    for codec in (searched, published):
        codec = codec.calibrated(*tables_of(statistics, codec, _Site().name))
        partials = [torch.from_numpy(x) for x in calibration[0]]
        wires = torch.stack([codec.sender(rank).encode(x) for rank, x in enumerate(partials)])
        noise.append((codec.decode_sum(wires, 64, torch.float32) - sum(partials)).square().sum().item())
    assert noise[0] < 0.8 * noise[1]


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_asymmetric_ranges_reach_from_the_lowest_to_the_highest(bits: int) -> None:
    options = {"bits": bits, "range": "minmax_ema", "symmetric": False, "row_scale": False, "outlier_features": 2}
    codec = static({"format": "static", **options})
    calibration = messages(64, 2, [50])
    for x in calibration[0]:
        x[:, 5], x[:, 6] = 0, -4
    tables, sum_tables = tables_of(statistics_of(calibration, codec), codec, _Site().name)
    for found, values in ((tables, calibration[0]), (sum_tables, [sum_of(calibration[0])])):
        assert found.offset is not None
        for sender, x in enumerate(values):
            scale, offset = found.scale[sender].double().numpy(), found.offset[sender].double().numpy()
            tolerance = 1e-6 * np.abs(x).max(0) + 1e-30
            assert (np.abs(offset - 2 ** (bits - 1) * scale - x.min(0)) <= tolerance).all()
            assert (np.abs(offset + (2 ** (bits - 1) - 1) * scale - x.max(0)) <= tolerance).all()


SPECS: tuple[Any, ...] = ("static4_paper", {"format": "static", "bits": 3, "outlier_features": 2})


@pytest.mark.parametrize("spec", SPECS)
def test_rows_with_nan_or_inf_count_for_nothing(spec: Any) -> None:
    codec = static(spec)
    whole, dirty = messages(64, 2, [30, 20]), messages(64, 2, [30, 20])
    dirty[0][0][4, 7], dirty[0][1][9, 0], dirty[1][1][3, 60] = np.nan, np.inf, -np.inf
    bad = [[4, 9], [3]]
    # A partial is left out where it is bad itself, their sum where any of them is.
    for message, (first, second) in zip(whole, ([[4], [9]], [[], [3]]), strict=True):
        message[0], message[1] = np.delete(message[0], first, 0), np.delete(message[1], second, 0)
    statistics = statistics_of(dirty, codec)
    expected = Statistics([codec])
    for index in range(expected.passes):
        if index:
            expected.next_pass()
        for clean, message, rows in zip(whole, dirty, bad, strict=True):
            for rank, x in enumerate(clean):
                expected.partial(_Site(), rank, 2, torch.from_numpy(x))
            expected.total(_Site(), torch.from_numpy(np.delete(sum_of(message), rows, 0)))
    got, wanted = (tables_of(each, codec, _Site().name) for each in (statistics, expected))
    assert [tables.digest for tables in got] == [tables.digest for tables in wanted]
    assert statistics.skipped_rows == 3 and expected.skipped_rows == 0
    assert statistics.unseen == ()


def test_who_gives_nothing_but_nan_is_named() -> None:
    nothing = messages(64, 2, [3])
    nothing[0][1][:] = np.nan
    statistics = statistics_of(nothing, static("static4"))
    assert statistics.unseen == ((_Site().name, "1"), (_Site().name, "sum"))


@pytest.mark.parametrize("spec", SPECS)
def test_silence_gives_usable_tables(spec: Any) -> None:
    codec = static(spec)
    quiet = messages(64, 2, [20])
    quiet[0][0][:], quiet[0][1][:, 11] = 0, 0
    codec = codec.calibrated(*tables_of(statistics_of(quiet, codec), codec, _Site().name))
    for rank, x in enumerate(quiet[0]):
        decoded = codec.sender(rank).encode(torch.from_numpy(x))
        alone = codec.decode_sum(torch.stack([decoded, decoded]), 64, torch.float32)
        assert alone.isfinite().all()
    zeros = torch.zeros(3, 64)
    wires = torch.stack([codec.sender(rank).encode(zeros) for rank in range(2)])
    assert codec.decode_sum(wires, 64, torch.float32).abs().max() < 1e-3 * np.abs(quiet[0][1]).max()


@pytest.mark.parametrize("spec", SPECS)
def test_statistics_go_on_from_their_state(spec: Any) -> None:
    """Whenever they are interrupted, and when each rank's are gathered by a process of its own."""
    codec, calibration = static(spec), messages(64, 2, [20, 30, 10])
    expected = [tables.digest for tables in tables_of(statistics_of(calibration, codec), codec, _Site().name)]
    apart = [Statistics([codec]) for _ in range(2)]
    statistics = Statistics([codec])
    for index in range(statistics.passes):
        for each in (statistics, *apart):
            if index:
                each.next_pass()
        for message in calibration:
            renewed = Statistics([codec])
            renewed.merge(statistics.state())
            statistics = renewed
            for rank, x in enumerate(message):
                for each in (statistics, apart[rank]):
                    each.partial(_Site(), rank, 2, torch.from_numpy(x))
            for each in (statistics, *apart):
                each.total(_Site(), torch.from_numpy(sum_of(message)))
    assert [tables.digest for tables in tables_of(statistics, codec, _Site().name)] == expected
    for each in apart:
        each.finish()
    apart[0].merge(apart[1].state())
    assert [tables.digest for tables in tables_of(apart[0], codec, _Site().name)] == expected
