"""Many configurations of one model over the same tokens, each against the uncompressed run, and kept in a file."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import megacomp
from megacomp.config import Config
from megacomp.launch.distributed import of_rank_0
from megacomp.launch.engines import Engine
from megacomp.launch.errors import LaunchError
from megacomp.launch.evaluation import Comparison, compare, exp
from megacomp.launch.files import replacing

__all__ = ["Change", "Progress", "Trial", "Trials"]

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and of how much."""


@dataclass(frozen=True)
class Trial:
    """A configuration to run, by which something is compressed.

    name: what tells it from the other trials, in the file and in messages.
    """

    name: str
    config: Config


@dataclass(frozen=True)
class Change:
    """What a trial does to the model, over the sequences it was run on.

    perplexity: relative increase over the uncompressed run; 0.01 is one percent.
    stderr: its standard error, from how the sequences differ; None for a single sequence.
    kl: KL(uncompressed || compressed) of the next-token distribution, in nats per token.
    sqnr_db: mean over batches and compressed sites, if the configuration samples it.
    """

    perplexity: float
    stderr: float | None
    kl: float
    sqnr_db: float | None


@dataclass
class _Record:
    """The first sequences of one trial: mean loss and KL divergence of each, in nats; SQNR of each batch, in dB."""

    loss: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    sqnr_db: list[float] = field(default_factory=list)


class Trials:
    """Runs trials, batch by batch, and remembers what came of them: what is in the file is not run again.

    Every rank makes one with the same arguments, calls the same methods, and gets the same results.

    batches: how many the tokens make.
    calibration: digest of the calibration that trials go by, if any: a note for its owner, kept in the file.
    """

    def __init__(
        self,
        engine: Engine,
        tokens: torch.Tensor,
        path: Path,
        identity: str,
        *,
        batch_size: int = 8,
        progress: Progress | None = None,
    ) -> None:
        """tokens: int64 [sequences, length of at least 2]. batch_size: sequences per forward.

        path: the file, read and written by rank 0. identity: of everything else that decides results; a file of
        another one is of no use, and will be replaced.
        progress: counts forwards.
        """
        self.batches = -(-len(tokens) // batch_size)
        self._engine = engine
        self._tokens = tokens
        self._path = path
        self._identity = identity
        self._batch_size = batch_size
        self._progress = progress or (lambda what, done, total: None)
        self._seconds, self._forwards = 0.0, 0
        found = of_rank_0(_read(path, identity) if dist.get_rank(engine.group) == 0 else {}, engine.group)
        self.calibration: str | None = found.get("calibration")
        self._exact: list[float] = found.get("exact", [])
        self._records = {name: _Record(**record) for name, record in found.get("trials", {}).items()}

    def run(self, trials: Sequence[Trial], what: str, go_on: Callable[[], bool] = lambda: True) -> None:
        """Run every batch through the uncompressed model and through each of `trials`, batches outermost.

        what: a name for all of this, for the progress. go_on: asked on rank 0 before each batch but the first; False
        ends the run with all trials at the same sequence.

        Raises LaunchError if a trial compresses nothing.
        """
        starts = range(0, len(self._tokens), self._batch_size)
        pending = {start: [trial for trial in trials if self.sequences(trial) <= start] for start in starts}
        total = sum(1 + len(missing) for missing in pending.values() if missing)
        done = 0
        for start, missing in pending.items():
            if not missing:
                continue
            if done and not of_rank_0(go_on(), self._engine.group):
                return
            begun = time.monotonic()
            batch = self._tokens[start : start + self._batch_size]
            exact = self._engine.logits(batch)
            exact_loss, records = [], {}
            for trial in missing:
                compared, sqnr_db = self._compared(trial, batch, exact)
                exact_loss = [each.baseline_loss / each.positions for each in compared]
                records[trial.name] = _Record(
                    [each.loss / each.positions for each in compared],
                    [each.kl / each.positions for each in compared],
                    sqnr_db,
                )
                done += 1
                self._progress(what, done, total)
            done += 1
            self._progress(what, done, total)
            # Ranks compute the same, but what decides is to be the same bit for bit.
            exact_loss, records = of_rank_0((exact_loss, records), self._engine.group)
            self._exact[start : start + len(batch)] = exact_loss
            for name, record in records.items():
                known = self._records.setdefault(name, _Record())
                known.loss += record.loss
                known.kl += record.kl
                known.sqnr_db += record.sqnr_db
            self.save()
            self._seconds += time.monotonic() - begun
            self._forwards += 1 + len(missing)

    @property
    def seconds_per_forward(self) -> float:
        """Of one batch, mean of those that were run; 0 before the first."""
        return self._seconds / self._forwards if self._forwards else 0.0

    @property
    def baseline_perplexity(self) -> float:
        """Of the uncompressed model, over the sequences that any trial was run on."""
        return exp(statistics.fmean(self._exact))

    def sequences(self, trial: Trial) -> int:
        """How many sequences `trial` was run on: always the first ones."""
        return len(self._records[trial.name].loss) if trial.name in self._records else 0

    def kl(self, trial: Trial, sequences: int) -> float:
        """KL(uncompressed || compressed), in nats per token, over so many of its sequences; NaN if it is for any."""
        return max(statistics.fmean(self._records[trial.name].kl[:sequences]), 0.0)  # a NaN is not below 0

    def change(self, trial: Trial) -> Change:
        """What `trial`, once it was run, does to the model."""
        record = self._records[trial.name]
        count = len(record.loss)
        changes = [loss - exact for loss, exact in zip(record.loss, self._exact, strict=False)]
        ratio = exp(statistics.fmean(changes))
        known = count > 1 and all(map(math.isfinite, changes))
        return Change(
            perplexity=ratio - 1,
            # Of a mean in nats; the perplexity is its exponential.
            stderr=ratio * statistics.stdev(changes) / math.sqrt(count) if known else None,
            kl=self.kl(trial, count),
            sqnr_db=statistics.fmean(record.sqnr_db) if record.sqnr_db else None,
        )

    def save(self) -> None:
        """Write the file, whole or not at all; `run` does after each batch."""
        if dist.get_rank(self._engine.group) != 0:
            return
        records = {name: asdict(record) for name, record in self._records.items()}
        document = {
            "identity": self._identity,
            "calibration": self.calibration,
            "exact": self._exact,
            "trials": records,
        }
        with replacing(self._path) as file:
            file.write(json.dumps(document).encode())

    def _compared(self, trial: Trial, batch: torch.Tensor, exact: torch.Tensor) -> tuple[list[Comparison], list[float]]:
        """`trial` against the uncompressed logits, sequence by sequence, and the SQNR of the batch, if sampled."""
        with megacomp.install(trial.config, model=self._engine.module) as installation:
            logits = self._engine.logits(batch)
        report = installation.report()
        if not report.calls:
            reasons = ", ".join(f"{count} x {reason}" for reason, count in report.declined.items())
            raise LaunchError(f"{trial.name}: nothing was compressed ({reasons or 'the model has no such site'})")
        sampled = [site.sqnr_db for site in report.sites.values() if site.sqnr_db is not None]
        finite = list(filter(math.isfinite, sampled))
        return list(compare(exact, logits, batch)), [statistics.fmean(finite)] if finite else []


def _read(path: Path, identity: str) -> dict[str, Any]:
    """What the file holds; nothing if it is none of ours, or of another identity."""
    try:
        document = json.loads(path.read_text())
        return document if document["identity"] == identity else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
