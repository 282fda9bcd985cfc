"""GPTQ weights for tensor parallelism: reading checkpoints, ordering them, and the linear that multiplies them."""

from megacomp.gptq.layers import QuantizedLinear
from megacomp.gptq.shards import Order, Shards, is_quantized, open_shards
from megacomp.gptq.tensor_files import CheckpointError

__all__ = ["CheckpointError", "Order", "QuantizedLinear", "Shards", "is_quantized", "open_shards"]
