"""How many bytes a message costs, with and without a codec."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from megacomp.collectives.partition import dealt
from megacomp.collectives.route import Route, choose_algorithm

if TYPE_CHECKING:
    from megacomp.codecs import Codec

Collective = Literal["all_reduce", "reduce_scatter", "all_gather"]


@dataclass(frozen=True)
class Traffic:
    """Bytes one rank sends for one message; payload only, without the transport's own headers.

    sent: what the compressed collective sends.
    uncompressed: what the same algorithm would send without a codec.
    ring: what a bandwidth-optimal plain collective (ring) sends: 2(N-1)/N of the message for all_reduce,
        (N-1)/N for reduce_scatter, N-1 times the contribution for all_gather.
    """

    sent: int
    uncompressed: int
    ring: int


def payload_ratio(codec: Codec, features: int, dtype: torch.dtype = torch.bfloat16) -> float:
    """How many times smaller `features` values of `dtype` are on the wire (16 / bits per value for bf16)."""
    return features * dtype.itemsize / codec.row_bytes(features)


def wire_bytes(
    route: Route,
    rows: int,
    features: int,
    dtype: torch.dtype,
    *,
    rank: int,
    world_size: int,
    collective: Collective = "all_reduce",
) -> Traffic:
    """The bytes rank `rank` sends for a message of `rows` x `features` values of `dtype`.

    rows, features: of this rank's input, seen as a matrix whose last dimension is `features`.

    With S the message's bytes and N ranks: one-shot and all_gather send (N-1) S, reduce_scatter (N-1)/N S,
    two-shot 2(N-1)/N S; exact also where rows do not divide evenly. A world of one sends nothing.
    """
    if world_size == 1 or rows == 0 or features == 0:
        return Traffic(0, 0, 0)
    plain_row = features * dtype.itemsize
    row = route.codec.row_bytes(features)
    own = dealt(rows, world_size, rank)
    others = rows - own
    if collective == "all_gather":
        gathered = (world_size - 1) * rows
        return Traffic(gathered * row, gathered * plain_row, gathered * plain_row)
    if collective == "reduce_scatter":
        return Traffic(others * row, others * plain_row, others * plain_row)
    ring = 2 * (world_size - 1) * rows * plain_row // world_size
    if choose_algorithm(route, world_size, rows, features) == "one_shot":
        gathered = (world_size - 1) * rows
        return Traffic(gathered * row, gathered * plain_row, ring)
    gathered = (world_size - 1) * own
    sent = others * row + gathered * route.second_codec.row_bytes(features)
    return Traffic(sent, (others + gathered) * plain_row, ring)
