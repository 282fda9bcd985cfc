"""What happened at each site: calls, rows, bytes, declined messages, sampled noise."""

from __future__ import annotations

import logging
import math
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from megacomp.collectives import Traffic
    from megacomp.policy import Decline, Site

__all__ = ["GuardSamples", "SiteCounters", "Telemetry", "energies", "sqnr_db"]

_log = logging.getLogger("megacomp")


def energies(exact: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
    """float64 [2]: the energy of an exact result (fp32) and of the difference of the compressed one from it."""
    pair = (exact, result.float() - exact)
    # float64, for squares of large activations leave the range of float32.
    return torch.stack([torch.linalg.vector_norm(x, dtype=torch.float64).square() for x in pair])


def sqnr_db(signal: float, noise: float) -> float | None:
    """10 log10 of signal energy over noise energy; None without both."""
    measured = 0 < signal < math.inf and 0 < noise < math.inf
    return 10 * (math.log10(signal) - math.log10(noise)) if measured else None


@dataclass(frozen=True)
class GuardSamples:
    """What the numerical guard found at one site.

    samples: messages it held against the exact result.
    last_sqnr_db, lowest_sqnr_db: signal-to-quantization-noise ratio of the last of them, and of the worst; None where
        there was none to measure (no noise, no signal, or a NaN).
    switched_off: why the site is no longer compressed; None if it is.
    """

    samples: int = 0
    last_sqnr_db: float | None = None
    lowest_sqnr_db: float | None = None
    switched_off: str | None = None

    def with_sample(self, found: float | None, switched_off: str | None) -> GuardSamples:
        """These and one more, of SQNR `found`."""
        measured = [value for value in (self.lowest_sqnr_db, found) if value is not None]
        return GuardSamples(self.samples + 1, found, min(measured, default=None), switched_off or self.switched_off)


@dataclass
class SiteCounters:
    """The running totals of one site on this rank; of a CUDA graph, its capture counts and no replay does.

    calls: messages compressed.
    rows: rows of those messages (tokens, for a reduction).
    bytes_sent: bytes this rank put on the wire for them.
    plain_bytes: bytes it would have sent by the same algorithm uncompressed, in the tensor's dtype.
    declined: messages left to the original collective, by reason.
    codecs: names of the codecs used, with the calls of each.
    guard: what the numerical guard found.
    """

    calls: int = 0
    rows: int = 0
    bytes_sent: int = 0
    plain_bytes: int = 0
    declined: Counter[str] = field(default_factory=Counter)
    codecs: Counter[str] = field(default_factory=Counter)
    guard: GuardSamples = field(default_factory=GuardSamples)
    # float64 [2] on the device of the tensors: energy of the exact results and of the differences. Kept there,
    # for reading a value at every sampled call would make the host wait for the device.
    _energies: torch.Tensor | None = None

    def count(self, codec: str, rows: int, traffic: Traffic) -> None:
        """Count one compressed message."""
        self.calls += 1
        self.rows += rows
        self.bytes_sent += traffic.sent
        self.plain_bytes += traffic.uncompressed
        self.codecs[codec] += 1

    @property
    def ratio(self) -> float | None:
        """Uncompressed bytes over sent bytes; None before the first call."""
        return self.plain_bytes / self.bytes_sent if self.bytes_sent else None

    @property
    def sqnr_db(self) -> float | None:
        """10 log10 of signal energy over noise energy of all sampled calls; None without both."""
        if self._energies is None:
            return None
        return sqnr_db(*self._energies.tolist())

    def sample(self, exact: torch.Tensor, result: torch.Tensor) -> None:
        """Add the energies of an exact result (fp32) and of the compressed one's difference from it."""
        found = energies(exact, result)
        self._energies = found if self._energies is None else self._energies + found


class Telemetry:
    """The counters of every site, and of what came from none.

    sites: by name, in the order in which they were learned.
    outside: messages from no site (embedding, output layer, expert counts), all left exact.
    """

    def __init__(self) -> None:
        self.sites: dict[str, SiteCounters] = {}
        self.outside = 0
        self._logged: set[Decline] = set()

    def at(self, site: Site) -> SiteCounters:
        """The counters of `site`, zero at first. Sites of equal names share them."""
        counters = self.sites.get(site.name)
        if counters is None:
            counters = self.sites[site.name] = SiteCounters()
        return counters

    def decline(self, site: Site | None, reason: Decline) -> None:
        """Count a message of `site`, or of none, that is left exact; log each reason the first time."""
        if site is None:
            self.outside += 1
        else:
            self.at(site).declined[reason.key] += 1
        if reason not in self._logged:
            self._logged.add(reason)
            where = "outside of all sites" if site is None else f"at {site.name}"
            _log.info("a message %s is left exact: %s (logged once, counted always)", where, reason.why)
