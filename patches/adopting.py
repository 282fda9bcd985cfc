"""A layer over quantized weights that takes the place of a framework's own."""

from __future__ import annotations

import torch

from megacomp.door import at_site
from megacomp.gptq import QuantizedLinear

__all__ = ["Adopted"]


class Adopted(torch.nn.Module):
    """What such a layer is besides its framework's class, which it is to inherit after this one.

    linear: what multiplies, in place of a weight. bias: a buffer, None where there is none.
    """

    linear: QuantizedLinear
    bias: torch.Tensor | None

    def __init__(self, replaced: torch.nn.Module, linear: QuantizedLinear, bias: torch.Tensor | None) -> None:
        """In evaluation mode, with the settings of `replaced`.

        Settings are its plain attributes: no parameters (a bias of None among them), buffers, children or hooks.
        """
        torch.nn.Module.__init__(self)
        own = {*vars(self), "weight", "bias"}
        vars(self).update({name: value for name, value in vars(replaced).items() if name not in own})
        self.eval()
        self.linear = linear
        self.register_buffer("bias", bias)

    @property
    def out_features(self) -> int:
        """How many features it gives out on this rank."""
        return self.linear.out_features

    def partial(self, input: torch.Tensor) -> torch.Tensor:
        """What `linear` makes of `input`, for the reduction; deferred where a door awaits it."""
        return self.linear(input, deferred=at_site())
