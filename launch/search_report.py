"""What a search found, for people: a page and two charts."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megacomp.config import SECTION
from megacomp.launch.errors import LaunchError
from megacomp.launch.files import replacing, require_matplotlib, write_figure
from megacomp.launch.searching import EXACT, Measured, Search

__all__ = ["HEADINGS", "cells", "check_folder", "compared", "summary", "verdict", "write"]

HEADINGS = ("codec", "bits per value", "perplexity", "KL, nats per token", "SQNR, dB", "within budget")
PARETO, SITES = "pareto.png", "sites.png"

_LEAST_KL = 1e-9
"""Where the logarithmic scales end: less is float32's own rounding."""


def check_folder(folder: Path | None) -> None:
    """Raise LaunchError if `write` could not write to `folder`, or not draw; None is fine."""
    if folder is None:
        return
    require_matplotlib()
    if folder.exists() and not folder.is_dir():
        raise LaunchError(f"{folder} is a file; give the name of a folder")
    there = folder if folder.exists() else folder.parent
    if not there.is_dir():
        raise LaunchError(f"cannot make {folder}: there is no folder {there}")
    if not os.access(there, os.W_OK):
        raise LaunchError(f"cannot write to {folder}: {there} is not writable")


def write(result: Search, environment: Mapping[str, Any], folder: Path) -> None:
    """Write report.md, pareto.png and sites.png; the folder is made if need be."""
    check_folder(folder)
    folder.mkdir(exist_ok=True)
    with replacing(folder / "report.md") as file:
        file.write(_page(result, environment).encode())
    write_figure(_pareto(result), folder / PARETO)
    write_figure(_sites(result), folder / SITES)


def compared(result: Search) -> list[Measured]:
    """The single codecs and, if it is a mix, the best of all, by bits."""
    mix = [] if result.best is None or result.best in result.singles else [result.best]
    return sorted([*result.singles, *mix], key=lambda measured: measured.bits)


def cells(measured: Measured, result: Search) -> tuple[str, ...]:
    """One line of a table under `HEADINGS`."""
    error = "" if measured.stderr is None else f" ± {measured.stderr:.2%}"
    return (
        measured.name,
        f"{measured.bits:.3f}",
        f"{measured.increase:+.2%}{error}",
        f"{measured.kl:.2e}",
        "" if measured.sqnr_db is None else f"{measured.sqnr_db:.1f}",
        "yes" if result.budget.load(measured) <= 1 else "",
    )


def verdict(result: Search) -> str:
    """What came of it, in a sentence or two."""
    best, single = result.best, result.best_single
    if best is None:
        return f"Nothing that was tried stays within {result.budget}: every site is left exact."
    found = f"{best.name}, {best.bits:.3f} bits per value, stays within {result.budget}"
    if best in result.singles:
        return f"Of fewest bits: {found}. No mix that was tried takes fewer."
    if single is None:
        return f"Of fewest bits: the {found}. No single codec does."
    fewer = 1 - best.bits / single.bits
    return (
        f"Of fewest bits: the {found}: {fewer:.0%} fewer than the best single codec, {single.name}, {single.bits:.3f}."
    )


def summary(result: Search) -> str:
    """What ran, in a few words."""
    simulated = "simulated " if result.simulated else ""
    return f"{result.engine}, {simulated}TP {result.tp}, {result.dtype}, {result.sequences} x {result.length} tokens"


def _page(result: Search, environment: Mapping[str, Any]) -> str:
    layers = list(dict.fromkeys(name.rpartition(".")[0] for name in result.allocation))
    modules = list(dict.fromkeys(name.rpartition(".")[2] for name in result.allocation))
    calibrated = result.calibration_sequences
    lines = [
        "# Search",
        "",
        f"{summary(result)}; perplexity {result.baseline_perplexity:.4f} uncompressed.",
        f"Budget: {result.budget}. Sites alone were measured on {result.sites_sequences} of the sequences.",
        *([f"Static codecs were calibrated on {calibrated} other sequences."] if calibrated else []),
        "",
        f"**{verdict(result)}**",
        "",
        "## Codecs",
        "",
        *_markdown(HEADINGS, [cells(measured, result) for measured in compared(result)]),
        "",
        "Every codec is used at every site, `mix` is the allocation below. Perplexity: increase over the uncompressed",
        "model, ± its standard error; within the budget is what stays below the limit by two of these.",
        "",
        f"![Quality against bits]({PARETO})",
        "",
        "## Sites",
        "",
        *_markdown(
            ("", *modules),
            [(layer, *(result.allocation.get(f"{layer}.{module}", "") for module in modules)) for layer in layers],
        ),
        "",
        f"![KL divergence of each site and codec alone]({SITES})",
        "",
        "## Mixes that were tried",
        "",
        *_markdown(
            ("bits per value", "perplexity", "KL, nats per token", "KL expected of the sites", "within budget"),
            [(*cells(mix, result)[1:4], f"{mix.expected_kl:.2e}", cells(mix, result)[-1]) for mix in result.mixes],
        ),
        "",
        "## Configuration",
        "",
        "```json",
        json.dumps({SECTION: result.section}, indent=2),
        "```",
        "",
        "## Environment",
        "",
        *_markdown(("", ""), [(key, str(value)) for key, value in environment.items()]),
    ]
    return "\n".join(lines) + "\n"


def _markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [
        f"| {' | '.join(headings)} |",
        f"|{'---|' * len(headings)}",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]


def _pareto(result: Search) -> Any:
    """Perplexity and KL divergence against bits: every single codec, the mixes that were tried, the best."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 5.5), layout="constrained")
    perplexity, kl = figure.subplots(1, 2)
    groups = (
        ("single codec", result.singles, {"marker": "o", "markersize": 5, "color": "tab:blue"}),
        ("mix that was tried", result.mixes, {"marker": "o", "markersize": 3, "color": "tab:orange"}),
        (
            "fewest bits within the budget",
            filter(None, [result.best]),
            {"marker": "*", "markersize": 15, "color": "tab:red"},
        ),
    )
    for label, group, style in groups:
        finite = [measured for measured in group if math.isfinite(measured.increase) and math.isfinite(measured.kl)]
        bits = [measured.bits for measured in finite]
        increases = [100 * measured.increase for measured in finite]
        errors = [100 * (measured.stderr or 0.0) for measured in finite]
        perplexity.errorbar(bits, increases, errors, linestyle="", elinewidth=0.8, label=label, **style)
        kl.plot(bits, [max(measured.kl, _LEAST_KL) for measured in finite], linestyle="", label=label, **style)
    for measured in result.singles:
        for axes, value in ((perplexity, 100 * measured.increase), (kl, max(measured.kl, _LEAST_KL))):
            if math.isfinite(value):
                place = {"textcoords": "offset points", "xytext": (6, 4), "fontsize": 8}
                axes.annotate(measured.name, (measured.bits, value), **place)
    budget = result.budget
    for axes, limit in ((perplexity, budget.perplexity and 100 * budget.perplexity), (kl, budget.kl)):
        if limit is not None:
            axes.axhline(limit, color="grey", linewidth=0.9, linestyle="--", label="budget")
        axes.set_xlabel("bits per value on the wire")
        axes.margins(x=0.15)
        axes.grid(alpha=0.3)
    # Linear around zero, where noise may decide the sign.
    perplexity.set_yscale("symlog", linthresh=100 * (budget.perplexity or 0.01))
    perplexity.yaxis.set_major_formatter("{x:g}")
    perplexity.set_ylabel("perplexity increase, %, ± standard error")
    perplexity.legend(fontsize=8)
    kl.set_yscale("log")
    kl.set_ylabel("KL divergence, nats per token")
    figure.suptitle(f"What compression costs: {summary(result)}")
    return figure


def _sites(result: Search) -> Any:
    """KL divergence of each codec at each site alone, a heat map; the chosen ones are marked."""
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    sites = list(result.divergences)
    names = [single.name for single in sorted(result.singles, key=lambda single: single.bits)]
    table = [[max(result.divergences[site][name], _LEAST_KL) for site in sites] for name in names]
    finite = [value for row in table for value in row if math.isfinite(value)]
    figure = Figure(figsize=(min(40.0, 5 + 0.3 * len(sites)), 3 + 0.3 * len(names)), layout="constrained")
    axes = figure.subplots()
    drawn = axes.imshow(table, norm=LogNorm(min(finite), max(finite)), aspect="auto")
    rows = [*names, EXACT]
    chosen = [rows.index(result.allocation[site]) for site in sites]
    axes.plot(range(len(sites)), chosen, linestyle="", marker="o", markersize=6, color="red")
    axes.set(ylim=(len(rows) - 0.5, -0.5), yticks=range(len(rows)), xticks=range(len(sites)))
    axes.set_yticklabels(rows, fontsize=8)
    axes.set_xticklabels(sites, rotation=90, fontsize=7)
    axes.set_title("a dot: the codec of the allocation", fontsize=8)
    figure.colorbar(drawn, ax=axes, label="KL divergence, nats per token")
    figure.suptitle(f"Each codec at one site alone: {summary(result)}", fontsize=10)
    return figure
