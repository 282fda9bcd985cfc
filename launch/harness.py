"""The Language Model Evaluation Harness over an engine: scores of its tasks, uncompressed and compressed.

Needs `lm_eval` (pip install 'megacomp[eval]'), so that commands import this module only when asked for tasks.
To the harness the ranks of a tensor-parallel engine are one model: each runs the whole harness over the same
requests, which makes each take part in the same forwards.
"""

from __future__ import annotations

import difflib
import hashlib
import logging
import math
import random
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import datasets
import lm_eval.api.task
import numpy as np
import torch
import torch.distributed as dist
from lm_eval.api.model import TemplateLM
from lm_eval.defaults import DEFAULT_MAX_GEN_TOKS, DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
from lm_eval.evaluator import evaluate
from lm_eval.models.utils import has_bos_prefix, normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

import megacomp
from megacomp.config import Config
from megacomp.launch import distributed
from megacomp.launch.engines import Engine
from megacomp.launch.engines._scoped import attribute
from megacomp.launch.errors import LaunchError

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how many requests of that are done, and of how many."""

_NO_DATA = (
    " (data sets come from the Hugging Face Hub; without a network, from an earlier download, which is in HF_HOME, "
    "with HF_HUB_OFFLINE=1)"
)

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Score:
    """One metric of one task or group. None: no compressed run, or unknown to the harness.

    task, version, metric, filter: as the harness names them. higher_is_better: of two scores.
    documents: scored ones; None for a group. num_fewshot: examples before each.
    baseline_score, score: uncompressed and compressed.
    baseline_stderr, stderr: their standard errors; None for a group, for fewer than two documents, and for
        scores that are no mean over documents.
    change_stderr: standard error of score - baseline_score. Both runs answer the same documents, so it is
        smaller than the other two: what compression changes is known better than what the model can do.
    """

    task: str
    version: str | None
    metric: str
    filter: str
    higher_is_better: bool | None
    documents: int | None
    num_fewshot: int | None
    baseline_score: float
    baseline_stderr: float | None
    score: float | None
    stderr: float | None
    change_stderr: float | None

    @property
    def kept(self) -> float | None:
        """Share of the uncompressed score that the compressed run keeps; None where scores have no such share."""
        if self.score is None or self.higher_is_better is None:
            return None
        part, whole = self.score, self.baseline_score
        if not self.higher_is_better:
            part, whole = whole, part
        return part / whole if part >= 0 and whole > 0 else None

    def to_dict(self) -> dict[str, Any]:
        """The fields and `kept` as JSON-able data."""
        return {**asdict(self), "kept": self.kept}


@dataclass(frozen=True)
class TaskEvaluation:
    """The scores of one model under one configuration.

    engine, tp, simulated, dtype, batch_size: what ran; simulated: all ranks in one process.
    lm_eval: the harness's version.
    limit: documents per task at most; None: all.
    codec: names of the codecs that were on the wire. bits_per_value: of the compressed messages, counted on the
        wire, everything included. Both None if there was no configuration, or nothing was compressed.
    compressed_messages: share of the messages of row-parallel layers that were compressed; others were too small
        (`min_bytes`) or outside of the rules.
    """

    engine: str
    tp: int
    simulated: bool
    dtype: str
    batch_size: int
    lm_eval: str
    limit: int | None
    codec: str | None
    bits_per_value: float | None
    compressed_messages: float | None
    scores: tuple[Score, ...]

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-able data."""
        return {**asdict(self), "scores": [score.to_dict() for score in self.scores]}


def load_tasks(names: Sequence[str], folder: Path | None = None, *, num_fewshot: int | None = None) -> Any:
    """Tasks, groups and tags of the harness with their data sets, as `evaluate_tasks` takes them.

    folder: YAML files of further tasks, which go before the harness's own of the same name.
    num_fewshot: examples before each document, for tasks that do not fix them at 0. Default: the tasks' own.

    Raises LaunchError for a name there is no task of, naming similar ones; for a task that cannot be loaded, be
    it for its definition or for its data set; and for one that this model cannot do.
    """
    names = list(dict.fromkeys(names))
    if not names:
        raise LaunchError("--tasks names no task")
    if folder is not None and not folder.is_dir():
        raise LaunchError(f"no folder {folder}")
    loaded: dict[str, dict[str, Any]] = {"tasks": {}, "groups": {}}
    with _quiet_library(), _seeded():
        manager = _task_manager(names, folder)
        for name in names:
            try:
                found = manager.load([name])
            except Exception as error:  # definitions are programs, and data sets come from anywhere
                reason = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
                hint = _NO_DATA if isinstance(error, OSError) else ""
                raise LaunchError(f"task {name} cannot be loaded: {reason}{hint}") from None
            for kind, members in loaded.items():
                members.update(found.get(kind, {}))
    for name, task in loaded["tasks"].items():
        _check_task(name, task)
        # What lm_eval's own entry point does with its option.
        if num_fewshot is not None and task.get_config("num_fewshot") != 0:
            task.set_config(key="num_fewshot", value=num_fewshot)
        elif task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
    return loaded


def evaluate_tasks(
    engine: Engine,
    tokenizer: Any,
    tasks: Any,
    config: Config | None = None,
    *,
    limit: int | None = None,
    batch_size: int = 8,
    progress: Progress | None = None,
) -> TaskEvaluation:
    """Run `tasks` over the engine without and with `config`, and compare.

    Every rank calls this with the same arguments and gets the same result.

    tokenizer: the model's, of transformers. tasks: from `load_tasks`. config: None for the uncompressed run
    alone; on one rank nothing travels, so the compressed scores are the uncompressed ones.
    limit: use each task's first documents only. batch_size: sequences per forward.

    Raises LaunchError if the ranks' data sets differ, if the tokenizer lacks what a task needs or a request does
    not fit into the model's positions, and what `megacomp.install` raises.
    """
    baseline = _run(engine, tokenizer, tasks, limit, batch_size, "uncompressed", progress)
    compressed = None
    traffic: dict[str, Any] = dict.fromkeys(("codec", "bits_per_value", "compressed_messages"))
    if config is not None:
        with megacomp.install(config, model=engine.module) as installation:
            if engine.tp > 1:
                compressed = _run(engine, tokenizer, tasks, limit, batch_size, "compressed", progress)
            else:
                compressed = baseline
        traffic |= _traffic(installation.report(), engine)
    return TaskEvaluation(
        engine=engine.name,
        tp=engine.tp,
        simulated=engine.simulated,
        dtype=str(engine.dtype).removeprefix("torch."),
        batch_size=batch_size,
        lm_eval=metadata.version("lm_eval"),
        limit=limit,
        scores=tuple(_scores(baseline, compressed)),
        **traffic,
    )


class EngineModel(TemplateLM):
    """An engine as the harness's model.

    Requests are encoded as its own model of transformers encodes them, so that scores can be compared with
    published ones. To the harness this is one process of one, whatever the engine's ranks.
    """

    def __init__(
        self, engine: Engine, tokenizer: Any, *, batch_size: int, progress: Callable[[int, int], None] | None = None
    ) -> None:
        """progress: called with (requests done, requests of this kind)."""
        super().__init__()
        self.tokenizer = tokenizer
        self._engine = engine
        self._batch_size = batch_size
        self._positions = engine.architecture.max_positions
        self._progress = progress or (lambda done, total: None)
        ends = engine.hf_config.eos_token_id
        self._ends = {*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id} - {None}

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text. Raises LaunchError if the tokenizer has none."""
        return self._special_token("eos")

    @property
    def prefix_token_id(self) -> int:
        """The token that stands before a text without context. Raises LaunchError if the tokenizer has none."""
        return self._special_token("bos", "eos")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """The tokens of `string`. add_special_tokens: default as the tokenizer likes, but no second BOS."""
        if add_special_tokens is None:
            bos = self.tokenizer.bos_token_id
            add_special_tokens = bos is None or not has_bos_prefix(string, self.tokenizer.decode([bos]))
        # Not verbose: it would warn of texts that are longer than the context, and that is what is cut here.
        return self.tokenizer(string, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, whether it is the greedy choice) of each request's continuation."""
        self._agree(requests)
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        """Log-likelihood in nats of each request's whole text, cut into windows of the model's positions."""
        self._agree(requests)
        windows = []
        for request in requests:
            (string,) = request.args
            parts = get_rolling_token_windows(self.tok_encode(string), self.prefix_token_id, self._positions, 1)
            windows.append([(("", string), *make_disjoint_window(part)) for part in parts])
        scored = iter(self._loglikelihood_tokens([window for text in windows for window in text]))
        return [math.fsum(next(scored)[0] for _ in text) for text in windows]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        """The greedy continuation of each request's prompt, up to the first of its stop strings."""
        self._agree(requests)
        answers, cut = [], 0
        for done, request in enumerate(requests, start=1):
            prompt, settings = request.args
            settings = normalize_gen_kwargs(settings, DEFAULT_MAX_GEN_TOKS)
            new_tokens = settings["max_gen_toks"]
            if new_tokens >= self._positions:
                raise LaunchError(
                    f"a task generates up to {new_tokens} tokens, but the model has {self._positions} positions"
                )
            tokens = self.tok_encode(prompt) or [self.prefix_token_id]
            cut += len(tokens) > self._positions - new_tokens
            answers.append(self._generate(tokens[new_tokens - self._positions :], new_tokens, settings["until"]))
            self._progress(done, len(requests))
        self._warn_of_cuts(cut, len(requests))
        return answers

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        """requests: (texts, tokens of the context, tokens of the continuation)."""
        # Choices of one token share all of their input, and many tasks have no others.
        indices: dict[tuple[int, ...], list[int]] = {}
        cut = 0
        for index, ((_context, text), context, continuation) in enumerate(requests):
            if not 0 < len(continuation) <= self._positions:
                raise LaunchError(
                    f"a continuation has {len(continuation)} tokens, which must be 1 to the model's "
                    f"{self._positions} positions: {text[:80]!r}"
                )
            cut += len(context) + len(continuation) > self._positions + 1
            context = context or [self.prefix_token_id]  # a context of spaces only, which went to the continuation
            inputs = tuple((context + continuation)[-(self._positions + 1) : -1])
            indices.setdefault(inputs, []).append(index)
        self._warn_of_cuts(cut, len(requests))

        results = [(0.0, False)] * len(requests)
        done = 0
        inputs_by_length = sorted(indices, key=len, reverse=True)  # if memory is short, it is so at once
        for start in range(0, len(inputs_by_length), self._batch_size):
            batch = inputs_by_length[start : start + self._batch_size]
            for inputs, logits in zip(batch, self._engine.logits(_padded(batch)), strict=True):
                for index in indices[inputs]:
                    continuation = requests[index][2]
                    results[index] = _score(logits[len(inputs) - len(continuation) : len(inputs)], continuation)
                done += len(indices[inputs])
            self._progress(done, len(requests))
        lost = sum(math.isnan(value) for value, _greedy in results)
        self._warn(lost, len(requests), "have no likelihood: the model's logits are NaN")
        return results

    def _generate(self, prompt: list[int], new_tokens: int, until: list[str]) -> str:
        stops = [stop for stop in until if stop]
        generation = self._engine.generate(
            torch.tensor([prompt]),
            new_tokens,
            eos_token_id=self._ends,
            stop=lambda chosen: any(stop in self._decode(chosen) for stop in stops),
        )
        *kept, last = generation.tokens
        answer = self._decode(kept if last in self._ends else generation.tokens)
        for stop in stops:
            answer = answer.partition(stop)[0]
        return answer

    def _decode(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True)

    def _special_token(self, *kinds: str) -> int:
        for kind in kinds:
            token = getattr(self.tokenizer, f"{kind}_token_id")
            if token is not None:
                return token
        raise LaunchError(f"the model's tokenizer has no {' or '.join(kinds)} token, which a task needs")

    def _agree(self, requests: list[Any]) -> None:
        """Raise LaunchError on every rank if their requests differ: they would wait for each other forever."""
        mine = hashlib.sha256(repr([request.args for request in requests]).encode()).hexdigest()
        told: list[Any] = [None] * dist.get_world_size(self._engine.group)
        dist.all_gather_object(told, mine, self._engine.group)
        if len(set(told)) > 1:
            raise LaunchError("the ranks' requests differ: the tasks, their data sets or lm_eval are not the same")

    def _warn_of_cuts(self, count: int, total: int) -> None:
        self._warn(count, total, f"lost their beginning: the model has {self._positions} positions")

    @staticmethod
    def _warn(count: int, total: int, what: str) -> None:
        if count and distributed.rank() == 0:
            _logger.warning("%d of %d requests %s", count, total, what)


def _padded(rows: list[tuple[int, ...]]) -> torch.Tensor:
    """Rows of tokens as int64 [rows, longest]; what is behind a row's end does not change what is before it."""
    tokens = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
    for padded, row in zip(tokens, rows, strict=True):
        padded[: len(row)] = torch.tensor(row)
    return tokens


def _score(logits: torch.Tensor, continuation: list[int]) -> tuple[float, bool]:
    """Log-likelihood of `continuation` and whether it is the first choice, from its logits [length, vocab_size]."""
    targets = torch.tensor(continuation, device=logits.device)
    log = logits.log_softmax(-1).gather(-1, targets[:, None])
    return log.double().sum().item(), bool((logits.argmax(-1) == targets).all())


def _task_manager(names: list[str], folder: Path | None) -> Any:
    """The index of tasks that knows all of `names`. The harness's own takes seconds: only if it is needed."""
    if folder is not None:
        manager = TaskManager(include_path=str(folder), include_defaults=False)
        if set(names) <= set(manager.all_subtasks):
            return manager
    manager = TaskManager(include_path=None if folder is None else str(folder))
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown:
        raise LaunchError("; ".join(map(partial(_unknown, known=manager.all_tasks), unknown)))
    return manager


def _unknown(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=5)
    hint = f"similar ones are {', '.join(close)}" if close else "--task-dir DIR adds tasks of your own"
    return f"there is no task {name}; {hint}"


def _check_task(name: str, task: Any) -> None:
    """Raise LaunchError for a task this model cannot do."""
    if getattr(task, "UNSAFE_CODE", False):
        raise LaunchError(f"task {name} runs code that the model has written; this command runs none")
    if getattr(task, "MULTIMODAL", False):
        raise LaunchError(f"task {name} has more than text; the models here read text")
    if task.OUTPUT_TYPE == "generate_until":
        settings = normalize_gen_kwargs(task.get_config("generation_kwargs") or {}, DEFAULT_MAX_GEN_TOKS)
        if settings["do_sample"]:
            raise LaunchError(f"task {name} samples (generation_kwargs); the engines generate greedily")


def _run(
    engine: Engine,
    tokenizer: Any,
    tasks: Any,
    limit: int | None,
    batch_size: int,
    label: str,
    progress: Progress | None,
) -> Any:
    """What the harness makes of one run, its samples included."""
    told = None if progress is None else partial(progress, label)
    model = EngineModel(engine, tokenizer, batch_size=batch_size, progress=told)
    with _quiet_library(), _seeded():
        for task in tasks["tasks"].values():
            task.set_fewshot_seed(DEFAULT_OTHER_SEED)
        # Its bootstrap would start a process for each core on every rank; standard errors are ours.
        return evaluate(model, tasks, limit=limit, bootstrap_iters=0, log_samples=True)


def _traffic(report: megacomp.Report, engine: Engine) -> dict[str, Any]:
    """What was on the wire, as fields of TaskEvaluation."""
    messages = report.calls + sum(report.declined.values())
    if not report.calls:
        return {"compressed_messages": 0.0 if messages else None}
    codecs = dict.fromkeys(name for site in report.sites.values() if site.codec for name in site.codec.split(", "))
    return {
        "codec": ", ".join(codecs),
        "bits_per_value": 8 * engine.dtype.itemsize * report.bytes_sent / report.plain_bytes,
        "compressed_messages": report.calls / messages,
    }


def _scores(baseline: Any, compressed: Any | None) -> Iterator[Score]:
    """The scores of both runs, in the harness's order."""
    for task, metrics in baseline["results"].items():
        for key, value in metrics.items():
            metric, _, chosen = key.partition(",")
            if not chosen or metric.endswith("_stderr") or not isinstance(value, (int, float, np.number)):
                continue
            before = _documents(baseline, task, metric, chosen)
            score, after = None, None
            if compressed is not None:
                score, after = compressed["results"][task][key], _documents(compressed, task, metric, chosen)
            changes = None if before is None or after is None else np.subtract(after, before).tolist()
            version = baseline["versions"].get(task)
            yield Score(
                task=task,
                version=None if version is None else str(version),
                metric=metric,
                filter=chosen,
                higher_is_better=baseline["higher_is_better"].get(task, {}).get(metric),
                documents=baseline["n-samples"].get(task, {}).get("effective"),
                num_fewshot=baseline["n-shot"].get(task),
                baseline_score=float(value),
                baseline_stderr=_stderr(before),
                score=None if score is None else float(score),
                stderr=_stderr(after),
                change_stderr=_stderr(changes),
            )


def _documents(results: Any, task: str, metric: str, chosen: str) -> list[float] | None:
    """The metric of each document, if the score is their mean."""
    samples = results["samples"].get(task, ())
    values = [sample[metric] for sample in samples if sample["filter"] == chosen and metric in sample]
    if not values or not all(isinstance(value, (int, float, np.bool_, np.number)) for value in values):
        return None
    numbers = [float(value) for value in values]
    return numbers if math.isclose(statistics.fmean(numbers), results["results"][task][f"{metric},{chosen}"]) else None


def _stderr(values: list[float] | None) -> float | None:
    """Standard error of the mean of `values`."""
    return statistics.stdev(values) / math.sqrt(len(values)) if values is not None and len(values) > 1 else None


@contextmanager
def _quiet_library() -> Iterator[None]:
    """lm_eval and datasets without progress bars where nobody would watch them, and one rank's warnings only."""
    library = logging.getLogger("lm_eval")
    with ExitStack() as stack:
        stack.enter_context(attribute(lm_eval.api.task, "tqdm", partial(tqdm, disable=True)))
        if distributed.rank() != 0:
            stack.callback(library.setLevel, library.level)
            library.setLevel(logging.ERROR)
        if (distributed.rank() != 0 or not sys.stderr.isatty()) and not datasets.are_progress_bars_disabled():
            stack.callback(datasets.enable_progress_bars)
            datasets.disable_progress_bars()
        yield


@contextmanager
def _seeded() -> Iterator[None]:
    """Random numbers as lm_eval's own entry point seeds them, the same on every rank; afterwards as before."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            random.seed(DEFAULT_RANDOM_SEED)
            np.random.seed(DEFAULT_OTHER_SEED)
            torch.default_generator.manual_seed(DEFAULT_OTHER_SEED)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
