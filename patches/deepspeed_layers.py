"""DeepSpeed AutoTP's parallel linear layers over quantized weights. Imported only where DeepSpeed is in use."""

from __future__ import annotations

import torch
from deepspeed.module_inject.layers import LinearAllreduce, LinearLayer, RowParallel

from megacomp.patches.adopting import Adopted

__all__ = ["QuantizedLinearAllreduce", "QuantizedLinearLayer"]


class QuantizedLinearLayer(Adopted, LinearLayer):
    """LinearLayer (split by outputs) with `linear` in place of its weight; inference only."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        output = self.linear(input)
        return output if self.bias is None else output + self.bias

    def extra_repr(self) -> str:
        return f"bias={self.bias is not None}"


class QuantizedLinearAllreduce(Adopted, LinearAllreduce):
    """LinearAllreduce (split by inputs) with `linear` in place of its weight; inference only.

    Its reduction is LinearAllreduce's own, so a patch of RowParallel.forward meets it too.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        output = RowParallel.apply(self.mp_group, self.partial(input), True)
        return output if self.bias is None else output + self.bias

    def extra_repr(self) -> str:
        return f"bias={self.bias is not None}"
