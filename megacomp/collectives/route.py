"""What one message is sent with: codec, algorithm, chunks; and what "auto" means for each."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from megacomp.codecs import Codec, from_key

Algorithm = Literal["one_shot", "two_shot"]

ONE_SHOT_LIMIT_BYTES = 256 * 1024
"""Wires up to this size go one-shot whatever the world size. Measured with mxfp4 among four gloo processes on
two cores: at 1 Gbit/s one-shot is the faster up to 136 KiB and the slower from 272 KiB, over loopback up to
0.5 MiB and from 2 MiB."""

CHUNK_BYTES = 512 * 1024
"""A wire gets one chunk per so many bytes. Measured with mxfp4 over gloo at 1 Gbit/s, one-shot between two ranks and
two-shot among four: at 0.5 MiB one or two chunks are the fastest, at 1 MiB four and two (one takes a fifth longer), at
8.5 MiB (32 MiB of bf16) eight to sixteen and four to eight. `megacomp tune` finds what is best where it runs."""

CUDA_CHUNK_BYTES = 8 * 1024 * 1024
CUDA_MAX_CHUNKS = 4
"""On CUDA a guess, not measured yet, meant to lose nothing: each chunk costs two or three launches and a collective,
some tens of microseconds, and 8 MiB take 20 us over the fastest NVLink, 400 us over PCIe. So messages of up to 32 MiB
of bf16 at 4 bits go whole, and what is beyond hides three quarters of its encoding and decoding at most."""

MAX_CHUNKS = 8
"""Each chunk costs its calls: beyond eight, two ranks gain a twentieth at 1 Gbit/s, four lose as much."""


@dataclass(frozen=True)
class Route:
    """How one message travels.

    codec: of every hop that carries partials.
    gather_codec: of the second hop of two-shot, which carries sums; None means `codec`.
    algorithm: of an all_reduce. "one_shot": everyone sends its wire to everyone and sums all of them, one
        rounding. "two_shot": reduce-scatter, then all-gather of the encoded sums; two roundings, and at N
        ranks 2/N of the volume. "auto": see `choose_algorithm`.
    pipeline_chunks: how many chunks of rows are encoded, sent and decoded in turn; "auto" goes by wire size.
        The result does not depend on it.

    Raises ValueError for an unknown algorithm and for chunks that are neither "auto" nor a positive int.
    """

    codec: Codec
    gather_codec: Codec | None = None
    algorithm: Algorithm | Literal["auto"] = "auto"
    pipeline_chunks: int | Literal["auto"] = "auto"

    def __post_init__(self) -> None:
        allowed = ("auto", *get_args(Algorithm))
        if self.algorithm not in allowed:
            raise ValueError(f"algorithm must be one of {', '.join(allowed)}, not {self.algorithm!r}")
        chunks = self.pipeline_chunks
        if chunks != "auto" and (not isinstance(chunks, int) or isinstance(chunks, bool) or chunks < 1):
            raise ValueError(f'pipeline_chunks must be "auto" or a positive integer, not {chunks!r}')

    @property
    def second_codec(self) -> Codec:
        """The codec of the second hop of two-shot."""
        return (self.codec if self.gather_codec is None else self.gather_codec).summed

    @property
    def key(self) -> str:
        """This route as JSON, from which `route_from_key` makes it again, in another process too.

        Put together from strings, for torch.compile reads it and cannot follow the json module.
        """
        gather_codec = "null" if self.gather_codec is None else self.gather_codec.key
        chunks = f'"{self.pipeline_chunks}"' if self.pipeline_chunks == "auto" else f"{self.pipeline_chunks}"
        return (
            f'{{"algorithm":"{self.algorithm}","codec":{self.codec.key},'
            f'"gather_codec":{gather_codec},"pipeline_chunks":{chunks}}}'
        )


@functools.lru_cache(maxsize=1024)
def route_from_key(key: str) -> Route:
    """The route whose `key` this is."""
    read = json.loads(key)
    codec, gather_codec = (
        # As it was written: a calibrated codec is known by its key.
        read[name] and from_key(json.dumps(read[name], separators=(",", ":")))
        for name in ("codec", "gather_codec")
    )
    return Route(codec, gather_codec, read["algorithm"], read["pipeline_chunks"])


def choose_algorithm(route: Route, world_size: int, rows: int, features: int) -> Algorithm:
    """The algorithm of an all_reduce of [rows, features] among `world_size` ranks under `route`.

    At two ranks both send the same volume and one-shot rounds once and takes one hop. Beyond, one-shot sends
    N/2 times the volume of two-shot, but small messages cost latency, not volume.
    """
    if route.algorithm != "auto":
        return route.algorithm
    small = rows * route.codec.row_bytes(features) <= ONE_SHOT_LIMIT_BYTES
    return "one_shot" if world_size == 2 or small else "two_shot"


def choose_chunks(route: Route, rows: int, features: int, device: torch.device) -> int:
    """How many chunks to send a message of [rows, features] in; at least one."""
    if route.pipeline_chunks != "auto":
        return route.pipeline_chunks
    on_cpu = device.type == "cpu"
    chunk_bytes, most = (CHUNK_BYTES, MAX_CHUNKS) if on_cpu else (CUDA_CHUNK_BYTES, CUDA_MAX_CHUNKS)
    return max(1, min(most, rows * route.codec.row_bytes(features) // chunk_bytes))
