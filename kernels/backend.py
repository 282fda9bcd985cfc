"""Backends: who executes a definition."""

from __future__ import annotations

import functools
import logging

import torch

from megacomp.kernels.block_format import BlockFormat
from megacomp.kernels.compiled import compiler_problem
from megacomp.kernels.launch_config import device_problem, launch_problem
from megacomp.kernels.static_format import StaticFormat

__all__ = ["BACKENDS", "backend_problem", "check_backend", "resolve_backend"]

logger = logging.getLogger("megacomp")

BACKENDS = ("auto", "reference", "compiled", "triton")
"""``reference``: the PyTorch definition, eagerly, on any device. ``compiled``: torch.compile of it, on the CPU.
``triton``: the Triton kernels, on CUDA, or interpreted. ``auto``: the fastest that works where the tensor lives."""


def backend_problem(backend: str, device: torch.device) -> str | None:
    """Why ``backend`` cannot run on ``device``; None if it can."""
    if backend == "compiled":
        return compiler_problem()
    if backend == "triton":
        return device_problem(device)
    return None


def check_backend(backend: str, device: torch.device) -> None:
    """Raises RuntimeError if ``backend`` was asked for by name and cannot run on ``device``; ``auto`` always can."""
    if (problem := backend_problem(backend, device)) is not None:
        raise RuntimeError(f'backend "{backend}": {problem}')


def resolve_backend(
    backend: str,
    operation: str,
    format: BlockFormat | StaticFormat,
    features: int,
    rows: int,
    device: torch.device,
) -> str:
    """The backend that runs a message: ``"reference"``, ``"compiled"`` or ``"triton"``.

    Single rows run the definition itself where they would be compiled: one row cannot share a compiled function with
    many. So do, whatever was asked for, tensors that are not on the CPU instead of ``compiled``, and hidden sizes that
    the Triton kernels do not take (logged once) instead of ``triton``: the bits are the same.

    Args:
        backend: one of ``BACKENDS``.
        operation: ``"encode"``, ``"decode_sum"``, ``"decode_sum_encode"`` or ``"reduce_norm"``.
        format: the block or static format; of the wire that is written, for decode_sum_encode.
        features, rows: of the message.
        device: where its tensors live.

    Raises:
        RuntimeError: the one backend that was asked for cannot run on ``device``.
    """
    if backend == "auto":
        backend = {"cpu": "compiled", "cuda": "triton"}.get(device.type, "reference")
        if backend_problem(backend, device) is not None:
            backend = "reference"
    else:
        check_backend(backend, device)
    if backend == "compiled" and (device.type != "cpu" or rows < 2):
        return "reference"
    if backend == "triton" and (problem := launch_problem(operation, format, features, device)) is not None:
        _log_once(problem)
        return "reference"
    return backend


@functools.cache
def _log_once(problem: str) -> None:
    logger.warning("no Triton kernel, the definition runs instead: %s", problem)
