"""What fusing the sum, the residual and the norm saves on the CPU: one call against three.

python -m benchmarks.reduce_norm
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from megacomp import codecs
from megacomp.kernels import reduce_norm

CODECS = ("mxfp4", "nvfp4", "int8")
ROWS, FEATURES, PEERS = 2048, 4096, 2
REPEATS = 10


def milliseconds(call: Callable[[], object]) -> float:
    """The fastest of a few calls, compilation aside."""
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return 1e3 * min(times)


@torch.inference_mode()
def main() -> None:
    """Prints a table in Markdown."""
    torch.set_num_threads(1)
    residual = torch.randn(ROWS, FEATURES).bfloat16()
    weight = torch.ones(FEATURES, dtype=torch.bfloat16)
    total, new_residual, normalized = (torch.empty_like(residual) for _ in range(3))
    print(f"{PEERS} wires of {ROWS} x {FEATURES} bf16 values, one thread, torch {torch.__version__}.\n")
    print("| codec | one after the other, ms | fused, ms |\n|---|---|---|")
    for name in CODECS:
        codec = codecs.get(name)
        wires = torch.stack([codec.encode(torch.randn(ROWS, FEATURES)) for _ in range(PEERS)])

        def separate(codec: codecs.Codec = codec, wires: torch.Tensor = wires) -> torch.Tensor:
            codec.decode_sum(wires, FEATURES, torch.bfloat16, out=total)
            return torch.nn.functional.rms_norm(total.add_(residual), (FEATURES,), weight, 1e-5)

        def fused(codec: codecs.Codec = codec, wires: torch.Tensor = wires) -> None:
            reduce_norm(codec.format, wires, residual, weight, 1e-5, new_residual, normalized, codec.backend)

        print(f"| {name} | {milliseconds(separate):.0f} | {milliseconds(fused):.0f} |")


if __name__ == "__main__":
    main()
