"""Finding the fastest way to all_reduce, size by size, among the ranks there are.

Every way is first compared with the definition, bit for bit, and only then timed. A time is that of the slowest
rank, the same figure on every rank; so all ranks come to the same verdict without asking further.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.distributed as dist

from megacomp import codecs
from megacomp.collectives import Algorithm, Route, all_reduce, choose_algorithm, choose_chunks
from megacomp.config import Communication, Config, Rule
from megacomp.launch.made_up import partial, route_with_tables
from megacomp.launch.measure import slowest, synchronize
from megacomp.tuning import CodecTuning, SizeTuning, Timing

SMALLEST_BYTES = 1024

SCREENING = 3
"""Repetitions after which ways that are clearly slower drop out."""

CLEARLY_SLOWER = 1.25

FEWEST_REPEATS = 5

SECONDS_PER_SIZE = 3.0
"""After so many seconds on one codec and size, on a slow link, repetitions end, but for the fewest."""

MOST_CHUNKS = 16
CHUNK_WIRE_BYTES = {"cpu": 32 * 1024, "cuda": 1024 * 1024}
"""Smaller chunks of a wire are not tried: a call costs as long as they travel."""

BATCH_BYTES = 256 * 1024
MOST_CALLS = 16
"""A repetition of a small message is several calls, or leaving the barrier would be most of its time."""

PATTERN_ROWS = 61
"""Messages repeat so many rows, the last incompletely: a prime, so that rows exchanged by a wrong cut show, and few,
so that the definition, which runs uncompiled, is quick."""


@dataclass(frozen=True)
class Message:
    """A tensor [rows, features] of `dtype` on each rank."""

    rows: int
    features: int
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return self.rows * self.features * self.dtype.itemsize


def messages(max_bytes: int, features: int, dtype: torch.dtype) -> list[Message]:
    """Messages from 1 KiB to `max_bytes`, each twice the size of the one before; less than a row is a shorter row."""
    doublings = max(0, int(math.log2(max_bytes / SMALLEST_BYTES)))
    values = [SMALLEST_BYTES * 2**step // dtype.itemsize for step in range(doublings + 1)]
    return [Message(max(1, count // features), min(count, features), dtype) for count in values]


def routes_of(config: Config) -> list[Route]:
    """The codecs of a configuration, with their gather codecs, each once."""
    communication = config.communication
    everywhere: list[Communication | Rule] = [communication, *map(communication.resolve, communication.rules)]
    found: list[Route] = []
    for settings in everywhere:
        if settings.codec is not None:
            gather = settings.gather_codec
            route = Route(
                codecs.get(settings.codec, backend=config.backend),
                None if gather is None else codecs.get(gather, backend=config.backend),
            )
            # To name a codec's own as gather codec changes nothing.
            if all((route.codec, route.second_codec) != (other.codec, other.second_codec) for other in found):
                found.append(route)
    return found


def candidates(route: Route, message: Message, world_size: int, device: torch.device) -> list[Route]:
    """The ways worth trying for a message: one-shot and two-shot, by chunks; what "auto" would choose comes first."""
    usual: Algorithm = choose_algorithm(route, world_size, message.rows, message.features)
    chunks_of_auto = choose_chunks(route, message.rows, message.features, device)
    found = [replace(route, algorithm=usual, pipeline_chunks=chunks_of_auto)]
    wire = message.rows * route.codec.row_bytes(message.features)
    shares: dict[Algorithm, int] = {"one_shot": message.rows, "two_shot": -(-message.rows // world_size)}
    for algorithm, share in shares.items():
        most = max(1, min(MOST_CHUNKS, share, wire // CHUNK_WIRE_BYTES[device.type]))
        for chunks in (2**doubling for doubling in range(most.bit_length())):
            candidate = replace(route, algorithm=algorithm, pipeline_chunks=chunks)
            if candidate not in found:
                found.append(candidate)
    return found


class Ranks(Protocol):
    """What all ranks do together, each with the same arguments, each with the same answer."""

    world_size: int
    device: torch.device

    def verify(self, message: Message, route: Route) -> bool:
        """Whether every rank gets the bits of the definition for `message` sent by `route`."""

    def seconds(self, message: Message, route: Route | None) -> float:
        """How long the slowest rank takes to all_reduce `message`, by `route` or (None) plainly."""


class Rejected(RuntimeError):
    """A way to send whose result is not that of the definition."""


def tune(
    routes: Sequence[Route],
    sizes: Sequence[Message],
    ranks: Ranks,
    *,
    repeats: int = 15,
    done: Callable[[], object] = lambda: None,
) -> list[CodecTuning]:
    """The times of every codec of `routes` at every size, plain in alternation with the ways that are quick.

    Static codecs are measured with made-up tables, on which times do not depend.
    done: called after each codec and size.
    Raises Rejected, on every rank and before it is timed, for a way whose result is not that of the definition.
    """
    found: dict[Route, list[SizeTuning]] = {route: [] for route in routes}
    # Size by size: what the codecs share, the message, is made once.
    for message in sizes:
        for route in routes:
            found[route].append(_tune_size(route, message, ranks, repeats))
            done()
    return [CodecTuning.of(route, measured) for route, measured in found.items()]


def _tune_size(route: Route, message: Message, ranks: Ranks, repeats: int) -> SizeTuning:
    route = route_with_tables(route, ranks.world_size, message.features)
    ways = candidates(route, message, ranks.world_size, ranks.device)
    for way in ways:
        if not ranks.verify(message, way):
            raise Rejected(
                f"{way.codec.name}, {way.algorithm} in {way.pipeline_chunks} chunks: an all_reduce of {message.rows} x "
                f"{message.features} {message.dtype} is not, bit for bit, what its definition gives; please report it"
            )
    contenders: list[Route | None] = [None, *ways]
    times: dict[Route | None, list[float]] = {contender: [] for contender in contenders}

    def repeat() -> float:
        total = 0.0
        for contender in contenders:
            seconds = ranks.seconds(message, contender)
            times[contender].append(seconds)
            total += seconds
        return total

    spent = sum(repeat() for _ in range(SCREENING))
    fastest = min(statistics.median(times[way]) for way in ways)
    contenders = [None, *(way for way in ways if statistics.median(times[way]) <= CLEARLY_SLOWER * fastest)]
    for repetition in range(SCREENING, max(repeats, SCREENING)):
        if repetition >= FEWEST_REPEATS and spent > SECONDS_PER_SIZE:
            break
        spent += repeat()
    return SizeTuning(
        bytes=message.bytes,
        rows=message.rows,
        features=message.features,
        plain_microseconds=_median_us(times[None]),
        timings=tuple(
            Timing(
                algorithm=_algorithm(way), pipeline_chunks=int(way.pipeline_chunks), microseconds=_median_us(times[way])
            )
            for way in ways
        ),
    )


def _algorithm(way: Route) -> Algorithm:
    assert way.algorithm != "auto"
    return way.algorithm


def _median_us(seconds: Iterable[float]) -> float:
    return 1e6 * statistics.median(seconds)


class GroupRanks:
    """The ranks of a process group, each holding partials of its own."""

    def __init__(self, group: dist.ProcessGroup | None, device: torch.device) -> None:
        self.world_size = dist.get_world_size(group)
        self.device = device
        self._group = group
        self._rank = dist.get_rank(group)
        self._message: Message | None = None
        self._x = self._plain = self._result = torch.empty(0)

    def verify(self, message: Message, route: Route) -> bool:
        """Each rank computes the definition from everyone's partials, which it can make itself."""
        self._hold(message)
        all_reduce(self._x, self._group, route, out=self._result)
        expected = self._definition(message, route).to(self.device)
        equal = all(same_bits(part, expected[: len(part)]) for part in self._result.split(PATTERN_ROWS))
        verdict = torch.tensor([float(equal)], device=self.device)
        dist.all_reduce(verdict, op=dist.ReduceOp.MIN, group=self._group)
        return bool(verdict.item())

    def seconds(self, message: Message, route: Route | None) -> float:
        self._hold(message)
        calls = max(1, min(MOST_CALLS, BATCH_BYTES // message.bytes))
        self._plain.copy_(self._x)
        dist.barrier(self._group)
        synchronize(self.device)
        start = time.perf_counter()
        for _ in range(calls):
            if route is None:
                dist.all_reduce(self._plain, group=self._group)
            else:
                all_reduce(self._x, self._group, route, out=self._result)
        synchronize(self.device)
        mine = (time.perf_counter() - start) / calls
        return slowest((mine,), self._group, self.device)[0]

    def _hold(self, message: Message) -> None:
        if message == self._message:
            return
        self._message = message
        pattern = _pattern(message, self._rank)
        self._x = pattern.repeat(-(-message.rows // len(pattern)), 1)[: message.rows].contiguous().to(self.device)
        self._plain, self._result = torch.empty_like(self._x), torch.empty_like(self._x)

    def _definition(self, message: Message, route: Route) -> torch.Tensor:
        """The result's rows, up to `PATTERN_ROWS`, by the uncompiled definition on the CPU."""
        codec, gather = (given.with_backend("reference") for given in (route.codec, route.second_codec))
        partials = [_pattern(message, rank) for rank in range(self.world_size)]
        wires = torch.stack([codec.sender(rank).encode(x) for rank, x in enumerate(partials)])
        if route.algorithm == "one_shot":
            return codec.decode_sum(wires, message.features, message.dtype)
        sums = codec.decode_sum(wires, message.features, torch.float32)
        return gather.decode(gather.encode(sums), message.features, message.dtype)


def _pattern(message: Message, rank: int) -> torch.Tensor:
    return partial(min(message.rows, PATTERN_ROWS), message.features, message.dtype, rank, "outliers")


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether two tensors of one dtype are equal bit for bit."""
    integers = {2: torch.int16, 4: torch.int32}[left.dtype.itemsize]
    return torch.equal(left.view(integers), right.view(integers))
