"""All ranks of a tensor-parallel model in one process, for judging it without the machines it is meant for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from megacomp.collectives import SimulatedGroup, SimulatedRanks
from megacomp.launch.engines.base import Engine

T = TypeVar("T")


class SimulatedEngine(Engine):
    """An engine of `tp` ranks, each the very model that a rank of its own would hold, taking turns in this process.

    Every matrix product has the shapes it has on real ranks, and compressed reductions are those of real ranks: so on
    the CPU, over gloo, and with as many intra-op threads as each of them has, results are theirs bit for bit.
    Durations say nothing about real ranks.

    module: a ModuleList of the ranks' models. group: of this process alone.
    """

    simulated = True

    def __init__(self, ranks: Sequence[Engine], schedule: SimulatedRanks, cleanup: ExitStack) -> None:
        """ranks: the engine of each rank. cleanup: of all of them."""
        first = ranks[0]
        modules = nn.ModuleList(rank.module for rank in ranks)
        group: Any = dist.group.WORLD
        super().__init__(
            modules, first.hf_config, first.architecture, first.tp, first.dtype, first.device, group, cleanup
        )
        self.name = first.name
        self._ranks = ranks
        self._schedule = schedule

    def _logits(self, tokens: torch.Tensor) -> torch.Tensor:
        return self._of_all(lambda rank: self._ranks[rank]._logits(tokens))

    def _new_cache(self, batch: int, length: int) -> list[Any]:
        return [rank._new_cache(batch, length) for rank in self._ranks]

    def _advance(self, tokens: torch.Tensor, cache: list[Any]) -> torch.Tensor:
        return self._of_all(lambda rank: self._ranks[rank]._advance(tokens, cache[rank]))

    def _of_all(self, function: Callable[[int], T]) -> T:
        """What every rank gets from `function`, which is the same."""
        return self._schedule.run(function)[0]


def build(
    build_rank: Callable[[SimulatedGroup], Engine], tp: int, device: torch.device, cleanup: ExitStack
) -> SimulatedEngine:
    """The engine whose ranks `build_rank` makes, given the group of each; a default group of this process is there.

    cleanup: receives what undoes each change of global state.
    """
    schedule = SimulatedRanks(tp, device)
    cleanup.callback(schedule.close)
    ranks = []
    for group in schedule.groups:
        ranks.append(build_rank(group))
        _share_equal_weights(ranks[0].module, ranks[-1].module)
    return SimulatedEngine(ranks, schedule, cleanup)


def _share_equal_weights(first: nn.Module, module: nn.Module) -> None:
    """Let `module` hold the tensors of `first` wherever its own are the same: embeddings, norms, replicated biases."""
    there = {**dict(first.named_parameters()), **dict(first.named_buffers())}
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        other = there.get(name)
        if other is not None and other.dtype == tensor.dtype and torch.equal(other, tensor):
            tensor.data = other.data
