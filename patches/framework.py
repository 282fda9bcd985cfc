"""What megacomp needs to know about a framework to cut into it."""

from __future__ import annotations

import importlib
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from packaging.specifiers import SpecifierSet
from packaging.version import Version

if TYPE_CHECKING:
    import torch

    from megacomp.door import Door
    from megacomp.gptq import QuantizedLinear
    from megacomp.patches.patch import Patch
    from megacomp.patches.quantization import ParallelLinear
    from megacomp.policy import Site

__all__ = ["Framework", "UnsupportedVersionError", "layer_forward"]


class UnsupportedVersionError(RuntimeError):
    """A framework in a version whose insides megacomp does not know; nothing has been patched."""


class Framework(ABC):
    """A framework whose reductions can be compressed.

    name: of its distribution, "megatron-core".
    module: its package, with `__version__`; once that is imported everything the patches replace can be.
    supported: the versions in which all of that exists, ">=1.2,<2".
    """

    name: ClassVar[str]
    module: ClassVar[str]
    supported: ClassVar[str]

    @property
    def imported(self) -> bool:
        """Whether its package has been imported, completely."""
        module = sys.modules.get(self.module)
        return module is not None and not getattr(module.__spec__, "_initializing", False)

    @property
    def version(self) -> str:
        """Its version; imports it."""
        return importlib.import_module(self.module).__version__

    def check(self, door: Door) -> None:
        """Raise UnsupportedVersionError or MissingSymbolError if the imported version cannot be patched."""
        known = f"{self.name} {self.supported}"
        if not SpecifierSet(self.supported).contains(Version(self.version), prereleases=True):
            raise UnsupportedVersionError(f"{self.name} {self.version} is not supported; megacomp works with {known}")
        for patch in self.patches(door):
            patch.check(f"{known}, found {self.version}")

    @abstractmethod
    def patches(self, door: Door) -> list[Patch]:
        """What is replaced, in the order in which to apply it."""

    @abstractmethod
    def sites(self, model: torch.nn.Module) -> Mapping[torch.nn.Module, Site]:
        """The layers of `model` whose collectives come to the door, and the sites they are."""

    @abstractmethod
    def not_covered(self, model: torch.nn.Module) -> dict[str, str]:
        """The row-parallel layers of `model`, by name, that reduce where no patch sees them, and why."""

    @abstractmethod
    def ranks(self, model: torch.nn.Module) -> tuple[int, int] | None:
        """(rank, ranks) of the tensor parallelism `model` is split with; None if it has no layer of this framework."""

    @abstractmethod
    def parallel_linears(self, model: torch.nn.Module) -> list[ParallelLinear]:
        """The linear layers of `model` that quantized ones may replace, quantized ones included.

        Raises CheckpointError for a model whose linears a checkpoint cannot be laid out for, and
        UnsupportedVersionError where this version's layers cannot be replaced.
        """

    @abstractmethod
    def elsewhere(self, models: Sequence[torch.nn.Module]) -> tuple[str, ...]:
        """Prefixes of the names, as in a checkpoint, of linears of the same model that other processes hold."""

    @abstractmethod
    def quantized_layer(
        self, layer: torch.nn.Module, linear: QuantizedLinear, bias: torch.Tensor | None
    ) -> torch.nn.Module:
        """A layer that does what `layer` does with other weights.

        bias: as `layer` adds it; None if it has none.
        """


def layer_forward(door: Door, original: Callable[..., Any]) -> Callable[..., Any]:
    """Covers the forward of a parallel linear layer: makes its site the current one.

    Here because only outside of the autograd functions it calls is it known which layer runs and whether
    gradients are wanted. Layers that are no site, such as the output layer and the linears of experts, run
    with none.
    """

    def forward(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        return door.inside(self, original, *args, **kwargs)

    return forward
