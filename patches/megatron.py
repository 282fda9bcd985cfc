"""Megatron-core: where tensor-parallel transformer layers reduce.

The collectives are cut in `megatron.core.tensor_parallel.mappings`, at the module's own helpers: every caller
looks them up in the module's globals when it runs, whereas the public functions and autograd classes around
them were bound by name in other modules at import. The helpers do not know who calls; so the forward of
`RowParallelLinear` (and of `ColumnParallelLinear`, for gathers) says which layer is running, and that of
`TransformerLayer` says which site a layer is, before it first runs, however and whenever it was built.

Two helpers lie elsewhere. While its weights require gradients, a column-parallel layer gathers its input with
`layers.dist_all_gather_func`; and `inference_layers` (from 0.16) imports its collectives from Transformer Engine.
Layers that are Transformer Engine's own are seen there: transformer_engine.py.

Left exact because they come from no site: the masked sum of the embedding, the gather in front of the output
layer, token counts and tokens dispatched to experts, shared experts, cross-attention, and whatever runs
backward. Not seen at all: what reduces without these helpers (`not_covered` lists it).
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from megacomp.collectives import materialized
from megacomp.gptq import CheckpointError, QuantizedLinear
from megacomp.patches.framework import Framework, UnsupportedVersionError, layer_forward
from megacomp.patches.patch import Patch
from megacomp.patches.quantization import ParallelLinear
from megacomp.patches.transformer_engine import gather_with_handle, reduce_with_handle
from megacomp.policy import Site

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist

    from megacomp.config import Module
    from megacomp.door import Door

__all__ = ["Megatron"]

# The children of a TransformerLayer that close (row-parallel) and open (column-parallel) its two halves.
_LAYERS: Mapping[str, Module] = {
    "self_attention.linear_qkv": "attention",
    "self_attention.linear_proj": "attention",
    "mlp.linear_fc1": "mlp",
    "mlp.linear_fc2": "mlp",
}

# What of them is parallel: Megatron's own linear layers, and its classes over Transformer Engine's. By name, for the
# module of the latter need not have been imported.
_LINEARS = {
    "ColumnParallelLinear",
    "RowParallelLinear",
    "TEColumnParallelLinear",
    "TELayerNormColumnParallelLinear",
    "TERowParallelLinear",
}

_BYPASSES = {
    "InferenceRowParallelLinear": "what it reduces in symmetric memory over NVLink is left exact",
    "MoELayer": "tokens dispatched to experts and their outputs combined are left exact",
    "SharedExpertMLP": "shared experts are left exact",
}


class Megatron(Framework):
    """Megatron-core 0.12 to 0.19, with layers of its own (`local`) or of Transformer Engine."""

    name = "megatron-core"
    module = "megatron.core"
    supported = ">=0.12,<0.20"

    def patches(self, door: Door) -> list[Patch]:
        """The forwards that say where we are first, then the collectives."""
        mappings = "megatron.core.tensor_parallel.mappings"
        layers = "megatron.core.tensor_parallel.layers"
        inference = "megatron.core.tensor_parallel.inference_layers"
        # Not before 0.16, and empty without Transformer Engine.
        module = sys.modules.get(inference)
        inference_layers = {} if module is None else vars(module)
        patches = [
            Patch(
                "megatron.core.transformer.transformer_layer.TransformerLayer.forward",
                partial(_transformer_layer, door),
            ),
            Patch(f"{layers}.RowParallelLinear.forward", partial(layer_forward, door)),
            Patch(f"{mappings}._reduce", partial(_reduce, door)),
            Patch(f"{mappings}._reduce_scatter_along_first_dim", partial(_reduce_scatter, door)),
        ]
        reduce_scatter, gather = "reduce_scatter_along_first_dim", "gather_along_first_dim"
        if reduce_scatter in inference_layers:
            patches += [
                Patch(f"{inference}.InferenceRowParallelLinear.forward", partial(layer_forward, door)),
                Patch(f"{inference}.{reduce_scatter}", partial(reduce_with_handle, door, "reduce_scatter")),
            ]
        if "all_gather" in door.config.communication.collectives:
            patches += [
                Patch(f"{layers}.ColumnParallelLinear.forward", partial(layer_forward, door)),
                Patch(f"{mappings}._gather_along_first_dim", partial(_gather, door)),
                Patch(f"{layers}.dist_all_gather_func", partial(_gather_into, door)),
            ]
            if gather in inference_layers:
                patches += [
                    Patch(f"{inference}.{kind}.forward", partial(layer_forward, door))
                    for kind in ("InferenceLayerNormColumnParallelLinear", "InferenceColumnParallelLinear")
                    if kind in inference_layers
                ]
                patches.append(Patch(f"{inference}.{gather}", partial(gather_with_handle, door)))
        return patches

    def sites(self, model: torch.nn.Module) -> dict[torch.nn.Module, Site]:
        """The row- and column-parallel layers of every TransformerLayer in `model`."""
        found = {}
        for layer in _transformer_layers(model).values():
            found.update(_sites_of_layer(layer))
        return found

    def not_covered(self, model: torch.nn.Module) -> dict[str, str]:
        """Experts, and inference layers, which choose their way at every call."""
        found = {}
        for name, module in model.named_modules():
            if kinds := [kind for kind in _kinds(module) if kind in _BYPASSES]:
                found[name] = f"{type(module).__name__}: {_BYPASSES[kinds[0]]}"
        return found

    def ranks(self, model: torch.nn.Module) -> tuple[int, int] | None:
        """Those of the group of the first TransformerLayer's linears."""
        for layer in _transformer_layers(model).values():
            for linear in _sites_of_layer(layer):
                group = _group(getattr(linear, "tp_group", None))
                return group.rank(), group.size()
        return None

    def parallel_linears(self, model: torch.nn.Module) -> list[ParallelLinear]:
        """The four of every TransformerLayer: attention's in its order of heads, gate and up side by side."""
        from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

        if "_forward_impl" not in vars(RowParallelLinear):
            raise UnsupportedVersionError(f"quantized weights need megatron-core 0.14 or later, not {self.version}")
        found = []
        for name, layer in _transformer_layers(model).items():
            config, prefix = layer.config, _prefix(layer.layer_number - 1)
            if not config.gated_linear_unit:
                raise CheckpointError(f"{name}: quantized weights are supported for gated MLPs only")
            hidden, mlp, head_dim = config.hidden_size, config.ffn_hidden_size, config.kv_channels
            queries = config.num_attention_heads * head_dim
            kv_heads = config.num_query_groups or config.num_attention_heads
            keys = kv_heads * head_dim
            attention, gated = f"{prefix}self_attn", f"{prefix}mlp"
            _, ranks = self.ranks(layer) or (0, 1)
            linears: dict[str, tuple[dict[str, tuple[int, int]], int]] = {
                "self_attention.linear_qkv": (
                    {
                        f"{attention}.q_proj": (queries, hidden),
                        f"{attention}.k_proj": (keys, hidden),
                        f"{attention}.v_proj": (keys, hidden),
                    },
                    kv_heads // ranks,
                ),
                "self_attention.linear_proj": ({f"{attention}.o_proj": (hidden, queries)}, 1),
                "mlp.linear_fc1": ({f"{gated}.gate_proj": (mlp, hidden), f"{gated}.up_proj": (mlp, hidden)}, 1),
                "mlp.linear_fc2": ({f"{gated}.down_proj": (hidden, mlp)}, 1),
            }
            for path, (shapes, blocks) in linears.items():
                parent_name, _, child = path.partition(".")
                parent = getattr(layer, parent_name)
                linear = getattr(parent, child, None)
                if not isinstance(linear, ColumnParallelLinear | RowParallelLinear):
                    raise CheckpointError(
                        f"{name}.{path} is a {type(linear).__name__}: quantized weights are supported for "
                        f"ColumnParallelLinear and RowParallelLinear only"
                    )
                found.append(ParallelLinear(f"{name}.{path}", parent, child, linear, shapes, blocks))
        return found

    def elsewhere(self, models: Sequence[torch.nn.Module]) -> tuple[str, ...]:
        """The layers of other pipeline stages, by their numbers."""
        layers = [layer for model in models for layer in _transformer_layers(model).values()]
        held = {layer.layer_number - 1 for layer in layers}
        count = max((layer.config.num_layers for layer in layers), default=0)
        return tuple(_prefix(index) for index in range(count) if index not in held)

    def quantized_layer(
        self, layer: torch.nn.Module, linear: QuantizedLinear, bias: torch.Tensor | None
    ) -> torch.nn.Module:
        """A subclass of ColumnParallelLinear or RowParallelLinear that overrides what multiplies."""
        from megatron.core.tensor_parallel.layers import ColumnParallelLinear

        from megacomp.patches import megatron_layers

        if isinstance(layer, ColumnParallelLinear):
            return megatron_layers.QuantizedColumnParallelLinear(layer, linear, bias)
        return megatron_layers.QuantizedRowParallelLinear(layer, linear, bias)


def _transformer_layers(model: torch.nn.Module) -> dict[str, Any]:
    """The TransformerLayers of `model`, itself perhaps, by name."""
    from megatron.core.transformer.transformer_layer import TransformerLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, TransformerLayer)}


def _prefix(index: int) -> str:
    """How Hugging Face's names of what is in a layer begin."""
    return f"model.layers.{index}."


def _kinds(module: Any) -> list[str]:
    """The names of its classes, its own first."""
    return [kind.__name__ for kind in type(module).__mro__]


def _sites_of_layer(layer: Any) -> dict[torch.nn.Module, Site]:
    # layer_number counts from 1 over all pipeline stages; config.num_layers is that of the entire model.
    index, count = layer.layer_number - 1, layer.config.num_layers
    sites = {}
    for path, module in _LAYERS.items():
        parent, _, child = path.partition(".")
        holder = getattr(layer, parent, None)
        linear: Any = getattr(holder, child, None)
        # TEFusedMLP only keeps its linears' weights and runs operations of its own.
        if type(holder).__name__ != "TEFusedMLP" and not _LINEARS.isdisjoint(_kinds(linear)):
            sites[linear] = Site(f"layers.{index}.{module}", module, index, count)
    return sites


def _transformer_layer(door: Door, original: Callable[..., Any]) -> Callable[..., Any]:
    """Covers TransformerLayer.forward and what inherits it: learns the layer's sites before it first runs.

    Here because this is the one method that every layer runs whole and that knows its number, for models
    built before as after the installation. It also is a place that every rank of a group passes, whatever its
    configuration: the ranks compare theirs before one of them might enter a collective that others do not.
    Not covered: subclasses that override forward without calling it.
    """

    seen: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()

    def forward(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self not in seen:
            seen.add(self)
            sites = _sites_of_layer(self)
            door.learn(sites)
            if sites:
                door.agree(_group(getattr(next(iter(sites)), "tp_group", None)))
        return original(self, *args, **kwargs)

    return forward


def _group(group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    if group is not None:
        return group
    from megatron.core.parallel_state import get_tensor_model_parallel_group

    return get_tensor_model_parallel_group()


def _reduce(door: Door, original: Callable[..., Any]) -> Callable[..., Any]:
    """Covers mappings._reduce, the all-reduce of row-parallel layers without sequence parallelism.

    Answers with a new tensor. The original reduces in place, or, given a tensor that is not contiguous,
    reduces a copy and returns its input unreduced: a replacement must not rely on either. Before 0.13 it
    takes no group and means the tensor-parallel one.
    """

    def reduce(input_: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        group = kwargs.get("group", args[0] if args else None)
        result = door("all_reduce", input_, _group(group))
        return original(materialized(input_), *args, **kwargs) if result is None else result

    return reduce


def _reduce_scatter(door: Door, original: Callable[..., Any]) -> Callable[..., Any]:
    """Covers mappings._reduce_scatter_along_first_dim, which row-parallel layers use under sequence
    parallelism.

    Left exact: unequal splits (`input_split_sizes`), as experts use them.
    """

    def reduce_scatter(
        input_: torch.Tensor,
        group: dist.ProcessGroup | None = None,
        input_split_sizes: list[int] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        result = door("reduce_scatter", input_, _group(group), even=input_split_sizes is None)
        if result is not None:
            return result
        return original(materialized(input_), group, input_split_sizes, *args, **kwargs)

    return reduce_scatter


def _gather(door: Door, original: Callable[..., Any]) -> Callable[..., Any]:
    """Covers mappings._gather_along_first_dim inside of column-parallel layers whose weights are frozen.

    Under sequence parallelism they gather their input this way. Left exact: unequal splits
    (`output_split_sizes`), and token counts and routing maps of experts, which pass through here outside of
    these layers.
    """

    def gather(
        input_: torch.Tensor,
        group: dist.ProcessGroup | None = None,
        output_split_sizes: list[int] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        result = door("all_gather", input_, _group(group), even=output_split_sizes is None)
        return original(input_, group, output_split_sizes, *args, **kwargs) if result is None else result

    return gather


def _gather_into(door: Door, original: Callable[..., Any]) -> Callable[..., Any]:
    """Covers layers.dist_all_gather_func inside of column-parallel layers whose weights require gradients.

    Under sequence parallelism they gather their input this way, into a buffer that all of them share. Left to the
    original: what goes on by itself (`async_op`, in backward passes).
    """

    def gather_into(
        output: torch.Tensor,
        input_: torch.Tensor,
        group: dist.ProcessGroup | None = None,
        async_op: bool = False,
    ) -> Any:
        result = None if async_op else door("all_gather", input_, _group(group))
        if result is None:
            return original(output, input_, group=group, async_op=async_op)
        output.copy_(result)
        return None

    return gather_into
