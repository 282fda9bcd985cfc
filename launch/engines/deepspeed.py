"""DeepSpeed AutoTP: a transformers model with its linear layers split among ranks, no kernel injection."""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import deepspeed
import deepspeed.comm.comm
import deepspeed.inference.engine
import torch
import torch.distributed as dist
import transformers
from deepspeed.accelerator import get_accelerator
from deepspeed.module_inject import layers
from packaging.version import Version

from megacomp.collectives import SimulatedGroup
from megacomp.launch.engines import cpu_host
from megacomp.launch.engines._scoped import unchanged
from megacomp.launch.engines.architecture import Architecture
from megacomp.launch.engines.base import Engine
from megacomp.launch.engines.checkpoint import Checkpoint
from megacomp.launch.engines.quantized import QuantizedWeights
from megacomp.launch.errors import LaunchError
from megacomp.patches.deepspeed import DeepSpeed


class DeepSpeedEngine(Engine):
    """A transformers model under `deepspeed.init_inference`, decoding with transformers' own KV cache.

    Every rank loads the model's weights and then keeps its part of each layer; the embedding stays whole on
    every rank, and the language-model head reduces logits of the whole vocabulary.
    """

    name = "deepspeed"

    def _logits(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.module(input_ids=tokens, use_cache=False).logits

    def _new_cache(self, batch: int, length: int) -> Any:
        return transformers.DynamicCache()

    def _advance(self, tokens: torch.Tensor, cache: Any) -> torch.Tensor:
        # The head on the last position only; how to ask forward for that differs between versions.
        model: Any = self.module
        decoded = model.model(input_ids=tokens, past_key_values=cache, use_cache=True)
        return model.lm_head(decoded.last_hidden_state[:, -1:])[:, -1]


def build(
    folder: Path,
    architecture: Architecture,
    hf_config: Any,
    tp: int,
    dtype: torch.dtype,
    device: torch.device,
    cleanup: ExitStack,
    quantized: QuantizedWeights | None,
    simulated: SimulatedGroup | None = None,
) -> DeepSpeedEngine:
    """The engine for the checked model in `folder`; a default process group of `tp` ranks is there.

    cleanup: receives what undoes each change of global state. quantized: GPTQ weights, checked as well.
    simulated: the `tp` ranks instead, as the rank to be built sees them; the default group is one process.
    Raises LaunchError if `device` is not of the kind DeepSpeed has chosen (DS_ACCELERATOR), or if this
    transformers does not understand the model's rotary settings.
    """
    accelerator = get_accelerator().device_name()
    if device.type != accelerator:
        raise LaunchError(f"device {device} asked for, but DeepSpeed runs on {accelerator} (DS_ACCELERATOR)")
    _check_rope(hf_config, architecture)
    if quantized is None:
        with _no_progress_bar():
            model = transformers.AutoModelForCausalLM.from_pretrained(
                folder, config=hf_config, local_files_only=True, use_safetensors=True, **_dtype(dtype)
            ).eval()
    else:
        model = _without_linears(folder, architecture, hf_config, dtype, quantized.linears).eval()

    inference = deepspeed.inference.engine
    cleanup.enter_context(unchanged(deepspeed.comm.comm, "cdb"))
    cleanup.enter_context(unchanged(inference, "DS_INFERENCE_ENABLED"))
    cleanup.enter_context(unchanged(inference.InferenceEngine, "inference_mp_group"))
    inference.InferenceEngine.inference_mp_group = simulated
    with ExitStack() as setup:
        setup.enter_context(torch.random.fork_rng(devices=[]))
        # AutoTP prints its plan on standard output, which belongs to the command's own results.
        setup.enter_context(contextlib.redirect_stdout(io.StringIO()))
        if accelerator == "cpu":
            setup.enter_context(cpu_host.deepspeed_without_shared_memory())
        if simulated is not None:
            # Done by the engine otherwise, along with the group.
            deepspeed.init_distributed()
        # DeepSpeed would otherwise cut the MLP at multiples of 64 features; so that partials are the same
        # whichever engine makes them, and every rank has equal work, it is cut evenly.
        parallel = {"tp_size": tp, "tp_grain_size": 1}
        settings: dict[str, Any] = {"dtype": dtype, "tensor_parallel": parallel}
        if quantized is not None:
            # Weights without storage cannot be moved to the device; the others are, once these are replaced.
            setup.enter_context(unchanged(layers.TensorParallel_Layer, "keep_module_on_host"))
            settings["keep_module_on_host"] = True
        engine = deepspeed.init_inference(model, config=settings)
    group: Any = engine.mp_group if tp > 1 else dist.group.WORLD
    if quantized is not None:
        quantized.install(DeepSpeed(), engine.module, group.rank(), tp)
        engine.module.to(device)
    if tp > 1 and simulated is None:
        cleanup.callback(dist.destroy_process_group, group)
    return DeepSpeedEngine(engine.module, hf_config, architecture, tp, dtype, device, group, cleanup)


def _without_linears(
    folder: Path, architecture: Architecture, hf_config: Any, dtype: torch.dtype, linears: Collection[str]
) -> Any:
    """The transformers model of the folder, whose `linears` have weights without storage ("meta")."""
    config = copy.deepcopy(hf_config)
    if hasattr(config, "quantization_config"):
        # transformers would want the tool that made them.
        del config.quantization_config
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, **_dtype(dtype))
    rotary = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(config=config)
    with Checkpoint(folder) as checkpoint:
        for name in architecture.tensor_shapes(linears):
            path, _, kind = name.rpartition(".")
            weight = torch.nn.Parameter(checkpoint.read(name).to(dtype), requires_grad=False)
            setattr(model.get_submodule(path), kind, weight)
    model.tie_weights()
    return model


def _dtype(dtype: torch.dtype) -> dict[str, torch.dtype]:
    """The keyword for `dtype` that this transformers understands."""
    return {"dtype" if Version(transformers.__version__) >= Version("4.56") else "torch_dtype": dtype}


def _check_rope(hf_config: Any, architecture: Architecture) -> None:
    """transformers before 5 silently takes the defaults for a newer config.json's `rope_parameters`."""
    settings = getattr(hf_config, "rope_parameters", None) or getattr(hf_config, "rope_scaling", None) or {}
    theta = settings.get("rope_theta", getattr(hf_config, "rope_theta", None))
    rope_type = settings.get("rope_type", settings.get("type", "default"))
    if (theta, rope_type) != (architecture.rope.theta, architecture.rope.type):
        raise LaunchError(
            f"transformers {transformers.__version__} does not read the rope_parameters of this config.json; "
            f"install transformers>=5"
        )


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """transformers loads without its progress bar, of which there would be one per rank."""
    enabled = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            transformers.utils.logging.enable_progress_bar()
