"""What compression costs a model in quality, and what it saves: one model, compressed and not, side by side."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import megacomp
from megacomp.config import Config, load
from megacomp.launch.engines import Engine
from megacomp.launch.files import logits_file

Configuration = str | Path | Mapping[str, Any] | Config

_BF16_BYTES = 2


@dataclass(frozen=True)
class Evaluation:
    """The measurements of one model under one configuration. None: there was no configuration, or no traffic.

    engine, tp, dtype: what ran. simulated: whether one process took the part of all ranks.
    sequences, length: the tokens it ran on.
    codec: names of the codecs that were on the wire.
    bits_per_value: of the compressed messages, counted on the wire, everything included.
    wire_bytes_per_token: bytes one rank sends per token for the reductions of all row-parallel layers, those
        left exact included. plain_bytes_per_token: the same by the same algorithms with every value in bf16.
    ratio: plain_bytes_per_token / wire_bytes_per_token.
    perplexity, baseline_perplexity: exp of the mean negative log-likelihood of the next token within each
        sequence, of the compressed and the uncompressed run.
    kl: Kullback-Leibler divergence of the compressed next-token distribution from the uncompressed one,
        KL(uncompressed || compressed), in nats, mean over the same positions.
    top1_agreement: share of these positions where both prefer the same token.
    ttft_ms, baseline_ttft_ms: time to the first token of one whole sequence, median, in milliseconds; None for
        simulated ranks, whose time is not that of real ones.
    """

    engine: str
    tp: int
    simulated: bool
    dtype: str
    sequences: int
    length: int
    codec: str | None
    bits_per_value: float | None
    ratio: float | None
    wire_bytes_per_token: float | None
    plain_bytes_per_token: float | None
    perplexity: float | None
    baseline_perplexity: float
    top1_agreement: float | None
    kl: float | None
    ttft_ms: float | None
    baseline_ttft_ms: float | None

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-able data."""
        return asdict(self)


def evaluate(
    engine: Engine,
    tokens: torch.Tensor,
    config: Configuration | None = None,
    *,
    batch_size: int = 8,
    prefills: int = 5,
    logits_out: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Run `tokens` through the engine without and with `config`, batch by batch, and compare.

    Every rank calls this with the same arguments and gets the same result, times and bytes being its own, or, of
    simulated ranks, the bytes being those of rank 0.

    tokens: int64 [sequences, length], length at least 2. config: as `megacomp.install` takes it; None for
    the uncompressed run alone. batch_size: sequences per batch; logits of two batches are held at a time.
    prefills: how often each time to first token is measured, the two in alternation.
    logits_out: a safetensors file for `logits` float32 [sequences, length, vocab_size] of the configured run
    (of the uncompressed one without `config`); written by rank 0 as the batches go by, complete or not at all.
    progress: called with (sequences done, sequences) after each batch.

    Raises ValueError for tokens of another shape, and what `megacomp.install` raises.
    """
    if tokens.dim() != 2 or tokens.shape[0] < 1 or tokens.shape[1] < 2:
        raise ValueError(f"tokens must be [sequences, length of at least 2], not {list(tokens.shape)}")
    sequences, length = tokens.shape
    compression = None if config is None else _Compression(engine, config)
    scores = _Scores()
    with ExitStack() as stack:
        write = None
        if logits_out is not None and dist.get_rank(engine.group) == 0:
            shape = (sequences, length, engine.architecture.vocab_size)
            write = stack.enter_context(logits_file(Path(logits_out), shape))
        for start in range(0, sequences, batch_size):
            batch = tokens[start : start + batch_size]
            exact = engine.logits(batch)
            compressed = exact if compression is None else compression.run(batch, exact)
            for comparison in compare(exact, compressed, batch):
                scores.add(comparison)
            if write is not None:
                write(compressed)
            if progress is not None:
                progress(start + len(batch), sequences)
    measured: dict[str, Any] = dict.fromkeys(field.name for field in fields(Evaluation))
    if not engine.simulated:
        baseline_ttft, ttft = _times_to_first_token(engine, tokens[:1], compression, prefills)
        measured |= {"baseline_ttft_ms": baseline_ttft, "ttft_ms": None if compression is None else ttft}
    if compression is not None:
        measured |= compression.traffic(sequences * length) | scores.compared()
    measured |= {
        "engine": engine.name,
        "tp": engine.tp,
        "simulated": engine.simulated,
        "dtype": str(engine.dtype).removeprefix("torch."),
        "sequences": sequences,
        "length": length,
        "baseline_perplexity": scores.baseline_perplexity,
    }
    return Evaluation(**measured)


class _Compression:
    """One configuration, switched on for single calls; counts what those of the evaluation put on the wire."""

    def __init__(self, engine: Engine, config: Configuration) -> None:
        self._engine = engine
        # Read once, so that one configuration runs to the end whatever happens to its file meanwhile.
        self._config = config if isinstance(config, Config) else load(config)[0]
        self._codecs: dict[str, None] = {}
        self._sites = self._rows = self._sent = self._uncompressed = 0
        if engine.tp == 1:
            with megacomp.install(self._config, model=engine.module):
                pass  # what is wrong with it is an error on one rank as on many

    def run(self, tokens: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
        """The compressed logits of `tokens`, counted; those of one rank are `exact`, for nothing travels."""
        if self._engine.tp == 1:
            return exact
        with self.installed() as installation:
            result = self._engine.logits(tokens)
        report = installation.report()
        self._sites = len(report.sites)
        self._sent += report.bytes_sent
        self._uncompressed += report.plain_bytes
        for site in report.sites.values():
            self._rows += site.rows
            self._codecs |= dict.fromkeys(site.codec.split(", ") if site.codec else ())
        return result

    def installed(self) -> megacomp.Installation:
        """Compression, on until the end of the `with` block."""
        return megacomp.install(self._config, model=self._engine.module)

    def traffic(self, tokens: int) -> dict[str, Any]:
        """What was on the wire for `tokens` tokens, as fields of Evaluation."""
        engine = self._engine
        itemsize, ranks = engine.dtype.itemsize, engine.tp
        # Every site reduces one row per token; those not compressed went through the original all_reduce.
        exact_rows = self._sites * tokens - self._rows
        exact = exact_rows * engine.architecture.hidden_size * itemsize * 2 * (ranks - 1) / ranks
        sent = self._sent + exact
        if not sent:
            return {}
        plain = (self._uncompressed + exact) / itemsize * _BF16_BYTES
        bits = 8 * itemsize * self._sent / self._uncompressed if self._uncompressed else None
        return {
            "codec": ", ".join(self._codecs) or None,
            "bits_per_value": bits,
            "wire_bytes_per_token": sent / tokens,
            "plain_bytes_per_token": plain / tokens,
            "ratio": plain / sent,
        }


@dataclass(frozen=True)
class Comparison:
    """Two runs of one sequence, in sums over the positions that have a next token, float64.

    positions: how many there are. baseline_loss, loss: negative log-likelihood of the next token, of the uncompressed
    and the compressed run, in nats. kl: KL(uncompressed || compressed) of its distribution, in nats. agreed: positions
    where both prefer the same token.
    """

    positions: int
    baseline_loss: float
    loss: float
    kl: float
    agreed: int


def compare(exact: torch.Tensor, compressed: torch.Tensor, tokens: torch.Tensor) -> Iterator[Comparison]:
    """Both runs of each sequence: their logits float32 [batch, length, vocab_size] on tokens int64 [batch, length]."""
    # Sequence by sequence: several float32 tensors of this size at once would be most of the memory.
    for row, exact_logits, logits in zip(tokens.to(exact.device), exact, compressed, strict=True):
        targets = row[1:, None]
        exact_log = exact_logits[:-1].log_softmax(-1)
        log = exact_log if compressed is exact else logits[:-1].log_softmax(-1)
        yield Comparison(
            positions=len(targets),
            baseline_loss=-exact_log.gather(-1, targets).double().sum().item(),
            loss=-log.gather(-1, targets).double().sum().item(),
            kl=(exact_log.exp() * (exact_log - log)).sum(-1).double().sum().item(),
            agreed=int((exact_log.argmax(-1) == log.argmax(-1)).sum().item()),
        )


class _Scores:
    """What comparisons of sequences add up to."""

    def __init__(self) -> None:
        self._count = 0
        self._baseline_loss = self._loss = self._kl = self._agreed = 0.0

    def add(self, comparison: Comparison) -> None:
        self._count += comparison.positions
        self._baseline_loss += comparison.baseline_loss
        self._loss += comparison.loss
        self._kl += comparison.kl
        self._agreed += comparison.agreed

    @property
    def baseline_perplexity(self) -> float:
        return exp(self._baseline_loss / self._count)

    def compared(self) -> dict[str, float]:
        """The compressed run against the uncompressed one, as fields of Evaluation."""
        return {
            "perplexity": exp(self._loss / self._count),
            "kl": self._kl / self._count,
            "top1_agreement": self._agreed / self._count,
        }


def exp(value: float) -> float:
    """exp that is infinite where it is too large for a float64, as a perplexity of a broken model may be."""
    return torch.tensor(value, dtype=torch.float64).exp().item()


def _times_to_first_token(
    engine: Engine, prompt: torch.Tensor, compression: _Compression | None, prefills: int
) -> tuple[float, float]:
    """Medians without and with compression, in milliseconds; equal if there is none.

    The two alternate, so that what disturbs the machine disturbs both alike; the first of each warms up.
    """
    plain, compressed = [], []
    for _ in range(prefills + 1):
        plain.append(_prefill_ms(engine, prompt))
        if compression is not None and engine.tp > 1:
            with compression.installed():
                compressed.append(_prefill_ms(engine, prompt))
    baseline = statistics.median(plain[1:])
    return baseline, statistics.median(compressed[1:]) if compressed else baseline


def _prefill_ms(engine: Engine, prompt: torch.Tensor) -> float:
    dist.barrier(engine.group)
    start = time.perf_counter()
    engine.prefill(prompt).argmax(-1).tolist()  # waits for a GPU to finish
    return 1e3 * (time.perf_counter() - start)
