"""The self-check of the transport that `python -m benchmarks.gpu` runs, as far as it goes without a GPU."""

from __future__ import annotations

import pytest
import torch
from rank_pool import RankPool

from benchmarks.gpu_transport import Call, check_bits, check_compile, routes
from megacomp import codecs
from megacomp.collectives import Route, hops
from megacomp.collectives.links import CollectiveLink

CPU = torch.device("cpu")


def _check(broken: bool) -> dict[str, bool]:
    usual = hops.link_for
    hops.link_for = lambda peers, device, lane: CollectiveLink(peers)
    torch._dynamo.reset()
    try:
        outcomes = {}
        for name, route in routes().items():
            given = Route(codecs.get(route.codec, backend="reference"), route.gather_codec, route.algorithm, 2)
            call = Call(given, CPU, rows=7, features=256)
            if broken:
                call.expected = lambda call=call: call.x
            outcomes[name] = check_bits(call)["passed"]
        outcomes["compile"] = check_compile(call)["passed"]
        return outcomes
    finally:
        hops.link_for = usual


@pytest.mark.parametrize("broken", [False, True])
def test_bits_are_checked(ranks: RankPool, broken: bool) -> None:
    (outcomes,) = ranks.run(_check, broken, world_size=1)
    assert outcomes.pop("compile")
    assert len(outcomes) == 16
    assert set(outcomes.values()) == {not broken}
