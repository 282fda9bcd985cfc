"""Statistics of the partials at every site, gathered message by message, and the tables that follow from them.

A static codec with ranges from ``"minmax_ema"`` takes one pass over the text (arXiv 2411.07942), one with a range from
``"search"`` two more. Its row scales go by what the first pass saw. In the second, candidates for every scale are tried
on every value, as the codec would quantize it; in the third, those around the best of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields

import torch

from megacomp.codecs import StaticCodec
from megacomp.kernels import StaticFormat, StaticTables
from megacomp.kernels.scales import safe_reciprocal
from megacomp.kernels.static_format import BF16

__all__ = ["Statistics", "tables_of"]

SUM = "sum"
"""Who sends the sum of a message, beside the ranks "0", "1"..."""

EMA_RATE = 0.01
"""The weight of a new message's extremes in their running mean (arXiv 2411.07942)."""

CLIPS = tuple(2.0 ** (-index / 3) for index in range(13))
"""Where the search clips at first, relative to the largest value there can be: thirds of an octave down to a
sixteenth."""

REFINEMENTS = tuple(2.0 ** (index / 24) for index in range(-7, 8))
"""Then, relative to the best of those. Without it the small models at hand lost 0.1 to 0.3 dB at 4 bits: what clips
hardly anything errs by the square of its scale, and 12 % more scale is 1 dB."""

CPU_VALUES_AT_ONCE, VALUES_AT_ONCE = 2**17, 2**26
"""How many values every candidate is tried on before the next ones: 84 candidates on 4096 x 4096 values took one CPU
core 6.6 s all at once and 0.7 s in parts that stay in its cache. Elsewhere it bounds memory."""

QUIETEST = 0.01
"""A feature all but silent in the text counts as if it had this share of its site's root mean square, or the first
value it ever has would set the scale of its whole row."""


@dataclass
class Ranges:
    """What the first pass sees of one sender at one site; float64 ``[features]``.

    Attributes:
        low, high: running means of the extremes of each message; the first sets them.
        lowest, highest: the extremes over all.
        total, energy: sums of the values and of their squares, of ``rows`` rows, int64 ``[]``.
        weighted: sum of values by the scale of their row, and ``weights`` ``[]``, of the squares of these scales; the
            scale is the largest value of the row, each relative to its feature's root mean square in the message.
    """

    low: torch.Tensor
    high: torch.Tensor
    lowest: torch.Tensor
    highest: torch.Tensor
    total: torch.Tensor
    energy: torch.Tensor
    rows: torch.Tensor
    weighted: torch.Tensor
    weights: torch.Tensor

    @classmethod
    def of(cls, x: torch.Tensor) -> Ranges:
        """The ranges of one message ``x [rows, features]``."""
        lowest, highest = x.amin(0).double(), x.amax(0).double()
        rows = torch.tensor(len(x), device=x.device)
        values = x.double()
        energy = values.square().sum(0)
        scale = (values / _rms(energy, rows)).abs().amax(-1, keepdim=True)
        weighted, weights = (values * scale).sum(0), scale.square().sum()
        return cls(lowest, highest, lowest.clone(), highest.clone(), values.sum(0), energy, rows, weighted, weights)

    def add(self, x: torch.Tensor) -> None:
        """One message more."""
        other = Ranges.of(x)
        self.low = (1 - EMA_RATE) * self.low + EMA_RATE * other.low
        self.high = (1 - EMA_RATE) * self.high + EMA_RATE * other.high
        self.lowest = torch.minimum(self.lowest, other.lowest)
        self.highest = torch.maximum(self.highest, other.highest)
        self.total = self.total + other.total
        self.energy = self.energy + other.energy
        self.rows = self.rows + other.rows
        self.weighted = self.weighted + other.weighted
        self.weights = self.weights + other.weights

    @property
    def rms(self) -> torch.Tensor:
        """Root mean square per feature, none of them silent; positive."""
        return _rms(self.energy, self.rows)

    @property
    def extent(self) -> torch.Tensor:
        """The largest magnitude per feature, positive."""
        return torch.maximum(-self.lowest, self.highest).clamp(min=float(torch.finfo(torch.float32).tiny))


def _rms(energy: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    mean_square = energy / rows
    floor = QUIETEST**2 * mean_square.mean() + torch.finfo(torch.float32).tiny
    return mean_square.clamp(min=float(floor)).sqrt()


@dataclass
class Search:
    """Candidates for the scales of one sender at one site by one codec, and what they cost.

    There are kinds of candidates, and of each as many as there are factors.

    Attributes:
        scale, shift: float32 ``[kinds, features]``, those of factor 1.
        center: float32 ``[kinds, features]``; an offset is the center plus the shift.
        factors: float32 ``[factors]``, of scales and shifts.
        errors: float64 ``[factors, kinds, features]``, squared and summed.
    """

    scale: torch.Tensor
    shift: torch.Tensor
    center: torch.Tensor
    factors: torch.Tensor
    errors: torch.Tensor

    @classmethod
    def among(cls, scale: torch.Tensor, shift: torch.Tensor, center: torch.Tensor, factors: Sequence[float]) -> Search:
        """The candidates of these, none tried yet."""
        errors = torch.zeros(len(factors), *scale.shape, dtype=torch.float64, device=scale.device)
        tried = torch.tensor(factors, dtype=torch.float32, device=scale.device)
        return cls(scale.float(), shift.float(), center.float(), tried, errors)

    @classmethod
    def first(cls, format: StaticFormat, seen: Ranges) -> Search:
        """The first candidates, by what the first pass saw.

        Symmetric ones have a step at zero. Others have all steps half a step further, so that every one of an even
        number is of use: around zero, and around the mean, by which the small models at hand gained 0.1 to 0.6 dB.
        Divided by its row scale, no value exceeds its feature's root mean square.
        """
        width = seen.rms if format.row_scale else seen.extent
        zero = torch.zeros_like(width)
        symmetric = width / (format.zero_code - 1)
        if not format.asymmetric:
            return cls.among(symmetric[None], zero[None], zero[None], CLIPS)
        # Values count by their row scale, as their errors do.
        weights = seen.weights.clamp(min=torch.finfo(torch.float32).tiny)
        mean = seen.weighted / weights if format.row_scale else seen.total / seen.rows
        between = width / (format.zero_code - 0.5)
        return cls.among(
            torch.stack([symmetric, between, between]),
            torch.stack([zero, between / 2, between / 2]),
            torch.stack([zero, zero, mean]),
            CLIPS,
        )

    def refined(self) -> Search:
        """Others around the best of every kind."""
        factor = self.factors[self.errors.argmin(0)]
        return self.among(_positive(self.scale * factor), self.shift * factor, self.center, REFINEMENTS)

    def settled(self) -> Search:
        """The best alone."""
        scale, offset, error = self.best
        return Search(
            scale[None], torch.zeros_like(scale)[None], offset[None], self.factors.new_ones(1), error[None, None]
        )

    @property
    def best(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Scale, offset and error ``[features]`` of the best candidate of every feature."""
        errors = self.errors.flatten(0, 1)
        best = errors.argmin(0)
        kind = (best % len(self.scale))[None]
        scale, offset = self._candidate(
            self.factors[best // len(self.scale)],
            *(table.gather(0, kind)[0] for table in (self.scale, self.shift, self.center)),
        )
        return scale, offset, errors.gather(0, best[None])[0]

    @staticmethod
    def _candidate(
        factor: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, center: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(scale, offset) in float32, as the tables will have it: what is tried is what will be."""
        return _positive(scale * factor), center + shift * factor

    def add(self, format: StaticFormat, seen: Ranges, x: torch.Tensor) -> None:
        """Try every candidate on ``x [rows, features]`` float32."""
        rows = max(1, (CPU_VALUES_AT_ONCE if x.device.type == "cpu" else VALUES_AT_ONCE) // x.shape[1])
        for part in x.split(rows):
            self._add(format, seen, part)

    def _add(self, format: StaticFormat, seen: Ranges, x: torch.Tensor) -> None:
        values, row_scale = x, None
        if format.row_scale:
            largest = (x.abs() * (1 / seen.rms).float()).amax(-1, keepdim=True)
            row_scale = BF16.value(BF16.round(largest))
            values = x * safe_reciprocal(row_scale)
        zero = float(format.zero_code)
        for factor, errors in zip(self.factors, self.errors, strict=True):
            for *kind, error in zip(self.scale, self.shift, self.center, errors, strict=True):
                scale, offset = self._candidate(factor, *kind)
                step = ((values - offset) / scale).round_().clamp_(-zero, zero - 1)
                decoded = step.mul_(scale).add_(offset)
                if row_scale is not None:
                    decoded = decoded.mul_(row_scale)
                error += decoded.sub_(x).square_().sum(0, dtype=torch.float64)


class Statistics:
    """An observer (megacomp.observe) that gathers what static codecs need to know.

    Call :meth:`next_pass` between passes over the text, ``passes`` of them, :meth:`finish` after the last, then
    :meth:`merge` what other processes saw, then :func:`tables_of`.

    Attributes:
        sites: the names of those that anything came from.
        skipped_rows: rows left out for a NaN or Inf in their sum, in the first pass.
    """

    def __init__(self, codecs: Iterable[StaticCodec]) -> None:
        """codecs: those to calibrate."""
        self.codecs = tuple(codecs)
        self.world_size = 0
        self.sites: dict[str, None] = {}
        self.skipped_rows = 0
        self._pass = 0
        # By site, sender and, of a search, codec.
        self._ranges: dict[tuple[str, str], Ranges] = {}
        self._searches: dict[tuple[str, str, str], Search] = {}

    @property
    def passes(self) -> int:
        """How often the text has to be run."""
        return 3 if any(_searches(codec) for codec in self.codecs) else 1

    def next_pass(self) -> None:
        """From now on the text is run for another time."""
        self._pass += 1
        self._searches = {key: search.refined() for key, search in self._searches.items()}

    def finish(self) -> None:
        """There is no further pass: of everything that was tried, the best is enough."""
        self._searches = {key: search.settled() for key, search in self._searches.items()}

    def partial(self, site: object, rank: int, world_size: int, x: torch.Tensor) -> None:
        """One rank's partial ``x [rows, features]`` at ``site`` (of a ``name``)."""
        self.world_size = world_size
        self._see(site.name, str(rank), x)  # type: ignore[attr-defined]

    def total(self, site: object, x: torch.Tensor) -> None:
        """The sum of a message."""
        self._see(site.name, SUM, x)  # type: ignore[attr-defined]

    def _see(self, site: str, sender: str, x: torch.Tensor) -> None:
        x = x.float()
        self.sites.setdefault(site)
        finite = x.isfinite().all(-1)
        if not bool(finite.all()):
            if sender == SUM and self._pass == 0:
                self.skipped_rows += int((~finite).sum())
            x = x[finite]
        if not len(x):
            return
        ranges = self._ranges.get((site, sender))
        if self._pass == 0:
            if ranges is None:
                self._ranges[site, sender] = Ranges.of(x)
            else:
                ranges.add(x)
            return
        if ranges is None:
            return  # what the first pass did not see has no ranges to search
        for codec in filter(_searches, self.codecs):
            key = (site, sender, codec.name)
            if key not in self._searches:
                self._searches[key] = Search.first(codec.format, ranges)
            self._searches[key].add(codec.format, ranges, x)

    def state(self) -> dict[str, torch.Tensor]:
        """All of it, by name, on the CPU: for a file, or for another process."""
        tensors = {
            "/".join((*key, field.name)): getattr(gathered, field.name).cpu()
            for key, gathered in (*self._ranges.items(), *self._searches.items())
            for field in fields(gathered)  # type: ignore[arg-type]  # Ranges or Search
        }
        return {**tensors, "counts": torch.tensor([self.world_size, self.skipped_rows, self._pass], device="cpu")}

    def merge(self, state: Mapping[str, torch.Tensor], device: torch.device | str = "cpu") -> None:
        """Takes over a :meth:`state`, in place of what is known of the same senders."""
        found: dict[tuple[str, ...], dict[str, torch.Tensor]] = {}
        for name, tensor in state.items():
            if name == "counts":
                self.world_size, self.skipped_rows, self._pass = tensor.tolist()
            else:
                *key, what = name.split("/")
                found.setdefault(tuple(key), {})[what] = tensor.to(device)
        for (site, sender, *codec), tensors in found.items():
            self.sites.setdefault(site)
            if codec:
                self._searches[site, sender, codec[0]] = Search(**tensors)
            else:
                self._ranges[site, sender] = Ranges(**tensors)

    @property
    def unseen(self) -> tuple[tuple[str, str], ...]:
        """(site, sender) of those who had no row without a NaN or Inf: there are no tables for such a site."""
        senders = [*map(str, range(self.world_size)), SUM]
        return tuple((site, sender) for site in self.sites for sender in senders if (site, sender) not in self._ranges)

    def ranges(self, site: str, sender: int | str) -> Ranges:
        """What the first pass saw of a rank, or of the sum (``"sum"``), at a site."""
        return self._ranges[site, str(sender)]

    def search(self, site: str, sender: int | str, codec: StaticCodec) -> Search:
        """How far the search of a codec's scales has come."""
        return self._searches[site, str(sender), codec.name]


def tables_of(statistics: Statistics, codec: StaticCodec, site: str) -> tuple[StaticTables, StaticTables]:
    """The tables of ``codec`` at ``site``: of the partials of every rank, and of their sum."""
    ranks = [str(rank) for rank in range(statistics.world_size)]
    return _tables(statistics, codec, site, ranks), _tables(statistics, codec, site, [SUM])


def _tables(statistics: Statistics, codec: StaticCodec, site: str, senders: Sequence[str]) -> StaticTables:
    format = codec.format
    ranges = [statistics.ranges(site, sender) for sender in senders]
    if _searches(codec):
        found = [statistics.search(site, sender, codec).best for sender in senders]
        # Those features keep BF16 whose codes would err the most.
        scales, offsets, errors = map(list, zip(*found, strict=True))
        score = sum(errors)
    else:
        scales, offsets = map(list, zip(*(_min_max(format, seen) for seen in ranges), strict=True))
        score = sum(2 * torch.maximum(seen.low.abs(), seen.high.abs()) for seen in ranges)
    assert isinstance(score, torch.Tensor)
    outliers = format.outliers(len(score))
    kept = score.sort(descending=True, stable=True).indices[:outliers].sort().values

    def table(rows: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.stack(list(rows)).float().cpu()

    return StaticTables(
        table(scales),
        table(offsets) if format.asymmetric else None,
        table([1 / seen.rms for seen in ranges]) if format.row_scale else None,
        kept.cpu(),
    )


def _searches(codec: StaticCodec) -> bool:
    return codec.spec["range"] == "search"


def _min_max(format: StaticFormat, seen: Ranges) -> tuple[torch.Tensor, torch.Tensor]:
    """(scale, offset) float64 ``[features]`` that cover the running extremes."""
    if not format.asymmetric:
        largest = torch.maximum(seen.low.abs(), seen.high.abs())
        return _positive(largest / (format.zero_code - 1)), torch.zeros_like(largest)
    scale = _positive((seen.high - seen.low) / (2**format.bits - 1))
    return scale, seen.low + format.zero_code * scale


def _positive(scale: torch.Tensor) -> torch.Tensor:
    return scale.clamp(min=torch.finfo(torch.float32).tiny)
