"""What an installation patched and what it has done so far, for people and for machines."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from megacomp.telemetry import GuardSamples

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = ["FrameworkReport", "Report", "SiteReport"]


@dataclass(frozen=True)
class FrameworkReport:
    """One framework: its version, and the full paths of what is patched in it.

    version: None while it has not been imported; it is patched as soon as it is.
    """

    name: str
    version: str | None
    patches: tuple[str, ...]


@dataclass(frozen=True)
class SiteReport:
    """One site on this rank.

    calls: messages compressed.
    rows: rows of those messages.
    bytes_sent: bytes this rank put on the wire for them.
    plain_bytes: bytes it would have sent by the same algorithm uncompressed.
    ratio: plain_bytes / bytes_sent; None before the first call.
    declined: messages left to the original collective, by reason.
    codec: the codecs used so far, separated by commas; None before the first call.
    sqnr_db: signal-to-quantization-noise ratio of the sampled calls in dB; None if nothing was sampled.
    guard: what the numerical guard found, and whether it has switched the site off.
    """

    calls: int
    rows: int
    bytes_sent: int
    plain_bytes: int
    ratio: float | None
    declined: Mapping[str, int]
    codec: str | None
    sqnr_db: float | None
    guard: GuardSamples = field(default_factory=GuardSamples)


@dataclass(frozen=True)
class Report:
    """What was patched, where, for which version; what every site sent and saved; what was declined and why.

    version: of megacomp.
    active: whether the installation is still in place.
    config: the canonical "megacomp" section.
    digest: SHA-256 of it.
    sites: by name, "layers.3.attention".
    outside: messages from no site (embedding, output layer, expert counts), all left exact.
    not_covered: layers of the given model that reduce where no patch sees them, by name, and why.
    quantized: layers of the given model that hold GPTQ weights, by name, and the order of their features:
        "tp_aware", or "local" (always so in attention).
    tuning: where something is "tuned", the file that counts for so many ranks, or why the defaults do.
    """

    version: str
    active: bool
    config: Mapping[str, Any]
    digest: str
    frameworks: tuple[FrameworkReport, ...]
    sites: Mapping[str, SiteReport]
    outside: int
    not_covered: Mapping[str, str]
    quantized: Mapping[str, str] = field(default_factory=dict)
    tuning: Mapping[str, str] = field(default_factory=dict)

    @property
    def calls(self) -> int:
        """Messages compressed at all sites."""
        return sum(site.calls for site in self.sites.values())

    @property
    def bytes_sent(self) -> int:
        """Bytes this rank put on the wire at all sites."""
        return sum(site.bytes_sent for site in self.sites.values())

    @property
    def plain_bytes(self) -> int:
        """Bytes it would have sent uncompressed by the same algorithms."""
        return sum(site.plain_bytes for site in self.sites.values())

    @property
    def ratio(self) -> float | None:
        """plain_bytes / bytes_sent; None before the first call."""
        return self.plain_bytes / self.bytes_sent if self.bytes_sent else None

    @property
    def declined(self) -> dict[str, int]:
        """Messages left to the original collective at all sites, by reason."""
        total: Counter[str] = Counter()
        for site in self.sites.values():
            total.update(site.declined)
        return dict(total)

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-able data, totals included."""
        totals = {"calls": self.calls, "bytes_sent": self.bytes_sent, "plain_bytes": self.plain_bytes}
        return {**asdict(self), "total": {**totals, "ratio": self.ratio, "declined": self.declined}}

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        state = "" if self.active else " (uninstalled)"
        yield Text(f"megacomp {self.version}{state}, configuration {self.digest[:12]}", style="bold")
        for framework in self.frameworks:
            if framework.version is None:
                yield Text(f"{framework.name}: not imported yet, will be patched when it is")
            else:
                yield Text(f"{framework.name} {framework.version}: patched {', '.join(framework.patches)}")
        for what, which in self.tuning.items():
            yield Text(f"tuning of {what}: {which}")
        yield self._sites_table()
        yield from self._guard_lines()
        yield Text(f"left exact outside of these sites: {self.outside} messages")
        for name, why in self.not_covered.items():
            yield Text(f"not covered: {name}, {why}")
        if self.quantized:
            orders = Counter(self.quantized.values())
            yield Text(f"GPTQ layers: {', '.join(f'{count} {order}' for order, count in sorted(orders.items()))}")

    def __str__(self) -> str:
        console = Console(width=120, no_color=True, force_terminal=False)
        with console.capture() as capture:
            console.print(self)
        return capture.get()

    def _guard_lines(self) -> Iterator[Text]:
        for name, site in self.sites.items():
            if site.guard.samples:
                last, lowest = (
                    "-" if value is None else f"{value:.1f}"
                    for value in (site.guard.last_sqnr_db, site.guard.lowest_sqnr_db)
                )
                off = f", switched off: {site.guard.switched_off}" if site.guard.switched_off else ""
                yield Text(f"guard of {name}: {site.guard.samples} samples, last {last} dB, lowest {lowest} dB{off}")

    def _sites_table(self) -> Table:
        table = Table()
        table.add_column("site")
        for heading in ("calls", "rows", "sent", "uncompressed", "ratio", "SQNR dB"):
            table.add_column(heading, justify="right")
        table.add_column("codec")
        table.add_column("left exact")
        for name, site in self.sites.items():
            table.add_row(
                name,
                *(f"{count:,}" for count in (site.calls, site.rows, site.bytes_sent, site.plain_bytes)),
                "" if site.ratio is None else f"{site.ratio:.2f}",
                "" if site.sqnr_db is None else f"{site.sqnr_db:.1f}",
                site.codec or "",
                ", ".join(f"{count} x {reason}" for reason, count in site.declined.items()),
            )
        return table
