"""A call that fails leaves nothing behind that the next one could meet, or there is no next one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from collective_cases import CALLS, Case, assert_as_emulated
from rank_pool import RankPool
from static_cases import calibrated
from torch.overrides import TorchFunctionMode

from megacomp import codecs
from megacomp.codecs import BlockCodec
from megacomp.collectives import CollectiveError, Route, all_gather, all_reduce, all_reduce_norm, reduce_scatter
from megacomp.config import Config
from megacomp.door import Door
from megacomp.policy import Site

TIMEOUT = 30
"""Of a test, and so of its group: where a message is taken for another, ranks wait as long."""

CASES = [
    Case(shape=(4, 64), algorithm="one_shot"),
    Case(shape=(4, 64), algorithm="two_shot"),
    Case(shape=(4, 64), collective="reduce_scatter"),
    Case(shape=(4, 64), collective="all_gather"),
]


def _norm(x: torch.Tensor, group: dist.ProcessGroup | None, route: Route) -> torch.Tensor:
    return all_reduce_norm(x, x, torch.ones_like(x[0]), 1e-6, group, route)[1]


def _compiled(x: torch.Tensor, group: dist.ProcessGroup | None, route: Route) -> torch.Tensor:
    return torch.compile(all_reduce, backend="eager")(x, group, route)


def _impossible() -> list[tuple[Route, type[Exception], str]]:
    """Routes with a codec that cannot take CASES here, and what it says; its wires are of other sizes."""
    here, kernels = (codecs.get("int8", backend=backend) for backend in ("reference", "triton"))
    no_gpu = RuntimeError, 'backend "triton": no GPU'
    other = calibrated("static4", 65, 2)
    other_features = ValueError, "calibrated for 65 features, not 64"
    return [
        (Route(kernels, algorithm="one_shot"), *no_gpu),
        (Route(kernels, algorithm="two_shot"), *no_gpu),
        (Route(here, kernels, algorithm="two_shot"), *no_gpu),
        (Route(other, algorithm="one_shot"), *other_features),
        (Route(other, algorithm="two_shot"), *other_features),
        (Route(here, other, algorithm="two_shot"), *other_features),
    ]


def _after_refusals(call: Callable[..., Any]) -> list[torch.Tensor]:
    """CASES on this rank, once `call` has been refused what a codec cannot do."""
    x = CASES[0].partial(dist.get_rank())
    with mock.patch("megacomp.kernels.backend.device_problem", lambda device: "no GPU"):
        for route, error, message in _impossible():
            if call in (reduce_scatter, all_gather) and route.gather_codec is not None:
                continue  # plays no part there
            with pytest.raises(error, match=message):
                call(x, None, route)
    return [CALLS[case.collective](case.partial(dist.get_rank()), None, case.route()) for case in CASES]


@pytest.mark.parametrize("call", [all_reduce, _compiled, _norm, reduce_scatter, all_gather])
def test_what_a_codec_refuses_is_refused_before_anything_is_sent(ranks: RankPool, call: Callable[..., Any]) -> None:
    assert_as_emulated(CASES, ranks.run(_after_refusals, call, timeout=TIMEOUT))


class _NoRoom(TorchFunctionMode):
    """No tensor can be made."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.empty, torch.empty_like, torch.Tensor.new_empty):
            raise torch.OutOfMemoryError("20 GiB")
        return func(*args, **(kwargs or {}))


def _after_a_failure(call: Callable[..., Any], failing: Case, no_room: bool) -> list[torch.Tensor]:
    """CASES over another group, once memory has run out under `failing` on every rank of this one.

    no_room: at once, for the result; or when a codec encodes.
    """
    rank, others = dist.get_rank(), dist.new_group()
    x = failing.partial(rank)
    encode = mock.patch.object(BlockCodec, "encode", side_effect=torch.OutOfMemoryError("20 GiB"))
    with _NoRoom() if no_room else encode, pytest.raises(torch.OutOfMemoryError):
        call(x, None, failing.route())
    for call in (*CALLS.values(), _norm, _compiled):
        with pytest.raises(
            CollectiveError, match=r"this process group has failed before; .*: OutOfMemoryError: 20 GiB"
        ):
            call(CASES[0].partial(rank), None, CASES[0].route())
    return [CALLS[case.collective](case.partial(rank), others, case.route()) for case in CASES]


@pytest.mark.parametrize("no_room", [False, True], ids=["encoding", "allocating"])
@pytest.mark.parametrize(
    ("call", "failing"), [*((CALLS[case.collective], case) for case in CASES), (_norm, CASES[0]), (_norm, CASES[1])]
)
def test_what_fails_on_the_way_ends_the_group_and_no_other(
    ranks: RankPool, call: Callable[..., Any], failing: Case, no_room: bool
) -> None:
    assert_as_emulated(CASES, ranks.run(_after_a_failure, call, failing, no_room, timeout=TIMEOUT))


def _through_a_door() -> None:
    x, layer = CASES[0].partial(dist.get_rank()), torch.nn.Identity()
    group = dist.group.WORLD

    def visit() -> None:
        door = Door(Config.model_validate({"communication": {"codec": "int8", "min_bytes": 0}, "backend": "reference"}))
        door.learn({layer: Site("here")})
        door.inside(layer, lambda _: door("all_reduce", x, group))

    with torch.no_grad():
        visit()
        with (
            mock.patch.object(BlockCodec, "encode", side_effect=MemoryError("20 GiB")),
            pytest.raises(CollectiveError, match=r"^all_reduce at here failed on rank \d: MemoryError: 20 GiB"),
        ):
            visit()
        for again in (visit, lambda: all_reduce(x, None, CASES[0].route())):
            with pytest.raises(CollectiveError, match=r"^this process group has failed before; .* at here failed"):
                again()


def test_a_group_that_failed_under_one_door_has_failed_for_all(ranks: RankPool) -> None:
    ranks.run(_through_a_door, timeout=TIMEOUT)
