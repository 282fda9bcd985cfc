"""Megatron-core's parallel linear layers over quantized weights. Imported only where megatron-core is in use.

They inherit everything, the forward included, but what multiplies: so they reduce where dense layers do, and the
patches of megatron.py see them as the same sites.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region

from megacomp.patches.adopting import Adopted

__all__ = ["QuantizedColumnParallelLinear", "QuantizedRowParallelLinear"]


class QuantizedColumnParallelLinear(Adopted, ColumnParallelLinear):
    """ColumnParallelLinear with `linear` in place of its weight; inference only."""

    @property
    def weight(self) -> torch.Tensor:
        """What `forward` takes for a weight and passes on: it insists on one."""
        return self.linear.codes

    def _forward_impl(
        self,
        input: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        sequence_parallel: bool = False,
        tp_group: Any = None,
        **_: Any,
    ) -> torch.Tensor:
        if sequence_parallel:
            input = gather_from_sequence_parallel_region(input, group=tp_group)
        output = self.linear(input)
        return output if bias is None else output + bias


class QuantizedRowParallelLinear(Adopted, RowParallelLinear):
    """RowParallelLinear with `linear` in place of its weight; inference only."""

    @property
    def weight(self) -> torch.Tensor:
        """What `forward` takes for a weight and passes on."""
        return self.linear.codes

    def _forward_impl(self, input: torch.Tensor, weight: torch.Tensor, **_: Any) -> torch.Tensor:
        return self.partial(input)
