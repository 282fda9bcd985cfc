"""What every rank of `benchmarks.ttft_link` does: it measures at one link rate after the other, rank 0 writes it down.

Run by benchmarks.ttft_link, in the ranks of benchmarks.shaped_link.
"""

from __future__ import annotations

import json
import logging
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import megacomp
from benchmarks.shaped_link import Link
from megacomp import codecs
from megacomp.collectives import Route, wire_bytes
from megacomp.config import Config, load
from megacomp.launch import autotune, command, environment, files
from megacomp.launch.autotune import GroupRanks, Message
from megacomp.launch.distributed import process_group
from megacomp.launch.engines import Engine
from megacomp.patches import FRAMEWORKS
from megacomp.tuning import Key, Plan, Tuning, plan

CPU = torch.device("cpu")
TUNING_ROWS = (8, 32, 128, 512, 2048)
TUNING_REPEATS = 7
FAST_MBIT = 1000.0
"""From here on the large all_reduce is tuned too; on slower links that would take minutes and change little."""
TUNED = dict.fromkeys(("min_bytes", "algorithm", "pipeline_chunks"), "tuned")


@dataclass(frozen=True)
class Task:
    """What to measure; the parent writes it, the ranks read it.

    model: the folder of the model. hidden: its hidden size. engines, mbits, prompts: what is combined.
    codec: as in the configuration.
    collective_mib: size of the all_reduce that is measured alone; 0 for none.
    seconds: about how long one combination may take; each has at least `fewest` repetitions and at most `most`.
    scratch: a folder for tunings. out: where rank 0 writes the results.
    """

    model: str
    hidden: int
    engines: list[str]
    mbits: list[float]
    prompts: list[int]
    codec: str
    collective_mib: int
    seconds: float
    fewest: int
    most: int
    scratch: str
    out: str

    @property
    def collective_rows(self) -> int:
        """Rows of the large all_reduce, which is bf16."""
        return self.collective_mib * 2**20 // (2 * self.hidden)

    def write(self, path: Path) -> None:
        files.write_json(path, asdict(self))

    @classmethod
    def read(cls, path: Path) -> Task:
        return cls(**json.loads(path.read_text()))


class PlainCollectives:
    """Seconds inside torch.distributed.all_reduce, call by call, while the layers of an engine's sites run."""

    def __init__(self, module: nn.Module) -> None:
        self.seconds: list[float] = []
        self._module = module
        self._depth = 0

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Measure the calls within the `with` block."""
        known = [framework for framework in FRAMEWORKS if framework.imported]
        layers = [layer for framework in known for layer in framework.sites(self._module)]
        hooks = [layer.register_forward_pre_hook(self._enter) for layer in layers]
        hooks += [layer.register_forward_hook(self._leave) for layer in layers]
        original: Any = dist.all_reduce

        def timed(*arguments: Any, **options: Any) -> Any:
            if not self._depth:
                return original(*arguments, **options)
            start = time.perf_counter()
            result = original(*arguments, **options)
            self.seconds.append(time.perf_counter() - start)
            return result

        dist.all_reduce = timed
        try:
            yield
        finally:
            dist.all_reduce = original
            for hook in hooks:
                hook.remove()

    def take(self) -> list[float]:
        """The seconds of each call since the last time this was asked."""
        taken, self.seconds = self.seconds, []
        return taken

    def _enter(self, *_: Any) -> None:
        self._depth += 1

    def _leave(self, *_: Any) -> None:
        self._depth -= 1


def tune(task: Task, world_size: int, mbit: float) -> Path:
    """What `megacomp tune` finds at this rate for the messages of the model, as a file."""
    route = Route(codecs.get(task.codec))
    rows = [rows for rows in TUNING_ROWS if rows <= max(task.prompts)]
    if task.collective_mib and mbit >= FAST_MBIT:
        rows.append(task.collective_rows)
    sizes = [Message(count, task.hidden, torch.bfloat16) for count in rows]
    found = autotune.tune([route], sizes, GroupRanks(None, CPU), repeats=TUNING_REPEATS)
    path = Path(task.scratch) / f"tuning-{world_size}-{mbit:g}.json"
    key = Key.here(CPU, world_size)
    if dist.get_rank() == 0:
        tuning = Tuning(key=key, hosts=1, dtype="bf16", codecs=tuple(found), environment=environment.describe(CPU))
        files.write_json(path, tuning.to_dict())
    dist.barrier()
    return path


def collective(task: Task, route: Route) -> dict[str, Any]:
    """One large all_reduce, plain and by `route`, in turn; the same JSON-able dict on every rank."""
    ranks = GroupRanks(None, CPU)
    message = Message(task.collective_rows, task.hidden, torch.bfloat16)
    times: dict[str, list[float]] = {"plain": [], "compressed": []}
    wanted = task.fewest
    while len(times["plain"]) < wanted:
        times["plain"].append(ranks.seconds(message, None))
        times["compressed"].append(ranks.seconds(message, route))
        if len(times["plain"]) == 1:
            wanted = repetitions(task, times["plain"][0] + times["compressed"][0])
    plain, compressed = (1e3 * statistics.median(seconds) for seconds in times.values())
    return {
        "bytes": message.bytes,
        "algorithm": route.algorithm,
        "pipeline_chunks": route.pipeline_chunks,
        "plain_ms": [1e3 * one for one in times["plain"]],
        "compressed_ms": [1e3 * one for one in times["compressed"]],
        "median_ms": {"plain": plain, "compressed": compressed},
        "speedup": plain / compressed,
    }


def repetitions(task: Task, seconds: float) -> int:
    """How often to repeat what takes so long."""
    return max(task.fewest, min(task.most, int(task.seconds / seconds)))


def time_to_first_token(task: Task, engine: Engine, length: int, config: Config) -> dict[str, Any]:
    """Prefills of `length` tokens, uncompressed and compressed in turn; the same JSON-able dict on every rank.

    A prefill's time is that of the slowest rank. What a plain collective takes is counted from when its last rank
    comes to it: the least of the ranks' times.
    """
    vocabulary = engine.architecture.vocab_size
    tokens = torch.randint(vocabulary, (1, length), generator=torch.Generator().manual_seed(length))
    plain_collectives = PlainCollectives(engine.module)

    def plain() -> float:
        with plain_collectives.watched():
            return _prefill(engine, tokens)

    def compressed() -> float:
        with megacomp.install(config, model=engine.module):
            return _prefill(engine, tokens)

    pair = plain() + compressed()
    plain_collectives.take()
    times: dict[str, list[float]] = {"plain": [], "compressed": [], "collectives": []}
    for _ in range(repetitions(task, pair)):
        times["plain"].append(plain())
        times["collectives"].append(_agreed(plain_collectives.take(), dist.ReduceOp.MIN))
        times["compressed"].append(compressed())
    with megacomp.install(config, model=engine.module) as installation:
        engine.prefill(tokens)
        report = installation.report()
    return {
        "engine": engine.name,
        "prompt": length,
        "message_bytes": length * engine.architecture.hidden_size * engine.dtype.itemsize,
        "messages": len(report.sites),
        "compressed_messages": report.calls,
        **{f"{name}_ms": [1e3 * one for one in seconds] for name, seconds in times.items()},
    }


def _prefill(engine: Engine, tokens: torch.Tensor) -> float:
    dist.barrier()
    start = time.perf_counter()
    engine.prefill(tokens).argmax(-1).tolist()
    return _agreed([time.perf_counter() - start], dist.ReduceOp.MAX)


def _agreed(seconds: list[float], among: Any) -> float:
    """The sum of the figures, of each that of the slowest or the quickest rank."""
    figures = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(figures, op=among)
    return figures.sum().item()


def ratio(task: Task, world_size: int, way: Route, rows: int) -> float:
    """How many times fewer bytes a rank sends by `way` than by a ring uncompressed."""
    traffic = wire_bytes(way, rows, task.hidden, torch.bfloat16, rank=0, world_size=world_size)
    return traffic.ring / traffic.sent


def measure_all(task: Task, link: Link, log: Callable[[str], None]) -> dict[str, Any]:
    """Everything in `task` over the ranks of `link`."""
    world_size = link.ranks
    route = Route(codecs.get(task.codec))
    plans: dict[float, Plan] = {}
    configs: dict[float, Config] = {}
    rates: dict[float, dict[str, Any]] = {}

    def shape(mbit: float) -> None:
        dist.barrier()
        if dist.get_rank() == 0:
            link.shape(mbit)
        dist.barrier()

    for mbit in task.mbits:
        shape(mbit)
        log(f"TP {world_size}, {mbit:g} Mbit/s: tuning")
        path = tune(task, world_size, mbit)
        section = {"communication": {"codec": task.codec, "tuning": str(path), **TUNED}}
        configs[mbit] = load({"megacomp": section})[0]
        times = Tuning.read(path).codecs[0]
        plans[mbit] = plan(times, route, world_size, algorithm=True, chunks=True)
        threshold = plans[mbit].min_bytes
        rates[mbit] = {
            "mbit": mbit,
            "min_bytes": None if threshold == math.inf else threshold,
            "tuning": [size.model_dump(mode="json") for size in times.sizes],
            "ttft": [],
        }
        if task.collective_mib:
            log(f"TP {world_size}, {mbit:g} Mbit/s: all_reduce of {task.collective_mib} MiB")
            rates[mbit]["collective"] = collective(task, plans[mbit].route_of(task.collective_mib * 2**20))
    for name in task.engines:
        with command.build_engine(Path(task.model), name, world_size, "bf16") as engine:
            for mbit in task.mbits:
                shape(mbit)
                for prompt in task.prompts:
                    log(f"TP {world_size}, {mbit:g} Mbit/s: {name}, {prompt} tokens")
                    result = time_to_first_token(task, engine, prompt, configs[mbit])
                    way = plans[mbit].route_of(result["message_bytes"])
                    result["algorithm"] = way.algorithm
                    result["pipeline_chunks"] = way.pipeline_chunks
                    result["wire_ratio"] = ratio(task, world_size, way, prompt)
                    rates[mbit]["ttft"].append(result)
    return {"tp": world_size, "rates": list(rates.values()), "environment": environment.describe(CPU)}


def main(task_file: str) -> None:
    """Measure the task in this file."""
    logging.basicConfig(level=logging.WARNING)
    task, link = Task.read(Path(task_file)), Link.current()
    with process_group(link.ranks, CPU):
        first = dist.get_rank() == 0
        start = time.monotonic()
        results = measure_all(
            task, link, lambda text: print(f"{time.monotonic() - start:6.0f} s  {text}", flush=True) if first else None
        )
        if first:
            files.write_json(Path(task.out), results)
        dist.barrier()


if __name__ == "__main__":
    main(sys.argv[1])
