"""all_gather: every rank's x, one after the other, encoded on the way."""

from __future__ import annotations

import torch
import torch.distributed as dist

from megacomp.collectives.hops import GatherHop, cut, into, joint, opened, out_of
from megacomp.collectives.message import as_matrix, check_tensor, name_of, peers_of
from megacomp.collectives.route import Route, choose_chunks
from megacomp.collectives.trace import Trace


def all_gather(
    x: torch.Tensor, group: dist.ProcessGroup | None, route: Route, *, trace: Trace | None = None
) -> torch.Tensor:
    """Every rank's `x`, concatenated along the first dimension in rank order; the same bits on every rank.

    x: [rows, ..., features], bf16, fp16 or fp32, the same shape and dtype on every rank; any strides; not
        written to.
    group: any process group this rank is a member of, but no SimulatedGroup; None means the default group.
    route, trace: as for all_reduce; the route's algorithm and gather_codec play no part.

    Returns a new tensor [rows * world, ..., features]; a rank's own part has gone through the codec as well.
    Alone in its group, a rank gets a copy of `x`.

    Raises what all_reduce does, and ValueError, before anything is sent, for a tensor of fewer than two
    dimensions and a SimulatedGroup.
    """
    check_tensor(x, leading_dimensions=1)
    if torch.compiler.is_compiling() and trace is None:
        return torch.ops.megacomp.all_gather(x.detach(), route.key, dist.get_world_size(group), name_of(group))
    return _all_gather(x, group, route, trace)


@torch.compiler.disable  # where a trace is wanted: nothing in it is to be traced by a compiler
def _all_gather(x: torch.Tensor, group: dist.ProcessGroup | None, route: Route, trace: Trace | None) -> torch.Tensor:
    peers = peers_of(group)
    if peers.world_size == 1:
        return x.clone(memory_format=torch.contiguous_format)
    shape = (peers.world_size * x.shape[0], *x.shape[1:])
    if x.numel() == 0:
        return x.new_empty(shape)
    route.codec.check_message(x.shape[-1], 1, x.device)
    with joint(peers):
        result = x.new_empty(shape)
        rows, out = as_matrix(x), as_matrix(result)
        pieces = cut([range(len(rows))] * peers.world_size, choose_chunks(route, len(rows), rows.shape[1], x.device))
        hop = GatherHop(route.codec, peers, pieces, rows.shape[1], x.device, trace)
        source = out_of(rows)
        with opened(hop):
            for chunk in range(len(pieces)):
                hop.send(chunk, source)
            for chunk, (piece, *_) in enumerate(pieces):
                starts = range(piece.start, len(out), len(rows))
                hop.finish_each(chunk, [range(start, start + len(piece)) for start in starts], into(out))
    return result
