"""torch.compile passes through the collectives, over real ranks: the same bits, no graph break, few compilations."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from collective_cases import same_bits
from rank_pool import RankPool
from torch._dynamo.testing import CompileCounterWithBackend

import megacomp
from megacomp import codecs
from megacomp.collectives import Route, Trace, all_reduce
from megacomp.collectives.route import route_from_key

ROUTE = Route(codecs.get("int4", backend="reference"), codecs.get("int8", backend="reference"), "two_shot", 2)


def _opcheck() -> None:
    x = torch.randn(6, 5, 96)
    group = dist.new_group()
    for name in ("", group.group_name):
        torch.library.opcheck(torch.ops.megacomp.all_reduce, (x, ROUTE.key, name))
        torch.library.opcheck(torch.ops.megacomp.reduce_scatter, (x, ROUTE.key, dist.get_world_size(), name))
        torch.library.opcheck(torch.ops.megacomp.all_gather, (x.mT, ROUTE.key, dist.get_world_size(), name))


def test_operators_do_what_they_declare(ranks: RankPool) -> None:
    ranks.run(_opcheck)


def _compiled(function: Callable[..., torch.Tensor], backend: str = "aot_eager") -> tuple[Callable, object]:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    return torch.compile(function, fullgraph=True, backend=counter), counter


def by_name(x: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    options = {"algorithm": "two_shot", "gather_codec": "int8", "backend": "reference"}
    return megacomp.all_reduce(x * 2, "mxfp4", group, **options) + 1


def by_route(x: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    doubled = x * 2
    all_reduce(doubled, group, ROUTE, out=doubled)
    return doubled + 1


def scattered(x: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    return megacomp.reduce_scatter(x * 2, {"preset": "int4", "rotation": 32}, group, backend="reference") + 1


def gathered(x: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    return megacomp.all_gather(x * 2, ROUTE.codec, group, backend="reference") + 1


def _compile(layer: Callable[..., torch.Tensor], group: dist.ProcessGroup | None, backend: str) -> None:
    function, counter = _compiled(lambda x: layer(x, group), backend)
    for rows in (6, 12, 18, 24):
        x = torch.randn(rows, 40, generator=torch.Generator().manual_seed(dist.get_rank()))
        assert same_bits(function(x), layer(x, group)), rows
    assert counter.frame_count <= 2  # the rows as a constant, then as a variable


@pytest.mark.parametrize("layer", [by_name, by_route, scattered, gathered])
def test_compiled_equals_eager_for_any_number_of_rows(ranks: RankPool, layer: Callable[..., torch.Tensor]) -> None:
    ranks.run(_compile, layer, None, "aot_eager", world_size=3)


def test_inductor_too(ranks: RankPool) -> None:
    ranks.run(_compile, by_name, None, "inductor")


def _compile_for_groups() -> None:
    half = dist.new_group([0, 2])
    _compile(by_name, dist.group.WORLD, "aot_eager")
    if dist.get_rank() != 1:
        _compile(by_name, half, "aot_eager")
        _compile(gathered, half, "aot_eager")


def test_groups(ranks: RankPool) -> None:
    ranks.run(_compile_for_groups, world_size=3)


def _around() -> None:
    linear = torch.nn.Linear(64, 64)
    function, _ = _compiled(lambda x: megacomp.all_reduce(linear(x), ROUTE.codec) + 1)
    x = torch.randn(4, 64)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            assert same_bits(function(x), megacomp.all_reduce(linear(x), ROUTE.codec) + 1)
    # With gradients wanted it is refused, compiled or not, on every rank before anything is sent.
    with pytest.raises(Exception, match="no gradient"):
        function(x)
    torch._dynamo.reset()
    with pytest.raises(ValueError, match="no gradient"):
        torch.compile(lambda x: megacomp.all_reduce(linear(x), ROUTE.codec), backend="eager")(x)


def test_gradients(ranks: RankPool) -> None:
    ranks.run(_around)


def _traced() -> None:
    trace = Trace()

    def layer(x: torch.Tensor) -> torch.Tensor:
        return all_reduce(x * 2, None, ROUTE, trace=trace) + 1

    torch._dynamo.reset()
    x = torch.randn(8, 64)
    assert same_bits(torch.compile(layer, backend="eager")(x), layer(x))
    assert trace.encode > 0 and trace.wire > 0 and trace.decode > 0


def test_a_trace_is_kept_outside_of_the_graph(ranks: RankPool) -> None:
    ranks.run(_traced)


@pytest.mark.parametrize("chunks", ["auto", 3])
@pytest.mark.parametrize("gather_codec", [None, "int8"])
def test_a_key_makes_the_route_it_came_from(gather_codec: str | None, chunks: int | str) -> None:
    gather = None if gather_codec is None else codecs.get(gather_codec)
    route = Route(codecs.get("nvfp4", backend="reference"), gather, "two_shot", chunks)
    assert route_from_key(route.key) == route
