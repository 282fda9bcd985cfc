"""Buffers kept between calls."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from typing import Literal

import torch

Slot = Literal["outgoing", "incoming", "gathered", "sums"]


class _Workspace(threading.local):
    """One growing buffer per slot and thread: at most the largest message each slot ever held."""

    def __init__(self) -> None:
        self.buffers: dict[Slot, torch.Tensor] = {}


_WORKSPACE = _Workspace()


def take(slot: Slot, shapes: Sequence[tuple[int, ...]], device: torch.device) -> list[torch.Tensor]:
    """Consecutive uint8 tensors of `shapes`, contents undefined, valid until this thread takes `slot` again.

    On the CPU a fresh large allocation costs a page fault per 4 KiB, so the buffer of the last call is used
    again.

    On an accelerator PyTorch's caching allocator reuses memory, as a buffer kept here could not: in the order of
    each stream, where two streams would write to one buffer; and within the pool of a CUDA graph, which would go
    on using a buffer freed here for a larger one. Nothing is allocated in steady state, for NCCL keeps a tensor
    no longer than until its work is waited for, which every call does before it returns, on the stream that the
    memory belongs to. (Before torch 2.8 it used record_stream: memory comes back once the device has got there,
    so a host far ahead of it has a few blocks more; within a graph, at the end of the capture.)
    """
    sizes = [math.prod(shape) for shape in shapes]
    buffer = _buffer(slot, sum(sizes), device)
    return [part.view(shape) for part, shape in zip(buffer.split(sizes), shapes, strict=True)]


def _buffer(slot: Slot, size: int, device: torch.device) -> torch.Tensor:
    if device.type != "cpu":
        return torch.empty(size, dtype=torch.uint8, device=device)
    buffers = _WORKSPACE.buffers
    if slot not in buffers or buffers[slot].numel() < size:
        buffers.pop(slot, None)  # freed before its successor is allocated
        # Tensors born in inference mode could not be written to by a later call outside it.
        with torch.inference_mode(False):
            buffers[slot] = torch.empty(size, dtype=torch.uint8, device=device)
    return buffers[slot][:size]
