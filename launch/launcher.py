"""`python -m megacomp.launch.launcher`: the deepspeed launcher, with the same arguments, which can be terminated.

On one machine DeepSpeed's runner (0.17 to 0.19) dies of SIGTERM and leaves the process that it has started, and that
one's ranks, behind.
"""

from __future__ import annotations

import signal
import sys
from types import FrameType

GRACE_SECONDS = 40
"""For the ranks to end by themselves; DeepSpeed gives them 30 before it kills them."""


def main() -> None:
    """What `deepspeed` does with this program's arguments; SIGTERM ends the ranks first, then this, with code 143."""
    # Before DeepSpeed, which takes seconds: it starts nothing until it has been imported.
    signal.signal(signal.SIGTERM, _terminate)
    from deepspeed.launcher import runner

    runner.main()


def _terminate(number: int, frame: FrameType | None) -> None:
    import psutil  # of DeepSpeed's requirements

    own = psutil.Process()
    everyone, started = own.children(recursive=True), own.children()
    # They are told by the process between, which also reaps them.
    for process in started:
        process.terminate()
    psutil.wait_procs(started, timeout=GRACE_SECONDS)
    for process in everyone:
        if process.is_running():
            process.kill()
    sys.exit(128 + number)


if __name__ == "__main__":
    main()
