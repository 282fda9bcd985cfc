"""all_reduce: y = sum over ranks of x, the partials encoded on the way."""

from __future__ import annotations

import torch
import torch.distributed as dist

from megacomp.collectives.deferred import materialized
from megacomp.collectives.hops import Finish, GatherHop, ScatterHop, cut, into, joint, opened, out_of
from megacomp.collectives.message import Peers, as_matrix, check_out, check_tensor, matrix_shape, name_of, peers_of
from megacomp.collectives.partition import deal
from megacomp.collectives.route import Route, choose_algorithm, choose_chunks
from megacomp.collectives.simulated import simulated_all_reduce
from megacomp.collectives.simulated_ranks import SimulatedGroup
from megacomp.collectives.trace import Trace


def all_reduce(
    x: torch.Tensor,
    group: dist.ProcessGroup | None,
    route: Route,
    *,
    out: torch.Tensor | None = None,
    trace: Trace | None = None,
) -> torch.Tensor:
    """The sum of every rank's `x`, with the same bits on every rank.

    x: [..., features], bf16, fp16 or fp32, the same shape and dtype on every rank; any strides; not written
        to, unless it is `out` as well. A DeferredPartial of one rank may be a tensor on another.
    group: any process group this rank is a member of, a SimulatedGroup included; None means the default group.
    route: the same on every rank.
    out: where to write the result: contiguous, of x's shape, dtype and device; may be `x` itself.
    trace: adds up where the time of this call went.

    Returns `out`, or a new contiguous tensor of x's shape and dtype. A rank's own partial goes through the
    codec like any other, and sums run in rank order in fp32. Alone in its group, a rank gets a copy of `x`:
    nothing would be sent, so nothing is encoded.

    Raises, before anything is sent:
        ValueError: another dtype, a tensor without dimensions, one that needs a gradient, an unfit `out`, a rank
            outside the group, and a static codec that is not calibrated for such a message.
        RuntimeError: the one backend that a codec asks for cannot run on x's device.
        CollectiveError: a message of this group has failed before.

    What is raised later (CollectiveError where a peer is gone or silent, or whatever went wrong here, memory that
    ran out included) leaves messages under way: from then on this rank refuses every message of the group. What is
    raised before is expected of every rank; one that alone was refused, as where only its host lacks a backend, must
    not go on over the group.
    """
    check_tensor(x)
    if out is not None:
        check_out(out, x)
    if torch.compiler.is_compiling() and trace is None:
        summed = torch.ops.megacomp.all_reduce(x.detach(), route.key, name_of(group))
        return summed if out is None else out.copy_(summed)
    return _all_reduce(x, group, route, out, trace)


@torch.compiler.disable  # where a trace is wanted: nothing in it is to be traced by a compiler
def _all_reduce(
    x: torch.Tensor,
    group: dist.ProcessGroup | None,
    route: Route,
    out: torch.Tensor | None,
    trace: Trace | None,
) -> torch.Tensor:
    def result() -> torch.Tensor:
        return torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out

    peers = peers_of(group)
    if peers.world_size == 1 or x.numel() == 0:
        return result().copy_(materialized(x).detach())
    if isinstance(group, SimulatedGroup):
        partial = materialized(x).detach()
        return result().copy_(group.exchange(partial, lambda partials: simulated_all_reduce(partials, route)))
    check_codecs(x, peers, route)
    with joint(peers):
        summed = result()
        reduce_rows(x, into(as_matrix(summed)), peers, route, trace)
    return summed


def check_codecs(x: torch.Tensor, peers: Peers, route: Route) -> None:
    """Raise, while nothing has been sent, what keeps a codec from its part in the sum of `x` [..., features]."""
    rows, features = matrix_shape(x)
    route.codec.check_message(features, peers.world_size, x.device)
    if choose_algorithm(route, peers.world_size, rows, features) == "two_shot":
        route.second_codec.check_message(features, 1, x.device)


def reduce_rows(x: torch.Tensor, finish: Finish, peers: Peers, route: Route, trace: Trace | None) -> None:
    """Sum `x` [..., features] over at least two ranks by the route's algorithm; `finish` gets every row once."""
    algorithm = choose_algorithm(route, peers.world_size, *matrix_shape(x))
    send = one_shot if algorithm == "one_shot" else two_shot
    send(x, finish, peers, route, trace)


def one_shot(x: torch.Tensor, finish: Finish, peers: Peers, route: Route, trace: Trace | None) -> None:
    """Everyone's wire to everyone (arXiv 2411.09510).

    1. Encode a chunk and send it to all peers; go on with the next while it travels.
    2. As the chunks of all peers arrive, decode and sum them in rank order: one rounding by the codec.
    """
    rows, features = matrix_shape(x)
    source = out_of(x)
    pieces = cut([range(rows)] * peers.world_size, choose_chunks(route, rows, features, x.device))
    hop = GatherHop(route.codec, peers, pieces, features, x.device, trace)
    with opened(hop):
        for chunk in range(len(pieces)):
            hop.send(chunk, source)
        for chunk, (piece, *_) in enumerate(pieces):
            hop.finish_sum(chunk, piece, finish)


def two_shot(x: torch.Tensor, finish: Finish, peers: Peers, route: Route, trace: Trace | None) -> None:
    """Reduce-scatter, then all-gather of the encoded sums (Flash Communication, QuickReduce).

    Rows are dealt out to the ranks.
    1. Encode each owner's rows and send them to it, chunk by chunk.
    2. As the chunks of all peers arrive, decode and sum the own rows in rank order, in fp32; encode the sum,
       the second rounding, and send it to all peers.
    3. As the sums arrive, decode them; a rank's own sum too, so that all ranks hold the same bits.
    """
    rows, features = matrix_shape(x)
    source = out_of(x)
    pieces = deal(rows, peers.world_size, choose_chunks(route, rows, features, x.device))
    gather = GatherHop(route.second_codec, peers, pieces, features, x.device, trace)
    scatter = ScatterHop(route.codec, peers, pieces, features, x.device, trace)
    with opened(gather, scatter):
        for chunk in range(len(pieces)):
            scatter.send(chunk, source)
        for chunk in range(len(pieces)):
            gather.send_sum(chunk, scatter)
        for chunk, owned in enumerate(pieces):
            gather.finish_each(chunk, owned, finish)
