"""A pool of real gloo processes for tests that need more than one rank.

Starting a process and importing torch costs seconds, a process group over loopback costs milliseconds. So
one pool serves a whole pytest session: processes are started when first needed (forked from a server that
has already imported torch) and kept, while every task gets a default process group of its own.
"""

from __future__ import annotations

import faulthandler
import math
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

MAX_WORLD_SIZE = 8

# How long the other ranks may take to report once one has failed; blocked in a collective, they never do.
_GRACE_SECONDS = 2.0


class RankError(RuntimeError):
    """What the failed ranks said: their tracebacks, exit codes, or where they hung."""


class RankTimeout(RankError):
    """A task did not finish within its time; the message shows where each rank stood."""


class _Task(NamedTuple):
    """One call, as sent to every rank. `call` is the pickled (function, args)."""

    call: bytes
    import_path: list[str]
    store_port: int
    generation: int
    world_size: int
    timeout: float


class _Outcome(NamedTuple):
    """One rank's answer: the pickled result, or the pickled exception (None if it resists) and its traceback.

    when: seconds on the machine's monotonic clock; the earliest failure is the cause of the others.
    """

    when: float
    result: bytes | None = None
    error: bytes | None = None
    trace: str = ""


class _Worker(NamedTuple):
    process: BaseProcess
    pipe: Connection
    stack_file: Path


class RankPool:
    """Runs functions in ranks 0..world_size-1 of a fresh gloo group, in processes kept between calls."""

    def __init__(self) -> None:
        self._workers: list[_Worker] = []
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["torch", "torch.distributed", "torch._dynamo"])
        self._folder = tempfile.TemporaryDirectory(prefix="megacomp-ranks-")
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._generation = 0

    def run(self, function: Callable[..., Any], *args: Any, world_size: int = 2, timeout: float = 120) -> list[Any]:
        """Call `function(*args)` in every rank and return the results in rank order.

        function: a module-level function of an importable module (a test module is one). torch.distributed's
            default group is gloo with exactly `world_size` ranks; RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_SIZE,
            MASTER_ADDR and MASTER_PORT are set as a launcher would; one intra-op thread per rank.
        args and results travel by pickle.
        timeout: seconds for the whole call.

        Raises what the first failing rank raised, with a RankError holding every rank's traceback as its
        cause; RankError if a process died; RankTimeout if time ran out. After any of these all processes are
        replaced, for a group whose members may disagree about what was sent is of no further use.
        """
        if not 1 <= world_size <= MAX_WORLD_SIZE:
            raise ValueError(f"world_size must be 1..{MAX_WORLD_SIZE}, not {world_size}")
        while len(self._workers) < world_size:
            self._workers.append(self._start(len(self._workers)))
        self._generation += 1
        call = pickle.dumps((function, args))
        task = _Task(call, sys.path, self._store.port, self._generation, world_size, timeout)
        workers = self._workers[:world_size]
        try:
            for worker in workers:
                worker.pipe.send(task)
            outcomes = self._collect(workers, timeout)
        except BaseException:
            self.stop()
            raise
        results = [outcome.result for outcome in outcomes if outcome and outcome.result is not None]
        if len(results) < world_size:
            self.stop()
            _raise(outcomes)
        return [pickle.loads(result) for result in results]

    def stop(self) -> None:
        """End every process now; the next call starts new ones."""
        for worker in self._workers:
            worker.process.kill()
        for worker in self._workers:
            worker.process.join()
            worker.pipe.close()
        self._workers.clear()

    def close(self) -> None:
        """End every process and remove the pool's files."""
        self.stop()
        self._folder.cleanup()

    def _start(self, rank: int) -> _Worker:
        pipe, remote = self._context.Pipe()
        stack_file = Path(self._folder.name) / f"stack-{rank}"
        process = self._context.Process(target=_serve, args=(remote, rank, stack_file), daemon=True)
        process.start()
        remote.close()
        return _Worker(process, pipe, stack_file)

    def _collect(self, workers: list[_Worker], timeout: float) -> list[_Outcome | None]:
        """One outcome per rank, in rank order; None for ranks still busy when another had failed."""
        outcomes: list[_Outcome | None] = [None] * len(workers)
        pending = {worker.pipe: rank for rank, worker in enumerate(workers)}
        deadline = time.monotonic() + timeout
        failed = False
        while pending:
            reporting = wait(list(pending), timeout=max(0.0, deadline - time.monotonic()))
            ready = [pipe for pipe in pending if pipe in reporting]
            if not ready:
                if failed:
                    break
                raise RankTimeout(_where(workers, list(pending.values()), timeout))
            for pipe in ready:
                rank = pending.pop(pipe)
                try:
                    outcome: _Outcome = pipe.recv()
                except EOFError:
                    workers[rank].process.join()
                    code = workers[rank].process.exitcode
                    # Noticed late, but whatever its peers report followed from it.
                    outcome = _Outcome(-math.inf, trace=f"the process ended with exit code {code}\n")
                outcomes[rank] = outcome
                if outcome.result is None and not failed:
                    failed = True
                    deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
        return outcomes


def _raise(outcomes: list[_Outcome | None]) -> None:
    """Re-raise the first rank's exception, with what every rank said as its cause."""
    said = "".join(
        f"\n--- rank {rank} ---\n{'still waiting for the others' if outcome is None else outcome.trace}"
        for rank, outcome in enumerate(outcomes)
        if outcome is None or outcome.result is None
    )
    first = min((outcome for outcome in outcomes if outcome and outcome.result is None), key=lambda o: o.when)
    if first.error is None:
        raise RankError(said)
    raise pickle.loads(first.error) from RankError(said)


def _where(workers: list[_Worker], hung: list[int], timeout: float) -> str:
    """The Python stacks of the ranks that did not answer in time."""
    for rank in hung:
        process = workers[rank].process
        if process.pid is not None and process.is_alive():
            os.kill(process.pid, signal.SIGUSR1)
    time.sleep(0.2)
    stacks = (f"\n--- rank {rank} ---\n{workers[rank].stack_file.read_text()}" for rank in hung)
    return f"ranks {hung} of {len(workers)} did not finish within {timeout} s{''.join(stacks)}"


def _serve(pipe: Connection, rank: int, stack_file: Path) -> None:
    """The life of one process: answer tasks until the parent hangs up."""
    os.environ["OMP_NUM_THREADS"] = "1"
    if Path("/sys/class/net/lo").exists():
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    with stack_file.open("w") as stack:
        faulthandler.register(signal.SIGUSR1, file=stack, all_threads=False)
        while True:
            try:
                task = pipe.recv()
            except EOFError:
                return
            pipe.send(_answer(task, rank))


def _answer(task: _Task, rank: int) -> _Outcome:
    sys.path[:] = task.import_path
    try:
        _join_group(task, rank)
        function, args = pickle.loads(task.call)
        outcome = _Outcome(time.monotonic(), pickle.dumps(function(*args)))
    except BaseException as error:  # pytest's skip and fail are not Exceptions
        outcome = _failure(error)
    try:
        _leave_group()
    except Exception as error:
        return outcome if outcome.result is None else _failure(error)
    return outcome


def _failure(error: BaseException) -> _Outcome:
    when, trace = time.monotonic(), "".join(traceback.format_exception(error))
    try:
        pickle.loads(pickled := pickle.dumps(error))
    except Exception:
        return _Outcome(when, trace=trace)
    return _Outcome(when, error=pickled, trace=trace)


def _join_group(task: _Task, rank: int) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(task.world_size),
        LOCAL_SIZE=str(task.world_size),
        LOCAL_WORLD_SIZE=str(task.world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(task.store_port),
    )
    timeout = timedelta(seconds=task.timeout)
    store = dist.TCPStore("127.0.0.1", task.store_port, is_master=False, timeout=timeout)
    dist.init_process_group(
        "gloo",
        store=dist.PrefixStore(f"task{task.generation}", store),
        rank=rank,
        world_size=task.world_size,
        timeout=timeout,
    )


def _leave_group() -> None:
    """Drop the default group and what the frameworks built upon it, so that the next task starts clean.

    Not undone, because nothing can: DeepSpeed's shared-memory all_reduce keeps the world size of its first
    use for the life of the process. A task that initialises DeepSpeed must switch that op off first.
    """
    parallel_state = sys.modules.get("megatron.core.parallel_state")
    if parallel_state is not None:
        parallel_state.destroy_model_parallel()
    deepspeed_comm: Any = sys.modules.get("deepspeed.comm.comm")
    if deepspeed_comm is not None and deepspeed_comm.cdb is not None:
        if dist.is_initialized():
            deepspeed_comm.destroy_process_group()
        deepspeed_comm.cdb = None
    if dist.is_initialized():
        dist.destroy_process_group()
