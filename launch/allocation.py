"""Which codec at which site: the fewest bytes for what they cost in quality, and how a configuration says it.

No model runs here: costs and verdicts are given.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megacomp import codecs
from megacomp.codecs import Codec
from megacomp.policy import Site

__all__ = ["Allocation", "Frontier", "close_in", "communication", "notation", "written"]

Allocation = Mapping[Site, Codec | None]
"""The codec of each site; None leaves it exact."""


@dataclass(frozen=True, eq=False)
class Frontier:
    """The best choices of one candidate per site: no other is as small and costs less.

    Attributes:
        sizes: int64 ``[points]``, strictly increasing: the sizes of all sites together.
        costs: float64 ``[points]``, strictly decreasing: their costs together.
    """

    sizes: np.ndarray
    costs: np.ndarray
    _steps: np.ndarray
    _points: np.ndarray
    _choices: Sequence[np.ndarray]

    @classmethod
    def of(cls, sizes: Sequence[int], costs: Sequence[Sequence[float]]) -> Frontier:
        """Every best choice, exactly.

        Sizes are whole numbers of a common unit, so that for each total there is one cheapest way to it, and the
        cheapest of ``n`` sites follows from that of ``n - 1``. A choice that is not on the convex hull is found as
        well, which a greedy walk by cost per byte would step over.

        Args:
            sizes: of each candidate, the same at every site.
            costs: of each candidate at each site, ``[sites][candidates]``; not finite: never to be chosen. Those of
                the chosen add up.

        Raises:
            ValueError: a site without a candidate to choose.
        """
        smallest = min(sizes)
        unit = math.gcd(*(size - smallest for size in sizes)) or 1
        steps = np.array([(size - smallest) // unit for size in sizes])
        cheapest = np.zeros(1)
        choices = []
        for number, row in enumerate(costs):
            if not any(map(math.isfinite, row)):
                raise ValueError(f"site {number} has no candidate of finite cost")
            extended = np.full(len(cheapest) + steps.max(), np.inf)
            choice = np.zeros(len(extended), dtype=np.uint8)
            for candidate, (step, cost) in enumerate(zip(steps, row, strict=True)):
                if math.isfinite(cost):
                    reached = slice(step, step + len(cheapest))
                    better = cheapest + cost < extended[reached]
                    extended[reached][better] = (cheapest + cost)[better]
                    choice[reached][better] = candidate
            cheapest = extended
            choices.append(choice)
        before = np.minimum.accumulate(np.concatenate([[np.inf], cheapest[:-1]]))
        points = np.nonzero(cheapest < before)[0]
        return cls(len(costs) * smallest + unit * points, cheapest[points], steps, points, choices)

    def __len__(self) -> int:
        return len(self.sizes)

    def within(self, limit: float) -> int:
        """The smallest point that costs at most ``limit``; the last one if none does."""
        return min(int(np.searchsorted(-self.costs, -limit)), len(self) - 1)

    def choice(self, point: int) -> list[int]:
        """The candidate of each site at a point."""
        at = int(self._points[point])
        chosen = []
        for choice in reversed(self._choices):
            chosen.append(int(choice[at]))
            at -= int(self._steps[chosen[-1]])
        return chosen[::-1]


def close_in(
    frontier: Frontier, load: Callable[[int], float], limit: float, *, finest: int = 0, go_on: Callable[[], bool]
) -> None:
    """Try points of a frontier, ever closer to the smallest one whose load is at most 1.

    Loads grow with costs in proportion, roughly: the next try is where the line through the last good point and the
    last bad one says 1. The last point of the frontier counts as good without a try.

    Args:
        load: tries a point: how much of what is allowed it uses; not finite: too much.
        limit: the cost that is expected to use all of it; where to begin.
        finest: a difference in size that is not worth another try.
        go_on: asked before each try.
    """
    good, bad = len(frontier) - 1, -1
    good_load, bad_load = 0.0, math.inf
    while bad + 1 < good and frontier.sizes[good] - frontier.sizes[bad + 1] >= finest and go_on():
        point = min(max(frontier.within(limit), bad + 1), good - 1)
        tried = load(point)
        if tried <= 1:
            good, good_load = point, tried
        else:
            bad, bad_load = point, tried
        start = float(frontier.costs[good])
        if bad < 0:
            limit = start * (min(4.0, 1 / good_load) if good_load > 0 else 4.0)
        else:
            share = (1 - good_load) / (bad_load - good_load)
            limit = start + min(max(share, 0.1), 0.9) * (float(frontier.costs[bad]) - start)


def communication(allocation: Allocation) -> dict[str, Any]:
    """``codec`` and ``rules`` of a ``communication`` section that says ``allocation``, as JSON-able data.

    The codec of most sites is the section's, each other one has rules. Every site has a layer and a module.
    """
    usual = Counter(allocation.values()).most_common(1)[0][0]
    modules = list(dict.fromkeys(site.module for site in allocation))
    every = {module: {site.layer for site in allocation if site.module == module} for module in modules}
    rules: list[dict[str, Any]] = []
    for codec in dict.fromkeys(codec for codec in allocation.values() if codec != usual):
        there = {
            module: {site.layer for site, own in allocation.items() if own == codec and site.module == module}
            for module in modules
        }
        alike = len({frozenset(layers) for layers in there.values()}) == 1
        for module, layers in there.items():
            if not layers or (alike and module != modules[0]):
                continue
            rule: dict[str, Any] = {} if layers == every[module] else {"layers": notation(layers)}
            rules.append({**rule, **({} if alike else {"module": module}), "codec": _spec(codec)})
    return {"codec": _spec(usual), "rules": rules} if rules else {"codec": _spec(usual)}


def written(codec: Codec) -> str | dict[str, Any]:
    """The shortest specification of a codec: a preset's name, with what differs from it."""
    names = (*codecs.presets(), *codecs.presets(static=True))
    differences = []
    for name in names:
        preset = codecs.get(name).spec
        if preset.keys() == codec.spec.keys() and preset["format"] == codec.spec["format"]:
            options = {key: value for key, value in codec.spec.items() if value != preset[key]}
            differences.append({"preset": name, **options})
    shortest: dict[str, Any] = min(differences, key=lambda spec: (len(spec), len(json.dumps(spec))))
    return shortest["preset"] if len(shortest) == 1 else shortest


def _spec(codec: Codec | None) -> str | dict[str, Any] | None:
    return None if codec is None else written(codec)


def notation(layers: Iterable[int | None]) -> str:
    """Layers as rules name them, None left out: "0,3,5-9"."""
    spans: list[list[int]] = []
    for layer in sorted({layer for layer in layers if layer is not None}):
        if spans and layer == spans[-1][1] + 1:
            spans[-1][1] = layer
        else:
            spans.append([layer, layer])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)
