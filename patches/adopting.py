"""A module that takes the place of another."""

from __future__ import annotations

import torch

__all__ = ["adopt"]


def adopt(module: torch.nn.Module, replaced: torch.nn.Module) -> None:
    """Initialise `module` as an evaluation-mode torch.nn.Module with the settings of `replaced`.

    Settings are its plain attributes: no parameters (a bias of None among them), buffers, children or hooks.
    """
    torch.nn.Module.__init__(module)
    own = {*vars(module), "weight", "bias"}
    vars(module).update({name: value for name, value in vars(replaced).items() if name not in own})
    module.eval()
