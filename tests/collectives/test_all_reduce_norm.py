"""all_reduce_norm over real ranks: what its parts say it is, the same bits on every rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
import torch
import torch.distributed as dist
from collective_cases import Case, same_bits, sqnr_db
from rank_pool import RankPool
from torch._dynamo.testing import CompileCounterWithBackend

import megacomp
from megacomp import codecs
from megacomp.collectives import Route, all_reduce, all_reduce_norm, hops
from megacomp.collectives.links import CollectiveLink
from megacomp.kernels import reduce_norm

EPS = 1e-3


@dataclass(frozen=True)
class NormCase:
    """One call: the partials and the route of `sent`, and what is added and normalized."""

    sent: Case = field(default_factory=Case)
    residual_dtype: torch.dtype | None = None
    biased: bool = False
    transposed: bool = False

    def residual(self) -> torch.Tensor:
        x = torch.randn(self.sent.shape, generator=torch.Generator().manual_seed(100))
        x = x.to(self.residual_dtype or self.sent.dtype)
        return x.mT.contiguous().mT if self.transposed else x

    def weight(self) -> torch.Tensor:
        return torch.linspace(0.5, 2, self.sent.shape[-1]).to(self.sent.dtype)

    def bias(self) -> torch.Tensor | None:
        return torch.linspace(-1, 1, self.sent.shape[-1]).to(self.sent.dtype) if self.biased else None


def run_cases(cases: Sequence[NormCase], link: str = "default") -> list[tuple[torch.Tensor, torch.Tensor]]:
    """In a rank: the results of each case. `link`: "collective" uses the accelerator's link."""
    usual = hops.link_for
    if link == "collective":
        hops.link_for = lambda peers, device, lane: CollectiveLink(peers)
    try:
        results = []
        for case in cases:
            x, residual = case.sent.partial(dist.get_rank()), case.residual()
            before = x.clone(), residual.clone()
            results.append(all_reduce_norm(x, residual, case.weight(), EPS, None, case.sent.route(), bias=case.bias()))
            assert same_bits(x, before[0]) and same_bits(residual, before[1]), "an input was written to"
        return results
    finally:
        hops.link_for = usual


def emulate(case: NormCase, world_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The result, computed in this process from the codec and the kernel's definition alone."""
    features, route = case.sent.shape[-1], case.sent.route()
    codec = route.codec
    wires = torch.stack([codec.encode(case.sent.partial(rank).reshape(-1, features)) for rank in range(world_size)])
    if case.sent.algorithm == "two_shot":
        codec = route.second_codec
        wires = codec.encode(route.codec.decode_sum(wires, features, torch.float32)).unsqueeze(0)
    residual = case.residual().reshape(-1, features)
    new_residual = torch.empty(residual.shape, dtype=residual.dtype)
    normalized = torch.empty(residual.shape, dtype=case.sent.dtype)
    reduce_norm(codec.format, wires, residual, case.weight(), EPS, new_residual, normalized, "reference", case.bias())
    return new_residual.view(case.sent.shape), normalized.view(case.sent.shape)


CASES = [
    NormCase(Case(shape=shape, dtype=dtype, algorithm=algorithm, gather_codec=gather, chunks=chunks), **options)
    for shape, dtype, algorithm, gather, chunks, options in (
        ((13, 100), torch.bfloat16, "one_shot", None, 1, {}),
        ((13, 100), torch.bfloat16, "one_shot", None, 4, {"biased": True}),
        ((13, 100), torch.bfloat16, "two_shot", "int8", 1, {"biased": True}),
        ((13, 100), torch.float16, "two_shot", None, 3, {}),
        ((5, 2, 96), torch.bfloat16, "two_shot", "int8", 2, {"residual_dtype": torch.float32}),
        ((5, 2, 96), torch.float32, "one_shot", None, "auto", {"transposed": True}),
        ((64,), torch.bfloat16, "one_shot", None, "auto", {}),
        ((1, 64), torch.bfloat16, "two_shot", None, "auto", {}),  # fewer rows than ranks
    )
]


@pytest.mark.parametrize("link", ["default", "collective"])
@pytest.mark.parametrize("world_size", [2, 3])
def test_every_rank_gets_the_bits_of_the_definition(ranks: RankPool, world_size: int, link: str) -> None:
    for rank, results in enumerate(ranks.run(run_cases, CASES, link, world_size=world_size)):
        for case, result in zip(CASES, results, strict=True):
            expected = emulate(case, world_size)
            assert all(map(same_bits, result, expected)), f"rank {rank} of {world_size}: {case}"
            assert all(each.is_contiguous() for each in result)


def _both_ways(dtype: torch.dtype, algorithm: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    case = NormCase(Case((40, 512), "int8", algorithm=algorithm, dtype=dtype), biased=True)
    x, bias = case.sent.partial(dist.get_rank()), case.bias()
    fused = all_reduce_norm(x, case.residual(), case.weight(), EPS, None, case.sent.route(), bias=bias)
    separate = all_reduce(x, None, case.sent.route()) + bias + case.residual()
    return [fused, (separate, torch.nn.functional.rms_norm(separate, (512,), case.weight(), EPS))]


@pytest.mark.parametrize("algorithm", ["one_shot", "two_shot"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_equals_all_reduce_add_and_norm_but_for_roundings(ranks: RankPool, dtype: torch.dtype, algorithm: str) -> None:
    # Three roundings of the sum and two of the norm against one each. Where they cancel, the roundings were of
    # values as large as their parts: up to 80 here.
    eps = torch.finfo(dtype).eps
    for (new_residual, normalized), (separate, separately_normalized) in ranks.run(_both_ways, dtype, algorithm):
        torch.testing.assert_close(new_residual, separate, rtol=2 * eps, atol=80 * 2 * eps)
        assert sqnr_db(normalized, separately_normalized) > (45 if dtype is torch.bfloat16 else 120)


def test_one_rank_sends_and_encodes_nothing(ranks: RankPool) -> None:
    case = NormCase(Case((6, 64), "int2"), biased=True)
    (((new_residual, normalized),),) = ranks.run(run_cases, [case], world_size=1)
    exact = case.sent.partial(0).float() + case.bias().float() + case.residual().float()
    assert same_bits(new_residual, exact.bfloat16())
    expected = torch.nn.functional.rms_norm(new_residual.float(), (64,), case.weight().float(), EPS).bfloat16()
    torch.testing.assert_close(normalized, expected, rtol=2**-8, atol=0)


def test_nothing_to_send(ranks: RankPool) -> None:
    case = NormCase(Case((0, 64)), residual_dtype=torch.float32)
    for ((new_residual, normalized),) in ranks.run(run_cases, [case]):
        assert new_residual.shape == normalized.shape == (0, 64)
        assert new_residual.dtype is torch.float32 and normalized.dtype is torch.bfloat16


def _by_name() -> None:
    case = NormCase(Case((9, 64), "int4", "int8", "two_shot", 2), biased=True)
    x = case.sent.partial(dist.get_rank())
    by_route = all_reduce_norm(x, case.residual(), case.weight(), EPS, None, case.sent.route(), bias=case.bias())
    options = {"algorithm": "two_shot", "gather_codec": "int8", "pipeline_chunks": 2, "backend": "reference"}
    by_name = megacomp.all_reduce_norm(x, case.residual(), case.weight(), EPS, "int4", bias=case.bias(), **options)
    assert all(map(same_bits, by_name, by_route))


def test_by_name_equals_by_route(ranks: RankPool) -> None:
    ranks.run(_by_name)


def _refuse() -> None:
    x, weight = torch.randn(4, 64), torch.ones(64)
    route = Route(codecs.get("mxfp4", backend="reference"))
    for options, message in (
        ({"residual": torch.randn(4, 32)}, r"residual must be .* \[4, 64\] on cpu, not float32 \[4, 32\]"),
        ({"residual": x.long()}, "residual must be bfloat16, float16 or float32"),
        ({"weight": torch.ones(4, 64)}, r"weight must be .* \[64\]"),
        ({"bias": torch.ones(1)}, r"bias must be .* \[64\]"),
        ({"weight": torch.nn.Parameter(weight)}, "no gradient for weight"),
        ({"x": x.double(), "residual": x}, "float64"),
    ):
        arguments = {"x": x, "residual": x, "weight": weight, "eps": EPS, "group": None, "route": route, **options}
        with pytest.raises(ValueError, match=message):
            all_reduce_norm(**arguments)
    with torch.no_grad():
        all_reduce_norm(x, x, torch.nn.Parameter(weight), EPS, None, route)


def test_wrong_tensors_are_refused_before_anything_is_sent(ranks: RankPool) -> None:
    ranks.run(_refuse)


def _compiled() -> None:
    case = NormCase(Case((6, 96), "int4", algorithm="two_shot"), residual_dtype=torch.float32, biased=True)
    route = case.sent.route()

    def layer(
        x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        new_residual, normalized = all_reduce_norm(x * 2, residual, weight, EPS, None, route, bias=bias)
        return new_residual + 1, normalized

    x = case.sent.partial(dist.get_rank())
    for bias in (case.bias(), None):
        arguments = (x, case.residual(), case.weight(), bias)
        torch.library.opcheck(torch.ops.megacomp.all_reduce_norm, (*arguments[:3], EPS, bias, route.key, ""))
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(layer, fullgraph=True, backend=counter)
        for _ in range(2):
            assert all(map(same_bits, compiled(*arguments), layer(*arguments)))
        assert counter.frame_count == 1


def test_compiles_without_a_break(ranks: RankPool) -> None:
    ranks.run(_compiled)
