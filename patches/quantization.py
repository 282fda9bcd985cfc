"""Putting quantized layers in the place of a framework's dense ones, and taking them out again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from megacomp.gptq import CheckpointError, QuantizedLinear
from megacomp.gptq.ordering import concatenate_outputs
from megacomp.gptq.shards import LinearShard

if TYPE_CHECKING:
    from megacomp.gptq import Shards
    from megacomp.patches.framework import Framework

__all__ = ["LayerPatch", "ParallelLinear", "quantized_layers"]


@dataclass(frozen=True)
class ParallelLinear:
    """A linear layer of a model, split among ranks, and the linears of a checkpoint that it multiplies.

    path: its name in the model. parent, child: where it hangs. layer: itself.
    linears: (out_features, in_features) of each linear it is made of, entire, by its name in the checkpoint.
    blocks: in how many blocks their outputs alternate, see `concatenate_outputs`.
    """

    path: str
    parent: torch.nn.Module
    child: str
    layer: torch.nn.Module
    linears: Mapping[str, tuple[int, int]]
    blocks: int = 1


@dataclass(frozen=True)
class LayerPatch:
    """A layer of a model replaced by another, until `undo`."""

    at: ParallelLinear
    replacement: torch.nn.Module

    def apply(self) -> None:
        """Replace the layer."""
        setattr(self.at.parent, self.at.child, self.replacement)

    def undo(self) -> None:
        """Put the original layer back."""
        setattr(self.at.parent, self.at.child, self.at.layer)


def quantized_layers(framework: Framework, models: Sequence[torch.nn.Module], shards: Shards) -> list[LayerPatch]:
    """The layers that multiply the quantized weights of `shards`, to take the place of those of `models`.

    models: all that this process holds of one model, as Megatron's virtual pipeline stages.

    Layers whose weights the checkpoint left unquantized, and those that hold the weights of it already, stay.

    Raises CheckpointError, before anything has been read, if tensors are missing or do not fit the models, or are for
    no layer of this process or of another; and if the linears of one layer were not quantized alike. The models are
    not changed.
    """
    candidates = [at for model in models for at in framework.parallel_linears(model)]
    layers = [at for at in candidates if not _holds(at, shards)]
    shards.check({name: shape for at in layers for name, shape in at.linears.items()})
    known, elsewhere = {name for at in candidates for name in at.linears}, framework.elsewhere(models)
    if lost := sorted(name for name in shards.linears - known if not name.startswith(elsewhere)):
        raise CheckpointError(f"{shards.folder}: {lost[0]} is quantized, but the model has no such layer")
    patches = []
    for at in layers:
        names = [name for name in at.linears if name in shards.linears]
        if not names:
            continue
        if len(names) < len(at.linears):
            missing = next(name for name in at.linears if name not in names)
            raise CheckpointError(f"{shards.folder}: {missing} is not quantized, but {names[0]} is: {at.path} is both")
        patches.append(LayerPatch(at, _quantized(framework, at, shards)))
    return patches


def _holds(at: ParallelLinear, shards: Shards) -> bool:
    """Whether a layer holds quantized weights of `shards` already. Raises CheckpointError if they are of others."""
    held = next((module for module in at.layer.modules() if isinstance(module, QuantizedLinear)), None)
    if held is None:
        return False
    if held.source != shards.folder.resolve():
        raise CheckpointError(f"{at.path} holds weights of {held.source} already, not of {shards.folder}")
    return True


def _quantized(framework: Framework, at: ParallelLinear, shards: Shards) -> torch.nn.Module:
    parts = [shards.read(name) for name in at.linears]
    try:
        weight = concatenate_outputs([part.weight for part in parts], at.blocks)
    except ValueError as error:
        raise CheckpointError(
            f"{shards.folder}: {', '.join(at.linears)} cannot be one layer ({at.path}): {error}"
        ) from None
    fused = LinearShard(weight, None, parts[0].in_features, sum(part.out_features for part in parts), parts[0].order)
    linear = QuantizedLinear(fused, shards.folder.resolve())
    own: torch.nn.Parameter | None = getattr(at.layer, "bias", None)
    bias = None
    if own is not None:
        bias = _joined_bias(parts, at.blocks, own.dtype)
    elif any(part.bias is not None for part in parts):
        named = next(name for name, part in zip(at.linears, parts, strict=True) if part.bias is not None)
        raise CheckpointError(f"{shards.folder}: {named}.bias is not zero, but the model has no bias there")
    replacement = framework.quantized_layer(at.layer, linear, bias)
    device = next(iter((*at.layer.parameters(), *at.layer.buffers()))).device
    # A layer built without storage says nothing of where it will run; whoever built it moves the model.
    return replacement if device.type == "meta" else replacement.to(device)


def _joined_bias(parts: Sequence[LinearShard], blocks: int, dtype: torch.dtype) -> torch.Tensor:
    """The bias of the outputs in the order of `concatenate_outputs`; zero where a linear has none."""
    biases = [
        part.weight.scales.new_zeros(part.out_features, dtype=torch.float32) if part.bias is None else part.bias.float()
        for part in parts
    ]
    return torch.cat([bias.unflatten(0, (blocks, -1)) for bias in biases], dim=1).flatten().to(dtype)
