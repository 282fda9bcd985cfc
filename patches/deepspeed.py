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
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from megacomp.patches.framework import Framework
from megacomp.patches.patch import Patch
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
            return original(ctx, group, input, is_inference_mode)
        ctx.group = group
        return result

    return forward
