"""Hugging Face Llama-family weights as a Megatron-core GPTModel names, arranges and shards them.

Megatron keeps the three attention projections in one matrix, grouped by KV head: the query heads of a group,
then its key head, then its value head, group after group; a rank holds whole groups. Gate and up projection
are one matrix too: a rank's gate rows, then its up rows. The vocabulary is padded with zero rows to a
multiple of the ranks.

Each rank reads only its own part: rows of column-parallel matrices, columns of row-parallel ones.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch
from torch import nn

from megacomp.launch.engines.architecture import Architecture
from megacomp.launch.engines.checkpoint import Checkpoint


def padded_vocab_size(vocab_size: int, tp: int) -> int:
    """The smallest multiple of `tp` that holds the vocabulary."""
    return -(-vocab_size // tp) * tp


@torch.no_grad()
def load(
    model: nn.Module,
    checkpoint: Checkpoint,
    architecture: Architecture,
    rank: int,
    tp: int,
    quantized: Collection[str] = (),
) -> None:
    """Fill every parameter of `model`, rank `rank` of `tp`, from the checkpoint, converting to its dtype.

    quantized: linears, by their names in the checkpoint, that have no parameters: their layers hold them already.

    Raises RuntimeError if the model has a parameter the mapping does not know, or the other way round: this
    version of Megatron-core builds something else.
    """
    parameters = dict(model.named_parameters())
    for name, weight in _Shards(checkpoint, architecture, rank, tp, quantized).all():
        parameter = parameters.pop(name, None)
        if parameter is None or parameter.shape != weight.shape:
            found = "no such parameter" if parameter is None else f"shape {list(parameter.shape)}"
            raise RuntimeError(f"GPTModel.{name}: expected shape {list(weight.shape)}, found {found}")
        parameter.copy_(weight)
    if parameters:
        raise RuntimeError(f"GPTModel has parameters without a weight: {sorted(parameters)}")


class _Shards:
    """One rank's parameters, made one at a time."""

    def __init__(
        self, checkpoint: Checkpoint, architecture: Architecture, rank: int, tp: int, quantized: Collection[str]
    ) -> None:
        self._checkpoint = checkpoint
        self._architecture = architecture
        self._rank = rank
        self._tp = tp
        self._quantized = quantized

    def all(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield "embedding.word_embeddings.weight", self._vocabulary("model.embed_tokens.weight")
        for layer in range(self._architecture.num_layers):
            for name, weight in self._layer(f"model.layers.{layer}."):
                yield f"decoder.layers.{layer}.{name}", weight
        yield "decoder.final_layernorm.weight", self._checkpoint.read("model.norm.weight")
        if not self._architecture.tied_embeddings:
            yield "output_layer.weight", self._vocabulary("lm_head.weight")

    def _layer(self, prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
        architecture, read = self._architecture, self._checkpoint.read
        mlp = self._part(architecture.intermediate_size)
        heads = self._part(architecture.num_heads * architecture.head_dim)
        yield "input_layernorm.weight", read(f"{prefix}input_layernorm.weight")
        yield "pre_mlp_layernorm.weight", read(f"{prefix}post_attention_layernorm.weight")

        # Megatron has one switch for all biases but QKV's; where only some are wanted, the others are zero.
        others = architecture.output_bias or architecture.mlp_bias
        if f"{prefix}self_attn.q_proj" not in self._quantized:
            yield "self_attention.linear_qkv.weight", self._qkv(prefix, "weight")
            if architecture.qkv_bias:
                yield "self_attention.linear_qkv.bias", self._qkv(prefix, "bias")
            elif others:
                features = (architecture.num_heads + 2 * architecture.num_kv_heads) * architecture.head_dim
                yield "self_attention.linear_qkv.bias", torch.zeros(features // self._tp)
        if f"{prefix}self_attn.o_proj" not in self._quantized:
            yield "self_attention.linear_proj.weight", read(f"{prefix}self_attn.o_proj.weight", columns=heads)
            if architecture.output_bias:
                yield "self_attention.linear_proj.bias", read(f"{prefix}self_attn.o_proj.bias")
            elif others:
                yield "self_attention.linear_proj.bias", torch.zeros(architecture.hidden_size)
        if f"{prefix}mlp.gate_proj" not in self._quantized:
            yield "mlp.linear_fc1.weight", self._gate_up(prefix, "weight", mlp)
            if architecture.mlp_bias:
                yield "mlp.linear_fc1.bias", self._gate_up(prefix, "bias", mlp)
            elif others:
                yield "mlp.linear_fc1.bias", torch.zeros(2 * (mlp.stop - mlp.start))
        if f"{prefix}mlp.down_proj" not in self._quantized:
            yield "mlp.linear_fc2.weight", read(f"{prefix}mlp.down_proj.weight", columns=mlp)
            if architecture.mlp_bias:
                yield "mlp.linear_fc2.bias", read(f"{prefix}mlp.down_proj.bias")
            elif others:
                yield "mlp.linear_fc2.bias", torch.zeros(architecture.hidden_size)

    def _qkv(self, prefix: str, kind: str) -> torch.Tensor:
        """This rank's query, key and value rows: [groups * (queries per group + 2) * head_dim, ...]."""
        head_dim, kv_heads = self._architecture.head_dim, self._architecture.num_kv_heads
        groups = self._part(kv_heads)
        parts = []
        for name, heads_per_group in (("q", self._architecture.num_heads // kv_heads), ("k", 1), ("v", 1)):
            rows_per_group = heads_per_group * head_dim
            rows = slice(groups.start * rows_per_group, groups.stop * rows_per_group)
            part = self._checkpoint.read(f"{prefix}self_attn.{name}_proj.{kind}", rows)
            parts.append(part.unflatten(0, (-1, rows_per_group)))
        return torch.cat(parts, dim=1).flatten(0, 1)

    def _gate_up(self, prefix: str, kind: str, rows: slice) -> torch.Tensor:
        names = (f"{prefix}mlp.{name}_proj.{kind}" for name in ("gate", "up"))
        return torch.cat([self._checkpoint.read(name, rows) for name in names])

    def _vocabulary(self, name: str) -> torch.Tensor:
        size = self._architecture.vocab_size
        rows = self._part(padded_vocab_size(size, self._tp))
        weight = self._checkpoint.read(name, slice(min(rows.start, size), min(rows.stop, size)))
        return nn.functional.pad(weight, (0, 0, 0, rows.stop - rows.start - len(weight)))

    def _part(self, size: int) -> slice:
        """This rank's share of `size` equal things."""
        return slice(self._rank * size // self._tp, (self._rank + 1) * size // self._tp)
