"""Which codec at which site costs a model the least: measured site by site, allocated, verified on the whole model."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import megacomp
from megacomp import codecs
from megacomp.calibration import Calibration, CalibrationError
from megacomp.codecs import Codec, StaticCodec
from megacomp.config import SECTION, TUNED, Config, load
from megacomp.launch.allocation import Allocation, Frontier, close_in, communication
from megacomp.launch.calibration import calibrate, write
from megacomp.launch.distributed import of_rank_0
from megacomp.launch.engines import Engine
from megacomp.launch.errors import LaunchError
from megacomp.launch.trials import Progress, Trial, Trials
from megacomp.policy import Site

__all__ = ["Budget", "Measured", "Search", "ladder", "search"]

CONFIDENCE = 2.0
"""So many standard errors must a perplexity stay below its limit: of ten mixes, one may look good by luck."""

EXACT = "exact"
"""Where a codec's name would be."""

EXACT_BYTES = 2
"""Of a value that stays exact: a served model's own bf16, whatever dtype a measurement has."""

MIX = "mix"

MAX_MIXES = 10
"""How many mixes have a full run at most; each leaves at most nine tenths of the range, most far less."""

FINEST_BITS = 0.01
"""Bits per value that are not worth another full run."""


def ladder(features: int) -> list[Codec]:
    """The codecs that are tried if none are named, from 2 to 8 bits, for rows of `features` values."""
    rotation = next((size for size in (128, 64, 32) if features % size == 0), None)
    specs: list[str | dict[str, Any]] = [
        {"preset": "static4", "bits": 2},
        {"preset": "static4", "bits": 3},
        {"preset": "int3", "rotation": rotation},
        "static4",
        "mxfp4",
        {"preset": "int4", "rotation": rotation},
        {"preset": "static4", "bits": 5},
        {"preset": "int5", "rotation": rotation},
        {"preset": "int6", "rotation": rotation},
        "int8",
    ]
    return [codecs.get(spec) for spec in specs]


@dataclass(frozen=True)
class Budget:
    """How much quality may be given away. At least one limit; of two, both hold.

    perplexity: the largest relative increase; 0.01 is one percent. What is measured has to stay below it by two
        standard errors: the more sequences there are, the closer one may come.
    kl: the largest mean KL divergence from the uncompressed model, in nats per token.
    """

    perplexity: float | None = None
    kl: float | None = None

    def __post_init__(self) -> None:
        limits = [limit for limit in (self.perplexity, self.kl) if limit is not None]
        if not limits or not all(0 < limit < math.inf for limit in limits):
            raise ValueError(f"a budget is one or two limits, positive and finite, not {self!r}")

    @property
    def expected_kl(self) -> float:
        """The KL divergence to expect at the limit: on text the model predicts well, the loss rises by as much."""
        expected = math.inf if self.perplexity is None else math.log1p(self.perplexity)
        return expected if self.kl is None else min(expected, self.kl)

    def load(self, measured: Measured) -> float:
        """How much of the budget is used; above 1 it is exceeded: infinite where anything measured is not finite."""
        used = []
        if self.perplexity is not None:
            at_worst = measured.increase + CONFIDENCE * (measured.stderr or 0.0)
            used.append(math.log1p(at_worst) / math.log1p(self.perplexity))
        if self.kl is not None:
            used.append(measured.kl / self.kl)
        return max(used) if all(map(math.isfinite, (measured.increase, measured.kl, *used))) else math.inf

    def __str__(self) -> str:
        perplexity = "" if self.perplexity is None else f"perplexity +{100 * self.perplexity:g} %"
        kl = "" if self.kl is None else f"KL divergence {self.kl:g}"
        return " and ".join(filter(None, (perplexity, kl)))


@dataclass(frozen=True)
class Measured:
    """One way to compress the whole model, run over all sequences.

    name: of the codec that is used everywhere, or "mix".
    bits: per value on the wire, mean over the sites; 16 where a site stays exact.
    perplexity, increase: of the compressed model, and relative to the uncompressed one. stderr: standard error of
        the increase, from how the sequences differ; None where it is not finite.
    kl: KL(uncompressed || compressed) of the next-token distribution, in nats per token. expected_kl: what those of
        the sites alone add up to.
    sqnr_db: signal-to-noise ratio of the sums, mean over compressed sites and batches.
    """

    name: str
    bits: float
    perplexity: float
    increase: float
    stderr: float | None
    kl: float
    expected_kl: float
    sqnr_db: float | None


@dataclass(frozen=True)
class Search:
    """What a search found.

    engine, tp, simulated, dtype: what ran. simulated: one process took the part of all ranks.
    sequences, length: of the tokens of every full run. sites_sequences: how many of them each site alone was run on.
    calibration_sequences: others, which static codecs were calibrated on; 0 if that was not done here.
    budget: the limits that were given. baseline_perplexity: of the uncompressed model.
    singles: each codec at every site. mixes: the allocations that had a full run, in order.
    best: of all these, the one of fewest bits within the budget; None if nothing but the exact model is.
    best_single: the same of `singles`.
    allocation: the name of each site's codec, of `best`. divergences: KL of each site and codec alone.
    section: the "megacomp" section that says `allocation`.
    """

    engine: str
    tp: int
    simulated: bool
    dtype: str
    sequences: int
    length: int
    sites_sequences: int
    calibration_sequences: int
    budget: Budget
    baseline_perplexity: float
    singles: tuple[Measured, ...]
    mixes: tuple[Measured, ...]
    best: Measured | None
    best_single: Measured | None
    allocation: dict[str, str]
    divergences: dict[str, dict[str, float]]
    section: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-able data."""
        return asdict(self)


def search(
    engine: Engine,
    tokens: torch.Tensor,
    choices: Sequence[Codec],
    budget: Budget,
    model: str,
    out: Path,
    *,
    base: Config | None = None,
    batch_size: int = 8,
    time_limit: float | None = None,
    progress: Progress | None = None,
) -> Search:
    """Find the codec of each site: the fewest bits by which the whole model stays within the budget.

    1. Static codecs are calibrated on the first half of the sequences. All else is measured on the rest.
    2. Each codec at each site alone, everything else exact: the KL divergence of the model's output.
    3. These divergences add up, roughly. So for every limit of their sum there is an allocation of fewest bytes.
    4. Full runs, of each codec everywhere and of allocations ever closer to the budget: their perplexity decides.

    Every rank calls this with the same arguments and gets the same result.

    tokens: int64 [sequences, length of at least 2]. choices: codecs; leaving a site exact is always one more.
    model: digest of its folder.
    out: where the section is going to be written. Beside it rank 0 keeps `STEM.calibration.safetensors`, to which the
        section refers, and `STEM.measurements.json`: whatever ran is not run again by another search of the same
        model, tokens, ranks and batches, be it after an interruption, for more codecs or for another budget.
    base: what the section is to say besides. Of this, backend and algorithm count in measurements, and so does a
        calibration, which takes the place of step 1; thresholds do not, every message is compressed.
    batch_size: sequences per forward.
    time_limit: in seconds. The batches of step 2 end when the limit would be passed by another one and all full runs;
        one batch, each codec everywhere, and a mix unless a single codec is within the budget are run in any case.
    progress: counts forwards, and of the calibration sequences.

    Raises ValueError for a model without tensor-parallel reductions; LaunchError for too few
    sequences, and for a codec that compresses nothing; what `calibrate` and `megacomp.install` raise.
    """
    begun = time.monotonic()
    base = base or Config()
    options: list[Codec | None] = [*dict.fromkeys(choices), None]
    static = [codec for codec in options if isinstance(codec, StaticCodec)]
    given = base.communication.calibration
    calibrated = len(tokens) // 2 if static and given is None else 0
    judged = tokens[calibrated:]
    if len(judged) < 2 or (static and given is None and not calibrated):
        needed = "two sequences to judge by, and another one for the calibration of static codecs"
        raise LaunchError(f"{len(tokens)} sequence{'s' * (len(tokens) > 1)}: a search takes {needed}")
    trials = Trials(
        engine,
        judged,
        _beside(out, "measurements.json"),
        _identity(engine, tokens, model, base, calibrated, batch_size),
        batch_size=batch_size,
        progress=progress,
    )
    calibration = None if given is None else Path(given)
    if calibrated:
        # Whoever reads the section may be in another folder.
        calibration = _beside(out.absolute(), "calibration.safetensors")
        _ensure_calibration(engine, tokens[:calibrated], static, model, calibration, trials, batch_size, progress)
    space = _Space(_sites(engine, judged), options, engine.architecture.hidden_size, base, calibration)

    def in_time(runs: int) -> bool:
        return time_limit is None or time.monotonic() - begun + trials.seconds_per_forward * runs <= time_limit

    full_runs = trials.batches * (len(options) + 2 * MAX_MIXES)
    alone = space.alone()
    trials.run(list(alone.values()), "sites", lambda: in_time(1 + len(alone) + full_runs))
    sites_sequences = min(map(trials.sequences, alone.values()))
    divergences = {
        site: [0.0 if codec is None else trials.kl(alone[site, codec], sites_sequences) for codec in space.options]
        for site in space.sites
    }

    found: list[tuple[Measured, Allocation]] = []

    def measured(name: str, allocation: Allocation) -> Measured:
        expected_kl = sum(divergences[site][space.options.index(codec)] for site, codec in allocation.items())
        change = trials.change(space.trial(allocation))
        result = Measured(
            name=name,
            bits=space.bits(allocation),
            perplexity=trials.baseline_perplexity * (1 + change.perplexity),
            increase=change.perplexity,
            stderr=change.stderr,
            kl=change.kl,
            expected_kl=expected_kl,
            sqnr_db=change.sqnr_db,
        )
        found.append((result, allocation))
        return result

    everywhere = [dict.fromkeys(space.sites, codec) for codec in options if codec is not None]
    trials.run([space.trial(allocation) for allocation in everywhere], "codecs")
    singles = [measured(str(next(iter(allocation.values()))), allocation) for allocation in everywhere]

    frontier = Frontier.of(space.sizes, list(divergences.values()))
    mixes: list[Measured] = []

    def load_of(point: int) -> float:
        allocation = space.allocation(frontier.choice(point))
        trials.run([space.trial(allocation)], f"mix {len(mixes) + 1}")
        mixes.append(measured(MIX, allocation))
        return budget.load(mixes[-1])

    def go_on() -> bool:
        enough = not in_time(2 * trials.batches) and any(budget.load(result) <= 1 for result, _ in found)
        return len(mixes) < MAX_MIXES and not of_rank_0(enough, engine.group)

    close_in(frontier, load_of, budget.expected_kl, finest=space.size_of(FINEST_BITS), go_on=go_on)

    within = [(result, allocation) for result, allocation in found if budget.load(result) <= 1]
    exact: tuple[Measured | None, Allocation] = (None, dict.fromkeys(space.sites))
    best, allocation = min(within, key=lambda pair: (pair[0].bits, pair[0].kl), default=exact)
    return Search(
        engine=engine.name,
        tp=engine.tp,
        simulated=engine.simulated,
        dtype=str(engine.dtype).removeprefix("torch."),
        sequences=len(judged),
        length=tokens.shape[1],
        sites_sequences=sites_sequences,
        calibration_sequences=calibrated,
        budget=budget,
        baseline_perplexity=trials.baseline_perplexity,
        singles=tuple(singles),
        mixes=tuple(mixes),
        best=best,
        best_single=min(
            (single for single in singles if budget.load(single) <= 1),
            key=lambda single: (single.bits, single.kl),
            default=None,
        ),
        allocation={site.name: EXACT if codec is None else str(codec) for site, codec in allocation.items()},
        divergences={
            site.name: {str(codec): kl for codec, kl in zip(options, by_codec, strict=True) if codec is not None}
            for site, by_codec in divergences.items()
        },
        section=space.section(allocation),
    )


@dataclass(frozen=True)
class _Space:
    """What there is to choose, and how a configuration says what was chosen.

    sites: of the model. options: what each may have. features: values per row.
    base: what the configuration says besides. calibration: file of the static codecs among the options.
    """

    sites: Sequence[Site]
    options: Sequence[Codec | None]
    features: int
    base: Config
    calibration: Path | None

    @property
    def sizes(self) -> list[int]:
        """Bytes of a row of each option."""
        return [
            EXACT_BYTES * self.features if codec is None else codec.row_bytes(self.features) for codec in self.options
        ]

    def bits(self, allocation: Allocation) -> float:
        """Per value, mean over the sites."""
        sizes = dict(zip(self.options, self.sizes, strict=True))
        return 8 * sum(sizes[codec] for codec in allocation.values()) / (self.features * len(self.sites))

    def size_of(self, bits: float) -> int:
        """Bytes of a row of every site, at so many bits per value."""
        return int(bits * self.features * len(self.sites) / 8)

    def allocation(self, chosen: Sequence[int]) -> Allocation:
        """By the index of each site's option."""
        return {site: self.options[index] for site, index in zip(self.sites, chosen, strict=True)}

    def alone(self) -> dict[tuple[Site, Codec], Trial]:
        """The trials of each codec at each site, everything else exact."""
        return {
            (site, codec): self.trial({**dict.fromkeys(self.sites), site: codec}, sample=False)
            for site in self.sites
            for codec in self.options
            if codec is not None
        }

    def trial(self, allocation: Allocation, *, sample: bool = True) -> Trial:
        """The trial of an allocation, every message compressed. sample: SQNR as well."""
        algorithm = self.base.communication.algorithm
        section = {
            "backend": self.base.backend,
            "telemetry": {"sqnr_every": int(sample)},
            "communication": {
                **self._communication(allocation),
                "algorithm": "auto" if algorithm == TUNED else algorithm,
                "min_bytes": 0,
            },
        }
        return Trial(json.dumps(communication(allocation)), load({SECTION: section})[0])

    def section(self, allocation: Allocation) -> dict[str, Any]:
        """`base` with an allocation in the place of its codecs and rules, as JSON-able data."""
        document = self.base.model_dump(mode="json", exclude_unset=True)
        replaced = ("codec", "gather_codec", "rules", "calibration")
        kept = {key: value for key, value in document.get("communication", {}).items() if key not in replaced}
        return {**document, "communication": {**kept, **self._communication(allocation)}}

    def _communication(self, allocation: Allocation) -> dict[str, Any]:
        said = communication(allocation)
        if any(isinstance(codec, StaticCodec) for codec in allocation.values()):
            said["calibration"] = str(self.calibration)
        return said


def _beside(out: Path, suffix: str) -> Path:
    return out.with_name(f"{out.stem}.{suffix}")


def _identity(engine: Engine, tokens: torch.Tensor, model: str, base: Config, calibrated: int, batch_size: int) -> str:
    """Digest of all that decides results, the trials' own configurations apart."""
    given = base.communication.calibration
    what = [megacomp.__version__, model, engine.name, engine.tp, engine.simulated, str(engine.dtype)]
    what += [base.weights.model_dump(), base.communication.algorithm, calibrated, batch_size, list(tokens.shape)]
    what += [None if given is None else Calibration.read(given).digest]
    return hashlib.sha256(json.dumps(what).encode() + tokens.numpy().tobytes()).hexdigest()


def _ensure_calibration(
    engine: Engine,
    tokens: torch.Tensor,
    static: Sequence[StaticCodec],
    model: str,
    path: Path,
    trials: Trials,
    batch_size: int,
    progress: Progress | None,
) -> None:
    """The calibration of `static` in the file: the one that `trials` went by, or a new one."""
    if of_rank_0(_is_there(path, static, trials.calibration), engine.group):
        return
    made = calibrate(
        engine,
        tokens,
        static,
        model,
        batch_size=batch_size,
        state=path.with_name(f".{path.name}.state"),
        progress=None if progress is None else lambda done, total: progress("calibration", done, total),
    )
    if dist.get_rank(engine.group) == 0:
        write(made, path)
    trials.calibration = made.digest
    trials.save()
    dist.barrier(engine.group)


def _is_there(path: Path, static: Sequence[StaticCodec], digest: str | None) -> bool:
    try:
        there = Calibration.read(path)
    except CalibrationError:
        return False
    return there.digest == digest and all(codec.name in there.tables for codec in static)


class _SiteObserver:
    """Notes where messages come from."""

    def __init__(self) -> None:
        self.sites: dict[Site, None] = {}

    def partial(self, site: Site, rank: int, world_size: int, x: torch.Tensor) -> None:
        self.sites.setdefault(site)

    def total(self, site: Site, x: torch.Tensor) -> None:
        pass


def _sites(engine: Engine, tokens: torch.Tensor) -> list[Site]:
    """The sites of the model, in the order in which they reduce."""
    observer = _SiteObserver()
    with megacomp.observe(engine.module, observer):
        engine.logits(tokens[:1, :2])
    if not observer.sites:
        raise ValueError("the model has no site that reduces among ranks")
    for site in observer.sites:
        if site.layer is None or site.module is None:
            raise ValueError(f"no rule can name site {site.name}, whose layer or module is not known")
    return list(observer.sites)
