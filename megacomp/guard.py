"""The numerical guard: a compressed result held against the exact one, and what follows for its site."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist

from megacomp.collectives.links import all_gather_single
from megacomp.telemetry import energies, sqnr_db

if TYPE_CHECKING:
    from megacomp.config import Guard as Settings

__all__ = ["Guard", "Verdict"]

_log = logging.getLogger("megacomp")


class Verdict(NamedTuple):
    """On one message.

    sqnr_db: its signal-to-quantization-noise ratio; None if there is none to measure.
    too_noisy: what is wrong with it; None if nothing is.
    """

    sqnr_db: float | None
    too_noisy: str | None


class Guard:
    """Judges sampled messages, alike on every rank of their group.

    every: judge every this many compressed messages of a site within a group; 0: none.
    """

    def __init__(self, settings: Settings | None) -> None:
        """settings: None for a guard that never judges."""
        self.every = 0 if settings is None else settings.every
        self._bound = -math.inf if settings is None else settings.min_sqnr_db

    def judge(self, exact: torch.Tensor, result: torch.Tensor, group: dist.ProcessGroup) -> Verdict | None:
        """The verdict on one message; all ranks of `group` must call this, and all get the same.

        exact, result: fp32 and as compressed; this rank's share if it was a reduce-scatter.

        None for a message whose exact result the plain collective could not have held either, because it has a NaN
        or an Inf in the dtype of `result`: that says nothing about a codec.
        """
        overflown = (~exact.to(result.dtype).isfinite()).sum()
        mine = torch.cat([energies(exact, result), overflown.double().view(1)])
        told = mine.new_empty(group.size() * 3)
        # Gathered and not reduced: moving changes no bits, and the same additions follow on every host. Were it left to
        # each rank alone, one rounding of one of them could have it wait in another collective than the others.
        all_gather_single(told, mine, group=group)
        signal, noise, not_finite = (sum(column) for column in zip(*told.view(-1, 3).tolist(), strict=True))
        if not_finite:
            return None
        found = sqnr_db(signal, noise)
        return Verdict(found, self._too_noisy(found, noise))

    def _too_noisy(self, found: float | None, noise: float) -> str | None:
        if not math.isfinite(noise):
            return "NaN or Inf where the exact result is finite"
        if noise == 0 or (found is not None and found >= self._bound):
            return None
        what = "noise where the exact result is zero" if found is None else f"SQNR {found:.1f} dB"
        return f"{what}, the bound is {self._bound:g} dB"

    @staticmethod
    def warn(site: str, group: dist.ProcessGroup, why: str) -> None:
        """Say, once in a group, that `site` is switched off."""
        if group.rank() == 0:
            _log.warning(
                "the guard switches compression off at %s (%d ranks): %s; exact until installed again",
                *(site, group.size(), why),
            )
