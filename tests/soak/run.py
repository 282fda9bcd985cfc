"""The long run, by `make soak`: writes benchmarks/results/soak.json, whole or not at all."""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import drift
import torch
from engines import tiny_models
from rank_pool import RankPool

from megacomp.launch import environment, files

ROOT = Path(__file__).resolve().parents[2]
ENGINES = ("deepspeed", "megatron")
HOUR = 3600.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2000, help="of generation, at each number of ranks")
    parser.add_argument("--times", type=int, default=1000, help="to install and uninstall")
    parser.add_argument("--backend", default="auto", help="of the codecs")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "soak.json")
    arguments = parser.parse_args()
    pool = RankPool()
    started = time.monotonic()
    generation: list[dict[str, Any]] = []
    try:
        with tempfile.TemporaryDirectory() as folder:
            model = Path(folder)
            tiny_models.save("llama", model)
            for ranks in (2, 4):
                for number, engine in enumerate(ENGINES):
                    steps = (arguments.steps + number) // len(ENGINES)
                    call = (drift.generate, model, engine, steps, arguments.backend, 10 * ranks + number)
                    generation.append(_together(pool.run(*call, world_size=ranks, timeout=HOUR)))
            call = (drift.reinstall, model, "megatron", arguments.times, min(100, arguments.times // 2))
            reinstallation = _together(pool.run(*call, world_size=2, timeout=HOUR))
    finally:
        pool.close()
    files.write_json(
        arguments.out,
        {
            "command": "make soak",
            "environment": environment.describe(torch.device("cpu")),
            "seconds": round(time.monotonic() - started),
            "codec_backend": arguments.backend,
            "steps_per_installation": drift.STEPS_PER_INSTALLATION,
            "generation": generation,
            "reinstallation": reinstallation,
        },
    )


def _together(by_rank: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures of all ranks as one: memory and objects of each, all else of the first."""
    each = {key: [figures[key] for figures in by_rank] for key in ("resident_mib", "objects") if key in by_rank[0]}
    shown = {**by_rank[0], **{f"{key}_by_rank": values for key, values in each.items()}}
    result = {key: value for key, value in shown.items() if key not in each}
    print(*(f"{key} {value}" for key, value in result.items() if not key.endswith("_by_rank")), flush=True)
    for key, values in each.items():
        for rank, value in enumerate(values):
            print(f"  rank {rank}, {key}: {value[0]} ... {value[-1]}", flush=True)
    return result


if __name__ == "__main__":
    main()
