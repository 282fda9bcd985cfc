"""Tensors in, tensors out: one operation per file, its definition in PyTorch and its faster twins beside it.

Imports torch and triton only, needs no GPU to import, and knows neither models nor policies.
"""

from megacomp.kernels.backend import BACKENDS
from megacomp.kernels.block_format import BlockFormat
from megacomp.kernels.decode_sum import decode_sum, sums_in_slices, sums_rows
from megacomp.kernels.decode_sum_encode import decode_sum_encode
from megacomp.kernels.elements import ELEMENTS, IntElement
from megacomp.kernels.encode import encode
from megacomp.kernels.reduce_norm import add_norm, reduce_norm
from megacomp.kernels.scales import SCALES, PowerOfTwoScale
from megacomp.kernels.static_decode_sum import static_decode_sum
from megacomp.kernels.static_encode import static_encode
from megacomp.kernels.static_format import StaticFormat, StaticTables

__all__ = [
    "BACKENDS",
    "ELEMENTS",
    "SCALES",
    "BlockFormat",
    "IntElement",
    "PowerOfTwoScale",
    "StaticFormat",
    "StaticTables",
    "add_norm",
    "decode_sum",
    "decode_sum_encode",
    "encode",
    "reduce_norm",
    "static_decode_sum",
    "static_encode",
    "sums_in_slices",
    "sums_rows",
]
