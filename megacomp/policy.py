"""Which site gets which route, and why a message is left to the original collective instead."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from math import inf
from typing import TYPE_CHECKING, NamedTuple

import torch

from megacomp import codecs
from megacomp.collectives import Route
from megacomp.config import ConfigError, Layers
from megacomp.kernels.backend import backend_problem

if TYPE_CHECKING:
    from collections.abc import Collection

    from megacomp.config import Collective, Communication, Config, Module, Rule

__all__ = ["Decline", "Policy", "Site"]


@dataclass(frozen=True)
class Site:
    """A place where a row-parallel layer reduces.

    name: "layers.3.attention".
    module: which half of its layer it closes; None if its name tells neither.
    layer: counted from 0 over the entire model; None if unknown.
    layer_count: layers of the entire model (of the stack it belongs to); None if unknown.
    """

    name: str
    module: Module | None = None
    layer: int | None = None
    layer_count: int | None = None


class Decline(Enum):
    """Why a message was left to the original collective: the reason's key in reports, and what it means."""

    OUTSIDE = "outside", "it does not come from a row-parallel layer of a transformer"
    SINGLE_RANK = "single_rank", "its group has one rank"
    GRAD_ENABLED = (
        "grad_enabled",
        "gradients are enabled; run under torch.no_grad() or torch.inference_mode()",
    )
    NOT_FLOATING = "not_floating", "it is not floating-point"
    SUBCLASS = "subclass", "it is no plain tensor (quantized already, or distributed)"
    DTYPE = "dtype", "codecs take bfloat16, float16 and float32 only"
    COLLECTIVE = "collective", "its collective is not listed in megacomp.communication.collectives"
    UNEVEN_SPLIT = "uneven_split", "ranks hold unequal numbers of rows"
    EMPTY = "empty", "it has no values"
    BELOW_MIN_BYTES = "below_min_bytes", "it is smaller than min_bytes"
    EXACT = "exact", "the configuration leaves it exact (codec null)"
    UNKNOWN_LAYER = "unknown_layer", "a rule names layers and its layer is unknown; install with model=..."

    def __init__(self, key: str, why: str) -> None:
        self.key = key
        self.why = why


class _Window(NamedTuple):
    """What happens to messages of min_bytes..max_bytes, both included."""

    min_bytes: int
    max_bytes: float
    outcome: Route | Decline


class Policy:
    """The decisions of one configuration.

    The routes of a site are worked out at its first message; from then on a decision is a dictionary lookup
    and a few comparisons.
    """

    def __init__(self, config: Config) -> None:
        """Raises ConfigError if this machine lacks what the backend of `config` needs."""
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if problem := backend_problem(config.backend, device):
            raise ConfigError([("megacomp.backend", f'"{config.backend}" is not possible here: {problem}')])
        self._communication = config.communication
        self._backend = config.backend
        rules = [self._communication.resolve(rule) for rule in self._communication.rules]
        self._rules = [(rule, rule.layers and Layers.parse(rule.layers), self._route(rule)) for rule in rules]
        self._default = self._route(self._communication)
        self._windows: dict[Site, tuple[_Window, ...]] = {}

    def decide(
        self,
        site: Site,
        collective: Collective,
        rows: int,
        features: int,
        dtype: torch.dtype,
        world_size: int,
        *,
        even: bool = True,
        grad_enabled: bool = False,
    ) -> Route | Decline:
        """The route of a message `[rows, features]` of `dtype` on this rank, or why it has none.

        even: whether all ranks of a reduce_scatter or all_gather hold equally many rows.
        grad_enabled: whether gradients will be wanted.

        All arguments are the same on every rank of a group, and equal arguments give equal answers: so all
        ranks decide alike without asking one another.
        """
        if world_size == 1:
            return Decline.SINGLE_RANK
        if grad_enabled:
            return Decline.GRAD_ENABLED
        if dtype not in codecs.DTYPES:
            return Decline.DTYPE if dtype.is_floating_point else Decline.NOT_FLOATING
        if collective not in self._communication.collectives:
            return Decline.COLLECTIVE
        if not even:
            return Decline.UNEVEN_SPLIT
        size = rows * features * dtype.itemsize
        if not size:
            return Decline.EMPTY
        windows = self._windows.get(site)
        if windows is None:
            windows = self._windows[site] = self._windows_of(site)
        for low, high, outcome in windows:
            if low <= size <= high:
                return outcome
        return Decline.BELOW_MIN_BYTES

    def check_rules(self, sites: Collection[Site]) -> None:
        """Raise ConfigError, naming them, if rules can match none of `sites`, the sites of a model.

        A pipeline stage holds part of a model's layers, so layers are held against the count of the entire
        model.
        """
        counts = {site.layer_count for site in sites if site.layer_count is not None}
        modules = {site.module for site in sites}
        errors = []
        for index, (rule, layers, _) in enumerate(self._rules):
            path = f"megacomp.communication.rules[{index}]"
            if rule.module is not None and rule.module not in modules:
                errors.append((f"{path}.module", f"the model has no site in module {rule.module!r}"))
            if layers and counts:
                unmatched = set.intersection(*(set(layers.unmatched(count)) for count in counts))
                known = " or ".join(f"{count} layers (0 to {count - 1}, or -{count} to -1)" for count in sorted(counts))
                errors += [
                    (f"{path}.layers", f"{item!r} matches no layer; the model has {known}")
                    for item in sorted(unmatched)
                ]
        if errors:
            raise ConfigError(errors)

    def _route(self, settings: Communication | Rule) -> Route | Decline:
        if settings.codec is None:
            return Decline.EXACT
        gather_codec = settings.gather_codec
        return Route(
            codec=codecs.get(settings.codec, backend=self._backend),
            gather_codec=None if gather_codec is None else codecs.get(gather_codec, backend=self._backend),
            algorithm=settings.algorithm,
            pipeline_chunks=self._communication.pipeline_chunks,
        )

    def _windows_of(self, site: Site) -> tuple[_Window, ...]:
        """What may happen at `site`, by size, in the order of the rules, the section itself last."""
        windows = []
        for rule, layers, route in self._rules:
            if rule.module is not None and rule.module != site.module:
                continue
            outcome = route
            if layers:
                if site.layer is None or site.layer_count is None:
                    outcome = Decline.UNKNOWN_LAYER
                elif not layers.contains(site.layer, site.layer_count):
                    continue
            windows.append(_Window(rule.min_bytes or 0, inf if rule.max_bytes is None else rule.max_bytes, outcome))
        windows.append(_Window(self._communication.min_bytes, inf, self._default))
        return tuple(windows)
