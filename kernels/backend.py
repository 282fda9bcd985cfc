"""Backends: who executes a definition."""

from __future__ import annotations

import torch

from megacomp.kernels.compiled import compiler_problem

__all__ = ["BACKENDS", "resolve_backend"]

BACKENDS = ("auto", "reference", "compiled")
"""``reference``: the PyTorch definition, eagerly, on any device. ``compiled``: torch.compile of it, on the CPU.
``auto``: the fastest that works where the tensor lives."""


def resolve_backend(backend: str, device: torch.device, rows: int) -> str:
    """The backend that runs a message of ``rows`` rows on ``device``: ``"reference"`` or ``"compiled"``.

    Single rows run the definition itself: one row cannot share a compiled function with many.

    Raises:
        RuntimeError: ``compiled`` was asked for and there is no compiler.
    """
    if backend == "reference" or device.type != "cpu" or rows < 2:
        return "reference"
    problem = compiler_problem()
    if problem is None:
        return "compiled"
    if backend == "compiled":
        raise RuntimeError(f'backend "compiled": {problem}')
    return "reference"
