"""SIGTERM while `megacomp run` serves over several ranks: nobody is left behind, and no file is half written."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from rank_pool import RankError, RankPool

from megacomp.launch import files

pytest.importorskip("deepspeed")

SCRIPT = """
import os, pathlib, sys, time
pathlib.Path(sys.argv[1], f"pid-{os.environ['RANK']}").write_text(str(os.getpid()))
time.sleep(600)
"""


def test_sigterm_ends_every_rank(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "ds.json").write_text(json.dumps({"megacomp": {"communication": {"codec": "int8"}}}))
    options = ["--tp", "2", "--config", "ds.json", "--json", "report.json", "script.py", str(tmp_path)]
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    run = subprocess.Popen(
        [sys.executable, "-m", "megacomp.launch.cli", "run", *options],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    started: list[psutil.Process] = []
    try:
        deadline = time.monotonic() + 120
        while len(list(tmp_path.glob("pid-*"))) < 2 and run.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        started = psutil.Process(run.pid).children(recursive=True)
        assert len(started) == 3, "DeepSpeed's launcher and two ranks"
        run.send_signal(signal.SIGTERM)
        assert run.wait(60) == 128 + signal.SIGTERM
        assert not [process for process in started if process.is_running()]
        assert not (tmp_path / "report.json").exists()
    finally:
        for process in [*started, run]:
            if isinstance(process, subprocess.Popen) or process.is_running():
                process.kill()


def _killed_while_writing(path: Path) -> None:
    with files.replacing(path) as file:
        file.write(b'{"half": ')
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_file_is_written_whole_or_not_at_all(ranks: RankPool, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    files.write_json(path, {"old": 1})
    with pytest.raises(RankError, match="exit code -9"):
        ranks.run(_killed_while_writing, path, world_size=1)
    assert json.loads(path.read_text()) == {"old": 1}
