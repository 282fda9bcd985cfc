"""What the partials of a model look like, where their outliers are, and how much of their sum each codec keeps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import megacomp
from megacomp.calibration import Calibration, Statistics
from megacomp.codecs import Codec, StaticCodec
from megacomp.collectives import Route, all_reduce, simulated_all_reduce
from megacomp.launch.calibration import calibrate
from megacomp.launch.engines import Engine
from megacomp.launch.errors import LaunchError
from megacomp.launch.files import check_figure, write_figure
from megacomp.policy import Site
from megacomp.telemetry import sqnr_db

__all__ = ["Inspection", "OutlierFeature", "SiteInspection", "inspect", "plot"]

OUTLIERS_NAMED = 5
"""How many features of each site are named."""

LARGEST_SHARE = 0.01
"""A feature stands out in a token if it is among this share of its row's largest magnitudes."""

COMPARED_SHARE = 1 / 64
"""So many of each rank's features, those of largest range, are compared with other ranks': what arXiv 2411.07942
keeps."""

_COLUMNS = 512
"""As many features of a heat map as can be told apart; neighbours beyond share a column, which has their maximum."""


@dataclass(frozen=True)
class OutlierFeature:
    """One of a site's features of largest range.

    feature: its index. range: its largest magnitude over all tokens, added up over the ranks.
    token_share: the share of tokens, mean over the ranks, in which it is among the largest 1 % of its row.
    """

    feature: int
    range: float
    token_share: float


@dataclass(frozen=True)
class SiteInspection:
    """The partials of one site, rows with a NaN or Inf left out.

    rows: tokens. skipped_rows: those of them whose sum has a NaN or Inf.
    range_max, range_median: over the features; see `OutlierFeature.range`.
    rank_range_max: the largest magnitude in each rank's partials.
    kurtosis: of all values; 3 for a normal distribution. None if all are equal.
    norm_spread: 99th percentile over median of the norms of a rank's rows, within 2.2 %; of the rank where it is
        largest. None if half of the rows are zero.
    outliers: the features of largest range, the largest first.
    rank_overlap: of the 1/64 of the features that have the largest ranges on a rank, the share that are so on
        another, mean over all pairs of ranks; 1/64 by chance.
    sqnr_db: by codec, the energy of the sum over that of its error if partials are encoded once (one-shot), in dB;
        None if there is no error.
    """

    rows: int
    skipped_rows: int
    range_max: float
    range_median: float
    rank_range_max: tuple[float, ...]
    kurtosis: float | None
    norm_spread: float | None
    outliers: tuple[OutlierFeature, ...]
    rank_overlap: float
    sqnr_db: dict[str, float | None]


@dataclass(frozen=True, eq=False)
class Inspection:
    """The sites of a model, in the order in which a token comes to them.

    engine, tp, dtype: what ran. simulated: whether one process took the part of all ranks.
    sequences, length: the tokens that all figures are of.
    calibration_sequences: the others, that static codecs were calibrated on.
    features: values per row, the hidden size.
    bits_per_value: of each codec. mean_sqnr_db: of each codec, mean over the sites.
    sites: by name.
    ranges: float32 [sites, ranks, features], the largest magnitudes; not in `to_dict`.
    """

    engine: str
    tp: int
    simulated: bool
    dtype: str
    sequences: int
    length: int
    calibration_sequences: int
    features: int
    bits_per_value: dict[str, float]
    mean_sqnr_db: dict[str, float | None]
    sites: dict[str, SiteInspection]
    ranges: torch.Tensor

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-able data."""
        sites = {name: asdict(site) for name, site in self.sites.items()}
        return {name: value for name, value in vars(self).items() if name != "ranges"} | {"sites": sites}


def inspect(
    engine: Engine,
    tokens: torch.Tensor,
    codecs: Sequence[Codec] = (),
    *,
    batch_size: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> Inspection:
    """Run `tokens` through the uncompressed model and look at what every site reduces.

    Every rank calls this with the same arguments and gets the same result.

    tokens: int64 [sequences, length]. codecs: those to judge. If any is static, the first half of the sequences
    serves to calibrate it, and what is reported is about the rest.
    batch_size: sequences per forward. Memory is that of running totals and of one message of all ranks in this
    process.
    progress: called with (sequences done, sequences to do), counting every pass.

    Raises ValueError for a model without tensor-parallel reductions, LaunchError for a single sequence and a static
    codec, and what `calibrate` raises.
    """
    static = [codec for codec in codecs if isinstance(codec, StaticCodec)]
    calibration = None
    first = len(tokens) // 2 if static else 0
    before = first * Statistics(static).passes
    everything = before + len(tokens) - first

    def report(done: int) -> None:
        if progress is not None:
            progress(done, everything)

    if static:
        if not first:
            raise LaunchError("a static codec is calibrated on half of the sequences and judged on the rest: give two")
        calibration = calibrate(
            engine, tokens[:first], static, "", batch_size=batch_size, progress=lambda done, _: report(done)
        )
    judged = tokens[first:]
    inspector = _Inspector(codecs, calibration, engine)
    with megacomp.observe(engine.module, inspector):
        for start in range(0, len(judged), batch_size):
            batch = judged[start : start + batch_size]
            engine.logits(batch)
            report(before + start + len(batch))
    partials, sums = inspector.gather()
    if not sums:
        raise ValueError("the model has no site that reduces among ranks")
    sites = {
        name: _site([partials[name, rank] for rank in range(engine.tp)], seen, [str(codec) for codec in codecs])
        for name, seen in sums.items()
    }
    ranges = [torch.stack([partials[name, rank].ranges for rank in range(engine.tp)]) for name in sites]
    features = ranges[0].shape[1]
    return Inspection(
        engine=engine.name,
        tp=engine.tp,
        simulated=engine.simulated,
        dtype=str(engine.dtype).removeprefix("torch."),
        sequences=len(judged),
        length=tokens.shape[1],
        calibration_sequences=first,
        features=features,
        bits_per_value={str(codec): codec.bits_per_value(features) for codec in codecs},
        mean_sqnr_db={str(codec): _mean([site.sqnr_db[str(codec)] for site in sites.values()]) for codec in codecs},
        sites=sites,
        ranges=torch.stack(ranges),
    )


class _Partials:
    """Running totals of one rank's partials at one site, on their device.

    ranges: float32 [features], the largest magnitudes.
    powers: float64 [4], the sums of all values to the power of 1 to 4.
    norms: int64 [bins], rows by their norm.
    largest: int64 [features], the rows in which a feature is among the largest.
    """

    # Of norms: the middle of a bin is within 1.1 % of what is in it. From float32's smallest number to beyond the norm
    # of a million of its largest.
    BINS_PER_OCTAVE, LOWEST_OCTAVE, OCTAVES = 32, -150, 290

    def __init__(self, features: int, device: torch.device) -> None:
        self.rows = 0
        self.ranges = torch.zeros(features, device=device)
        self.powers = torch.zeros(4, dtype=torch.float64, device=device)
        self.norms = torch.zeros(self.OCTAVES * self.BINS_PER_OCTAVE, dtype=torch.int64, device=device)
        self.largest = torch.zeros(features, dtype=torch.int64, device=device)

    def add(self, x: torch.Tensor) -> None:
        """One message `x` [rows, features] more."""
        values = x[x.isfinite().all(-1)].double()
        if not len(values):
            return
        self.rows += len(values)
        magnitudes = values.abs()
        self.ranges = torch.maximum(self.ranges, magnitudes.amax(0).float())
        squares = values.square()
        self.powers += torch.stack(
            [values.sum(), squares.sum(), (squares * values).sum(), squares.square().sum()],
        )
        octaves = squares.sum(-1).sqrt().log2() - self.LOWEST_OCTAVE
        bins = (octaves * self.BINS_PER_OCTAVE).clamp(0, len(self.norms) - 1).long()
        self.norms += bins.bincount(minlength=len(self.norms))
        features = values.shape[1]
        top = magnitudes.topk(max(1, round(LARGEST_SHARE * features)))
        self.largest += top.indices[top.values > 0].bincount(minlength=features)

    def norm(self, quantile: float) -> float:
        """That quantile of the norms; 0 if it is a row of zeros."""
        index = int((self.norms.cumsum(0) >= quantile * self.rows).nonzero()[0])
        return 2 ** ((index + 0.5) / self.BINS_PER_OCTAVE + self.LOWEST_OCTAVE) if index else 0.0

    def cpu(self) -> _Partials:
        """Itself, on the CPU."""
        for name in ("ranges", "powers", "norms", "largest"):
            setattr(self, name, getattr(self, name).cpu())
        return self


class _Sums:
    """Running totals of the sums at one site.

    signal, noise: float64 [], the energy of the exact sums, and that of each codec's errors.
    """

    def __init__(self, device: torch.device) -> None:
        self.rows = self.skipped_rows = 0
        self.signal = torch.zeros((), dtype=torch.float64, device=device)
        self.noise: dict[str, torch.Tensor] = {}

    def add(self, exact: torch.Tensor, results: Mapping[str, torch.Tensor]) -> None:
        """One message [rows, features] more: the exact sums in float32, and what became of them by each codec."""
        finite = exact.isfinite().all(-1)
        exact = exact[finite].double()
        self.rows += len(finite)
        self.skipped_rows += len(finite) - len(exact)
        self.signal += exact.square().sum()
        for name, result in results.items():
            noise = (result[finite].double() - exact).square().sum()
            self.noise[name] = self.noise[name] + noise if name in self.noise else noise

    def sqnr_db(self, codec: str) -> float | None:
        """Of one codec; None without a signal, or an error."""
        return sqnr_db(self.signal.item(), self.noise[codec].item())


class _Inspector:
    """An observer (megacomp.observe): keeps the totals of what this process holds, and tries every codec on it."""

    def __init__(self, codecs: Sequence[Codec], calibration: Calibration | None, engine: Engine) -> None:
        self._codecs = codecs
        self._calibration = calibration
        self._engine = engine
        self._partials: dict[tuple[str, int], _Partials] = {}
        self._sums: dict[str, _Sums] = {}
        self._routes: dict[str, dict[str, Route]] = {}
        self._message: list[torch.Tensor] = []

    def partial(self, site: Site, rank: int, world_size: int, x: torch.Tensor) -> None:
        if (site.name, rank) not in self._partials:
            self._partials[site.name, rank] = _Partials(x.shape[1], x.device)
        self._partials[site.name, rank].add(x)
        if self._codecs:
            self._message.append(x.clone())

    def total(self, site: Site, x: torch.Tensor) -> None:
        if site.name not in self._sums:
            self._sums[site.name] = _Sums(x.device)
            self._routes[site.name] = {str(codec): self._route(codec, site) for codec in self._codecs}
        results = {name: self._reduced(route) for name, route in self._routes[site.name].items()}
        self._message.clear()
        self._sums[site.name].add(x, results)

    def _route(self, codec: Codec, site: Site) -> Route:
        if isinstance(codec, StaticCodec):
            assert self._calibration is not None
            codec = self._calibration.codec(codec, site.name)
        return Route(codec, algorithm="one_shot")

    def _reduced(self, route: Route) -> torch.Tensor:
        """What the collective would make of the message; with real ranks the others are here as well."""
        if self._engine.simulated:
            return simulated_all_reduce(self._message, route)
        return all_reduce(self._message[0], self._engine.group, route)

    def gather(self) -> tuple[dict[tuple[str, int], _Partials], dict[str, _Sums]]:
        """The totals of every rank, and those of the sums, which each process has."""
        mine = {key: seen.cpu() for key, seen in self._partials.items()}
        if self._engine.simulated:
            return mine, self._sums
        told: list[Any] = [None] * dist.get_world_size(self._engine.group)
        dist.all_gather_object(told, mine, self._engine.group)
        return {key: seen for theirs in told for key, seen in theirs.items()}, self._sums


def _site(ranks: Sequence[_Partials], sums: _Sums, codecs: Sequence[str]) -> SiteInspection:
    ranges = torch.stack([rank.ranges for rank in ranks]).double()
    combined = ranges.sum(0)
    rows = sum(rank.rows for rank in ranks)
    shares = torch.stack([rank.largest for rank in ranks]).sum(0) / max(1, rows)
    outliers = combined.sort(descending=True, stable=True).indices[:OUTLIERS_NAMED].tolist()
    spreads = [rank.norm(0.99) / median for rank in ranks if rank.rows and (median := rank.norm(0.5))]
    return SiteInspection(
        rows=sums.rows,
        skipped_rows=sums.skipped_rows,
        range_max=combined.max().item(),
        range_median=_median(combined),
        rank_range_max=tuple(ranges.amax(1).tolist()),
        kurtosis=_kurtosis(torch.stack([rank.powers for rank in ranks]).sum(0), rows * len(combined)),
        norm_spread=max(spreads, default=None),
        outliers=tuple(OutlierFeature(index, combined[index].item(), shares[index].item()) for index in outliers),
        rank_overlap=_overlap(ranges),
        sqnr_db={codec: sums.sqnr_db(codec) for codec in codecs},
    )


def _median(values: torch.Tensor) -> float:
    return values.quantile(0.5).item()


def _kurtosis(powers: torch.Tensor, count: int) -> float | None:
    """The fourth standardized moment of `count` values, from the sums of their powers."""
    if not count:
        return None
    mean, second, third, fourth = (powers / count).tolist()
    variance = second - mean**2
    central = fourth - 4 * mean * third + 6 * mean**2 * second - 3 * mean**4
    return central / variance**2 if variance > 0 else None


def _overlap(ranges: torch.Tensor) -> float:
    """Mean share that two ranks' sets of features of largest range have in common; ranges [ranks, features]."""
    ranks, features = ranges.shape
    count = max(1, int(COMPARED_SHARE * features))
    chosen = torch.zeros_like(ranges).scatter_(1, ranges.topk(count).indices, 1.0)
    common = chosen @ chosen.T
    return ((common.sum() - common.trace()) / (ranks * (ranks - 1) * count)).item()


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def plot(inspection: Inspection, path: Path) -> None:
    """Draw a heat map of the ranges: where each site's outliers are, how many, and on which ranks.

    Raises LaunchError as `files.check_figure` does.
    """
    check_figure(path)
    import matplotlib
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    ranges = inspection.ranges.double()
    combined = ranges.sum(1)
    median = combined.quantile(0.5, dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    relative = combined / median
    columns = min(_COLUMNS, inspection.features)
    in_order = torch.stack([part.amax(1) for part in relative.tensor_split(columns, dim=1)], dim=1)
    by_range = relative.sort(dim=1, descending=True).values
    # As if every rank were like this one.
    by_rank = ranges.amax(2) * inspection.tp / median

    figure = Figure(figsize=(13, min(30.0, 2.2 + 0.22 * len(ranges))), layout="constrained")
    axes = figure.subplots(1, 3, sharey=True, width_ratios=(5, 4, max(1.0, min(3.0, 0.35 * inspection.tp))))
    colours: Any = {
        "norm": LogNorm(vmin=0.5, vmax=max(10.0, relative.max().item(), by_rank.max().item())),
        "cmap": matplotlib.colormaps["inferno"],
    }
    edges = torch.arange(len(ranges) + 1) - 0.5
    bounds = torch.linspace(0, inspection.features, columns + 1)
    axes[0].pcolormesh(bounds, edges, in_order, **colours)
    axes[0].set(title="features in their order: shared by sites?", xlabel="feature")
    axes[1].pcolormesh(torch.arange(inspection.features + 1) + 1, edges, by_range, **colours)
    axes[1].set(title="features by range: how many stand out?", xlabel="features, largest range first", xscale="log")
    drawn = axes[2].pcolormesh(torch.arange(inspection.tp + 1) - 0.5, edges, by_rank, **colours)
    axes[2].set(title="by rank", xlabel="rank", xticks=range(inspection.tp))
    axes[1].xaxis.set_major_formatter("{x:g}")
    every = -(-len(ranges) // 100)
    axes[0].set(yticks=range(0, len(ranges), every), ylim=(len(ranges) - 0.5, -0.5))
    axes[0].set_yticklabels(list(inspection.sites)[::every], fontsize=8)
    figure.colorbar(drawn, ax=axes, label="range / median range of the site", format="{x:g}", pad=0.01)
    figure.suptitle(
        f"Outlier features of partials: {inspection.engine}, TP {inspection.tp}, {inspection.dtype}, "
        f"{inspection.sequences * inspection.length:,} tokens"
    )
    write_figure(figure, path)
