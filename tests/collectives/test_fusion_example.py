"""The worked example of docs/fusion.md does what a model of separate steps does."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from collective_cases import same_bits, sqnr_db
from rank_pool import RankPool

import megacomp

HIDDEN, LAYERS = 64, 3


def example() -> dict[str, Any]:
    """What the document's Python defines."""
    text = (Path(__file__).parents[2] / "docs" / "fusion.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(code, "docs/fusion.md", "exec"), names)
    return names


class Half(torch.nn.Module):
    """Half of a layer, split over the ranks: its result is a partial."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        world_size, rank = dist.get_world_size(), dist.get_rank()
        inner, outer = torch.randn(2, HIDDEN, 4 * HIDDEN, generator=generator) / HIDDEN**0.5 / 2
        self.inner, self.outer = inner.chunk(world_size, 1)[rank], outer.chunk(world_size, 1)[rank]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x @ self.inner) @ self.outer.T


def _both_ways() -> tuple[torch.Tensor, torch.Tensor]:
    names = example()
    norms = [torch.nn.RMSNorm(HIDDEN, eps=1e-5) for _ in range(2 * LAYERS + 1)]
    halves = [Half(seed) for seed in range(2 * LAYERS)]
    for index, norm in enumerate(norms):
        torch.nn.init.uniform_(norm.weight, 0.5, 1 + index)
        dist.broadcast(norm.weight.data, 0)
    layers = [names["Layer"](*halves[at : at + 2], *norms[at + 1 : at + 3]) for at in range(0, 2 * LAYERS, 2)]
    hidden = torch.randn(10, HIDDEN, generator=torch.Generator().manual_seed(1))
    # The definitions will do; compiling them takes half a minute.
    without_compiler = patch("megacomp.kernels.backend.compiler_problem", return_value="not here")
    with without_compiler, torch.inference_mode():
        fused = names["run"](layers, norms[0], hidden)
        for norm, half in zip(norms, halves, strict=False):
            hidden = hidden + megacomp.all_reduce(half(norm(hidden)), "mxfp4")
        return fused, norms[-1](hidden)


def test_the_example_is_a_transformer(ranks: RankPool) -> None:
    results = ranks.run(_both_ways)
    for fused, separate in results:
        # float32 throughout, so roundings differ in the last place, and now and then a code at the brink.
        assert sqnr_db(fused, separate) > 40
        assert same_bits(fused, results[0][0])
