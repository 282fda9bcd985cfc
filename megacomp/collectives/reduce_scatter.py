"""reduce_scatter: each rank keeps its share of the sum over ranks, the partials encoded on the way."""

from __future__ import annotations

import torch
import torch.distributed as dist

from megacomp.collectives.deferred import materialized
from megacomp.collectives.hops import ScatterHop, cut, into, joint, opened, out_of
from megacomp.collectives.message import as_matrix, check_tensor, matrix_shape, name_of, peers_of
from megacomp.collectives.partition import split
from megacomp.collectives.route import Route, choose_chunks
from megacomp.collectives.trace import Trace


def reduce_scatter(
    x: torch.Tensor, group: dist.ProcessGroup | None, route: Route, *, trace: Trace | None = None
) -> torch.Tensor:
    """This rank's share of the sum of every rank's `x`, shares being cut along the first dimension.

    x: [rows, ..., features], bf16, fp16 or fp32, the same shape and dtype on every rank, `rows` divisible by
        the world size; any strides; not written to.
    group: any process group this rank is a member of, but no SimulatedGroup; None means the default group.
    route, trace: as for all_reduce; the route's algorithm and gather_codec play no part.

    Returns a new tensor [rows / world, ..., features]. One hop and one rounding by the codec, whatever the
    world size: each owner receives its rows from every rank and sums them in rank order in fp32. Alone in its
    group, a rank gets a copy of `x`.

    Raises what all_reduce does, and ValueError, before anything is sent, for a tensor of fewer than two
    dimensions, rows that do not divide, and a SimulatedGroup.
    """
    check_tensor(x, leading_dimensions=1)
    if torch.compiler.is_compiling() and trace is None:
        return torch.ops.megacomp.reduce_scatter(x.detach(), route.key, dist.get_world_size(group), name_of(group))
    return _reduce_scatter(x, group, route, trace)


@torch.compiler.disable  # where a trace is wanted: nothing in it is to be traced by a compiler
def _reduce_scatter(
    x: torch.Tensor, group: dist.ProcessGroup | None, route: Route, trace: Trace | None
) -> torch.Tensor:
    peers = peers_of(group)
    if x.shape[0] % peers.world_size:
        raise ValueError(
            f"reduce_scatter cuts the first dimension into {peers.world_size} equal shares; "
            f"{x.shape[0]} rows do not divide"
        )
    if peers.world_size == 1:
        return materialized(x).clone(memory_format=torch.contiguous_format)
    shape = (x.shape[0] // peers.world_size, *x.shape[1:])
    if x.numel() == 0:
        return torch.empty(shape, dtype=x.dtype, device=x.device)
    rows, features = matrix_shape(x)
    route.codec.check_message(features, peers.world_size, x.device)
    with joint(peers):
        result = torch.empty(shape, dtype=x.dtype, device=x.device)
        source, out = out_of(x), as_matrix(result)
        shares = split(range(rows), peers.world_size)
        pieces = cut(shares, choose_chunks(route, rows, features, x.device))
        hop = ScatterHop(route.codec, peers, pieces, features, x.device, trace)
        with opened(hop):
            for chunk in range(len(pieces)):
                hop.send(chunk, source)
            for chunk, owned in enumerate(cut([range(len(out))], len(pieces))):
                hop.finish_sum(chunk, owned[0], into(out))
    return result
