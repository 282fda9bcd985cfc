"""DeepSpeed AutoTP: where the layers it replaces reduce.

`RowParallel.forward` is the one place that AutoTP's row-parallel layers reduce through. DeepSpeed's own
collective underneath may be a shared-memory op that takes no group and never meets torch.distributed, so the
cut is made above it. `LinearAllreduce.forward` says which layer is running, and `init_inference`, which
builds the layers, what their names in the model are.

Left exact: the output layer (LmHeadLinearAllreduce reduces full-vocabulary logits by itself), the embeddings,
which share RowParallel but are no LinearAllreduce, and every backward pass. Not seen at all: kernel
injection, FastGen, and convolutions.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from megacomp.collectives import materialized
from megacomp.gptq import CheckpointError, QuantizedLinear
from megacomp.patches.framework import Framework
from megacomp.patches.patch import Patch
from megacomp.patches.quantization import ParallelLinear
from megacomp.policy import Site

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist

    from megacomp.config import Module
    from megacomp.door import Door

__all__ = ["DeepSpeed"]

# "model.layers.3.self_attn.o_proj": the first number is the layer's, whatever the list is called.
_LAYER = re.compile(r"(?P<stack>.*?)\.(?P<layer>\d+)\.(?P<inner>.+)")
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_MLP = re.compile(
    r"mlp|ffn|feed_?forward|moe|expert|dense_?relu_?dense|fc2|fc_out|down_proj|4h_to_h|output\.dense|(^|\.)(w2|wo)$",
    re.IGNORECASE,
)

_PROJECTION = re.compile(r"self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj")

_BYPASSES = {
    "LmHeadLinearAllreduce": "the output layer is left exact",
    "SubParamLinearAllreduce": "custom partitioned layers are left exact",
    "TensorParallelIcShardConv2d": "convolutions are left exact",
    "DeepSpeedTransformerInference": "injected kernels reduce by themselves",
}


class DeepSpeed(Framework):
    """DeepSpeed 0.17 to 0.19, automatic tensor parallelism for inference."""

    name = "deepspeed"
    module = "deepspeed"
    supported = ">=0.17,<0.20"

    def patches(self, door: Door) -> list[Patch]:
        """What names the sites first, then the collective."""
        layers = "deepspeed.module_inject.layers"
        return [
            Patch("deepspeed.init_inference", partial(_init_inference, door, self)),
            Patch(f"{layers}.LinearAllreduce.forward", partial(_linear_allreduce, door)),
            Patch(
                "megacomp.patches.deepspeed_layers.QuantizedLinearAllreduce.forward", partial(_linear_allreduce, door)
            ),
            Patch(f"{layers}.RowParallel.forward", partial(_row_parallel, door)),
        ]

    def sites(self, model: torch.nn.Module) -> dict[Any, Site]:
        """Every LinearAllreduce inside a numbered layer, named alike for all architectures: "layers.3.mlp".

        Models of several stacks (a vision tower beside a language model) keep the stack's own path in front.
        """
        from deepspeed.module_inject.layers import LinearAllreduce, LmHeadLinearAllreduce

        found = {}
        counts: dict[str, int] = {}
        for name, module in model.named_modules():
            match = _LAYER.fullmatch(name)
            if match is None:
                continue
            stack, layer = match["stack"], int(match["layer"])
            counts[stack] = max(counts.get(stack, 0), layer + 1)
            if isinstance(module, LinearAllreduce) and not isinstance(module, LmHeadLinearAllreduce):
                found[module] = stack, layer, match["inner"]
        several = len({stack for stack, _, _ in found.values()}) > 1
        sites = {}
        for module, (stack, layer, inner) in found.items():
            kind = _module_of(inner)
            prefix = f"{stack}.{layer}" if several else f"layers.{layer}"
            sites[module] = Site(f"{prefix}.{kind or inner}", kind, layer, counts[stack])
        return sites

    def not_covered(self, model: torch.nn.Module) -> dict[str, str]:
        """The output layer, custom partitioned layers, convolutions, injected kernels."""
        return {
            name: f"{type(module).__name__}: {_BYPASSES[type(module).__name__]}"
            for name, module in model.named_modules()
            if type(module).__name__ in _BYPASSES
        }

    def ranks(self, model: torch.nn.Module) -> tuple[int, int] | None:
        """Those of the first layer AutoTP has split; one rank for a model it had no reason to split."""
        from deepspeed.module_inject.layers import LinearAllreduce

        for module in model.modules():
            if isinstance(module, LinearAllreduce) and module.mp_group is not None:
                return module.mp_group.rank(), module.mp_group.size()
        return (0, 1) if self._projections(model) else None

    def parallel_linears(self, model: torch.nn.Module) -> list[ParallelLinear]:
        """The projections of every numbered layer, which go by the names of the checkpoint.

        Models over one rank, which AutoTP leaves alone, have plain torch.nn.Linear there.
        """
        import torch
        from deepspeed.module_inject.layers import LinearAllreduce, LinearLayer, TensorParallel_Layer

        _, ranks = self.ranks(model) or (0, 1)
        found = []
        for name, module in self._projections(model).items():
            sizes: Any = getattr(module, "_partition_sizes", ())
            if len(set(sizes)) > 1:
                raise CheckpointError(
                    f"{name}: DeepSpeed gave the ranks {list(sizes)} features; quantized weights need equal shares "
                    f"(tensor_parallel.tp_grain_size 1 in its configuration)"
                )
            if isinstance(module, QuantizedLinear):
                out_features, in_features = module.out_features, module.in_features
            elif isinstance(linear := getattr(module, "linear", None), QuantizedLinear):
                out_features, in_features = linear.out_features, linear.in_features
            elif type(module) in (LinearAllreduce, LinearLayer, torch.nn.Linear):
                weight: Any = module.weight
                out_features, in_features = weight.shape
            else:
                raise CheckpointError(f"{name} is a {type(module).__name__}: quantized weights are not supported there")
            if isinstance(module, TensorParallel_Layer):
                split_by_input = isinstance(module, LinearAllreduce)
                out_features *= 1 if split_by_input else ranks
                in_features *= ranks if split_by_input else 1
            parent, _, child = name.rpartition(".")
            # An engine calls the model it wraps "module".
            shapes = {name.removeprefix("module."): (out_features, in_features)}
            found.append(ParallelLinear(name, model.get_submodule(parent), child, module, shapes))
        return found

    def elsewhere(self, models: Sequence[torch.nn.Module]) -> tuple[str, ...]:
        """Nothing: AutoTP gives every process part of every layer."""
        return ()

    def quantized_layer(
        self, layer: torch.nn.Module, linear: QuantizedLinear, bias: torch.Tensor | None
    ) -> torch.nn.Module:
        """A subclass of LinearLayer or LinearAllreduce; in the place of a torch.nn.Linear the linear itself."""
        from deepspeed.module_inject.layers import LinearAllreduce, LinearLayer

        from megacomp.patches import deepspeed_layers

        if isinstance(layer, LinearAllreduce):
            return deepspeed_layers.QuantizedLinearAllreduce(layer, linear, bias)
        if isinstance(layer, LinearLayer):
            return deepspeed_layers.QuantizedLinearLayer(layer, linear, bias)
        linear.register_buffer("bias", bias)
        return linear

    def _projections(self, model: torch.nn.Module) -> dict[str, torch.nn.Module]:
        """Modules called "...3.self_attn.q_proj" and alike, by name."""
        return {
            name: module
            for name, module in model.named_modules()
            if (match := _LAYER.fullmatch(name)) and _PROJECTION.fullmatch(match["inner"])
        }


def _module_of(path: str) -> Module | None:
    """Which half of a layer the linear at `path`, as it is called inside of the layer, closes."""
    if _ATTENTION.search(path):
        # BERT calls the block "attention", and its MLP plain "output.dense".
        return "attention"
    return "mlp" if _MLP.search(path) else None


def _init_inference(door: Door, framework: DeepSpeed, original: Callable[..., Any]) -> Callable[..., Any]:
    """Covers deepspeed.init_inference: takes our section out of its configuration, names the sites it builds.

    Here because it is where an unmodified script hands over its configuration, whose unknown key DeepSpeed
    would reject, and where the layers come to exist. A section in it must be the one installed. Not covered:
    `from deepspeed import init_inference` executed before the installation; the layers it builds go by the
    names AutoTP gave them, without a layer number.
    """

    def init_inference(model: torch.nn.Module, config: Any = None, **kwargs: Any) -> Any:
        engine = original(model, door.without_section(config), **kwargs)
        sites = framework.sites(engine.module)
        ranks = framework.ranks(engine.module)
        door.check(sites, () if ranks is None else (ranks[1],))
        door.attach(sites, framework.not_covered(engine.module))
        # In the order of the layers: every rank must come to the same groups in the same order.
        for group in dict.fromkeys(layer.mp_group for layer in sites):
            if group is not None:
                door.agree(group)
        return engine

    return init_inference


def _linear_allreduce(door: Door, original: Callable[..., Any]) -> Callable[..., Any]:
    """Covers LinearAllreduce.forward and what inherits it: makes the layer's site the current one.

    Here because only outside of RowParallel is it known which layer runs and whether gradients are wanted.
    A layer that nobody named goes by the name AutoTP built it under ("self_attn.o_proj"), which tells the
    module but not the layer.
    """

    def forward(self: torch.nn.Module, input: torch.Tensor) -> torch.Tensor:
        if self not in door.sites:
            kind = _module_of(getattr(self, "name", None) or "")
            if kind is not None:
                door.learn({self: Site(kind, kind)})
        return door.inside(self, original, input)

    return forward


def _row_parallel(door: Door, original: Callable[..., Any]) -> Callable[..., Any]:
    """Covers RowParallel.forward, the all-reduce of every row-parallel layer.

    Without a group, when the model is not split, the original returns its input; so does this.
    """

    def forward(
        ctx: Any, group: dist.ProcessGroup | None, input: torch.Tensor, is_inference_mode: bool
    ) -> torch.Tensor:
        result = None if group is None else door("all_reduce", input, group)
        if result is None:
            return original(ctx, group, materialized(input), is_inference_mode)
        ctx.group = group
        return result

    return forward
