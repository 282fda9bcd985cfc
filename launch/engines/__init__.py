"""Tensor-parallel models from Hugging Face folders, one engine for each framework megacomp cuts into.

with engines.build("model/", "megatron", tp=2, dtype=torch.bfloat16) as engine:
    logits = engine.logits(tokens)
"""

from __future__ import annotations

import logging
import warnings
from contextlib import ExitStack, nullcontext
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import torch

from megacomp.gptq import Order
from megacomp.launch import distributed
from megacomp.launch.engines import cpu_host, simulated
from megacomp.launch.engines.architecture import Architecture
from megacomp.launch.engines.base import Engine, Generation
from megacomp.launch.engines.checkpoint import Checkpoint
from megacomp.launch.engines.quantized import QuantizedWeights
from megacomp.launch.errors import LaunchError

__all__ = ["DTYPES", "ENGINES", "Engine", "Generation", "build", "check"]

ENGINES = ("deepspeed", "megatron")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

_logger = logging.getLogger(__name__)


def check(
    model_dir: str | Path, engine: str = "deepspeed", *, tp: int, weights: str | Path | None = None
) -> Architecture:
    """Everything about a request for a model that can be known before anything is started.

    weights: as `build` takes it.

    Raises LaunchError for an unknown or absent engine, a folder without config.json or weights, a model no
    engine computes, weights that do not fit config.json, or a `tp` that does not divide the model's heads.
    """
    return _check(Path(model_dir), engine, tp, None if weights is None else Path(weights), "tp_aware")[0]


def _check(
    folder: Path, engine: str, tp: int, weights: Path | None, order: Order
) -> tuple[Architecture, QuantizedWeights | None]:
    if engine not in ENGINES:
        raise LaunchError(f"unknown engine {engine!r}; there are {', '.join(ENGINES)}")
    packages = {"deepspeed": ("deepspeed",), "megatron": ("megatron", "megatron.core")}[engine]
    if any(find_spec(name) is None for name in (*packages, "transformers")):
        raise LaunchError(f"engine {engine} is not installed: pip install 'megacomp[{engine}]'")
    architecture = Architecture.read(folder)
    architecture.check_tensor_parallel(tp)
    quantized = QuantizedWeights.find(folder, weights, architecture, tp, order)
    with Checkpoint(folder) as checkpoint:
        checkpoint.check(architecture.tensor_shapes(quantized.linears if quantized else ()))
    return architecture, quantized


def build(
    model_dir: str | Path,
    engine: str = "deepspeed",
    *,
    tp: int,
    dtype: torch.dtype,
    device: torch.device | str | None = None,
    weights: str | Path | None = None,
    order: Order = "tp_aware",
    simulate: bool = False,
) -> Engine:
    """A Llama, Mistral or Qwen2 model from a local Hugging Face folder, on `tp` ranks, not compressed.

    The folder may be a GPTQ checkpoint, or one that `megacomp convert` has written for `tp` ranks.

    Every rank calls this. The ranks are those of the default process group, or of the launcher's
    environment, or this process alone; there must be exactly `tp`. With `simulate` there must be this process
    alone, and it takes the part of all `tp` ranks (`SimulatedEngine`).

    dtype: float32, bfloat16 or float16, of weights and activations. device: default this rank's GPU, or the
    CPU where there is none. weights: the folder of a GPTQ checkpoint whose linears take the place of the
    model's own. order: of quantized weights, as in the configuration.

    Raises LaunchError as `check` does, and for another dtype or number of ranks; nothing has changed then.
    """
    if dtype not in DTYPES.values():
        raise LaunchError(f"dtype {dtype} is not supported; use {', '.join(DTYPES)}")
    folder = Path(model_dir)
    architecture, quantized = _check(folder, engine, tp, None if weights is None else Path(weights), order)
    place = distributed.default_device() if device is None else torch.device(device)

    with Checkpoint(folder) as checkpoint:
        # What belongs to a quantized linear goes by other names.
        unused = [
            name
            for name in checkpoint.unused(architecture.tensor_shapes())
            if quantized is None or name.rpartition(".")[0] not in quantized.linears
        ]
    if unused and distributed.rank() == 0:
        _logger.warning("%s: weights config.json has no place for: %s", folder, ", ".join(unused))

    import transformers

    hf_config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    cleanup = ExitStack()
    try:
        simulate = simulate and tp > 1
        cleanup.enter_context(distributed.process_group(1 if simulate else tp, place))
        with warnings.catch_warnings():
            # Megatron warns that Transformer Engine and apex, which we do not use, are absent, and of its own
            # defaults.
            warnings.filterwarnings("ignore", category=UserWarning, module="megatron")
            module = _module(engine, place)
            build_rank = partial(module.build, folder, architecture, hf_config, tp, dtype, place, cleanup, quantized)
            return simulated.build(build_rank, tp, place, cleanup) if simulate else build_rank()
    except BaseException:
        cleanup.close()
        raise


def _module(engine: str, device: torch.device) -> ModuleType:
    """The module of an engine, imported only here: its framework is heavy, and may be absent."""
    on_cpu = engine == "deepspeed" and device.type == "cpu"
    with cpu_host.deepspeed_on_cpu() if on_cpu else nullcontext():
        return import_module(f"megacomp.launch.engines.{engine}")
