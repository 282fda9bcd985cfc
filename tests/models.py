"""Tiny random tensor-parallel models on the CPU, one for each framework; nothing is downloaded."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

LAYERS = 3
HIDDEN = 64
HEADS = 4
VOCABULARY = 96


def tokens(batch: int = 2, length: int = 8) -> torch.Tensor:
    """The same tokens on every rank, int64 [batch, length]."""
    return torch.randint(VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(7))


class _Norm:
    """torch's RMSNorm where Megatron builds its own, which refuses sequence parallelism."""

    def __new__(cls, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> Any:
        return torch.nn.RMSNorm(hidden_size, eps)


@contextmanager
def megatron_gpt(
    *,
    sequence_parallel: bool = False,
    linears: Mapping[str, type] | None = None,
    timeout: timedelta = timedelta(minutes=30),
    **settings: Any,
) -> Iterator[torch.nn.Module]:
    """A Megatron GPTModel split over all ranks of the default group, weights frozen.

    linears: classes to build in the place of "ColumnParallelLinear" and "RowParallelLinear" inside of layers.
    timeout: of its process groups.
    settings: of its TransformerConfig.

    What it needs of CUDA is stood in for until the end of the block; leaving it resets Megatron's state.
    """
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel, gpt_layer_specs
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer import TransformerConfig

    with (
        mock.patch("torch.cuda.current_device", lambda: "cpu"),
        mock.patch("megatron.core.transformer.transformer_block.LayerNormImpl", _Norm),
    ):
        minutes: Any = timeout / timedelta(minutes=1)
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=dist.get_world_size(), distributed_timeout_minutes=minutes
        )
        try:
            model_parallel_cuda_manual_seed(3, inference_rng_tracker=True)
            usual: dict[str, Any] = {
                "num_layers": LAYERS,
                "hidden_size": HIDDEN,
                "num_attention_heads": HEADS,
                "ffn_hidden_size": 4 * HIDDEN,
                "hidden_dropout": 0.0,
                "attention_dropout": 0.0,
                "normalization": "RMSNorm",
                "gated_linear_unit": True,
                "activation_func": torch.nn.functional.silu,
                "add_bias_linear": False,
                "tensor_model_parallel_size": dist.get_world_size(),
                "sequence_parallel": sequence_parallel,
                "use_cpu_initialization": True,
                "persist_layer_norm": False,
                "gradient_accumulation_fusion": False,
                "masked_softmax_fusion": False,
                "bias_dropout_fusion": False,
                "pipeline_dtype": torch.float32,
            }
            config = TransformerConfig(**{**usual, **settings})
            # Before 0.13 the specifications name the classes of layers themselves.
            home = sys.modules.get("megatron.core.models.backends", gpt_layer_specs)
            with mock.patch.dict(vars(home), linears or {}):
                spec = gpt_layer_specs.get_gpt_layer_local_spec(
                    num_experts=settings.get("num_moe_experts"), moe_grouped_gemm=False, normalization="RMSNorm"
                )
            spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = _Norm
            torch.manual_seed(5)
            model = GPTModel(
                config,
                spec,
                vocab_size=VOCABULARY,
                max_sequence_length=64,
                position_embedding_type="rope",
            )
            yield model.eval().requires_grad_(False)
        finally:
            parallel_state.destroy_model_parallel()


def megatron_logits(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """float32 [batch, length, vocabulary]; with gradients enabled, this rank's part of the vocabulary."""
    batch, length = ids.shape
    positions = torch.arange(length).expand(batch, length)
    mask = torch.ones(batch, 1, length, length, dtype=torch.bool).triu(1)
    shard = model(ids, positions, mask).contiguous()
    if torch.is_grad_enabled():
        return shard
    shards = [torch.empty_like(shard) for _ in range(dist.get_world_size())]
    dist.all_gather(shards, shard)
    return torch.cat(shards, dim=-1)


def llama() -> torch.nn.Module:
    """A transformers Llama, not split yet; the same weights on every rank."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=4 * HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).eval()


@contextmanager
def deepspeed_on_cpu() -> Iterator[None]:
    """DeepSpeed without its shared-memory op, which outlives process groups; resets its state at the end."""
    import deepspeed
    from deepspeed.inference.engine import InferenceEngine

    with mock.patch.dict(deepspeed.ops.__compatible_ops__, deepspeed_shm_comm=False):
        try:
            yield
        finally:
            InferenceEngine.inference_mp_group = None


def deepspeed_settings(**section: Any) -> dict[str, Any]:
    """A DeepSpeed inference configuration that splits a model over all ranks, with a "megacomp" section if given."""
    settings = {"dtype": "fp32", "tensor_parallel": {"tp_size": dist.get_world_size()}}
    return {**settings, "megacomp": section} if section else settings
