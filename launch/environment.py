"""Where a measurement was taken: versions, machine, transport."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from typing import Any

import torch
import torch.distributed as dist

from megacomp.machine import cpu_name
from megacomp.version import __version__

_PACKAGES = ("torch", "triton", "transformers", "deepspeed", "megatron-core")


def describe(device: torch.device) -> dict[str, Any]:
    """JSON-able facts about this process and machine; the same keys everywhere, None for what is absent.

    backend: of the default process group; uncompressed reductions travel on it too.
    """
    return {
        "megacomp": __version__,
        "python": platform.python_version(),
        **{package: _version(package) for package in _PACKAGES},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "cpu": cpu_name(),
        "cpu_cores": len(os.sched_getaffinity(0)),
        "threads_per_rank": torch.get_num_threads(),
        "backend": dist.get_backend() if dist.is_initialized() else None,
        "system": platform.platform(),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
