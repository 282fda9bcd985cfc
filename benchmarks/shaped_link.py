"""Ranks of one machine, each in a network namespace, joined by a link of a chosen rate.

python -m benchmarks.shaped_link --tp 2 --mbit 1000 benchmarks.tp_dequant --out FILE.json --link "1 Gbit/s"

runs a module in every rank, with the environment of a launcher. Two ranks share a cable; more hang on a switch, a cable
each. Every cable carries the rate in both directions at once (tbf at each end). Needs root and iproute2. Namespaces
vanish with the program, however it ends, unless it is killed outright; then the next one removes them.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Annotated

import typer

from megacomp.launch import ranked
from megacomp.launch.errors import LaunchError

PREFIX = "megacomp-link"
INTERFACE = "eth0"
PORT = 29500

BURST_SECONDS = 0.6e-3
SMALLEST_BURST = 12 * 1024
"""A cable that was idle lets pass at once what it carries in that time, and at least some packets. Measured: at
1 Gbit/s 72 KiB reach the rate, and 64 KiB, less than the largest packet that the kernel hands down, half of it."""

QUEUE_BYTES = 4 * 2**20
"""Room for what a rank has under way, so that hardly anything is lost and TCP does not slow down."""

_VARIABLE = "MEGACOMP_LINK"


@dataclass(frozen=True)
class Link:
    """The namespaces of `ranks` ranks, named after `name`; made by `network`."""

    name: str
    ranks: int

    @classmethod
    def current(cls) -> Link:
        """The link that this process is a rank on. LaunchError if it is on none."""
        name, _, ranks = os.environ.get(_VARIABLE, "").partition("/")
        if not ranks.isdecimal():
            raise LaunchError("this is to run in the ranks of benchmarks.shaped_link")
        return cls(name, int(ranks))

    def namespace(self, rank: int) -> str:
        return f"{self.name}-{rank}"

    @property
    def switch(self) -> str:
        return f"{self.name}-switch"

    def shape(self, mbit: float | None) -> None:
        """From now on every cable carries `mbit` Mbit/s in each direction; None for as fast as the machine can."""
        ends = [(self.namespace(rank), INTERFACE) for rank in range(self.ranks)]
        if self.ranks > 2:
            ends += [(self.switch, f"port{rank}") for rank in range(self.ranks)]
        for namespace, device in ends:
            if mbit is None:
                _run("tc", "-n", namespace, "qdisc", "replace", "dev", device, "root", "pfifo", "limit", "100000")
                continue
            burst = max(SMALLEST_BURST, int(mbit * 1e6 / 8 * BURST_SECONDS))
            shaping = ("rate", f"{round(mbit * 1000)}kbit", "burst", f"{burst}", "limit", f"{QUEUE_BYTES}")
            _run("tc", "-n", namespace, "qdisc", "replace", "dev", device, "root", "tbf", *shaping)

    def environment(self, rank: int) -> dict[str, str]:
        """What a launcher would set for `rank`, and that its messages are to take the link."""
        return {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(self.ranks),
            "LOCAL_SIZE": str(self.ranks),
            "MASTER_ADDR": _address(0),
            "MASTER_PORT": str(PORT),
            "GLOO_SOCKET_IFNAME": INTERFACE,
            "DS_ACCELERATOR": "cpu",
            # Freed memory is kept, as GPUs' allocators do: page faults are otherwise over half of Megatron's prefill.
            "MALLOC_MMAP_MAX_": "0",
            "MALLOC_TRIM_THRESHOLD_": "8000000000",
            # Namespaces have no names to look up, which torch.distributed would warn of.
            "TORCH_CPP_LOG_LEVEL": "ERROR",
            "OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // self.ranks)),
            _VARIABLE: f"{self.name}/{self.ranks}",
        }


def problem() -> str | None:
    """Why links cannot be made here; None if they can."""
    missing = [program for program in ("ip", "tc") if shutil.which(program) is None]
    if missing:
        return f"{' and '.join(missing)} not found: shaping a link needs iproute2 (apt-get install iproute2)"
    if os.geteuid() != 0:
        return "making network namespaces and shaping a link needs root"
    probe = f"{PREFIX}-{os.getpid()}-probe"
    try:
        _run("ip", "netns", "add", probe)
        _run("ip", "netns", "del", probe)
    except LaunchError as error:
        return f"network namespaces cannot be made here: {error}"
    return None


@contextmanager
def network(ranks: int) -> Iterator[Link]:
    """The namespaces of `ranks` ranks, not shaped yet, until the end of the `with` block.

    Raises LaunchError, before anything is made, if they cannot be.
    """
    if why := problem():
        raise LaunchError(why)
    _remove_stale()
    link = Link(f"{PREFIX}-{os.getpid()}", ranks)
    with ExitStack() as undo:
        namespaces = [link.namespace(rank) for rank in range(ranks)] + ([link.switch] if ranks > 2 else [])
        for namespace in namespaces:
            undo.callback(_run, "ip", "netns", "del", namespace)
            _run("ip", "netns", "add", namespace)
            _run("ip", "-n", namespace, "link", "set", "lo", "up")
        if ranks > 2:
            _run("ip", "-n", link.switch, "link", "add", "bridge", "type", "bridge")
            _run("ip", "-n", link.switch, "link", "set", "bridge", "up")
            for rank in range(ranks):
                port = f"port{rank}"
                _cable(link.namespace(rank), INTERFACE, link.switch, port)
                _run("ip", "-n", link.switch, "link", "set", port, "master", "bridge", "up")
        else:
            _cable(link.namespace(0), INTERFACE, link.namespace(1), INTERFACE)
        for rank in range(ranks):
            inside = ("ip", "-n", link.namespace(rank))
            _run(*inside, "address", "add", f"{_address(rank)}/24", "dev", INTERFACE)
            _run(*inside, "link", "set", INTERFACE, "up")
        yield link


def run(link: Link, arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> int:
    """Run `python arguments` in every rank of the link; the first exit code other than 0, or 0.

    Ranks that are left when one has failed, or when this is interrupted, are ended.
    """
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(link.ranks):
            inside = ("ip", "netns", "exec", link.namespace(rank), sys.executable, *arguments)
            variables = {**os.environ, **link.environment(rank), **(environment or {})}
            processes.append(subprocess.Popen(inside, env=variables))
        while True:
            codes = [process.poll() for process in processes]
            if failed := [code for code in codes if code]:
                return failed[0]
            if all(code == 0 for code in codes):
                return 0
            time.sleep(0.05)
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()


@contextmanager
def interruptible() -> Iterator[None]:
    """Within the block SIGTERM and SIGHUP end the program as Ctrl-C does: it cleans up first."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _address(rank: int) -> str:
    return f"10.77.0.{rank + 1}"


def _cable(namespace: str, device: str, other: str, other_device: str) -> None:
    cable = ("link", "add", device, "netns", namespace, "type", "veth", "peer", "name", other_device, "netns", other)
    _run("ip", *cable)


def _remove_stale() -> None:
    """Remove what programs that are gone have left."""
    for name in _run("ip", "netns", "list").split():
        owner = re.fullmatch(rf"{PREFIX}-(\d+)-\w+", name)
        if owner is not None and not os.path.exists(f"/proc/{owner[1]}"):  # noqa: PTH110 -- no path of ours
            _run("ip", "netns", "del", name)


def _run(*words: str) -> str:
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise LaunchError(f"`{' '.join(words)}` failed: {done.stderr.strip()}")
    return done.stdout


def main(
    ctx: typer.Context,
    module: Annotated[str, typer.Argument(help="The module to run in every rank; its arguments follow.")],
    tp: Annotated[int, typer.Option(min=2, max=8, help="Ranks.")] = 2,
    mbit: Annotated[float | None, typer.Option(min=1, help="Mbit/s of every cable, in each direction.")] = None,
) -> None:
    """Run a module in ranks that a link of a chosen rate joins."""
    with interruptible(), network(tp) as link:
        link.shape(mbit)
        code = run(link, ["-m", module, *ctx.args])
    raise typer.Exit(code)


app = ranked.single(main, context_settings={"allow_interspersed_args": False, "allow_extra_args": True})

if __name__ == "__main__":
    app()
