"""Transformer Engine's own Python code where there is no GPU: what is compiled of it is stood in for.

The package `transformer_engine` is Python alone; its kernels come with other distributions, without which it refuses
to be imported. Here they are replaced by what torch has for it: the product, and the norms. Everything between, and so
everything that the patches touch, is Transformer Engine's own.
"""

from __future__ import annotations

import enum
import importlib
import importlib.machinery
import os
import sys
from contextlib import nullcontext
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

__all__ = ["load"]


class _Enumeration(type):
    """A class that has any member: those it does not define are 0."""

    def __getattr__(cls, name: str) -> int:
        if name.startswith("__"):
            raise AttributeError(name)
        return 0


# As 2.20 knows it; earlier versions have a member more, and ask for no list of them.
_BACKENDS = {"NVTE_No_Backend": -1, "NVTE_F16_arbitrary_seqlen": 1, "NVTE_FP8": 2}


class _Compiled(ModuleType):
    """The module of kernels, which has any name; some enumerations are compared with those of the Python code."""

    DType = enum.IntEnum(
        "DType", "kByte kInt32 kFloat32 kFloat16 kBFloat16 kFloat8E4M3 kFloat8E5M2 kFloat4E2M1", start=0
    )
    NVTE_Fused_Attn_Backend = _Enumeration("NVTE_Fused_Attn_Backend", (), {**_BACKENDS, "__members__": _BACKENDS})

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = _Enumeration(name, (), {"__init__": lambda self, *args, **kwargs: None})
        setattr(self, name, value)
        return value


def load() -> None:
    """Import `transformer_engine.pytorch` for the rest of this process; once."""
    if "transformer_engine.pytorch" in sys.modules:
        return
    compiled = _Compiled("transformer_engine_torch")
    compiled.__spec__ = importlib.machinery.ModuleSpec(compiled.__name__, None)
    sys.modules[compiled.__name__] = compiled
    # While it is being built, the package does without its libraries.
    os.environ["NVTE_PROJECT_BUILDING"] = "1"
    properties = SimpleNamespace(major=9, minor=0, multi_processor_count=1, name="")
    for name, value in {
        "is_available": lambda: True,
        "current_device": lambda: "cpu",
        "is_current_stream_capturing": lambda: False,
        "get_device_properties": lambda *_: properties,
        "get_device_capability": lambda *_: (9, 0),
        "device": lambda *_: nullcontext(),
        "Stream": SimpleNamespace,
    }.items():
        setattr(torch.cuda, name, value)
    torch.cuda.nvtx.range_push = torch.cuda.nvtx.range_pop = lambda *_: None
    torch.Tensor.is_cuda = True  # type: ignore[assignment,misc]
    torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]
    # The outer package imports `pytorch` if that can be had; it cannot yet.
    common = importlib.import_module("transformer_engine.common")
    common.load_framework_extension = lambda framework: None  # type: ignore[attr-defined]
    importlib.import_module("transformer_engine.pytorch")
    for name in ("linear", "layernorm_linear"):
        module = importlib.import_module(f"transformer_engine.pytorch.module.{name}")
        module.general_gemm = _gemm  # type: ignore[attr-defined]
        module.get_workspace = lambda *_: None  # type: ignore[attr-defined]
        module.apply_normalization = _norm  # type: ignore[attr-defined]


def _gemm(
    weight: torch.Tensor, inp: torch.Tensor, *_: Any, bias: torch.Tensor | None = None, ub: Any = None, **__: Any
) -> tuple[torch.Tensor, None, None, None]:
    assert ub is None
    return torch.nn.functional.linear(inp, weight, bias), None, None, None


def _norm(
    inp: torch.Tensor, _: Any, weight: torch.Tensor, bias: torch.Tensor | None, eps: float, *__: Any
) -> tuple[torch.Tensor, None, None]:
    # Told apart by the bias that only one of them has.
    if bias is None:
        return torch.nn.functional.rms_norm(inp, weight.shape, weight, eps), None, None
    return torch.nn.functional.layer_norm(inp, weight.shape, weight, bias, eps), None, None
