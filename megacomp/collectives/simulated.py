"""What collectives of N ranks make of their tensors, given all N of them in one process."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megacomp.collectives.message import as_matrix
from megacomp.collectives.route import Route, choose_algorithm

_GLOO_SEGMENT_BYTES = 1024 * 1024


def simulated_all_reduce(partials: Sequence[torch.Tensor], route: Route) -> torch.Tensor:
    """The sum of `partials`, one per rank in rank order: the bits that `all_reduce` gives that many ranks.

    partials: [..., features], bf16, fp16 or fp32, all of one shape, dtype and device; not written to.

    Returns a new contiguous tensor of their shape and dtype. Each partial is encoded as its rank would encode it and
    all are summed in rank order; by two-shot, the sum is encoded and decoded once more. Rows shared out among ranks
    and chunks change no value, so there are none here. One partial alone is copied: nothing would be sent.
    """
    first, ranks = partials[0], len(partials)
    result = torch.empty_like(first, memory_format=torch.contiguous_format)
    if ranks == 1 or first.numel() == 0:
        return result.copy_(first)
    out = as_matrix(result)
    rows, features = out.shape
    codec = route.codec
    wires = torch.empty(ranks, rows, codec.row_bytes(features), dtype=torch.uint8, device=first.device)
    for rank, partial in enumerate(partials):
        codec.sender(rank).encode(as_matrix(partial), out=wires[rank])
    if choose_algorithm(route, ranks, rows, features) == "one_shot":
        codec.decode_sum(wires, features, out.dtype, out=out)
    else:
        wire = codec.decode_sum_encode(wires, features, route.second_codec)
        route.second_codec.decode(wire, features, out.dtype, out=out)
    return result


def ring_sum(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """The sum of `tensors`, one per rank in rank order: the bits that gloo's all_reduce gives that many ranks.

    tensors: all of one shape, dtype and device; not written to. Returns a new contiguous tensor of the same.

    gloo cuts the flat tensor into as many chunks as there are ranks. Each travels once around the ring, from rank to
    the rank before, and ends where it belongs: rank r - 1 begins the sum of chunk r, which rank r completes. Every
    addition rounds to the dtype. A chunk is an even number of segments of at most 1 MiB, two at least.
    """
    ranks = len(tensors)
    flat = [tensor.flatten() for tensor in tensors]
    result = torch.empty_like(flat[0])
    size = result.numel()
    segments = max(2, -(-size * result.itemsize // (ranks * _GLOO_SEGMENT_BYTES)))
    chunk = segments * -(-size // (segments * ranks))
    for rank, own in enumerate(result.split(chunk) if size else ()):
        at = slice(rank * chunk, rank * chunk + len(own))
        own.copy_(flat[rank - 1][at])
        for step in range(2, ranks + 1):
            own += flat[(rank - step) % ranks][at]
    return result.view(tensors[0].shape)
