"""Static codecs: what they need to know, what they say when they do not, and their way through the collectives."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rank_pool import RankPool
from static_cases import calibrated, tables
from torch._dynamo.testing import CompileCounterWithBackend
from torch_defaults import default_dtype

from megacomp import codecs
from megacomp.codecs import Codec, StaticCodec
from megacomp.collectives import Route, all_reduce, all_reduce_norm, reduce_scatter
from megacomp.collectives.route import route_from_key
from megacomp.kernels import StaticTables, add_norm

SPECS: list[Any] = [
    "static4",
    "static4_paper",
    {"format": "static", "bits": 3, "outlier_features": 2, "symmetric": True},
]
FEATURES = 100
EPS = 1e-3


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Equal dtype, shape and bits; a NaN equals a NaN of the same bits only."""
    return left.dtype == right.dtype and torch.equal(
        left.contiguous().view(torch.uint8), right.contiguous().view(torch.uint8)
    )


def values(rows: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(rows, FEATURES, generator=torch.Generator().manual_seed(seed)).to(dtype)


def wires_of(codec: Codec, partials: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack([codec.sender(rank).encode(x) for rank, x in enumerate(partials)])


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_before_calibration_it_knows_sizes_and_nothing_else(spec: Any) -> None:
    codec = codecs.get(spec)
    assert isinstance(codec, StaticCodec) and codec.static and not codecs.get("mxfp4").static
    assert codec.row_bytes(4096) % 8 == 0 and codec.summed.row_bytes(4096) == codec.row_bytes(4096)
    assert codecs.get(codec.spec) == codec == codecs.from_key(codec.key)
    wire = torch.zeros(3, codec.row_bytes(FEATURES), dtype=torch.uint8)
    calls: list[Callable[[], object]] = [
        lambda: codec.encode(values(3)),
        lambda: codec.decode(wire, FEATURES, torch.float32),
        lambda: codec.decode_sum(wire[None], FEATURES, torch.float32),
        lambda: codec.decode_sum_encode(wire[None], FEATURES, codecs.get("mxfp4")),
        lambda: codec.sender(0),
        lambda: codec.summed.sender(0),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=f"codec {codec.name} is not calibrated: .*megacomp calibrate"):
            call()


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_defaults_of_torch_decide_nothing(spec: Any) -> None:
    codec, partials = calibrated(spec, FEATURES, 2), [values(3), values(3, 1)]
    wires = wires_of(codec, partials)
    total = codec.decode_sum(wires, FEATURES, torch.float32)
    for defaults in (default_dtype(torch.float16), default_dtype(torch.float64), torch.device("meta")):
        with defaults:
            again = wires_of(codec, partials)
            assert torch.equal(again, wires)
            assert torch.equal(codec.decode_sum(again, FEATURES, torch.float32), total)


def test_other_ranks_and_features_than_it_was_calibrated_for_are_refused() -> None:
    codec = calibrated("static4", FEATURES, 2)
    wires = wires_of(codec, [values(3), values(3, 1)])
    with pytest.raises(ValueError, match=r"encodes for one rank: take codec.sender\(rank\)"):
        codec.encode(values(3))
    for rank in (-1, 2):
        with pytest.raises(ValueError, match=f"calibrated for 2 ranks; there is no rank {rank}"):
            codec.sender(rank)
    with pytest.raises(ValueError, match="calibrated for 100 features, not 64"):
        codec.sender(0).encode(values(3)[:, :64])
    with pytest.raises(ValueError, match="calibrated for 100 features, not 98"):
        codec.decode_sum(wires[..., : codec.row_bytes(98)], 98, torch.float32)
    for wrong in (wires[:1], wires[[0, 1, 1]]):
        with pytest.raises(ValueError, match=f"calibrated for 2 ranks, not {len(wrong)}"):
            codec.decode_sum(wrong, FEATURES, torch.float32)
    with pytest.raises(ValueError, match="calibrated for 1 ranks, not 2"):
        codec.summed.decode_sum(wires, FEATURES, torch.float32)


def _with(name: str, value: Any) -> Callable[[StaticTables], StaticTables]:
    """Tables with one of them changed: to a value, or by a function."""

    def change(given: StaticTables) -> StaticTables:
        names = ("scale", "offset", "weight", "kept")
        parts = {part: getattr(given, part) for part in names}
        parts[name] = value(parts[name].clone()) if callable(value) else value
        return StaticTables(**parts)

    return change


def _at(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def put(table: torch.Tensor) -> torch.Tensor:
        table[0, 3] = value
        return table

    return put


@pytest.mark.parametrize(
    ("spec", "change", "message"),
    [
        ("static4", _with("offset", None), "tables.offset: codec static4 needs one"),
        ("static4", _with("weight", None), "tables.weight: codec static4 needs one"),
        ("static4_paper", _with("offset", torch.zeros(2, FEATURES)), "tables.offset: codec static4_paper has none"),
        ("static4_paper", _with("weight", torch.ones(2, FEATURES)), "tables.weight: codec static4_paper has none"),
        ("static4", _with("scale", lambda table: table.double()), r"tables.scale must be float32 \[2, 100\]"),
        ("static4", _with("offset", lambda table: table[:1]), r"tables.offset must be float32 \[2, 100\]"),
        ("static4", _with("weight", lambda table: table[:, 1:]), r"tables.weight must be float32 \[2, 100\]"),
        ("static4", _with("scale", _at(torch.inf)), "tables.scale must be finite"),
        ("static4", _with("offset", _at(torch.nan)), "tables.offset must be finite"),
        ("static4", _with("scale", _at(0.0)), "tables.scale must be positive"),
        ("static4", _with("scale", _at(2.0**-127)), "tables.scale must be positive, and no subnormal"),
        ("static4", _with("weight", _at(-1.0)), "tables.weight must be positive"),
        ("static4", _with("kept", torch.tensor([1, 2])), r"tables.kept must be int64 \[1\], not torch.int64 \[2\]"),
        ("static4", _with("kept", lambda kept: kept.int()), r"tables.kept must be int64 \[1\], not torch.int32 \[1\]"),
        ({"preset": "static4", "outlier_features": 101}, lambda given: given, "keeps 101 outlier features, of 100"),
        ({"preset": "static4_paper", "outlier_features": 0.001}, lambda given: given, "nothing could tell NaN"),
    ],
)
def test_tables_that_do_not_fit_are_named(spec: Any, change: Callable[..., StaticTables], message: str) -> None:
    codec = codecs.get(spec)
    assert isinstance(codec, StaticCodec)
    few = replace(codec.format, outlier_features=min(1, codec.format.outliers(FEATURES)))
    partials, of_sum = tables(few, FEATURES, 2), tables(few, FEATURES)
    with pytest.raises(ValueError, match=message):
        codec.calibrated(change(partials), of_sum)
    if "[2" not in message:
        with pytest.raises(ValueError, match=message.replace("tables.", "sum_tables.")):
            codec.calibrated(partials, change(of_sum)) if "tables." in message else codec.calibrated(
                change(partials), of_sum
            )


def test_tables_of_the_sum_are_for_one_sender_and_as_many_features() -> None:
    codec = codecs.get("static4")
    assert isinstance(codec, StaticCodec)
    format = codec.format
    for of_sum in (tables(format, FEATURES, 2), tables(format, 200)):
        with pytest.raises(ValueError, match="sum_tables must be for one sender and 100 features, not"):
            codec.calibrated(tables(format, FEATURES, 2), of_sum)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_senders_and_sums(spec: Any) -> None:
    codec = calibrated(spec, FEATURES, 3)
    assert codec.tables is not None and codec.sum_tables is not None
    senders = [codec.sender(rank) for rank in range(3)]
    assert [sender.rank for sender in senders] == [0, 1, 2] and len(set(senders)) == 3
    assert all(codec.sender(rank) is sender for rank, sender in enumerate(senders))
    assert senders[2].sender(0) == senders[0]
    summed = codec.summed
    assert summed.tables is codec.sum_tables and all(summed.sender(rank) is summed for rank in range(3))
    assert summed.summed == summed and senders[1].summed == summed
    x = values(5)
    assert not torch.equal(senders[0].encode(x), senders[1].encode(x))
    decoded = summed.decode(summed.encode(x), FEATURES, torch.float32)
    assert torch.equal(decoded[:, codec.sum_tables.kept], x.float()[:, codec.sum_tables.kept])
    # Where partials and sum are the same: one rank.
    alone = codec.calibrated(codec.sum_tables, codec.sum_tables)
    assert torch.equal(alone.sender(0).encode(x), summed.encode(x))


def test_a_key_finds_a_codec_as_long_as_one_is_there() -> None:
    codec = calibrated("static4", FEATURES, 2)
    for one in (codec, codec.sender(1), codec.summed, codec.with_backend("triton")):
        found = codecs.from_key(one.key)
        assert found == one and found.backend == one.backend and json.loads(one.key)["spec"] == dict(one.spec)
        route = Route(one, None, "two_shot", 3)
        assert route_from_key(route.key) == route
    # Equal codecs are one by their key, whichever of them goes first.
    first = calibrated("static4", FEATURES, 2, seed=7)
    second, third = (calibrated("static4", FEATURES, 2, seed=7) for _ in range(2))
    key = first.key
    assert first == second and hash(first) == hash(second) and first is not second
    del third
    gc.collect()
    assert codecs.from_key(key) == second
    del first
    gc.collect()
    assert codecs.from_key(key) == second
    del second
    gc.collect()
    with pytest.raises(KeyError):
        codecs.from_key(key)


def test_codecs_are_equal_by_what_they_know() -> None:
    codec = calibrated("static4", FEATURES, 2)
    assert codec == calibrated("static4", FEATURES, 2) and hash(codec) == hash(calibrated("static4", FEATURES, 2))
    assert len({codec, codecs.get("static4"), calibrated("static4", FEATURES, 2, seed=1), codec.sender(0)}) == 4
    assert codec != codec.with_backend("triton") and codec.with_backend("reference") is codec
    assert codecs.get(codec, backend="triton").backend == "triton"
    assert str(codec) == codec.name == "static4"


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ("static4_paper", "static4_paper"),
        ({"format": "static"}, "static4"),
        (
            {"preset": "static4_paper", "range": "search", "row_scale": True, "symmetric": False},
            "static4-o0.015625-search-row",
        ),
        ({"format": "static", "bits": 3, "outlier_features": 2}, "static3-o2-search-row"),
        ({"preset": "static4_paper", "bits": 8}, "static8-o0.015625-minmax_ema-symmetric"),
    ],
)
def test_names(spec: Any, name: str) -> None:
    assert codecs.get(spec).name == name
    assert {"static4", "static4_paper"} == set(codecs.presets(static=True))
    assert not set(codecs.presets(static=True)) & set(codecs.presets())


@pytest.mark.parametrize(
    ("options", "key", "message"),
    [
        ({"bits": 9}, "bits", "allowed: 2, 3, 4, 5, 6, 7, 8"),
        ({"bits": True}, "bits", "True is not allowed"),
        ({"range": "serach"}, "range", "did you mean 'search'"),
        ({"symmetric": 1}, "symmetric", "1 is not allowed"),
        ({"row_scale": None}, "row_scale", "None is not allowed"),
        ({"outlier_features": -1}, "outlier_features", "-1 is not allowed"),
        ({"outlier_features": 1.0}, "outlier_features", "no share of the features"),
        ({"outlier_features": True}, "outlier_features", "True is not allowed"),
        ({"outlier_features": "64"}, "outlier_features", "'64' is not allowed"),
        ({"outlier_features": float("nan")}, "outlier_features", "nan"),
        ({"outlier_features": float("inf")}, "outlier_features", "no share of the features"),
        ({"range": "minmax_ema"}, "row_scale", "know no row scales"),
        ({"row_scale": False, "outlier_features": 0}, "outlier_features", "only an outlier feature could tell NaN"),
        ({"rotation": 64}, "rotation", "unknown option"),
        ({"block_size": 32}, "block_size", "unknown option"),
    ],
)
def test_a_wrong_option_is_named(options: dict[str, Any], key: str, message: str) -> None:
    with pytest.raises(codecs.CodecError, match=message) as error:
        codecs.get({"format": "static", **options})
    assert error.value.key == key


def gather_codecs(codec: StaticCodec) -> Iterator[tuple[Codec, Codec]]:
    """(codec, gather codec) of every kind: static to static, static to block, block to static."""
    block = codecs.get("int6", backend="reference")
    yield codec, codec.summed
    yield codec, block
    yield block, codec.summed


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_decode_sum_encode_gives_the_bits_of_its_two_steps(spec: Any) -> None:
    for codec, gather_codec in gather_codecs(calibrated(spec, FEATURES, 2)):
        wires = wires_of(codec, [values(7), values(7, 1)])
        expected = gather_codec.encode(codec.decode_sum(wires, FEATURES, torch.float32))
        for sums in (None, torch.full((3, FEATURES), torch.nan)):
            assert torch.equal(codec.decode_sum_encode(wires, FEATURES, gather_codec, sums=sums), expected)
        none = codec.decode_sum_encode(wires[:, :0], FEATURES, gather_codec)
        assert none.shape == (0, gather_codec.row_bytes(FEATURES))


def test_reduce_norm_is_the_norm_of_the_sum() -> None:
    codec = calibrated("static4", FEATURES, 2)
    wires = wires_of(codec, [values(7), values(7, 1)])
    residual, weight, bias = values(7, 2), torch.linspace(0.5, 2, FEATURES).bfloat16(), values(1, 3)[0]
    found, expected = ((torch.empty_like(residual), torch.empty_like(residual)) for _ in range(2))
    codec.reduce_norm(wires, residual, weight, EPS, *found, bias=bias)
    add_norm(codec.decode_sum(wires, FEATURES, torch.float32), residual, weight, EPS, *expected, bias)
    assert all(map(same_bits, found, expected))


@pytest.mark.parametrize("spec", SPECS[:2], ids=str)
def test_torch_compile_passes_through(spec: Any) -> None:
    codec = calibrated(spec, FEATURES, 2)
    sender = codec.sender(1)
    x = values(6)
    wires = wires_of(codec, [x, -x])
    torch.library.opcheck(torch.ops.megacomp.encode, (x, sender.key))
    torch.library.opcheck(torch.ops.megacomp.decode_sum, (wires, codec.key, FEATURES, torch.bfloat16))
    torch.library.opcheck(torch.ops.megacomp.decode_sum_encode, (wires, codec.key, FEATURES, codec.summed.key))

    def layer(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        wires = torch.stack([codec.sender(0).encode(x * 2), sender.encode(x)])
        passed_on = codec.decode_sum_encode(wires, FEATURES, codec.summed)
        return codec.decode_sum(wires, FEATURES, torch.bfloat16) + 1, passed_on

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    function = torch.compile(layer, fullgraph=True, backend=counter)
    for rows in (4, 6, 9):
        for left, right in zip(function(values(rows)), layer(values(rows)), strict=True):
            assert same_bits(left, right)
    assert counter.frame_count <= 2


# Over real ranks


@dataclass(frozen=True)
class Case:
    """One call. `codec`, `gather_codec`: specifications; static ones get tables that were made up."""

    codec: Any = "static4"
    gather_codec: Any = None
    algorithm: Any = "auto"
    chunks: Any = "auto"
    dtype: torch.dtype = torch.bfloat16
    rows: int = 12

    def route(self, ranks: int) -> Route:
        def made(spec: Any, seed: int) -> Codec:
            codec = codecs.get(spec, backend="reference")
            return calibrated(spec, FEATURES, ranks, seed=seed) if codec.static else codec

        gather = None if self.gather_codec is None else made(self.gather_codec, 5)
        return Route(made(self.codec, 0), gather, self.algorithm, self.chunks)

    def partial(self, rank: int) -> torch.Tensor:
        x = values(self.rows, rank, self.dtype)
        if rank == 1:
            x[2, 5] = torch.inf
        return x

    def by_hand(self, ranks: int) -> torch.Tensor:
        """The float32 sum by the definition of the algorithm, before it is rounded to the dtype."""
        route = self.route(ranks)
        wires = wires_of(route.codec, [self.partial(rank) for rank in range(ranks)])
        total = route.codec.decode_sum(wires, FEATURES, torch.float32)
        if self.algorithm == "two_shot":
            total = route.second_codec.decode(route.second_codec.encode(total), FEATURES, torch.float32)
        return total


CASES = [
    Case(),
    Case("static4_paper", algorithm="one_shot", chunks=3, dtype=torch.float32),
    Case(algorithm="two_shot"),
    Case("static4_paper", algorithm="two_shot", chunks=2, dtype=torch.float16),
    Case(gather_codec="static4_paper", algorithm="two_shot"),
    Case(gather_codec="int8", algorithm="two_shot", chunks=3),
    Case("mxfp4", "static4", "two_shot", dtype=torch.float32),
    Case(SPECS[2], algorithm="two_shot", rows=3),
]


def _run() -> list[tuple[torch.Tensor, ...]]:
    """In a rank: all_reduce, all_reduce_norm and, where the rows divide, reduce_scatter of every case."""
    results = []
    for case in CASES:
        x, route = case.partial(dist.get_rank()), case.route(dist.get_world_size())
        residual, weight = values(case.rows, 100, case.dtype), torch.linspace(0.5, 2, FEATURES).to(case.dtype)
        normed = all_reduce_norm(x, residual, weight, EPS, None, route)
        share = x if case.rows % dist.get_world_size() else reduce_scatter(x, None, route)
        results.append((all_reduce(x, None, route), *normed, share))
    return results


@pytest.mark.parametrize("world_size", [2, 3])
def test_every_rank_gets_the_sum_by_hand(ranks: RankPool, world_size: int) -> None:
    for rank, results in enumerate(ranks.run(_run, world_size=world_size)):
        for case, (reduced, new_residual, normalized, share) in zip(CASES, results, strict=True):
            total = case.by_hand(world_size)
            assert same_bits(reduced, total.to(case.dtype)), f"rank {rank}: {case}"
            assert reduced[2].isnan().any() and reduced[[0, 1]].isfinite().all()
            residual, weight = values(case.rows, 100, case.dtype), torch.linspace(0.5, 2, FEATURES).to(case.dtype)
            expected = torch.empty_like(residual), torch.empty_like(residual)
            add_norm(total, residual, weight, EPS, *expected)
            assert same_bits(new_residual, expected[0]) and same_bits(normalized, expected[1]), f"rank {rank}: {case}"
            if case.rows % world_size == 0:
                one_hop = replace(case, algorithm="one_shot").by_hand(world_size).to(case.dtype)
                assert same_bits(share, one_hop.chunk(world_size)[rank]), f"rank {rank}: {case}"


def _compile() -> None:
    for case in (CASES[0], CASES[2], CASES[5]):
        route = case.route(dist.get_world_size())

        def layer(x: torch.Tensor, route: Route = route) -> torch.Tensor:
            return all_reduce(x * 2, None, route) + 1

        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        function = torch.compile(layer, fullgraph=True, backend=counter)
        for rows in (4, 6, 9):
            x = values(rows, dist.get_rank())
            assert same_bits(function(x), layer(x))
        assert counter.frame_count <= 2


def test_compiled_collectives_pass_through_the_operator(ranks: RankPool) -> None:
    ranks.run(_compile)


def _other_ranks() -> None:
    x = values(4)
    uncalibrated = Route(codecs.get("static4", backend="reference"))
    with pytest.raises(ValueError, match="is not calibrated"):
        all_reduce(x, None, uncalibrated)
    with pytest.raises(ValueError, match="calibrated for 3 ranks, not 2"):
        all_reduce(x, None, Route(calibrated("static4", FEATURES, 3)))


def test_another_number_of_ranks_is_refused_on_every_rank(ranks: RankPool) -> None:
    ranks.run(_other_ranks)
