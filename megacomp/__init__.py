"""Compressed communication for tensor-parallel LLM inference with DeepSpeed and Megatron-core.

Importing this package imports nothing else and changes nothing: the public names below are loaded when first
used, and nothing is patched before `install` or `init_inference` is called.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from megacomp.version import __version__

if TYPE_CHECKING:
    from megacomp.agreement import AgreementError
    from megacomp.calibration import Calibration, CalibrationError
    from megacomp.codecs import CodecError
    from megacomp.collectives import CollectiveError
    from megacomp.collectives.functional import all_gather, all_reduce, all_reduce_norm, reduce_scatter
    from megacomp.config import Config, ConfigError
    from megacomp.gptq import CheckpointError
    from megacomp.installation import Installation, init_inference, install, observe
    from megacomp.patches import MissingSymbolError, UnsupportedVersionError
    from megacomp.report import Report

__all__ = [
    "AgreementError",
    "Calibration",
    "CalibrationError",
    "CheckpointError",
    "CodecError",
    "CollectiveError",
    "Config",
    "ConfigError",
    "Installation",
    "MissingSymbolError",
    "Report",
    "UnsupportedVersionError",
    "__version__",
    "all_gather",
    "all_reduce",
    "all_reduce_norm",
    "init_inference",
    "install",
    "observe",
    "reduce_scatter",
]

_HOMES = {
    "AgreementError": "megacomp.agreement",
    "Calibration": "megacomp.calibration",
    "CalibrationError": "megacomp.calibration",
    "CheckpointError": "megacomp.gptq",
    "CodecError": "megacomp.codecs",
    "CollectiveError": "megacomp.collectives",
    "Config": "megacomp.config",
    "ConfigError": "megacomp.config",
    "Installation": "megacomp.installation",
    "MissingSymbolError": "megacomp.patches",
    "Report": "megacomp.report",
    "UnsupportedVersionError": "megacomp.patches",
    "all_gather": "megacomp.collectives.functional",
    "all_reduce": "megacomp.collectives.functional",
    "all_reduce_norm": "megacomp.collectives.functional",
    "init_inference": "megacomp.installation",
    "install": "megacomp.installation",
    "observe": "megacomp.installation",
    "reduce_scatter": "megacomp.collectives.functional",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
