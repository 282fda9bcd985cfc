"""Block codecs: the scales travel with the values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch

from megacomp.codecs.codec import Codec, canonical_json
from megacomp.kernels import BlockFormat, decode_sum, decode_sum_encode, encode, reduce_norm
from megacomp.kernels.dequant_gemm_encode import dequant_gemm_encode
from megacomp.kernels.grouped_weight import GroupedWeight

__all__ = ["BlockCodec"]


@dataclass(frozen=True)
class BlockCodec(Codec):
    """A block codec: a block with a NaN or Inf decodes to NaN, zero blocks decode to zero.

    Attributes:
        format: the numerics and the layout.
    """

    name: str
    spec: Mapping[str, object] = field(hash=False)
    format: BlockFormat
    backend: str = "auto"
    key: str = field(init=False, repr=False, compare=False)
    static: ClassVar[bool] = False

    __str__ = Codec.__str__

    def __post_init__(self) -> None:
        object.__setattr__(self, "key", f'{{"backend":"{self.backend}","spec":{canonical_json(self.spec)}}}')

    def with_backend(self, backend: str) -> BlockCodec:
        return self if backend == self.backend else replace(self, backend=backend)

    def row_bytes(self, features: int) -> int:
        return self.format.row_bytes(features)

    def _encode(self, x: torch.Tensor, wire: torch.Tensor) -> None:
        encode(self.format, x, wire, self.backend)

    def _encode_product(self, x: torch.Tensor, weight: GroupedWeight, wire: torch.Tensor) -> None:
        dequant_gemm_encode(self.format, x, weight, wire, self.backend)

    def _decode_sum(self, wires: torch.Tensor, out: torch.Tensor) -> None:
        decode_sum(self.format, wires, out, self.backend)

    def _decode_sum_encode(
        self,
        wires: torch.Tensor,
        features: int,
        gather_codec: Codec,
        out: torch.Tensor,
        sums: torch.Tensor | None,
    ) -> None:
        if isinstance(gather_codec, BlockCodec):
            decode_sum_encode(self.format, wires, gather_codec.format, features, out, self.backend, sums)
        else:
            super()._decode_sum_encode(wires, features, gather_codec, out, sums)

    def reduce_norm(
        self,
        wires: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        new_residual: torch.Tensor,
        normalized: torch.Tensor,
        bias: torch.Tensor | None = None,
        sums: torch.Tensor | None = None,
    ) -> None:
        reduce_norm(self.format, wires, residual, weight, eps, new_residual, normalized, self.backend, bias, sums)
