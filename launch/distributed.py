"""How the ranks of a command come to be: from a launcher, as one process alone, or by a launch of our own.

A command runs in one of three settings: under a launcher (the `deepspeed` one or torchrun), which has set
RANK, LOCAL_RANK and WORLD_SIZE for every process it started; bare with one rank; or bare with `--tp N`, when
it replaces itself by the deepspeed launcher running N of it.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist
from packaging.version import Version
from torch.distributed.rendezvous import rendezvous

from megacomp.launch.errors import LaunchError

T = TypeVar("T")


def launched_world_size() -> int | None:
    """The number of ranks a launcher started; None without a launcher.

    Raises LaunchError if the environment is not a launcher's: a number missing or no number.
    """
    if "WORLD_SIZE" not in os.environ and "RANK" not in os.environ:
        return None
    return _environment_count("WORLD_SIZE")


def rank() -> int:
    """This process's rank, known before any process group exists; 0 without a launcher."""
    return _environment_count("RANK") if launched_world_size() is not None else 0


def default_device() -> torch.device:
    """This rank's GPU (by LOCAL_RANK) where there is one, else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def ensure_ranks(tp: int | None, module: str, arguments: Sequence[str]) -> int:
    """The tensor-parallel size to run at, once there are that many ranks.

    Under a launcher that is its world size, which `tp` must equal if given. Without one, `tp` ranks (default
    1): more than one replaces this process by `deepspeed --num_gpus tp --module module arguments` (`launcher.py`) and
    does not return.

    Raises LaunchError on a mismatch, without the deepspeed launcher, or with fewer GPUs than ranks.
    """
    if tp is not None and tp < 1:
        raise LaunchError(f"--tp must be at least 1, not {tp}")
    world_size = launched_world_size()
    if world_size is not None:
        if tp not in (None, world_size):
            raise LaunchError(
                f"--tp {tp}, but the launcher started {world_size} rank{'s' * (world_size > 1)}: "
                f"leave --tp out or make the two equal"
            )
        return world_size
    if tp is None or tp == 1:
        return 1
    _relaunch(tp, module, arguments)


def of_rank_0(value: T, group: dist.ProcessGroup) -> T:
    """What rank 0 of `group` brings, on every rank, all of which call this: clocks and files are each rank's own."""
    if dist.get_world_size(group) == 1:
        return value
    said = [value]
    dist.broadcast_object_list(said, dist.get_global_rank(group, 0), group)
    return said[0]


@contextmanager
def process_group(tp: int, device: torch.device) -> Iterator[None]:
    """A default process group of exactly `tp` ranks inside the `with` block: nccl on GPUs, gloo on CPUs.

    One that is already there is used and left alone; one made here is destroyed at the end.
    Raises LaunchError if the group there is, or the launcher's environment, has another size.
    """
    if dist.is_initialized():
        _check_size(dist.get_world_size(), tp)
        yield
        return
    world_size = launched_world_size()
    _check_size(world_size or 1, tp)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    if world_size is None:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    else:
        # A second group over the same store would find the addresses of the first one's ranks.
        generation = (_launcher_store().add("megacomp/ranks", 1) - 1) // world_size
        store = dist.PrefixStore(f"megacomp/{generation}", _launcher_store())
        dist.init_process_group(backend, store=store, rank=rank(), world_size=world_size)
    try:
        yield
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


@cache
def _launcher_store() -> dist.Store:
    """The launcher's rendezvous. One for the life of the process: rank 0 may be the one that serves it."""
    return next(rendezvous("env://"))[0]


def _check_size(world_size: int, tp: int) -> None:
    if world_size != tp:
        raise LaunchError(
            f"tensor-parallel size {tp}, but there {'is' if world_size == 1 else 'are'} {world_size} "
            f"rank{'s' * (world_size > 1)}: one model runs on all of them"
        )


def _relaunch(tp: int, module: str, arguments: Sequence[str]) -> NoReturn:
    if find_spec("deepspeed") is None:
        raise LaunchError(
            f"--tp {tp} starts its ranks with the deepspeed launcher, which is not installed "
            f"(pip install 'megacomp[deepspeed]'); "
            f"torchrun --nproc-per-node {tp} -m {module} works without it"
        )
    if torch.cuda.is_available() and torch.cuda.device_count() < tp:
        raise LaunchError(f"--tp {tp}, but this machine has {torch.cuda.device_count()} GPUs")
    # The launcher's own port is fixed, so two runs at a time would meet there; and its ranks are to be on
    # this machine whatever hosts its default hostfile may list.
    options = ["--num_gpus", str(tp), "--master_port", str(_free_port()), "--hostfile", os.devnull]
    if Version(metadata.version("deepspeed")) >= Version("0.18"):
        options.append("--quiet")
    command = [sys.executable, "-m", "megacomp.launch.launcher", *options]
    command += ["--no_local_rank", "--module", module, *arguments]
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, command, {**_rank_environment(tp), **os.environ})


def _rank_environment(tp: int) -> dict[str, str]:
    """What ranks sharing one machine want, where the user has not said otherwise."""
    if torch.cuda.is_available():
        return {}
    # Left alone, every rank would use every core; and DeepSpeed would say that it looked for a GPU in vain.
    environment = {
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // tp)),
    }
    # gloo otherwise looks up this machine's name, which in containers often has no address.
    if Path("/sys/class/net/lo").exists():
        environment["GLOO_SOCKET_IFNAME"] = "lo"
    return environment


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _environment_count(name: str) -> int:
    value = os.environ.get(name, "")
    if not value.isdecimal():
        raise LaunchError(
            f"the environment variable {name} is {value!r}: a launcher sets RANK, LOCAL_RANK and WORLD_SIZE"
        )
    return int(value)
