"""How many ranks a command runs on, and where they come from."""

from __future__ import annotations

import os
import sys
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rank_pool import RankPool

from megacomp.launch import distributed
from megacomp.launch.errors import LaunchError


@pytest.fixture
def bare(no_launcher: None, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """No launcher's environment."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    return monkeypatch


def _ensure(tp: int | None) -> int:
    return distributed.ensure_ranks(tp, "megacomp.launch.eval", ["--model", "m", "--tp", str(tp)])


def test_one_rank_needs_no_launcher(bare: pytest.MonkeyPatch) -> None:
    assert (_ensure(None), _ensure(1), distributed.rank()) == (1, 1, 0)
    with pytest.raises(LaunchError, match="--tp must be at least 1, not 0"):
        _ensure(0)


def test_under_a_launcher_its_size_counts(bare: pytest.MonkeyPatch) -> None:
    bare.setenv("WORLD_SIZE", "2")
    bare.setenv("RANK", "1")
    assert (_ensure(None), _ensure(2), distributed.rank()) == (2, 2, 1)
    with pytest.raises(LaunchError, match="--tp 4, but the launcher started 2 ranks: leave --tp out"):
        _ensure(4)
    for size in ("two", "²"):
        bare.setenv("WORLD_SIZE", size)
        with pytest.raises(LaunchError, match=f"the environment variable WORLD_SIZE is '{size}'"):
            _ensure(None)


def test_more_ranks_replace_the_process_by_the_deepspeed_launcher(bare: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def execve(*arguments: Any) -> None:
        seen.append(arguments)
        raise SystemExit

    bare.setattr(os, "execve", execve)
    with pytest.raises(SystemExit):
        _ensure(2)
    ((program, command, environment),) = seen
    assert program == command[0] == sys.executable
    assert command[1:5] == ["-m", "megacomp.launch.launcher", "--num_gpus", "2"]
    assert command[command.index("--module") :] == ["--module", "megacomp.launch.eval", "--model", "m", "--tp", "2"]
    assert 0 < int(command[command.index("--master_port") + 1]) < 65536
    if not torch.cuda.is_available():
        assert int(environment["OMP_NUM_THREADS"]) >= 1
    bare.setenv("OMP_NUM_THREADS", "7")
    with pytest.raises(SystemExit):
        _ensure(2)
    assert seen[1][2]["OMP_NUM_THREADS"] == "7"


def test_no_deepspeed_launcher(bare: pytest.MonkeyPatch) -> None:
    bare.setattr(distributed, "find_spec", lambda name: None)
    with pytest.raises(LaunchError, match=r"not installed .*torchrun --nproc-per-node 2 -m megacomp.launch.eval"):
        _ensure(2)


def _group_sizes() -> tuple[int, str]:
    with distributed.process_group(dist.get_world_size(), torch.device("cpu")):
        inside = dist.get_world_size()
    try:
        with distributed.process_group(5, torch.device("cpu")):
            return inside, "no error"
    except LaunchError as error:
        return inside, str(error)


def test_a_process_group_that_is_there_is_used(ranks: RankPool) -> None:
    for inside, message in ranks.run(_group_sizes):
        assert inside == 2
        assert message.startswith("tensor-parallel size 5, but there are 2 ranks: ")


def test_a_process_group_of_one(bare: pytest.MonkeyPatch) -> None:
    with distributed.process_group(1, torch.device("cpu")):
        assert dist.get_backend() == "gloo"
    assert not dist.is_initialized()
