"""Which site gets which route, and why a message is left to the original collective instead."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from math import inf
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist

from megacomp import codecs
from megacomp.calibration import Calibration, CalibrationError
from megacomp.collectives import Route
from megacomp.config import DEFAULT_MIN_BYTES, TUNED, ConfigError, Layers
from megacomp.kernels.backend import backend_problem
from megacomp.tuning import Step, TuningError, Tunings

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from megacomp.config import Collective, Communication, Config, Module, Rule

__all__ = ["Decline", "Policy", "Site"]


_CALIBRATION = "megacomp.communication.calibration"


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
    OBSERVED = "observed", "it is being observed, and nothing is compressed meanwhile"
    NOT_CALIBRATED = (
        "not_calibrated",
        "the calibration is not for such a message (site, ranks, hidden size, collective)",
    )
    GUARD = "guard", "the numerical guard found its site too noisy and switched it off"
    UNKNOWN_LAYER = "unknown_layer", "a rule names layers and its layer is unknown; install with model=..."

    def __init__(self, key: str, why: str) -> None:
        self.key = key
        self.why = why


class _Window(NamedTuple):
    """What happens to messages of min_bytes..max_bytes, both included."""

    min_bytes: float
    max_bytes: float
    outcome: Route | Decline


class Policy:
    """The decisions of one configuration.

    The routes of a site are worked out at its first message; from then on a decision is a dictionary lookup
    and a few comparisons.

    tunings: what `megacomp tune` measured, if anything is left to that. calibration: of the static codecs, if any.
    """

    def __init__(self, config: Config) -> None:
        """Raises ConfigError if this machine lacks what the backend of `config` needs, or a file it names is bad."""
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if problem := backend_problem(config.backend, device):
            raise ConfigError([("megacomp.backend", f'"{config.backend}" is not possible here: {problem}')])
        self._communication = config.communication
        self._backend = config.backend
        self.calibration = _calibration(self._communication)
        self.tunings = _tunings(self._communication)
        rules = [self._communication.resolve(rule) for rule in self._communication.rules]
        self._rules = [(rule, rule.layers and Layers.parse(rule.layers), self._route(rule)) for rule in rules]
        self._default = self._route(self._communication)
        self._windows: dict[tuple[Site, int], tuple[_Window, ...]] = {}

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
        size = rows * features * dtype.itemsize
        if unfit := self.unfit(size, dtype, world_size, grad_enabled):
            return unfit
        if collective not in self._communication.collectives:
            return Decline.COLLECTIVE
        if not even:
            return Decline.UNEVEN_SPLIT
        windows = self._windows.get((site, world_size))
        if windows is None:
            windows = self._windows[site, world_size] = tuple(self._windows_of(site, world_size))
        for low, high, outcome in windows:
            if low <= size <= high:
                fits = isinstance(outcome, Decline) or self._fits(outcome, collective, features, world_size)
                return outcome if fits else Decline.NOT_CALIBRATED
        return Decline.BELOW_MIN_BYTES

    @staticmethod
    def unfit(size: int, dtype: torch.dtype, world_size: int, grad_enabled: bool) -> Decline | None:
        """Why no configuration would have a message of `size` bytes compressed, or None."""
        if world_size == 1:
            return Decline.SINGLE_RANK
        if grad_enabled:
            return Decline.GRAD_ENABLED
        if dtype not in codecs.DTYPES:
            return Decline.DTYPE if dtype.is_floating_point else Decline.NOT_FLOATING
        return None if size else Decline.EMPTY

    def _fits(self, route: Route, collective: Collective, features: int, world_size: int) -> bool:
        """Whether the static codecs of `route`, if any, were calibrated for such a message."""
        if self.calibration is None or not _static(route):
            return True
        # What is gathered in front of a column-parallel layer is no partial, nor a sum of them.
        fits = (world_size, features) == (self.calibration.tp, self.calibration.features)
        return fits and collective != "all_gather"

    def check_calibration(self, sites: Collection[Site], features: Collection[int], ranks: Collection[int]) -> None:
        """Raise ConfigError unless the calibration, if there is one, is for these sites of a model.

        features: what their layers give out, some of them the hidden size. ranks: the sizes of their tensor-parallel
        groups.
        """
        if self.calibration is None:
            return
        try:
            for count in ranks:
                self.calibration.check(tp=count)
            if features and self.calibration.features not in features:
                self.calibration.check(features=min(features))
            for site in sites:
                for window in self._windows_of(site, self.calibration.tp):
                    if window.outcome is Decline.NOT_CALIBRATED:
                        raise CalibrationError(f"{self.calibration.source} has no tables for site {site.name}")
        except CalibrationError as error:
            raise ConfigError([(_CALIBRATION, str(error))]) from None

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
        chunks = self._communication.pipeline_chunks
        route = Route(
            codec=codecs.get(settings.codec, backend=self._backend),
            gather_codec=None if gather_codec is None else codecs.get(gather_codec, backend=self._backend),
            algorithm="auto" if settings.algorithm == TUNED else settings.algorithm,
            pipeline_chunks="auto" if chunks == TUNED else chunks,
        )
        if self.calibration is not None:
            for codec in _static(route):
                if codec.name not in self.calibration.tables:
                    try:
                        self.calibration.codec(codec, "")
                    except CalibrationError as error:
                        raise ConfigError([(_CALIBRATION, str(error))]) from None
        return route

    def _at(self, site: Site, outcome: Route | Decline) -> Route | Decline:
        """`outcome` with static codecs as they are calibrated for `site`."""
        if self.calibration is None or isinstance(outcome, Decline):
            return outcome
        calibrated: dict[codecs.Codec, codecs.Codec] = {}
        for codec in _static(outcome):
            if site.name not in self.calibration.tables[codec.name]:
                return Decline.NOT_CALIBRATED
            calibrated[codec] = self.calibration.codec(codec, site.name)
        gather_codec = outcome.gather_codec
        return replace(
            outcome,
            codec=calibrated.get(outcome.codec, outcome.codec),
            gather_codec=None if gather_codec is None else calibrated.get(gather_codec, gather_codec),
        )

    def _windows_of(self, site: Site, world_size: int) -> Iterator[_Window]:
        """What may happen at `site`, by size, in the order of the rules, the section itself last."""
        for rule, layers, route in self._rules:
            if rule.module is not None and rule.module != site.module:
                continue
            outcome = route
            if layers:
                if site.layer is None or site.layer_count is None:
                    outcome = Decline.UNKNOWN_LAYER
                elif not layers.contains(site.layer, site.layer_count):
                    continue
            yield from self._windows_for(
                rule, inf if rule.max_bytes is None else rule.max_bytes, outcome, world_size, site
            )
        yield from self._windows_for(self._communication, inf, self._default, world_size, site)

    def _windows_for(
        self, settings: Communication | Rule, max_bytes: float, outcome: Route | Decline, world_size: int, site: Site
    ) -> Iterator[_Window]:
        """`outcome` up to `max_bytes`: one window, or one for each way that was found the fastest for some sizes.

        A tuned min_bytes is one codec's own: below it a message stays exact, and does not fall to a later rule that
        compresses sooner, and by less precise a codec perhaps.
        """
        own_threshold = settings.min_bytes == TUNED
        algorithm, chunks = settings.algorithm == TUNED, self._communication.pipeline_chunks == TUNED
        min_bytes: float = DEFAULT_MIN_BYTES if settings.min_bytes == TUNED else settings.min_bytes or 0
        if isinstance(outcome, Decline):
            yield _Window(0 if own_threshold else min_bytes, max_bytes, outcome)
            return
        steps: tuple[Step, ...] = (Step(0, inf, outcome),)
        if self.tunings is not None and (own_threshold or algorithm or chunks):
            plan = self.tunings.plan(outcome, world_size, algorithm=algorithm, chunks=chunks)
            if plan is not None:
                steps = plan.steps
                min_bytes = plan.min_bytes if own_threshold else min_bytes
        if own_threshold:
            yield _Window(0, min(max_bytes, min_bytes - 1), Decline.BELOW_MIN_BYTES)
        for step in steps:
            yield _Window(max(min_bytes, step.min_bytes), min(max_bytes, step.max_bytes), self._at(site, step.route))


def _static(route: Route) -> list[codecs.StaticCodec]:
    """The static codecs of a route."""
    return [codec for codec in (route.codec, route.gather_codec) if isinstance(codec, codecs.StaticCodec)]


def _calibration(communication: Communication) -> Calibration | None:
    """The calibration that `communication` names; ConfigError if it cannot be read."""
    if communication.calibration is None:
        return None
    try:
        return Calibration.read(communication.calibration)
    except CalibrationError as error:
        raise ConfigError([(_CALIBRATION, str(error))]) from None


def _tunings(communication: Communication) -> Tunings | None:
    """What "tuned" refers to; None where nothing is. ConfigError if `tuning` names a file that holds no tuning."""
    if not communication.tuned:
        return None
    there = dist.is_available() and dist.is_initialized()
    try:
        return Tunings(communication.tuning, dist.get_world_size() if there else None)
    except TuningError as error:
        raise ConfigError([("megacomp.communication.tuning", str(error))]) from error
