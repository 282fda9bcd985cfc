"""all_reduce over real ranks against an emulation in one process, and against the exact sum."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from collective_cases import Case, assert_as_emulated, run_cases, same_bits, sqnr_db
from rank_pool import RankPool

from megacomp import codecs
from megacomp.collectives import Route, all_reduce

ALGORITHMS = ("one_shot", "two_shot")


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_every_preset_and_algorithm(ranks: RankPool, world_size: int) -> None:
    cases = [Case(codec=codec, algorithm=algorithm) for codec in codecs.presets() for algorithm in ALGORITHMS]
    assert_as_emulated(cases, ranks.run(run_cases, cases, world_size=world_size))


def test_eight_ranks(ranks: RankPool) -> None:
    cases = [
        Case(codec=codec, algorithm=algorithm, chunks=2, shape=(rows, 64))
        for codec in ("mxfp4", {"preset": "int4", "rotation": 64})
        for algorithm in ALGORITHMS
        for rows in (3, 21)
    ]
    assert_as_emulated(cases, ranks.run(run_cases, cases, world_size=8))


@pytest.mark.parametrize("world_size", [2, 3])
def test_chunks_change_nothing(ranks: RankPool, world_size: int) -> None:
    cases = [
        Case(algorithm=algorithm, chunks=chunks, gather_codec=gather_codec)
        for algorithm in ALGORITHMS
        for chunks in (1, 2, 3, 8, 50, "auto")
        for gather_codec in (None, "int8")
    ]
    assert_as_emulated(cases, ranks.run(run_cases, cases, world_size=world_size))


@pytest.mark.parametrize("link", ["default", "collective"])
def test_any_shape_dtype_and_layout(ranks: RankPool, link: str) -> None:
    cases = [
        Case(shape=shape, algorithm=algorithm, dtype=dtype, layout=layout, chunks=2, codec="int6")
        for shape, layout in (
            ((3, 5, 64), "contiguous"),
            ((3, 5, 64), "transposed"),
            ((3, 5, 64), "sliced"),
            ((2, 1, 4, 7), "contiguous"),
            ((64,), "contiguous"),
            ((1, 1), "contiguous"),
            ((2, 33), "transposed"),
            ((0, 64), "contiguous"),
            ((5, 0), "contiguous"),
            ((0,), "contiguous"),
        )
        for algorithm in ALGORITHMS
        for dtype in (torch.bfloat16, torch.float16, torch.float32)
    ]
    assert_as_emulated(cases, ranks.run(run_cases, cases, link, world_size=3))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_error_is_the_codecs(ranks: RankPool, algorithm: str) -> None:
    cases = [Case(codec=codec, algorithm=algorithm, shape=(64, 256), dtype=torch.float32) for codec in codecs.presets()]
    results = ranks.run(run_cases, cases, world_size=4)[0]
    # Independent errors add like independent partials, so one rounding costs the sum what it costs a partial;
    # the second, of the same size, costs 3 dB.
    allowed_loss = 0.5 if algorithm == "one_shot" else 3.5
    for case, result in zip(cases, results, strict=True):
        partials = [case.partial(rank) for rank in range(4)]
        codec = case.route().codec
        alone = min(sqnr_db(codec.decode(codec.encode(x), 256, x.dtype), x) for x in partials)
        assert sqnr_db(result, sum(x.double() for x in partials)) > alone - allowed_loss, case


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_nan_and_inf_reach_every_rank(ranks: RankPool, algorithm: str) -> None:
    poison = ((0, (1, 5), float("inf")), (1, (4, 70), float("nan")), (2, (6, 0), float("-inf")))
    cases = [
        Case(codec=codec, algorithm=algorithm, chunks=3, shape=(7, 96), poison=poison)
        for codec in ("mxfp4", "int8", "nvfp4", {"preset": "int4", "rotation": 32})
    ]
    results = ranks.run(run_cases, cases, world_size=3)
    assert_as_emulated(cases, results)
    for result in results[0]:
        assert [torch.isnan(result[row, column]).item() for _, (row, column), _ in poison] == [True] * 3
        assert torch.isfinite(result[[0, 2, 3, 5]]).all()


def _reduce_in_subgroups(case: Case) -> list[torch.Tensor | None]:
    results: list[torch.Tensor | None] = []
    for members in ([0, 2], [1, 2, 3], [3]):
        group = dist.new_group(members)
        if dist.get_rank() in members:
            x = case.partial(members.index(dist.get_rank()))
            results.append(all_reduce(x, group, case.route()))
        else:
            with pytest.raises(ValueError, match="not a member"):
                all_reduce(case.partial(0), group, case.route())
            results.append(None)
    return results


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_subgroups(ranks: RankPool, algorithm: str) -> None:
    case = Case(algorithm=algorithm, chunks=2)
    results = ranks.run(_reduce_in_subgroups, case, world_size=4)
    for number, members in enumerate(([0, 2], [1, 2, 3], [3])):
        assert_as_emulated([case], [[results[member][number]] for member in members])


def _two_results(first: Case, second: Case) -> tuple[torch.Tensor, torch.Tensor]:
    rank = dist.get_rank()
    with torch.inference_mode():  # workspaces made here must serve the calls outside
        result = all_reduce(first.partial(rank), None, first.route())
    kept = result.clone()
    all_reduce(second.partial(rank), None, second.route())
    return result, kept


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_later_call_leaves_earlier_results_alone(ranks: RankPool, algorithm: str) -> None:
    first = Case(algorithm=algorithm, chunks=2)
    for result, kept in ranks.run(_two_results, first, Case(algorithm=algorithm, codec="int8")):
        assert same_bits(result, kept)


def test_alone_nothing_is_encoded(ranks: RankPool) -> None:
    case = Case(codec="int2", layout="transposed")
    ((result,),) = ranks.run(run_cases, [case], world_size=1)
    assert same_bits(result, case.partial(0))
    assert result.is_contiguous()


def _in_place(case: Case) -> torch.Tensor:
    x = case.partial(dist.get_rank())
    assert all_reduce(x, None, case.route(), out=x) is x
    return x


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_result_may_take_the_place_of_the_input(ranks: RankPool, algorithm: str, world_size: int) -> None:
    case = Case(algorithm=algorithm, chunks=3)
    assert_as_emulated([case], [[result] for result in ranks.run(_in_place, case, world_size=world_size)])


def _refusals() -> torch.Tensor:
    route = Route(codecs.get("mxfp4", backend="reference"))
    for wrong, message in (
        (torch.ones(2, 32, dtype=torch.int64), "takes bfloat16, float16, float32 tensors, not torch.int64"),
        (torch.ones(2, 32, dtype=torch.float64), "not torch.float64"),
        (torch.tensor(1.0), r"shape \[\.\.\., features\], not one of shape \[\]"),
        (torch.ones(2, 32, requires_grad=True), "no gradient"),
    ):
        # On one rank only: had it sent anything, or waited, the others would hang.
        if dist.get_rank() == 1:
            with pytest.raises(ValueError, match=message):
                all_reduce(wrong, None, route)
    x = torch.ones(2, 32)
    if dist.get_rank() == 1:
        for out, message in (
            (torch.ones(32, 2), "out has shape"),
            (x.half(), "out has dtype"),
            (torch.ones(32, 2).t(), "out must be contiguous"),
        ):
            with pytest.raises(ValueError, match=message):
                all_reduce(x, None, route, out=out)
    with torch.no_grad():
        return all_reduce(x.requires_grad_(), None, route)


def test_bad_input_is_refused_before_anything_is_sent(ranks: RankPool) -> None:
    for result in ranks.run(_refusals):
        assert torch.equal(result, torch.full((2, 32), 2.0))
        assert not result.requires_grad
