"""Statistics of the partials at every site, gathered message by message, and the tables that follow from them.

A static codec with ranges from ``"minmax_ema"`` takes one pass over the text (arXiv 2411.07942), one with a range from
``"search"`` a second: its row scales go by what the first pass saw, and every candidate for a scale is tried on every
value, as the codec would quantize it.
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
"""Where the search clips, relative to the largest value there can be: thirds of an octave down to a sixteenth. A
scale that is off by the half of one costs 0.1 dB at most."""

QUIETEST = 0.01
"""A feature all but silent in the text counts as if it had this share of its site's root mean square, or the first
value it ever has would set the scale of its whole row."""


@dataclass
class Ranges:
    """What the first pass sees of one sender at one site; float64 ``[features]``.

    Attributes:
        low, high: running means of the extremes of each message; the first sets them.
        lowest, highest: the extremes over all.
        energy: sum of squares, of ``rows`` rows, int64 ``[]``.
    """

    low: torch.Tensor
    high: torch.Tensor
    lowest: torch.Tensor
    highest: torch.Tensor
    energy: torch.Tensor
    rows: torch.Tensor

    @classmethod
    def of(cls, x: torch.Tensor) -> Ranges:
        """The ranges of one message ``x [rows, features]``."""
        lowest, highest = x.amin(0).double(), x.amax(0).double()
        rows = torch.tensor(len(x), device=x.device)
        return cls(lowest, highest, lowest.clone(), highest.clone(), x.double().square().sum(0), rows)

    def add(self, x: torch.Tensor) -> None:
        """One message more."""
        other = Ranges.of(x)
        self.low = (1 - EMA_RATE) * self.low + EMA_RATE * other.low
        self.high = (1 - EMA_RATE) * self.high + EMA_RATE * other.high
        self.lowest = torch.minimum(self.lowest, other.lowest)
        self.highest = torch.maximum(self.highest, other.highest)
        self.energy = self.energy + other.energy
        self.rows = self.rows + other.rows

    @property
    def rms(self) -> torch.Tensor:
        """Root mean square per feature, none of them silent; positive."""
        mean_square = self.energy / self.rows
        floor = QUIETEST**2 * mean_square.mean() + torch.finfo(torch.float32).tiny
        return mean_square.clamp(min=float(floor)).sqrt()

    @property
    def extent(self) -> torch.Tensor:
        """The largest magnitude per feature, positive."""
        return torch.maximum(-self.lowest, self.highest).clamp(min=float(torch.finfo(torch.float32).tiny))


class Statistics:
    """An observer (megacomp.observe) that gathers what static codecs need to know.

    Call :meth:`next_pass` after each pass over the text, ``passes`` of them, then :meth:`merge` what other processes
    saw, then :func:`tables_of`.
    """

    def __init__(self, codecs: Iterable[StaticCodec]) -> None:
        """codecs: those to calibrate."""
        self.codecs = tuple(codecs)
        self.world_size = 0
        self.sites: dict[str, None] = {}
        self.skipped_rows = 0
        self._second_pass = False
        # By site, sender and, of errors, codec.
        self._ranges: dict[tuple[str, str], Ranges] = {}
        self._errors: dict[tuple[str, str, str], torch.Tensor] = {}

    @property
    def passes(self) -> int:
        """How often the text has to be run."""
        return 2 if any(_searches(codec) for codec in self.codecs) else 1

    def next_pass(self) -> None:
        """From now on the text is run for the second time."""
        self._second_pass = True

    def partial(self, site: object, rank: int, world_size: int, x: torch.Tensor) -> None:
        """One rank's partial ``x [rows, features]`` at ``site`` (of a ``name``)."""
        self.world_size = world_size
        self._see(site.name, str(rank), x)  # type: ignore[attr-defined]

    def total(self, site: object, x: torch.Tensor) -> None:
        """The sum of a message."""
        self._see(site.name, SUM, x)  # type: ignore[attr-defined]

    def _see(self, site: str, sender: str, x: torch.Tensor) -> None:
        x = x.float()
        finite = x.isfinite().all(-1)
        if not bool(finite.all()):
            self.skipped_rows += int((~finite).sum())
            x = x[finite]
        if not len(x):
            return
        self.sites.setdefault(site)
        ranges = self._ranges.get((site, sender))
        if not self._second_pass:
            if ranges is None:
                self._ranges[site, sender] = Ranges.of(x)
            else:
                ranges.add(x)
            return
        if ranges is None:
            return  # a site that the first pass did not come to has no ranges to search
        for codec in filter(_searches, self.codecs):
            errors = _errors(codec.format, ranges, x)
            key = (site, sender, codec.name)
            self._errors[key] = self._errors[key] + errors if key in self._errors else errors

    def state(self) -> dict[str, torch.Tensor]:
        """All of it, by name, on the CPU: for a file, or for another process."""
        tensors = {
            f"{site}/{sender}/{field.name}": getattr(ranges, field.name).cpu()
            for (site, sender), ranges in self._ranges.items()
            for field in fields(ranges)
        }
        tensors |= {f"{'/'.join(key)}/errors": errors.cpu() for key, errors in self._errors.items()}
        counts = [self.world_size, self.skipped_rows, int(self._second_pass)]
        return {**tensors, "counts": torch.tensor(counts)}

    def merge(self, state: Mapping[str, torch.Tensor], device: torch.device | str = "cpu") -> None:
        """Takes over a :meth:`state`, in place of what is known of the same senders."""
        names: dict[tuple[str, str], dict[str, torch.Tensor]] = {}
        for name, tensor in state.items():
            if name == "counts":
                self.world_size, self.skipped_rows, second = tensor.tolist()
                self._second_pass = bool(second)
                continue
            site, sender, *codec, what = name.split("/")
            self.sites.setdefault(site)
            if codec:
                self._errors[site, sender, codec[0]] = tensor.to(device)
            else:
                names.setdefault((site, sender), {})[what] = tensor.to(device)
        self._ranges |= {key: Ranges(**tensors) for key, tensors in names.items()}

    def ranges(self, site: str, sender: int | str) -> Ranges:
        """What the first pass saw of a rank, or of the sum (``"sum"``), at a site."""
        return self._ranges[site, str(sender)]

    def errors(self, site: str, sender: int | str, codec: StaticCodec) -> torch.Tensor:
        """Squared errors of the second pass, float64 ``[candidates, features]``."""
        return self._errors[site, str(sender), codec.name]


def tables_of(statistics: Statistics, codec: StaticCodec, site: str) -> tuple[StaticTables, StaticTables]:
    """The tables of ``codec`` at ``site``: of the partials of every rank, and of their sum."""
    ranks = [str(rank) for rank in range(statistics.world_size)]
    return _tables(statistics, codec, site, ranks), _tables(statistics, codec, site, [SUM])


def _tables(statistics: Statistics, codec: StaticCodec, site: str, senders: Sequence[str]) -> StaticTables:
    format = codec.format
    ranges = [statistics.ranges(site, sender) for sender in senders]
    if _searches(codec):
        errors = [statistics.errors(site, sender, codec) for sender in senders]
        chosen = [table.argmin(0) for table in errors]
        scales, offsets = [], []
        for seen, best in zip(ranges, chosen, strict=True):
            steps, candidates = _candidates(format, seen)
            scales.append(steps.gather(0, best[None])[0])
            offsets.append(candidates.gather(0, best[None])[0])
        # Those features keep BF16 whose codes would err the most.
        score = sum(table.gather(0, best[None])[0] for table, best in zip(errors, chosen, strict=True))
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
        return _positive(largest / (format.zero_code - 1 or 1)), torch.zeros_like(largest)
    scale = _positive((seen.high - seen.low) / (2**format.bits - 1))
    return scale, seen.low + format.zero_code * scale


def _candidates(format: StaticFormat, seen: Ranges) -> tuple[torch.Tensor, torch.Tensor]:
    """(scales, offsets) float64 ``[candidates, features]`` to choose from.

    Symmetric ones have a step at zero. With offsets, as many have all steps half a step further, so that every one
    of an even number is of use. Divided by its row scale, no value exceeds its feature's root mean square.
    """
    widths = (seen.rms if format.row_scale else seen.extent) * torch.tensor(CLIPS, device=seen.energy.device)[:, None]
    scales = _positive(widths / (format.zero_code - 1 or 1))
    if not format.asymmetric:
        return scales, torch.zeros_like(scales)
    between = _positive(widths / (format.zero_code - 0.5))
    # In float32, as the tables have them: what is tried is what will be.
    return torch.cat([scales, between]).float(), torch.cat([torch.zeros_like(scales), between / 2]).float()


def _positive(scale: torch.Tensor) -> torch.Tensor:
    return scale.clamp(min=torch.finfo(torch.float32).tiny)


def _errors(format: StaticFormat, seen: Ranges, x: torch.Tensor) -> torch.Tensor:
    """Squared errors of every candidate on ``x [rows, features]`` float32, float64 ``[candidates, features]``."""
    values, row_scale = x, None
    if format.row_scale:
        largest = (x.abs() * (1 / seen.rms).float()).amax(-1, keepdim=True)
        row_scale = BF16.value(BF16.round(largest))
        values = x * safe_reciprocal(row_scale)
    zero = float(format.zero_code)
    errors = []
    for scale, offset in zip(*(table.float() for table in _candidates(format, seen)), strict=True):
        step = ((values - offset) / scale).round_().clamp_(-zero, zero - 1)
        decoded = step.mul_(scale).add_(offset)
        if row_scale is not None:
            decoded = decoded.mul_(row_scale)
        errors.append(decoded.sub_(x).square_().sum(0, dtype=torch.float64))
    return torch.stack(errors)
