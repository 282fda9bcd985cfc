"""Where megacomp cuts into other frameworks, each cut a reversible `Patch`."""

from megacomp.patches.deepspeed import DeepSpeed
from megacomp.patches.framework import Framework, UnsupportedVersionError
from megacomp.patches.importing import ImportWatch
from megacomp.patches.megatron import Megatron
from megacomp.patches.patch import MissingSymbolError, Patch
from megacomp.patches.quantization import LayerPatch, quantized_layers
from megacomp.patches.transformer_engine import TransformerEngine

__all__ = [
    "FRAMEWORKS",
    "Framework",
    "ImportWatch",
    "LayerPatch",
    "MissingSymbolError",
    "Patch",
    "UnsupportedVersionError",
    "quantized_layers",
]

FRAMEWORKS: tuple[Framework, ...] = (Megatron(), TransformerEngine(), DeepSpeed())
