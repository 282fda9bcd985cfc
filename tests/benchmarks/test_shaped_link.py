"""Links of a chosen rate: made, used and gone again, or refused with the reason. What passes over them is not timed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from benchmarks import shaped_link, ttft_link
from megacomp.launch.errors import LaunchError

needs_namespaces = pytest.mark.skipif(shaped_link.problem() is not None, reason=str(shaped_link.problem()))

# Every rank sends its number to rank 0 over the link, which writes down what came and from where.
MEETING = """
import json, os, socket, sys, time
rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
if rank == 0:
    server = socket.create_server(address)
    found = {}
    for _ in range(ranks - 1):
        peer, (host, _) = server.accept()
        found[peer.recv(10).decode()] = host
    json.dump({"found": found, "interface": os.environ["GLOO_SOCKET_IFNAME"], "devices": os.listdir("/sys/class/net")},
              open(sys.argv[1], "w"))
else:
    while True:
        try:
            with socket.create_connection(address, timeout=5) as peer:
                peer.send(str(rank).encode())
            break
        except ConnectionRefusedError:
            time.sleep(0.05)
"""


def namespaces() -> list[str]:
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout.split()
    return [name for name in listed if name.startswith(f"{shaped_link.PREFIX}-{os.getpid()}-")]


@needs_namespaces
@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_meet_over_the_link_and_nothing_is_left(tmp_path: Path, ranks: int) -> None:
    script, told = tmp_path / "meeting.py", tmp_path / "told.json"
    script.write_text(MEETING)
    with shaped_link.network(ranks) as link:
        for rate in (None, 1000.0, 50.0):
            link.shape(rate)
        shown = subprocess.run(
            ["tc", "-n", link.namespace(0), "qdisc", "show", "dev", shaped_link.INTERFACE],
            capture_output=True,
            text=True,
        )
        assert "tbf" in shown.stdout and "50Mbit" in shown.stdout
        assert shaped_link.run(link, [str(script), str(told)]) == 0
        assert len(namespaces()) == ranks + (ranks > 2)
    assert not namespaces()
    said = json.loads(told.read_text())
    assert said["found"] == {str(rank): f"10.77.0.{rank + 1}" for rank in range(1, ranks)}
    assert said["interface"] in said["devices"]


@needs_namespaces
def test_a_rank_that_fails_ends_the_others(tmp_path: Path) -> None:
    script = tmp_path / "failing.py"
    script.write_text("import os, sys, time\nsys.exit(3) if os.environ['RANK'] == '1' else time.sleep(60)\n")
    with pytest.raises(ZeroDivisionError), shaped_link.network(2) as link:
        assert shaped_link.run(link, [str(script)]) == 3
        raise ZeroDivisionError
    assert not namespaces()


@needs_namespaces
def test_an_interrupted_program_cleans_up(tmp_path: Path) -> None:
    (tmp_path / "sleeping.py").write_text(
        f"import os, pathlib, time\npathlib.Path({str(tmp_path)!r}, os.environ['RANK']).touch()\ntime.sleep(60)\n"
    )
    command = [sys.executable, "-m", "benchmarks.shaped_link", "--tp", "2", "--mbit", "100", "sleeping"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    program = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while not all((tmp_path / rank).exists() for rank in "01"):
            assert program.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        program.send_signal(signal.SIGTERM)
        assert program.wait(timeout=30) != 0
    finally:
        program.kill()
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
    assert f"{shaped_link.PREFIX}-{program.pid}-" not in listed


@needs_namespaces
def test_what_a_killed_program_left_is_removed_by_the_next() -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    left = f"{shaped_link.PREFIX}-{gone.pid}-0"
    subprocess.run(["ip", "netns", "add", left], check=True)
    with shaped_link.network(2):
        listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
        assert left not in listed


@pytest.mark.parametrize(("root", "programs", "word"), [(False, True, "root"), (True, False, "iproute2")])
def test_without_root_or_iproute2_it_says_so(
    monkeypatch: pytest.MonkeyPatch, root: bool, programs: bool, word: str
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0 if root else 1000)
    monkeypatch.setattr(shutil, "which", lambda name: f"/sbin/{name}" if programs else None)
    with pytest.raises(LaunchError, match=word), shaped_link.network(2):
        pass
    result = CliRunner().invoke(ttft_link.app, [])
    assert result.exit_code == 2 and word in result.output and "Traceback" not in result.output


def test_a_rank_that_is_on_no_link_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MEGACOMP_LINK", raising=False)
    with pytest.raises(LaunchError, match="shaped_link"):
        shaped_link.Link.current()
    monkeypatch.setenv("MEGACOMP_LINK", "a/²")
    with pytest.raises(LaunchError, match="shaped_link"):
        shaped_link.Link.current()
