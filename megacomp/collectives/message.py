"""Who takes part in a call, and whether its tensor can travel; checked before anything is sent."""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from megacomp.codecs import DTYPES


class CollectiveError(RuntimeError):
    """A message did not get through; says which rank's part is missing, as far as that is known, and why.

    From a patched layer it names the site, too, and the rank that raises it. What raised it is its cause.
    """


# Of the process, as groups are: one that has failed has failed for every door and every caller.
_failures: weakref.WeakKeyDictionary[dist.ProcessGroup, str] = weakref.WeakKeyDictionary()


def mark_failed(group: dist.ProcessGroup, why: str) -> None:
    """Have every further message of `group` refused: it might be taken for what is still under way, or take it."""
    _failures[group] = why


def refuse_failed(group: dist.ProcessGroup) -> None:
    """Raise CollectiveError if a message of `group` has failed on this rank."""
    if (why := _failures.get(group)) is not None:
        raise CollectiveError(f"this process group has failed before; start over with a new one: {why}")


def cause_of(error: BaseException) -> str:
    """What to say of `error`: with its type, unless it is ours and says enough."""
    return str(error) if isinstance(error, CollectiveError) else f"{type(error).__name__}: {error}"


class Peers(NamedTuple):
    """A process group as this rank sees it; `rank` counts within the group."""

    group: dist.ProcessGroup
    rank: int
    world_size: int


def peers_of(group: dist.ProcessGroup | None) -> Peers:
    """The peers of `group`, None meaning the default group.

    Raises ValueError if this rank is not one of them, or no process group was initialised; CollectiveError if a
    message of the group has failed.
    """
    rank = dist.get_rank(group)
    if rank < 0:
        raise ValueError(f"rank {dist.get_rank()} is not a member of the process group it was asked to use")
    group = dist.group.WORLD if group is None else group
    assert group is not None  # there is one: this rank is in it
    refuse_failed(group)
    return Peers(group, rank, dist.get_world_size(group))


def check_tensor(x: torch.Tensor, *, leading_dimensions: int = 0) -> None:
    """Raise ValueError unless `x` is bf16, fp16 or fp32, has enough dimensions and no gradient to keep.

    leading_dimensions: how many dimensions the collective needs before `features`.
    """
    if x.dtype not in DTYPES:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise ValueError(f"a compressed collective takes {allowed} tensors, not {x.dtype}")
    if x.dim() <= leading_dimensions:
        shape = "[rows, ..., features]" if leading_dimensions else "[..., features]"
        raise ValueError(f"expected a tensor of shape {shape}, not one of shape {list(x.shape)}")
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError("a compressed collective has no gradient; call it under torch.no_grad()")


def check_out(out: torch.Tensor, x: torch.Tensor) -> None:
    """Raise ValueError unless `out` is contiguous and has the shape, dtype and device of `x`."""
    for property_name in ("shape", "dtype", "device"):
        if (given := getattr(out, property_name)) != (needed := getattr(x, property_name)):
            raise ValueError(f"out has {property_name} {given}, but the result has {needed}")
    if not out.is_contiguous():
        raise ValueError(f"out must be contiguous; its strides are {out.stride()}")


def as_matrix(x: torch.Tensor) -> torch.Tensor:
    """`x` as [rows, features]; a copy only where its strides admit no view."""
    return x.reshape(-1, x.shape[-1])


def matrix_shape(x: torch.Tensor) -> tuple[int, int]:
    """The shape of `as_matrix(x)`, of an `x` with at least one value."""
    return x.numel() // x.shape[-1], x.shape[-1]


def name_of(group: dist.ProcessGroup | None) -> str:
    """What `group_of` finds `group` by; the default group has none, so that it may be another one by then."""
    return "" if group is None else group.group_name


def group_of(name: str) -> dist.ProcessGroup | None:
    """The process group of this name, None for the default group."""
    return distributed_c10d._resolve_process_group(cast(Any, name)) if name else None
