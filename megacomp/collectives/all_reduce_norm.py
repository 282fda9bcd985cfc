"""all_reduce_norm: the sum over ranks, the residual and the norm behind a row-parallel layer, in one call."""

from __future__ import annotations

import torch
import torch.distributed as dist

from megacomp.codecs import DTYPES, Codec
from megacomp.collectives.all_reduce import check_codecs, reduce_rows
from megacomp.collectives.deferred import materialized
from megacomp.collectives.hops import joint, sums_buffer
from megacomp.collectives.message import as_matrix, check_tensor, name_of, peers_of
from megacomp.collectives.route import Route
from megacomp.kernels import add_norm


def all_reduce_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    group: dist.ProcessGroup | None,
    route: Route,
    *,
    bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(`residual` + the sum of every rank's `x` + `bias`, its RMSNorm), with the same bits on every rank.

    x: [..., features], bf16, fp16 or fp32, the same shape and dtype on every rank; any strides; not written to.
    residual: of x's shape, the same values on every rank, in one of these dtypes; not written to.
    weight, eps: of the norm; `weight` [features].
    bias: [features], added once; None for none.
    group: any process group this rank is a member of, but no SimulatedGroup; None means the default group.
    route: as for all_reduce.

    Returns new contiguous tensors: the new residual in the residual's dtype, the normalized one in x's. The sum
    is that of all_reduce, taken on in float32: one rounding to the new residual, where all_reduce, bias and
    residual added one after the other round three times. The norm is that of the rounded residual, rounded once
    (numerics: megacomp.kernels.reduce_norm). Alone in its group, a rank encodes nothing.

    Raises what all_reduce does, and ValueError, before anything is sent, for a residual, weight or bias of another
    shape, device or kind of dtype, or one that needs a gradient, and for a SimulatedGroup.
    """
    check_tensor(x)
    _check(residual, "residual", x, x.shape)
    _check(weight, "weight", x, x.shape[-1:])
    if bias is not None:
        _check(bias, "bias", x, x.shape[-1:])
    if torch.compiler.is_compiling():
        return torch.ops.megacomp.all_reduce_norm(
            x.detach(), residual.detach(), weight.detach(), eps, bias, route.key, name_of(group)
        )

    def results() -> tuple[torch.Tensor, torch.Tensor]:
        new_residual = torch.empty_like(residual, memory_format=torch.contiguous_format)
        return new_residual, torch.empty(x.shape, dtype=x.dtype, device=x.device)

    peers = peers_of(group)
    if x.numel() == 0:
        return results()
    residual, weight, bias = residual.detach(), weight.detach(), None if bias is None else bias.detach()
    if peers.world_size == 1:
        new_residual, normalized = results()
        total = as_matrix(materialized(x).detach()).float()
        add_norm(total, as_matrix(residual), weight, eps, as_matrix(new_residual), as_matrix(normalized), bias)
        return new_residual, normalized
    check_codecs(x, peers, route)
    with joint(peers):
        new_residual, normalized = results()
        residuals, new_residuals, norms = map(as_matrix, (residual, new_residual, normalized))

        def finish(codec: Codec, wires: torch.Tensor, owned: range) -> None:
            part = slice(owned.start, owned.stop)
            codec.reduce_norm(
                wires,
                residuals[part],
                weight,
                eps,
                new_residuals[part],
                norms[part],
                bias,
                sums_buffer(len(owned), x.shape[-1], x.device),
            )

        reduce_rows(x, finish, peers, route, None)
    return new_residual, normalized


def _check(tensor: torch.Tensor, name: str, x: torch.Tensor, shape: torch.Size) -> None:
    if tensor.shape != shape or tensor.device != x.device or tensor.dtype not in DTYPES:
        raise ValueError(
            f"{name} must be bfloat16, float16 or float32 {list(shape)} on {x.device}, "
            f"not {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} on {tensor.device}"
        )
    if tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"a compressed collective has no gradient for {name}; call it under torch.no_grad()")
