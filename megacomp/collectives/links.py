"""Links: how the wires of one hop reach the other ranks, chunk by chunk.

A hop tells its link of each chunk three times: `expect` (where the chunk's wires will lie), `gather` or
`scatter` (this rank's part is encoded: send it), `wait` (the peers' parts are needed). `close` ends the hop.
The wires of a chunk are uint8[peers, rows, row_bytes]; peer p fills the first counts[p] rows of its part.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.distributed as dist

from megacomp.collectives.message import CollectiveError, Peers

# Tags have 31 bits: one that keeps away from those a program would use for messages of its own, then the channel, then
# the chunk. Chunks beyond begin anew, for messages of one tag are received in the order in which they were sent.
_OWN_TAGS = 1 << 30
_CHUNK_BITS = 12
CHANNELS = 1 << 18

# torch 2.13 renamed them; the older names warn there.
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Link(Protocol):
    """The way of one hop's wires. See the module's docstring for the order of calls."""

    delivers_own: bool
    """Whether `scatter` also carries a rank's own part to its place; if not, it is to be encoded there."""

    def expect(self, chunk: int, wires: torch.Tensor, counts: Sequence[int]) -> None:
        """Be ready for the peers' parts of `chunk`."""

    def gather(self, chunk: int, wires: torch.Tensor, counts: Sequence[int]) -> None:
        """Send wires[rank] to every peer, and receive theirs."""

    def scatter(self, chunk: int, parts: torch.Tensor, counts: Sequence[int], wires: torch.Tensor) -> None:
        """Send each peer its part of `parts`, uint8[sum(counts), row_bytes], counts[p] rows for peer p."""

    def wait(self, chunk: int) -> None:
        """Return when the peers' parts of `chunk` are there (on an accelerator: for the stream's kernels)."""

    def close(self) -> None:
        """Return when everything this rank sent has left its buffers."""


class PointToPointLink:
    """Messages between pairs of ranks: the fast way of gloo.

    Raises CollectiveError where a peer is gone, or silent for longer than the group's timeout, and names it.

    All receives are posted before the first send: gloo then moves each message as soon as it is sent, on its
    own threads, where a send that finds no receive waits for one and halves the bandwidth of a slow link.
    Sends start with the next rank, so that no rank is everyone's first target. Once a chunk is sent, a thread of gloo
    that waits for this core gets it before the next is encoded: measured at 1 Gbit/s, 1 to 5 % of the whole time.
    """

    delivers_own = False

    def __init__(self, peers: Peers, channel: int) -> None:
        """channel: below CHANNELS; a message is received only where the same is expected."""
        self._group = peers.group
        self._rank = peers.rank
        self._first_tag = _OWN_TAGS | channel << _CHUNK_BITS
        others = [(peers.rank + step) % peers.world_size for step in range(1, peers.world_size)]
        global_ranks = dist.get_process_group_ranks(peers.group)
        self._global_ranks = {peer: global_ranks[peer] for peer in others}
        self._receives: dict[int, list[tuple[int, dist.Work]]] = {}
        self._sends: list[tuple[int, dist.Work]] = []

    def expect(self, chunk: int, wires: torch.Tensor, counts: Sequence[int]) -> None:
        self._receives[chunk] = []
        for peer in self._global_ranks:
            if counts[peer]:
                self._receives[chunk].append(self._posted(dist.irecv, chunk, wires[peer, : counts[peer]], peer))

    def gather(self, chunk: int, wires: torch.Tensor, counts: Sequence[int]) -> None:
        own = wires[self._rank, : counts[self._rank]]
        for peer in self._global_ranks:
            self._send(chunk, own, peer)
        os.sched_yield()

    def scatter(self, chunk: int, parts: torch.Tensor, counts: Sequence[int], wires: torch.Tensor) -> None:
        by_peer = parts.split(list(counts))
        for peer in self._global_ranks:
            self._send(chunk, by_peer[peer], peer)
        os.sched_yield()

    def wait(self, chunk: int) -> None:
        for peer, work in self._receives.pop(chunk):
            try:
                work.wait()
            except RuntimeError as error:
                what = f"nothing of the shape expected came from rank {self._global_ranks[peer]}"
                raise CollectiveError(f"{what}: {error}") from error

    def close(self) -> None:
        for peer, work in self._sends:
            try:
                work.wait()
            except RuntimeError as error:
                raise CollectiveError(f"rank {self._global_ranks[peer]} took nothing: {error}") from error

    def _send(self, chunk: int, message: torch.Tensor, peer: int) -> None:
        if message.shape[0]:
            self._sends.append(self._posted(dist.isend, chunk, message, peer))

    def _posted(
        self, begin: Callable[..., dist.Work | None], chunk: int, message: torch.Tensor, peer: int
    ) -> tuple[int, dist.Work]:
        tag = self._first_tag | chunk % (1 << _CHUNK_BITS)
        try:
            work = begin(message, self._global_ranks[peer], self._group, tag)
        except RuntimeError as error:
            raise CollectiveError(f"rank {self._global_ranks[peer]} cannot be reached: {error}") from error
        assert work is not None  # torch.distributed gives None to ranks outside the group only: refused at entry
        return peer, work


class CollectiveLink:
    """One collective per chunk: the way of NCCL, where nothing here makes the host wait.

    Where a hop has several chunks they travel on NCCL's stream, beside the kernels of the others. Its only chunk has
    none to travel beside: since torch 2.8 it then travels on the current stream, which spares two events.
    A gather needs parts of one size: shorter ones travel padded to the longest.
    """

    delivers_own = True

    def __init__(self, peers: Peers) -> None:
        self._group = peers.group
        self._rank = peers.rank
        self._chunks = 0
        self._works: dict[int, dist.Work | None] = {}

    def expect(self, chunk: int, wires: torch.Tensor, counts: Sequence[int]) -> None:
        self._chunks += 1

    def gather(self, chunk: int, wires: torch.Tensor, counts: Sequence[int]) -> None:
        self._works[chunk] = all_gather_single(
            wires.flatten(0, 1), wires[self._rank], self._group, async_op=self._chunks > 1
        )

    def scatter(self, chunk: int, parts: torch.Tensor, counts: Sequence[int], wires: torch.Tensor) -> None:
        # Equal parts, told by naming no sizes, are one operation to newer NCCLs.
        even = len(set(counts)) == 1
        self._works[chunk] = dist.all_to_all_single(
            wires.flatten(0, 1),
            parts,
            None if even else [wires.shape[1]] * wires.shape[0],
            None if even else list(counts),
            group=self._group,
            async_op=self._chunks > 1,
        )

    def wait(self, chunk: int) -> None:
        work = self._works.pop(chunk)
        if work is not None:
            work.wait()

    def close(self) -> None:
        pass


def link_for(peers: Peers, device: torch.device, channel: int) -> Link:
    """The link for tensors of `device`: point to point on the CPU, collectives on an accelerator.

    channel: below CHANNELS; tells messages apart that could be taken for one another.
    """
    return PointToPointLink(peers, channel) if device.type == "cpu" else CollectiveLink(peers)
