"""Which GPTQ weights an engine is built with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from megacomp.gptq import CheckpointError, Order, is_quantized, open_shards
from megacomp.launch.engines.architecture import Architecture
from megacomp.launch.errors import LaunchError
from megacomp.patches import Framework, quantized_layers


@dataclass(frozen=True)
class QuantizedWeights:
    """A checkpoint that fits the model, found good.

    folder: a GPTQ checkpoint, or one that `megacomp convert` has written. order: of the MLP's features.
    linears: the names of those that are quantized; the others are the model's own.
    """

    folder: Path
    order: Order
    linears: frozenset[str]

    @classmethod
    def find(
        cls, model_dir: Path, weights_dir: Path | None, architecture: Architecture, tp: int, order: Order
    ) -> QuantizedWeights | None:
        """The checkpoint in `weights_dir`, or that in `model_dir` if it is one; None if neither is asked for.

        Raises LaunchError if it is damaged or does not fit `architecture`; the message names the tensor.
        """
        try:
            if weights_dir is None and not is_quantized(model_dir):
                return None
            folder = model_dir if weights_dir is None else weights_dir
            with open_shards(folder, 0, tp, order) as shards:
                shards.check(architecture.linear_shapes())
                return cls(folder, order, shards.linears)
        except CheckpointError as error:
            raise LaunchError(str(error)) from None

    def install(self, framework: Framework, model: nn.Module, rank: int, tp: int) -> None:
        """Put them in the place of the layers of `model`, which is split already."""
        try:
            with open_shards(self.folder, rank, tp, self.order) as shards:
                for patch in quantized_layers(framework, [model], shards):
                    patch.apply()
        except CheckpointError as error:
            raise LaunchError(str(error)) from None
