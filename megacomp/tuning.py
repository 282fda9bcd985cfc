"""What `megacomp tune` measured on this kind of ranks, and what "tuned" in a configuration means by it.

A file holds the times of plain and compressed all_reduces of many sizes among so many ranks of one kind of hardware
over one backend, under one version of torch and megacomp. :class:`Tunings` reads those that fit, once; a
:class:`Plan` follows from the times alone, so ranks that hold equal files decide alike.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from megacomp.collectives import Algorithm, Route, choose_algorithm, choose_chunks
from megacomp.kernels.launch_config import NO_CACHE, cache_folder, slug
from megacomp.machine import cpu_name
from megacomp.version import __version__

__all__ = [
    "CodecTuning",
    "Key",
    "Plan",
    "Step",
    "Timing",
    "Tuning",
    "TuningError",
    "Tunings",
    "cache_file",
    "plan",
]

_log = logging.getLogger("megacomp")

MARGIN = 0.1
"""How much faster than plain, as a share of its time, compressed must be to count as faster. A choice: within a model,
whose layers leave neither code nor buffers in the caches, encoding takes longer than in the loop that is measured, and
a gain within the noise is no reason to lose precision."""

CLOSE = 0.05
"""By so much, as a share of its time, another way must be faster than what "auto" chooses to take its place: of many
that are about as fast, noise would choose."""

Count = Annotated[int, Field(ge=1)]
Microseconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class TuningError(ValueError):
    """A file that holds no tuning; the message names it."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Key(_Part):
    """What must be equal for times to count.

    hardware: the GPU's name; of a CPU its name and the machine's cores.
    backend: what carries the messages: "nccl" between GPUs, "gloo" between CPUs.
    world_size: ranks of the group.
    """

    hardware: str
    backend: str
    world_size: Count
    torch_version: str
    megacomp_version: str

    @classmethod
    def here(cls, device: torch.device, world_size: int) -> Key:
        """The key of `world_size` ranks like this one."""
        if device.type == "cuda":
            hardware, backend = torch.cuda.get_device_name(device), "nccl"
        else:
            hardware, backend = f"{cpu_name()}, {os.cpu_count()} cores", "gloo"
        return cls(
            hardware=hardware,
            backend=backend,
            world_size=world_size,
            torch_version=str(torch.__version__),
            megacomp_version=__version__,
        )

    def differences(self, here: Key) -> list[str]:
        """What is not as `here`, the number of ranks aside: "torch 2.12.0, not 2.13.0"."""
        mine, theirs = self.model_dump(exclude={"world_size"}), here.model_dump()
        return [
            f"{name.removesuffix('_version')} {value}, not {theirs[name]}"
            for name, value in mine.items()
            if value != theirs[name]
        ]


class Timing(_Part):
    """One way to compress a message, and its time: the median over repetitions, each as slow as its slowest rank."""

    algorithm: Algorithm
    pipeline_chunks: Count
    microseconds: Microseconds


class SizeTuning(_Part):
    """The times of one message: an all_reduce of [rows, features] values, `bytes` in all on one rank."""

    bytes: Count
    rows: Count
    features: Count
    plain_microseconds: Microseconds
    timings: Annotated[tuple[Timing, ...], Field(min_length=1)]


class CodecTuning(_Part):
    """The times of one codec (with the codec of two-shot's second hop) as one backend computes it.

    codec, gather_codec: the names; codec_spec, gather_codec_spec: every option.
    sizes: in rising order, plain and compressed measured in alternation.
    """

    codec: str
    gather_codec: str
    codec_spec: dict[str, Any]
    gather_codec_spec: dict[str, Any]
    codec_backend: str
    sizes: Annotated[tuple[SizeTuning, ...], Field(min_length=1)]

    @classmethod
    def of(cls, route: Route, sizes: Sequence[SizeTuning]) -> CodecTuning:
        """The times of the codecs of `route`."""
        return cls(
            codec=route.codec.name,
            gather_codec=route.second_codec.name,
            codec_spec=dict(route.codec.spec),
            gather_codec_spec=dict(route.second_codec.spec),
            codec_backend=route.codec.backend,
            sizes=tuple(sorted(sizes, key=lambda size: size.bytes)),
        )

    def covers(self, route: Route) -> bool:
        """Whether these are the times of the codecs of `route`."""
        return (self.codec_spec, self.gather_codec_spec, self.codec_backend) == (
            route.codec.spec,
            route.second_codec.spec,
            route.codec.backend,
        )


class Tuning(_Part):
    """What one run of `megacomp tune` found, and earlier ones under the same key.

    hosts: machines the ranks were on. dtype: of the messages. environment: where and under what it was measured.
    """

    kind: Literal["megacomp collective tuning"] = "megacomp collective tuning"
    version: Literal[1] = 1
    key: Key
    hosts: Count
    dtype: str
    codecs: tuple[CodecTuning, ...]
    environment: dict[str, Any]

    @classmethod
    def read(cls, path: Path) -> Tuning:
        """The tuning in a file. FileNotFoundError without one, TuningError if it holds something else."""
        try:
            return cls.model_validate_json(path.read_bytes())
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(map(str, first["loc"]))
            raise TuningError(
                f"{path} holds no tuning as this version of megacomp writes it: "
                f"{f'{where}: ' if where else ''}{first['msg']}; delete it or run megacomp tune again"
            ) from None
        except FileNotFoundError:
            raise
        except (OSError, ValueError) as error:  # a path with a NUL in it is a ValueError
            raise TuningError(f"{str(path)!r} cannot be read: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """The contents of the file, JSON-able."""
        return self.model_dump(mode="json")

    def with_codecs_of(self, older: Tuning) -> Tuning:
        """This tuning, and from `older`, of the same key, dtype and hosts, the codecs that this one has no times of."""
        if (older.key, older.dtype, older.hosts) != (self.key, self.dtype, self.hosts):
            return self
        measured = [_identity(codec) for codec in self.codecs]
        kept = tuple(codec for codec in older.codecs if _identity(codec) not in measured)
        return self.model_copy(update={"codecs": self.codecs + kept})

    def digest(self) -> str:
        """SHA-256, in hexadecimal, of everything that decisions follow from."""
        content = self.model_dump(mode="json", exclude={"environment"})
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def find(self, route: Route) -> CodecTuning | None:
        """The times of the codecs of `route`."""
        return next((codec for codec in self.codecs if codec.covers(route)), None)


def _identity(codec: CodecTuning) -> tuple[dict[str, Any], dict[str, Any], str]:
    return codec.codec_spec, codec.gather_codec_spec, codec.codec_backend


# What follows from the times


class Step(NamedTuple):
    """The fastest way for messages of min_bytes..max_bytes, both included."""

    min_bytes: int
    max_bytes: float
    route: Route


@dataclass(frozen=True)
class Plan:
    """How messages of one codec are best sent.

    min_bytes: the smallest measured size from which compressed was faster than plain, by `MARGIN`, at every size;
        infinite if it was not even at the largest.
    steps: the fastest way at each measured size, up to half-way, in doublings, to the next; they cover all sizes.
    """

    min_bytes: float
    steps: tuple[Step, ...]

    def route_of(self, size: int) -> Route:
        """The fastest way for a message of `size` bytes."""
        return next(step.route for step in self.steps if size <= step.max_bytes)


def plan(times: CodecTuning, route: Route, world_size: int, *, algorithm: bool, chunks: bool) -> Plan:
    """The plan for messages of `route` among `world_size` ranks.

    algorithm, chunks: whether those of `route` may be replaced by what was fastest. Where they may not, the times
    are those of what `route` says, "auto" included; of other chunks where these were not measured.
    """
    best = [_best(size, route, world_size, algorithm, chunks) for size in times.sizes]
    min_bytes = math.inf
    for size, timing in zip(reversed(times.sizes), reversed(best), strict=True):
        if timing.microseconds > (1 - MARGIN) * size.plain_microseconds:
            break
        min_bytes = size.bytes
    steps: list[Step] = []
    for index, (size, timing) in enumerate(zip(times.sizes, best, strict=True)):
        last = index + 1 == len(best)
        end = math.inf if last else math.isqrt(size.bytes * times.sizes[index + 1].bytes)
        changed = replace(
            route,
            algorithm=timing.algorithm if algorithm else route.algorithm,
            pipeline_chunks=timing.pipeline_chunks if chunks else route.pipeline_chunks,
        )
        if steps and steps[-1].route == changed:
            steps[-1] = steps[-1]._replace(max_bytes=end)
        else:
            steps.append(Step(int(steps[-1].max_bytes) + 1 if steps else 0, end, changed))
    return Plan(min_bytes, tuple(steps))


def _best(size: SizeTuning, route: Route, world_size: int, algorithm: bool, chunks: bool) -> Timing:
    """The fastest of the timings that `route` leaves open; the one nearest to what it says, if that is `CLOSE`."""
    usual_algorithm = choose_algorithm(route, world_size, size.rows, size.features)
    usual_chunks = choose_chunks(route, size.rows, size.features, _device())
    allowed: Sequence[Timing] = size.timings
    if not algorithm:
        allowed = [timing for timing in allowed if timing.algorithm == usual_algorithm] or allowed
    if not chunks:
        allowed = [timing for timing in allowed if timing.pipeline_chunks == usual_chunks] or allowed
    # Of the other algorithm powers of two were measured, which "auto" need not choose.
    usual = min(allowed, key=lambda way: (way.algorithm != usual_algorithm, abs(way.pipeline_chunks - usual_chunks)))
    fastest = min(allowed, key=lambda timing: timing.microseconds)
    return usual if usual.microseconds * (1 - CLOSE) <= fastest.microseconds else fastest


# Where they are kept


def cache_file(key: Key) -> Path | None:
    """Where a user's tuning is: ``$XDG_CACHE_HOME/megacomp/tuning/<hardware>-<backend>-<ranks>-ranks.json``.

    None where there is no cache.
    """
    folder = cache_folder("tuning")
    return folder and folder / f"{_file_stem(key)}{key.world_size}-ranks.json"


def _file_stem(key: Key) -> str:
    return f"{slug(key.hardware)}-{key.backend}-"


class Tunings:
    """The tunings that one installation goes by, read when it is made: a file that changes later changes nothing.

    source: a file, or None for the user's cache, of which every number of ranks counts.

    A file of the cache that holds no tuning is ignored with a warning that names it; in `source` it raises
    TuningError, and so does a `source` that is not there. One of other hardware or versions counts for nothing,
    which is warned of as well.
    """

    def __init__(self, source: str | None, world_size: int | None) -> None:
        """world_size: of the default group; None as long as there is none."""
        self._here = Key.here(_device(), 1)
        self._source = source
        self._found: dict[int, tuple[Path, Tuning]] = {}
        self._problems: dict[int, str] = {}
        self._missing: dict[str, str] = {}
        self._plans: dict[tuple[Route, int, bool, bool], Plan | None] = {}
        self._read()
        usable = [size for size in self._found if world_size is None or world_size % size == 0]
        if not usable:
            reasons = list(self._problems.values()) or [self._absent(world_size)]
            self._warn(None, "; ".join(reasons), world_size)

    def plan(self, route: Route, world_size: int, *, algorithm: bool, chunks: bool) -> Plan | None:
        """The plan for `route`, see :func:`plan`; None, and one warning, if nothing fits that was measured."""
        key = (route, world_size, algorithm, chunks)
        if key not in self._plans:
            times = self._times(route, world_size)
            made = plan(times, route, world_size, algorithm=algorithm, chunks=chunks) if times else None
            self._plans[key] = made
        return self._plans[key]

    def statement(self) -> dict[str, str]:
        """What ranks must have in common to decide alike: the digest of each tuning."""
        return {f"tuning of {size} ranks": tuning.digest() for size, (_, tuning) in sorted(self._found.items())}

    def describe(self) -> dict[str, str]:
        """For reports: which tuning counts for how many ranks, and for which the defaults stand in, and why."""
        found = {f"{size} ranks": f"{path} ({tuning.digest()[:12]})" for size, (path, tuning) in self._found.items()}
        return found | {what: f"defaults: {why}" for what, why in self._missing.items()}

    def _times(self, route: Route, world_size: int) -> CodecTuning | None:
        if world_size not in self._found:
            self._warn(f"{world_size} ranks", self._problems.get(world_size) or self._absent(world_size), world_size)
            return None
        path, tuning = self._found[world_size]
        times = tuning.find(route)
        if times is None:
            codec = route.codec.name if route.gather_codec is None else f"{route.codec.name}, {route.gather_codec.name}"
            why = f"{path} has no times of it computed by backend {route.codec.backend!r}"
            self._warn(f"{world_size} ranks, {codec}", why, world_size)
        return times

    def _absent(self, world_size: int | None) -> str:
        place = self._source or cache_folder("tuning")
        if place is None:
            return NO_CACHE
        ranks = "these ranks" if world_size is None else f"{world_size} ranks"
        there = f"there is one for {', '.join(map(str, sorted(self._found)))}" if self._found else "there is none"
        return f"no tuning of {ranks} in {place} ({there})"

    def _warn(self, what: str | None, why: str, world_size: int | None) -> None:
        """Say once that the defaults stand in for a tuning of `what`."""
        what = what or ("any ranks" if world_size is None else f"{world_size} ranks")
        if what not in self._missing:
            self._missing[what] = why
            command = "megacomp tune" + (f" --tp {world_size}" if world_size else "")
            command += " --out FILE" if cache_folder("tuning") is None else ""
            _log.warning('"tuned" for %s falls back on the defaults: %s; `%s` measures it', what, why, command)

    def _read(self) -> None:
        if self._source is not None:
            try:
                self._take(Path(self._source), Tuning.read(Path(self._source)))
            except FileNotFoundError:
                raise TuningError(f"there is no file {self._source}") from None
            return
        folder = cache_folder("tuning")
        for path in sorted(folder.glob(f"{_file_stem(self._here)}*-ranks.json")) if folder else ():
            try:
                self._take(path, Tuning.read(path))
            except (TuningError, FileNotFoundError) as error:
                _log.warning("a tuning is ignored: %s", error)

    def _take(self, path: Path, tuning: Tuning) -> None:
        if differences := tuning.key.differences(self._here):
            self._problems[tuning.key.world_size] = f"{path} was measured with {'; '.join(differences)}"
        else:
            self._found[tuning.key.world_size] = (path, tuning)


def _device() -> torch.device:
    """What the messages of this process lie on."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
