"""Several ranks in one process, for judging a tensor-parallel model without the machines it is meant for.

Each rank is a thread, and one of them runs at a time: a rank's turn lasts until it enters a collective or is done, then
comes the next rank's. So whatever the ranks run needs to know of no threads, and everything happens in one order.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from contextvars import copy_context
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _world

from megacomp.collectives.simulated import ring_sum

T = TypeVar("T")
V = TypeVar("V")


class SimulatedRanks:
    """Ranks 0 to size - 1 of this process.

    groups: the process group of all of them as each rank sees it.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        """size: at least two. device: the one of all ranks. A default process group must be there."""
        self.size = size
        self._device = device
        self._threads = ThreadPoolExecutor(size - 1, thread_name_prefix="megacomp-rank")
        self._run: _Run | None = None
        self.groups = tuple(SimulatedGroup(self, rank) for rank in range(size))
        for rank, group in enumerate(self.groups):
            # Where torch.distributed looks up its groups; every one of these ranks lives in this process.
            _world.pg_group_ranks[group] = {dist.get_rank(): rank}
            _world.pg_map[group] = ("simulated", dist.HashStore())

    def close(self) -> None:
        """End the threads, and forget the groups."""
        self._threads.shutdown()
        for group in self.groups:
            _world.pg_group_ranks.pop(group, None)
            _world.pg_map.pop(group, None)

    def run(self, function: Callable[[int], T]) -> list[T]:
        """`function(rank)` of every rank; their results in rank order.

        Rank 0 runs in the calling thread, the others under its context variables, grad mode, autocast (for the CPU and
        for the ranks' device), CUDA stream and number of intra-op threads. Raises what the first rank to fail raised,
        after ending the others at the collectives they wait in; RuntimeError if the ranks do not enter the same number
        of collectives.
        """
        threads, grad, inference = torch.get_num_threads(), torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        stream = torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None
        cache = torch.is_autocast_cache_enabled()
        autocasts = {
            kind: (torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
            for kind in {"cpu", self._device.type}
        }

        def in_thread(rank: int) -> T:
            torch.set_num_threads(threads)
            with ExitStack() as modes:
                if stream is not None:
                    modes.enter_context(torch.cuda.stream(stream))
                modes.enter_context(torch.inference_mode(inference))
                modes.enter_context(torch.set_grad_enabled(grad))
                for kind, (dtype, enabled) in autocasts.items():
                    modes.enter_context(torch.autocast(kind, dtype, enabled, cache))
                return function(rank)

        self._run = run = _Run(self.size)
        try:
            others = [
                self._threads.submit(copy_context().run, run.call, rank, in_thread) for rank in range(1, self.size)
            ]
            results = [run.call(0, function), *(other.result() for other in others)]
        finally:
            self._run = None
        if run.failure is not None:
            raise run.failure
        return results

    def exchange(self, rank: int, value: V, combine: Callable[[Sequence[V]], T]) -> T:
        """What `combine` makes of the value each rank brings, in rank order; every rank is to call this in `run`.

        Rank 0 calls `combine`, the others are given the same object.
        """
        if self._run is None:
            raise RuntimeError("simulated ranks meet in collectives only while all of them run")
        return self._run.exchange(rank, value, combine)


class _Run:
    """One run of all ranks: whose turn it is, what they have brought to a collective, and who failed."""

    def __init__(self, size: int) -> None:
        self.failure: BaseException | None = None
        self._turns = [threading.Semaphore(int(rank == 0)) for rank in range(size)]
        self._brought: list[Any] = []
        self._result: Any = None

    def call(self, rank: int, function: Callable[[int], Any]) -> Any:
        """`function(rank)`, from the rank's first turn on; None if this or another rank fails (`failure`)."""
        try:
            self._wait(rank)
            result = function(rank)
            self._check_in_step(0)
            return result
        except BaseException as error:
            self.failure = self.failure or error
            return None
        finally:
            self._pass_on(rank)

    def exchange(self, rank: int, value: Any, combine: Callable[[Sequence[Any]], Any]) -> Any:
        self._check_in_step(rank)
        self._brought.append(value)
        self._pass_on(rank)
        self._wait(rank)
        if rank == 0:
            self._check_in_step(len(self._turns))
            brought, self._brought = self._brought, []
            self._result = combine(brought)
        return self._result

    def _pass_on(self, rank: int) -> None:
        self._turns[(rank + 1) % len(self._turns)].release()

    def _wait(self, rank: int) -> None:
        self._turns[rank].acquire()
        if self.failure is not None:
            raise RuntimeError("another rank failed")

    def _check_in_step(self, brought: int) -> None:
        """Raise RuntimeError unless as many ranks as `brought` are in the collective that this one enters or skips."""
        if len(self._brought) != brought:
            raise RuntimeError("the ranks are out of step: some entered a collective that others did not")


class SimulatedGroup(dist.ProcessGroup):
    """The process group of simulated ranks as one of them sees it, with the collectives that inference needs.

    Sums are those of gloo, bit for bit.
    """

    def __init__(self, ranks: SimulatedRanks, rank: int) -> None:
        super().__init__(rank, ranks.size)  # type: ignore[call-arg]  # the stubs lack it
        self._ranks = ranks

    def exchange(self, value: V, combine: Callable[[Sequence[V]], T]) -> T:
        """`SimulatedRanks.exchange` of this group's rank."""
        return self._ranks.exchange(self.rank(), value, combine)

    def allreduce(self, tensors: list[torch.Tensor], opts: Any = None) -> dist.Work:  # type: ignore[override]
        """torch.distributed.all_reduce, of sums."""
        if opts.reduceOp != dist.ReduceOp.SUM:
            raise NotImplementedError(f"simulated ranks reduce sums only, not {opts.reduceOp}")
        (tensor,) = tensors
        tensor.copy_(self.exchange(tensor, ring_sum))
        return _Done()

    def all_gather_single(self, output: torch.Tensor, input: torch.Tensor, opts: Any = None) -> dist.Work:
        """torch.distributed.all_gather_into_tensor; torch 2.13 renamed it."""
        output.view(-1).copy_(self.exchange(input, lambda inputs: torch.cat([each.flatten() for each in inputs])))
        return _Done()

    _allgather_base = all_gather_single


class _Done(dist.Work):
    """What was to be done has been done."""

    def wait(self, timeout: Any = None) -> bool:
        return True
