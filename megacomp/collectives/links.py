"""Links: how the wires of one hop reach the other ranks, chunk by chunk.

A hop tells its link of each chunk three times: `expect` (where the chunk's wires will lie), `gather` or
`scatter` (this rank's part is encoded: send it), `wait` (the peers' parts are needed). `close` ends the hop.
The wires of a chunk are uint8[peers, rows, row_bytes]; peer p fills the first counts[p] rows of its part.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Protocol

import torch
import torch.distributed as dist

from megacomp.collectives.message import Peers

# Away from the tags a program would use for messages of its own, and below 32768, all that MPI promises.
_FIRST_TAG = 0x6D00

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

    All receives are posted before the first send: gloo then moves each message as soon as it is sent, on its
    own threads, where a send that finds no receive waits for one and halves the bandwidth of a slow link.
    Sends start with the next rank, so that no rank is everyone's first target. Once a chunk is sent, a thread of gloo
    that waits for this core gets it before the next is encoded: measured at 1 Gbit/s, 1 to 5 % of the whole time.
    """

    delivers_own = False

    def __init__(self, peers: Peers, lane: int) -> None:
        """lane: tells the messages of hops in flight at the same time apart; 0 or 1."""
        self._group = peers.group
        self._rank = peers.rank
        self._lane = lane
        others = [(peers.rank + step) % peers.world_size for step in range(1, peers.world_size)]
        global_ranks = dist.get_process_group_ranks(peers.group)
        self._global_ranks = {peer: global_ranks[peer] for peer in others}
        self._receives: dict[int, list[dist.Work]] = {}
        self._sends: list[dist.Work] = []

    def expect(self, chunk: int, wires: torch.Tensor, counts: Sequence[int]) -> None:
        self._receives[chunk] = []
        for peer, global_rank in self._global_ranks.items():
            if counts[peer]:
                place = wires[peer, : counts[peer]]
                work = dist.irecv(place, global_rank, self._group, self._tag(chunk))
                self._receives[chunk].append(_posted(work))

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
        for work in self._receives.pop(chunk):
            work.wait()

    def close(self) -> None:
        for work in self._sends:
            work.wait()

    def _send(self, chunk: int, message: torch.Tensor, peer: int) -> None:
        if message.shape[0]:
            work = dist.isend(message, self._global_ranks[peer], self._group, self._tag(chunk))
            self._sends.append(_posted(work))

    def _tag(self, chunk: int) -> int:
        return _FIRST_TAG + 2 * chunk + self._lane


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


def _posted(work: dist.Work | None) -> dist.Work:
    """torch.distributed gives None to ranks outside the group only, and those were refused at entry."""
    assert work is not None
    return work


def link_for(peers: Peers, device: torch.device, lane: int) -> Link:
    """The link for tensors of `device`: point to point on the CPU, collectives on an accelerator."""
    return PointToPointLink(peers, lane) if device.type == "cpu" else CollectiveLink(peers)
