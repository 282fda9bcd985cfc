"""Megatron-core: a GPTModel of the local layer spec, filled from Hugging Face weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from inspect import signature
from pathlib import Path
from typing import Any

import megatron.core
import torch
from megatron.core import parallel_state
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel import RowParallelLinear
from megatron.core.tensor_parallel import random as tensor_parallel_random
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from torch.distributed import distributed_c10d

from megacomp.collectives import SimulatedGroup
from megacomp.launch.engines import cpu_host, megatron_weights
from megacomp.launch.engines._scoped import attribute, unchanged
from megacomp.launch.engines.architecture import Architecture
from megacomp.launch.engines.base import Engine
from megacomp.launch.engines.checkpoint import Checkpoint
from megacomp.launch.engines.quantized import QuantizedWeights
from megacomp.launch.errors import LaunchError
from megacomp.patches.megatron import Megatron


class MegatronEngine(Engine):
    """A GPTModel decoding with Megatron's own KV cache, a StaticInferenceContext.

    That context works on a host without a GPU as it is; the engines of megatron.core.inference built upon it
    need further stand-ins and add only batching of requests, so tokens are run through the model directly.

    The local layer spec needs neither Transformer Engine nor apex. It knows no sliding window here: sequences
    longer than the model's window are refused.
    """

    name = "megatron"

    def _logits(self, tokens: torch.Tensor) -> torch.Tensor:
        return self._forward(tokens, start=0)

    def _new_cache(self, batch: int, length: int) -> StaticInferenceContext:
        context = StaticInferenceContext(max_batch_size=batch, max_sequence_length=length)
        context.materialize_only_last_token_logits = True  # the default since megatron-core 0.14
        return context

    def _advance(self, tokens: torch.Tensor, cache: StaticInferenceContext) -> torch.Tensor:
        logits = self._forward(tokens, start=cache.sequence_len_offset, inference_context=cache)
        cache.sequence_len_offset += tokens.shape[1]
        cache.enable_decode_mode()
        return logits[:, -1]

    def _forward(self, tokens: torch.Tensor, start: int, **context: StaticInferenceContext) -> torch.Tensor:
        length = tokens.shape[1]
        window = self.architecture.sliding_window
        if window is not None and start + length > window:
            raise LaunchError(
                f"{start + length} tokens are more than the model's sliding_window {window}, "
                f"which the megatron engine does not compute; use --engine deepspeed"
            )
        positions = torch.arange(start, start + length, device=self.device).expand_as(tokens)
        # True where attention is forbidden. A single new token sees everything before it.
        mask = torch.ones(length, length, dtype=torch.bool, device=self.device).triu(1)[None, None]
        logits = self.module(tokens, positions, mask if length > 1 else None, runtime_gather_output=True, **context)
        return logits[..., : self.architecture.vocab_size]


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
) -> MegatronEngine:
    """The engine for the checked model in `folder`; a default process group of `tp` ranks is there.

    cleanup: receives what undoes each change of global state. quantized: GPTQ weights, checked as well.
    simulated: the `tp` ranks instead, as the rank to be built sees them; the default group is one process.
    Raises LaunchError if Megatron's parallel state is already set up with another size, and for simulated ranks of
    a Megatron-core whose layers do not know their group.
    """
    if device.type == "cpu":
        cleanup.enter_context(cpu_host.megatron_without_cuda())
    cleanup.enter_context(_parallel_state(tp if simulated is None else 1))
    cleanup.enter_context(_inference_rng_tracker())
    # Dense weights that quantized ones replace are made on the CPU: there, memory never written to costs nothing.
    on_cpu = quantized is not None or device.type == "cpu"
    with nullcontext() if simulated is None else _building_for(simulated):
        module = _model(architecture, tp, dtype, device, on_cpu).eval().requires_grad_(False)
    group = parallel_state.get_tensor_model_parallel_group() if simulated is None else simulated
    rank = group.rank()
    if quantized is not None:
        quantized.install(Megatron(), module, rank, tp)
    module.to(device=device, dtype=dtype)
    with Checkpoint(folder) as checkpoint:
        linears = quantized.linears if quantized is not None else frozenset()
        megatron_weights.load(module, checkpoint, architecture, rank, tp, linears)
    return MegatronEngine(module, hf_config, architecture, tp, dtype, device, group, cleanup)


def _model(architecture: Architecture, tp: int, dtype: torch.dtype, device: torch.device, on_cpu: bool) -> GPTModel:
    """The uninitialised model of this rank, for `device`, made there or on the CPU."""
    config = TransformerConfig(
        num_layers=architecture.num_layers,
        hidden_size=architecture.hidden_size,
        ffn_hidden_size=architecture.intermediate_size,
        num_attention_heads=architecture.num_heads,
        num_query_groups=architecture.num_kv_heads,
        kv_channels=architecture.head_dim,
        layernorm_epsilon=architecture.norm_eps,
        normalization="RMSNorm",
        activation_func=torch.nn.functional.silu,
        gated_linear_unit=True,
        add_bias_linear=architecture.output_bias or architecture.mlp_bias,
        add_qkv_bias=architecture.qkv_bias,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=tp,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        attention_softmax_in_fp32=True,
        use_cpu_initialization=on_cpu,
        # Every parameter is read from the checkpoint.
        perform_initialization=False,
        # All of these need Transformer Engine, apex or CUDA kernels.
        persist_layer_norm=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
    )
    layer = get_gpt_layer_local_spec(normalization="RMSNorm")
    # Said outright, because the default depends on whether apex or Transformer Engine is installed.
    layer.submodules.input_layernorm = WrappedTorchNorm
    layer.submodules.pre_mlp_layernorm = WrappedTorchNorm
    model = GPTModel(
        config,
        TransformerBlockSubmodules(layer_specs=[layer] * architecture.num_layers, layer_norm=WrappedTorchNorm),
        vocab_size=megatron_weights.padded_vocab_size(architecture.vocab_size, tp),
        max_sequence_length=architecture.max_positions,
        share_embeddings_and_output_weights=architecture.tied_embeddings,
        position_embedding_type="rope",
    )
    # Megatron's own scaled variant fixes all but one of its parameters.
    model.rotary_pos_emb.inv_freq = architecture.rope.inverse_frequencies(architecture.head_dim).to(device)
    return model


@contextmanager
def _parallel_state(tp: int) -> Iterator[None]:
    """Megatron's parallel state with `tp` tensor-parallel ranks: the one there is, or one of our own."""
    if parallel_state.model_parallel_is_initialized():
        found = parallel_state.get_tensor_model_parallel_world_size()
        if found != tp:
            raise LaunchError(f"tensor-parallel size {tp}, but Megatron's parallel state was set up with {found}")
        yield
        return
    existing = set(distributed_c10d._world.pg_map)
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp, create_gloo_process_groups=False)
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()
        # Megatron forgets its groups but does not end them.
        for group in [group for group in distributed_c10d._world.pg_map if group not in existing]:
            distributed_c10d.destroy_process_group(group)


@contextmanager
def _building_for(simulated: SimulatedGroup) -> Iterator[None]:
    """Layers built inside the `with` block are of this tensor-parallel group, which they keep."""
    if "tp_group" not in signature(RowParallelLinear).parameters:
        raise LaunchError(f"simulated ranks need megatron-core 0.13 or later, not {megatron.core.__version__}")
    with attribute(parallel_state, "_TENSOR_MODEL_PARALLEL_GROUP", simulated):
        yield


@contextmanager
def _inference_rng_tracker() -> Iterator[None]:
    """Megatron's RNG tracker for inference: attention forks it around a dropout of zero."""
    with (
        unchanged(tensor_parallel_random, "_CUDA_RNG_STATE_TRACKER"),
        unchanged(tensor_parallel_random, "_CUDA_RNG_STATE_TRACKER_INITIALIZED"),
    ):
        tensor_parallel_random._CUDA_RNG_STATE_TRACKER_INITIALIZED = False
        tensor_parallel_random.initialize_rng_tracker(inference_rng_tracker=True)
        yield
