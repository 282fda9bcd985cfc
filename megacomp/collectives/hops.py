"""The two hops every collective is made of: encoded rows to everyone, encoded rows to their owners.

Both work through the rows in chunks, so that a chunk travels while the next is being encoded or the last
decoded. Chunks cut every rank's rows alike; a codec's wire is row by row, so the cut changes no value. Rows of
several ranks that follow one another, in the message and on the wire, are encoded or decoded together.

On CUDA nothing here makes the host wait or looks at data, so a call can be captured in a CUDA graph: kernels go to
the current stream, NCCL's own stream carries what was sent, and waiting orders the one behind the other. A chunk is
so encoded while the one before it travels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from megacomp.collectives import workspace
from megacomp.collectives.deferred import DeferredPartial
from megacomp.collectives.links import CHANNELS, link_for
from megacomp.collectives.message import Peers, as_matrix, cause_of, mark_failed
from megacomp.collectives.partition import consecutive, runs, split
from megacomp.collectives.simulated_ranks import SimulatedGroup
from megacomp.collectives.trace import Trace, measured
from megacomp.kernels import sums_rows

if TYPE_CHECKING:
    from megacomp.codecs import Codec

Source = Callable[["Codec", range, torch.Tensor], None]
"""What this rank contributes: writes such rows of it, encoded, to a wire, uint8[rows, row_bytes]."""

Finish = Callable[["Codec", torch.Tensor, range], None]
"""What becomes of wires that arrived, uint8[peers, rows, row_bytes]: their sum is such rows of the result."""


def out_of(x: torch.Tensor) -> Source:
    """Encode rows of `x` [..., features], or have them computed encoded if it is a DeferredPartial."""
    if isinstance(x, DeferredPartial):
        return x.encode_rows
    matrix = as_matrix(x)

    def source(codec: Codec, rows: range, wire: torch.Tensor) -> None:
        codec.encode(matrix[rows.start : rows.stop], out=wire)

    return source


def into(out: torch.Tensor) -> Finish:
    """Decode and sum wires into their rows of `out` [rows, features]."""

    def finish(codec: Codec, wires: torch.Tensor, rows: range) -> None:
        codec.decode_sum(wires, out.shape[1], out.dtype, out=out[rows.start : rows.stop])

    return finish


def cut(shares: Sequence[range], chunks: int) -> list[list[range]]:
    """For each chunk, the rows of each share that belong to it.

    There are no more chunks than the longest share has rows.
    """
    chunks = min(chunks, max(len(share) for share in shares))
    return [list(chunk) for chunk in zip(*(split(share, chunks) for share in shares), strict=True)]


def sums_buffer(rows: int, features: int, device: torch.device) -> torch.Tensor | None:
    """The buffer for sums that kernels of several steps want on the CPU; elsewhere the allocator has one if needed."""
    if device.type != "cpu":
        return None
    shape = (sums_rows(rows, features, device), features * torch.float32.itemsize)
    return workspace.take("sums", [shape], device)[0].view(torch.float32)


def _channel(rows: int, features: int, lane: int) -> int:
    """Another one for every other message shape, within reason, and for each of its lanes.

    gloo ends the process that receives more than it expected, and of as many bytes in another shape nobody would know.
    In a channel of its own such a message arrives nowhere, and whoever waits for another has an error in time. Of as
    many features, any two numbers of rows below 131,072 differ: the factor is odd.
    """
    return (2 * (40_503 * rows + features) + lane) % CHANNELS


class _Hop(ABC):
    """What both hops share: a codec, a link, and for each chunk the wires of all peers."""

    lane: int
    """Tells the messages of the two hops of one call apart."""

    def __init__(
        self,
        codec: Codec,
        peers: Peers,
        pieces: Sequence[Sequence[range]],
        features: int,
        device: torch.device,
        trace: Trace | None,
    ) -> None:
        """pieces: for each chunk, one range of rows per rank (`cut`)."""
        self._codec = codec.sender(peers.rank)
        self._rank = peers.rank
        self._pieces = pieces
        self._features = features
        self._counts = [[len(rows) for rows in chunk] for chunk in pieces]
        self._row_bytes = codec.row_bytes(features)
        self._device = device
        self._trace = trace
        self._link = link_for(peers, device, _channel(pieces[-1][-1].stop, features, self.lane))
        self._wires: list[torch.Tensor] = []

    def open(self) -> None:
        """Be ready for the wires of all peers."""
        self._wires = self._expect()

    @abstractmethod
    def _expect(self) -> list[torch.Tensor]:
        """Take the hop's buffers, tell the link where wires will arrive, and return these places."""

    @abstractmethod
    def send(self, chunk: int, source: Source) -> None:
        """Encode what of this rank's rows belongs to `chunk`, and send it."""

    def finish_sum(self, chunk: int, rows: range, finish: Finish) -> None:
        """Wait for the wires of `chunk`, whose sum in rank order is `rows` of the result, and finish them."""
        with self._arrived(chunk):
            finish(self._codec, self._wires[chunk], rows)

    @contextmanager
    def _arrived(self, chunk: int) -> Iterator[None]:
        """Wait for the wires of `chunk`, and count the block as decoding."""
        with measured(self._trace, "wire"):
            self._link.wait(chunk)
        with measured(self._trace, "decode"):
            yield

    def close(self) -> None:
        """Wait until this rank's own messages have left its buffers."""
        with measured(self._trace, "wire"):
            self._link.close()


@contextmanager
def joint(peers: Peers) -> Iterator[None]:
    """What `peers` do together, each counting on the others, from the first allocation to the last wire.

    A rank that fails in here leaves receives posted and its peers' wires under way, and the next message of the same
    shape would be taken for this one: no message of the group is of use any more.

    Raises ValueError for a SimulatedGroup, whose ranks exchange tensors and no wires.
    """
    if isinstance(peers.group, SimulatedGroup):
        raise ValueError("of the compressed collectives, simulated ranks have all_reduce only")
    try:
        yield
    except BaseException as error:
        mark_failed(peers.group, cause_of(error))
        raise


@contextmanager
def opened(*hops: _Hop) -> Iterator[None]:
    """Have `hops`, of one call, be ready for all wires first, and in the end wait until this rank's own have left."""
    for hop in hops:
        hop.open()
    yield
    for hop in hops:
        hop.close()


class GatherHop(_Hop):
    """All-gather: a rank's piece of a chunk is what it contributes, and goes to everyone.

    Where ranks contribute different numbers of rows, a shorter piece fills the beginning of its wire.
    """

    lane = 0

    def _expect(self) -> list[torch.Tensor]:
        shapes = [(len(counts), max(counts), self._row_bytes) for counts in self._counts]
        places = workspace.take("gathered", shapes, self._device)
        with measured(self._trace, "wire"):
            for chunk, (wires, counts) in enumerate(zip(places, self._counts, strict=True)):
                self._link.expect(chunk, wires, counts)
        return places

    def send(self, chunk: int, source: Source) -> None:
        """Encode this rank's piece of `chunk`, and send it to everyone."""
        with measured(self._trace, "encode"):
            source(self._codec, self._pieces[chunk][self._rank], self._own(chunk))
        self._post(chunk)

    def send_sum(self, chunk: int, arriving: ScatterHop) -> None:
        """Wait for the wires of `chunk` of the hop before, and send everyone their sum."""
        arriving.decode_sum_encode(chunk, self._codec, self._own(chunk))
        self._post(chunk)

    def finish_each(self, chunk: int, places: Sequence[range], finish: Finish) -> None:
        """Wait for the wires of `chunk`, each peer's being its own of `places` in the result, and finish them."""
        with self._arrived(chunk):
            wires = self._wires[chunk].flatten(0, 1)
            starts = range(0, len(wires), self._wires[chunk].shape[1])
            arrived = [range(start, start + len(place)) for start, place in zip(starts, places, strict=True)]
            for rows, place in runs(zip(arrived, places, strict=True)):
                finish(self._codec, wires[rows.start : rows.stop].unsqueeze(0), place)

    def _own(self, chunk: int) -> torch.Tensor:
        return self._wires[chunk][self._rank, : self._counts[chunk][self._rank]]

    def _post(self, chunk: int) -> None:
        with measured(self._trace, "wire"):
            self._link.gather(chunk, self._wires[chunk], self._counts[chunk])


class ScatterHop(_Hop):
    """All-to-all: a rank's piece of a chunk is what it owns, and is sent to it by everyone."""

    lane = 1

    def _expect(self) -> list[torch.Tensor]:
        self._parts = workspace.take(
            "outgoing", [(sum(counts), self._row_bytes) for counts in self._counts], self._device
        )
        places = workspace.take(
            "incoming",
            [(len(counts), counts[self._rank], self._row_bytes) for counts in self._counts],
            self._device,
        )
        with measured(self._trace, "wire"):
            for chunk, wires in enumerate(places):
                self._link.expect(chunk, wires, [wires.shape[1]] * wires.shape[0])
        return places

    def send(self, chunk: int, source: Source) -> None:
        """Encode those rows of the message that belong to `chunk`; send them to their owners."""
        parts, counts, wires = self._parts[chunk], self._counts[chunk], self._wires[chunk]
        pairs = list(zip(consecutive(counts), self._pieces[chunk], strict=True))
        with measured(self._trace, "encode"):
            if not self._link.delivers_own:
                _, own = pairs.pop(self._rank)
                source(self._codec, own, wires[self._rank])
            for place, piece in runs(pairs):
                source(self._codec, piece, parts[place.start : place.stop])
        with measured(self._trace, "wire"):
            self._link.scatter(chunk, parts, counts, wires)

    def decode_sum_encode(self, chunk: int, codec: Codec, wire: torch.Tensor) -> None:
        """Wait for the wires of `chunk` and write their sum, encoded by `codec`, to `wire`."""
        sums = sums_buffer(len(wire), self._features, self._device)
        with self._arrived(chunk):
            self._codec.decode_sum_encode(self._wires[chunk], self._features, codec, out=wire, sums=sums)
