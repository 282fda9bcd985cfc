"""Where the time of a call goes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal

Stage = Literal["encode", "wire", "decode"]


@dataclass
class Trace:
    """Seconds of the host's time in each stage, added up over the calls it is handed to.

    encode: in the codec's encode. wire: posting messages and blocked waiting for them; what a chunked
    pipeline hides behind encode and decode is not in it. decode: in the codec's decode and decode_sum, and in
    decode_sum_encode, the middle of two-shot, which is one operation though it encodes as well.
    On an accelerator kernels run after the call that launches them, so these are launch times only.
    """

    encode: float = 0.0
    wire: float = 0.0
    decode: float = 0.0

    @contextmanager
    def measure(self, stage: Stage) -> Iterator[None]:
        """Add the time inside the block to `stage`."""
        start = time.perf_counter()
        yield
        setattr(self, stage, getattr(self, stage) + time.perf_counter() - start)


def measured(trace: Trace | None, stage: Stage) -> AbstractContextManager[None]:
    """`trace.measure(stage)`, or nothing where nobody looks."""
    return nullcontext() if trace is None else trace.measure(stage)
