"""Gathering the statistics of a model's partials over a text, and the file that comes of it."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

import megacomp
from megacomp.calibration import SUM, Calibration, SiteTables, Statistics, tables_of
from megacomp.codecs import StaticCodec
from megacomp.launch.distributed import of_rank_0
from megacomp.launch.engines import Engine
from megacomp.launch.errors import LaunchError
from megacomp.launch.files import replacing

__all__ = ["calibrate", "gather", "pick_sequences", "write"]

_logger = logging.getLogger(__name__)

SECONDS_BETWEEN_SAVES = 30.0
"""How much work an interruption may cost."""


def pick_sequences(tokens: torch.Tensor, count: int | None, seed: int) -> torch.Tensor:
    """`count` of the sequences of `tokens` [sequences, length], drawn by `seed`, in the order of the text."""
    if count is None or count >= len(tokens):
        return tokens
    generator = torch.Generator().manual_seed(seed)
    return tokens[torch.randperm(len(tokens), generator=generator)[:count].sort().values]


def calibrate(
    engine: Engine,
    tokens: torch.Tensor,
    codecs: Sequence[StaticCodec],
    model: str,
    *,
    batch_size: int = 8,
    state: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Calibration:
    """The tables of `codecs` at every site of the model, from running `tokens` through it uncompressed.

    Every rank calls this with the same arguments and gets the same result.

    tokens: int64 [sequences, length]. model: the digest of its folder.
    batch_size: sequences per forward; each site's message of a batch is one step of the running extremes.
    state: a file that an interrupted run leaves behind and the next one goes on from; each rank has its own. It is
    of no use with other arguments, and starts anew then.
    progress: called with (sequences done, sequences to do), counting every pass.

    Raises ValueError for a model without tensor-parallel reductions, LaunchError for a hidden size that a codec is not
    for, and for a rank whose partials at a site have a NaN or Inf in every row. Other such rows are left out, with a
    warning.
    """
    for codec in codecs:
        try:
            codec.check_features(engine.architecture.hidden_size)
        except ValueError as error:
            raise LaunchError(str(error)) from None
    statistics = gather(
        engine, tokens, codecs, (model, batch_size), batch_size=batch_size, state=state, progress=progress
    )
    if not statistics.sites:
        raise ValueError("the model has no site that reduces among ranks")
    for site, sender in statistics.unseen:
        what = "the sums" if sender == SUM else f"the partials of rank {sender}"
        raise LaunchError(f"{site}: {what} have a NaN or Inf in every row; is {engine.dtype} right for this model?")
    if statistics.skipped_rows and dist.get_rank(engine.group) == 0:
        _logger.warning("rows left out of the calibration for a NaN or Inf in their sum: %d", statistics.skipped_rows)
    tables = {
        codec.name: {site: SiteTables(*tables_of(statistics, codec, site)) for site in statistics.sites}
        for codec in codecs
    }
    features = next(iter(tables[codecs[0].name].values())).partials.features
    return Calibration(engine.tp, features, model, {codec.name: dict(codec.spec) for codec in codecs}, tables)


def gather(
    engine: Engine,
    tokens: torch.Tensor,
    codecs: Sequence[StaticCodec],
    identity: object = None,
    *,
    batch_size: int = 8,
    state: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Statistics:
    """The statistics of all ranks that `codecs` need, on every rank; arguments as for `calibrate`.

    identity: what else, besides tokens, codecs and ranks, a state file must have been made for.
    """
    statistics = Statistics(codecs)
    batches = list(tokens.split(batch_size))
    key = _key(engine, tokens, codecs, identity)
    resumable = None if state is None else _State(state, engine, key)
    done = 0 if resumable is None else resumable.load(statistics)
    saved = time.monotonic()
    with megacomp.observe(engine.module, statistics):
        for step in range(done, statistics.passes * len(batches)):
            if step and step % len(batches) == 0:
                statistics.next_pass()
            engine.logits(batches[step % len(batches)])
            if progress is not None:
                sequences = min((step % len(batches) + 1) * batch_size, len(tokens))
                progress(step // len(batches) * len(tokens) + sequences, statistics.passes * len(tokens))
            # Ranks are in step, so each saves what the others do: rank 0 says when.
            if resumable is not None and of_rank_0(time.monotonic() - saved > SECONDS_BETWEEN_SAVES, engine.group):
                resumable.save(statistics, step + 1)
                saved = time.monotonic()
    statistics.finish()
    if dist.get_world_size(engine.group) > 1:
        told: list[dict[str, torch.Tensor] | None] = [None] * dist.get_world_size(engine.group)
        dist.all_gather_object(told, statistics.state(), engine.group)
        for other in told:
            assert other is not None
            statistics.merge(other)
    if resumable is not None:
        resumable.remove()
    return statistics


def write(calibration: Calibration, path: Path) -> None:
    """Write the calibration file, whole or not at all."""
    tensors = {name: tensor.contiguous() for name, tensor in calibration.tensors().items()}
    with replacing(path) as file:
        file.write(save(tensors, calibration.metadata()))


def _key(engine: Engine, tokens: torch.Tensor, codecs: Sequence[StaticCodec], identity: object) -> str:
    specs = [dict(codec.spec) for codec in codecs]
    ranks = [engine.name, engine.tp, engine.simulated]
    what = [*ranks, str(engine.dtype), list(tokens.shape), specs, identity, megacomp.__version__]
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode() + tokens.numpy().tobytes()).hexdigest()


class _State:
    """What an interrupted run leaves behind: one file for each process."""

    def __init__(self, path: Path, engine: Engine, key: str) -> None:
        self._path = path.with_name(f"{path.name}.{dist.get_rank(engine.group)}")
        self._engine = engine
        self._key = key

    def load(self, statistics: Statistics) -> int:
        """Restores `statistics`; how many batches they hold: the same on every rank, or nothing is restored."""
        done, tensors = self._read()
        steps: list[int | None] = [None] * dist.get_world_size(self._engine.group)
        dist.all_gather_object(steps, done, self._engine.group)
        if len(set(steps)) > 1 or not done:
            return 0
        statistics.merge(tensors, self._engine.device)
        return done

    def _read(self) -> tuple[int, dict[str, torch.Tensor]]:
        if not self._path.is_file():
            return 0, {}
        try:
            with safe_open(self._path, framework="pt") as opened:
                metadata = opened.metadata() or {}
                if metadata.get("key") != self._key:
                    return 0, {}
                return int(metadata["done"]), {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise LaunchError(f"{self._path}, left by an interrupted run, cannot be read: {error}; remove it") from None

    def save(self, statistics: Statistics, done: int) -> None:
        """Write it, whole or not at all."""
        with replacing(self._path) as file:
            file.write(save(statistics.state(), {"key": self._key, "done": str(done)}))

    def remove(self) -> None:
        """The run has ended well."""
        self._path.unlink(missing_ok=True)
