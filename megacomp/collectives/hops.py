"""The two hops every collective is made of: encoded rows to everyone, encoded rows to their owners.

Both work through the rows in chunks, so that a chunk travels while the next is being encoded or the last
decoded. Chunks cut every rank's rows alike; a codec's wire is row by row, so the cut changes no value.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from megacomp.collectives import workspace
from megacomp.collectives.links import link_for
from megacomp.collectives.message import Peers
from megacomp.collectives.partition import split
from megacomp.collectives.trace import Trace, measured

if TYPE_CHECKING:
    from megacomp.codecs import Codec


def cut(shares: Sequence[range], chunks: int) -> list[list[range]]:
    """For each chunk, the rows of each share that belong to it.

    There are no more chunks than the longest share has rows.
    """
    chunks = min(chunks, max(len(share) for share in shares))
    return [list(chunk) for chunk in zip(*(split(share, chunks) for share in shares), strict=True)]


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
        self._codec = codec
        self._rank = peers.rank
        self._pieces = pieces
        self._counts = [[len(rows) for rows in chunk] for chunk in pieces]
        self._row_bytes = codec.row_bytes(features)
        self._device = device
        self._trace = trace
        self._link = link_for(peers, device, self.lane)
        self._wires = self._expect()

    @abstractmethod
    def _expect(self) -> list[torch.Tensor]:
        """Take the hop's buffers, tell the link where wires will arrive, and return these places."""

    @abstractmethod
    def send(self, chunk: int, rows: torch.Tensor) -> None:
        """Encode this rank's `rows` and send those of `chunk`."""

    def decode_sum(self, chunk: int, out: torch.Tensor) -> None:
        """Wait for the wires of `chunk` and write their sum, in rank order, to `out` [rows, features]."""
        with measured(self._trace, "wire"):
            self._link.wait(chunk)
        with measured(self._trace, "decode"):
            self._codec.decode_sum(self._wires[chunk], out.shape[1], out.dtype, out=out)

    def decode(self, chunk: int, outs: Sequence[torch.Tensor]) -> None:
        """Wait for the wires of `chunk` and write each peer's rows to its own of `outs` [rows, features]."""
        with measured(self._trace, "wire"):
            self._link.wait(chunk)
        with measured(self._trace, "decode"):
            for wire, out in zip(self._wires[chunk], outs, strict=True):
                if len(out):
                    self._codec.decode(wire[: len(out)], out.shape[1], out.dtype, out=out)

    def close(self) -> None:
        """Wait until this rank's own messages have left its buffers."""
        with measured(self._trace, "wire"):
            self._link.close()


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

    def send(self, chunk: int, rows: torch.Tensor) -> None:
        """Encode `rows`, this rank's piece of `chunk`, and send them to everyone."""
        wires, counts = self._wires[chunk], self._counts[chunk]
        with measured(self._trace, "encode"):
            self._codec.encode(rows, out=wires[self._rank, : counts[self._rank]])
        with measured(self._trace, "wire"):
            self._link.gather(chunk, wires, counts)


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

    def send(self, chunk: int, rows: torch.Tensor) -> None:
        """Encode those of `rows`, the whole message, that belong to `chunk`; send them to their owners."""
        parts, counts, wires = self._parts[chunk], self._counts[chunk], self._wires[chunk]
        places = list(parts.split(counts))
        if not self._link.delivers_own:
            places[self._rank] = wires[self._rank]
        with measured(self._trace, "encode"):
            for place, piece in zip(places, self._pieces[chunk], strict=True):
                if piece:
                    self._codec.encode(rows[piece.start : piece.stop], out=place)
        with measured(self._trace, "wire"):
            self._link.scatter(chunk, parts, counts, wires)
