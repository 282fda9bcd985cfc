"""The commands as a user starts them: bare, by the deepspeed launcher, by torchrun. Each costs seconds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engines import tiny_models

from megacomp import codecs
from megacomp.launch import distributed

CONFIG = {"megacomp": {"backend": "reference", "communication": {"codec": "int8", "min_bytes": 0}}}

TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node", 2, "-m")
DEEPSPEED = ("deepspeed.launcher.runner", "--num_gpus", 2)

# An inference script as DeepSpeed's documentation has them. Its shared-memory op is switched off because it
# is compiled for minutes when first used.
SCRIPT = """
import argparse, json, os, sys
import deepspeed, torch, transformers

parser = argparse.ArgumentParser()
parser.add_argument("--local_rank", type=int, required=True)
parser.add_argument("model")
arguments = parser.parse_args()
deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}
model = transformers.AutoModelForCausalLM.from_pretrained(arguments.model)
config = json.load(open(os.path.join(arguments.model, "ds.json")))
engine = deepspeed.init_inference(model, config={**config, "tensor_parallel": {"tp_size": 2}})
with torch.no_grad():
    engine(torch.arange(40)[None])
torch.distributed.destroy_process_group()
sys.exit(3)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mistral")
    tiny_models.save("mistral", folder)
    np.save(folder / "tokens.npy", np.random.default_rng(0).integers(0, 101, (4, 32)))
    (folder / "ds.json").write_text(json.dumps({"dtype": "fp32", **CONFIG}))
    (folder / "script.py").write_text(SCRIPT)
    return folder


def _start(*command: Any) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    environment |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = (sys.executable, "-m", *map(str, command))
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)


def _eval(folder: Path, engine: str, out: Path) -> list[Any]:
    return [
        *("--model", folder, "--tokens", folder / "tokens.npy", "--config", folder / "ds.json"),
        *("--engine", engine, "--dtype", "fp32", "--json", out),
    ]


def test_eval_starts_its_ranks_and_torchrun_gives_it_some(folder: Path, tmp_path: Path) -> None:
    out = {engine: tmp_path / f"{engine}.json" for engine in ("deepspeed", "megatron")}
    bare = _start("megacomp.launch.cli", "eval", "--tp", 2, *_eval(folder, "deepspeed", out["deepspeed"]))
    assert bare.returncode == 0, bare.stderr
    assert bare.stdout.count("perplexity") == 1
    given = _start(*TORCHRUN, "megacomp.launch.eval", *_eval(folder, "megatron", out["megatron"]))
    assert given.returncode == 0, given.stderr
    rows = [json.loads(path.read_text()) for path in out.values()]
    for row in rows:
        assert (row["tp"], row["codec"]) == (2, "int8")
        assert row["bits_per_value"] == pytest.approx(codecs.get("int8").bits_per_value(48))
        assert row["perplexity"] == pytest.approx(rows[0]["perplexity"], rel=2e-3)
        assert row["baseline_perplexity"] == pytest.approx(rows[0]["baseline_perplexity"], rel=1e-5)


def test_an_unmodified_script_under_the_deepspeed_launcher(folder: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    port = distributed._free_port()
    launch = (*DEEPSPEED, "--master_port", port, "--module", "megacomp.launch.run")
    done = _start(*launch, "--json", report, folder / "script.py", folder)
    assert done.returncode == 3, done.stderr
    sites = json.loads(report.read_text())["sites"]
    assert set(sites) == {f"layers.{layer}.{module}" for layer in (0, 1) for module in ("attention", "mlp")}
    assert {(site["calls"], site["rows"], site["codec"]) for site in sites.values()} == {(1, 40, "int8")}
    assert "layers.1.mlp" in done.stderr


def test_a_request_refused_in_the_ranks(folder: Path) -> None:
    done = _start(*TORCHRUN, "megacomp.launch.eval", *_eval(folder, "deepspeed", folder / "o.json"), "--tp", 4)
    assert done.returncode != 0
    assert "error: --tp 4, but the launcher started 2 ranks" in done.stderr
