"""What a long run would bring to light, on one rank: drift among ranks, growing memory, wrong counters, leaks."""

from __future__ import annotations

import gc
import hashlib
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

import megacomp
from megacomp import codecs
from megacomp.collectives.links import all_gather_single
from megacomp.launch import calibration, engines
from megacomp.launch.engines import Engine

MODULES = ("attention", "mlp")
STEPS_PER_INSTALLATION = 25
HOOKED = ("model.norm", "final_layernorm")
"""The last norm of each engine: what comes in has passed every reduction, and no gather has made ranks equal yet."""


class Mix(NamedTuple):
    """One way to compress: the codec of each module (None: exact), and how messages travel."""

    attention: Any
    mlp: Any
    algorithm: str = "one_shot"
    gather: str | None = None
    chunks: int = 1
    more: dict[str, Any] = {}  # noqa: RUF012 -- never written to

    def section(self, backend: str, calibrated: Path | None = None) -> dict[str, Any]:
        communication = {
            "calibration": None if calibrated is None else str(calibrated),
            "codec": self.mlp,
            "gather_codec": self.gather,
            "algorithm": self.algorithm,
            "pipeline_chunks": self.chunks,
            "min_bytes": 0,
            "rules": [{"module": "attention", "codec": self.attention}],
        }
        return {"megacomp": {"communication": communication, "backend": backend, **self.more}}


STATIC_PAPER = {"preset": "static4_paper", "outlier_features": 2}
"""The default share of so small a model's features is none."""

MIXES = [
    Mix("mxfp4", "mxfp4"),
    Mix("int8", "mxfp4", chunks=3),
    Mix("mxfp6_e2m3", "mxfp6_e2m3", algorithm="two_shot", gather="int8"),
    Mix(None, {"preset": "int4", "rotation": 32}),
    Mix("nvfp4", "int8", algorithm="two_shot", chunks=2, more={"guard": {"every": 5, "min_sqnr_db": 1}}),
    Mix({"preset": "int4", "rotation": 32}, "mxfp6_e2m3", more={"telemetry": {"sqnr_every": 7}}),
    Mix("static4", STATIC_PAPER),
    Mix("mxfp4", "static4", algorithm="two_shot", chunks=2),
]


@torch.no_grad()
def generate(
    folder: Path, engine: str, steps: int, backend: str, seed: int = 0, period: int = STEPS_PER_INSTALLATION
) -> dict[str, Any]:
    """Generate for `steps` steps, each one forward and one token for each sequence of a batch, and check every one.

    Requests have 1 to 4 sequences, prompts of 1 to 40 tokens and 1 to 12 new ones; each rank goes on with the tokens
    it has found itself. Another mix of codecs is installed every `period` steps.

    Raises AssertionError, on every rank, at the first step after which ranks hold other bits, and for a counter of
    a report that is not what the mix and the messages come to. Returns figures of this rank.
    """
    draw = random.Random(seed)
    shapes: list[tuple[int, int]] = []
    memory: list[float] = []
    left = 0
    # oneDNN keeps a compiled product for every shape it has met, up to 1,024: growth that is none of ours.
    with (
        torch.backends.mkldnn.flags(enabled=False),
        engines.build(folder, engine, tp=dist.get_world_size(), dtype=torch.bfloat16) as built,
        _digest(built) as seen,
    ):
        vocabulary, layers = built.hf_config.vocab_size, built.hf_config.num_hidden_layers
        calibrated = _calibrate(built, folder / f"calibration-{engine}-{dist.get_world_size()}")
        started = time.monotonic()
        for step in range(steps):
            if step % period == 0:
                mix = MIXES[step // period % len(MIXES)]
                installation = megacomp.install(mix.section(backend, calibrated), model=built.module)
                shapes = []
            if left == 0:
                generator = torch.Generator().manual_seed(draw.getrandbits(32))
                batch, length, left = draw.randint(1, 4), draw.randint(1, 40), draw.randint(1, 12)
                tokens = torch.randint(vocabulary, (batch, length), generator=generator)
                cache = built._new_cache(batch, length + left)
            logits = built._advance(tokens, cache).float()
            _assert_same(seen(logits), step)
            shapes.append((tokens.shape[0], tokens.shape[1]))
            tokens, left = logits.argmax(-1, keepdim=True), left - 1
            if (step + 1) % period == 0 or step + 1 == steps:
                installation.uninstall()
                _check_counters(installation.report(), mix, shapes, layers, built.hf_config.hidden_size)
                memory.append(resident_mib())
        seconds = time.monotonic() - started
    return {
        "engine": engine,
        "ranks": dist.get_world_size(),
        "steps": steps,
        "installations": len(memory),
        "seconds": round(seconds, 1),
        "resident_mib": memory,
    }


def reinstall(folder: Path, engine: str, times: int, warm_up: int) -> dict[str, Any]:
    """Install, run a forward and uninstall, `times` over; how many objects and MiB there are before and after.

    Counted from `warm_up` times on, when every cache has been filled.
    """
    objects, memory = [], []
    section = MIXES[0].section("reference")
    tokens = torch.arange(8)[None]
    with engines.build(folder, engine, tp=dist.get_world_size(), dtype=torch.bfloat16) as built:
        exact = built.logits(tokens)
        for time_number in range(1, times + 1):
            with megacomp.install(section, model=built.module):
                if time_number % 10 == 0 or time_number == 1:
                    built.logits(tokens)
            if time_number in (warm_up, times):
                gc.collect()
                objects.append(len(gc.get_objects()))
                memory.append(resident_mib())
        assert torch.equal(built.logits(tokens), exact)
    return {
        "engine": engine,
        "ranks": dist.get_world_size(),
        "times": times,
        "warm_up": warm_up,
        "objects": objects,
        "resident_mib": memory,
    }


def _calibrate(engine: Engine, path: Path) -> Path:
    """The tables of the static codecs of MIXES, in the file."""
    tokens = torch.randint(engine.hf_config.vocab_size, (4, 32), generator=torch.Generator().manual_seed(0))
    made = calibration.calibrate(engine, tokens, [codecs.get("static4"), codecs.get(STATIC_PAPER)], "random")
    if dist.get_rank() == 0:
        calibration.write(made, path)
    dist.barrier()
    return path


@contextmanager
def _digest(engine: Engine) -> Iterator[Callable[[torch.Tensor], int]]:
    """A function that says, in 63 bits, what the last norm was given and what logits came of it."""
    found = hashlib.blake2b(digest_size=8)

    def look(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        found.update(inputs[0].contiguous().view(torch.uint8).numpy().tobytes())

    def digest(logits: torch.Tensor) -> int:
        found.update(logits.contiguous().view(torch.uint8).numpy().tobytes())
        return int.from_bytes(found.digest(), "little") >> 1

    (norm,) = (module for name, module in engine.module.named_modules() if name.endswith(HOOKED))
    handle = norm.register_forward_pre_hook(look)
    try:
        yield digest
    finally:
        handle.remove()


def _assert_same(digest: int, step: int) -> None:
    told = torch.empty(dist.get_world_size(), dtype=torch.int64)
    all_gather_single(told, torch.tensor([digest]))
    assert len(set(told.tolist())) == 1, f"after step {step} the ranks hold other bits"


def _check_counters(
    report: megacomp.Report, mix: Mix, shapes: list[tuple[int, int]], layers: int, features: int
) -> None:
    """Every site's counters against what its messages come to by hand."""
    assert set(report.sites) == {f"layers.{layer}.{module}" for layer in range(layers) for module in MODULES}
    for name, site in report.sites.items():
        spec = mix.attention if name.endswith("attention") else mix.mlp
        if spec is None:
            assert (site.calls, site.bytes_sent, site.declined) == (0, 0, {"exact": len(shapes)}), name
            continue
        codec = codecs.get(spec)
        gather = codec if mix.gather is None else codecs.get(mix.gather)
        sent = [_values_sent(mix, batch * length) for batch, length in shapes]
        expected = (
            len(shapes),
            sum(batch * length for batch, length in shapes),
            sum(first * codec.row_bytes(features) + second * gather.row_bytes(features) for first, second in sent),
            sum(first + second for first, second in sent) * features * torch.bfloat16.itemsize,
        )
        assert (site.calls, site.rows, site.bytes_sent, site.plain_bytes) == expected, name
        assert not site.declined, name


def _values_sent(mix: Mix, rows: int) -> tuple[int, int]:
    """How many rows this rank sends of a message: of its partial, and of sums."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    if mix.algorithm == "one_shot":
        return rows * (ranks - 1), 0
    share = -(-rows // ranks)
    own = max(0, min(share, rows - rank * share))
    return rows - own, own * (ranks - 1)


def resident_mib() -> float:
    """This process's resident memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return round(pages * 4096 / 2**20, 1)
