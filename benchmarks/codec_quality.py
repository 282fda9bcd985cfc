"""Quality of the presets on synthetic partials; writes the table of docs/codecs.md.

python -m benchmarks.codec_quality --write docs/codecs.md
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks.markdown import check_table, replace_table
from megacomp import codecs
from megacomp.launch import ranked
from megacomp.launch.made_up import OUTLIER_EVERY, OUTLIER_GAIN

MODULE = "benchmarks.codec_quality"
ROWS, FEATURES = 256, 4096

QUIET = torch.arange(FEATURES) % OUTLIER_EVERY != 0
"""The features that are no outliers: over them one sees what the noise of the outliers does to the rest."""


def sqnr_db(codec: codecs.Codec, x: torch.Tensor, counted: torch.Tensor | slice = slice(None)) -> float:
    """Signal to quantization noise ratio of one encode and decode, in dB, over the ``counted`` features."""
    decoded = codec.decode(codec.encode(x), x.shape[1], torch.float32)
    signal, noise = x.double()[:, counted], (decoded.double() - x.double())[:, counted]
    return float(10 * torch.log10(signal.square().sum() / noise.square().sum()))


def table() -> str:
    """The markdown table: every preset, plain and rotated, on Gaussian data and on data with outlier features."""
    generator = torch.Generator().manual_seed(0)
    gaussian = torch.randn(ROWS, FEATURES, generator=generator)
    outliers = torch.randn(ROWS, FEATURES, generator=generator)
    outliers[:, ::OUTLIER_EVERY] *= OUTLIER_GAIN
    lines = [
        f"SQNR in dB; {ROWS} x {FEATURES} float32 values, seed 0. *Outliers*: one feature in {OUTLIER_EVERY} is "
        f"{OUTLIER_GAIN:.0f} times larger; *quiet*: the same data, counted over the other features only.",
        "",
        "| preset | bits per value | Gaussian | outliers | quiet | outliers, rotation 128 | quiet, rotation 128 |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in codecs.presets():
        codec = codecs.get(name, backend="reference")
        rotated = codecs.get({"preset": name, "rotation": 128}, backend="reference")
        figures = [
            sqnr_db(codec, gaussian),
            sqnr_db(codec, outliers),
            sqnr_db(codec, outliers, QUIET),
            sqnr_db(rotated, outliers),
            sqnr_db(rotated, outliers, QUIET),
        ]
        cells = " | ".join(f"{figure:.1f}" for figure in figures)
        lines.append(f"| {name} | {codec.bits_per_value(FEATURES):.3f} | {cells} |")
    return "\n".join(lines)


def main(
    write: Annotated[Path | None, typer.Option(help="Replace the table in this markdown file.")] = None,
) -> None:
    """Prints the table, or puts it between its marks in a file."""
    check_table(write, MODULE)
    rows = table()
    if write is None:
        typer.echo(rows)
        return
    replace_table(write, MODULE, rows)


app = ranked.single(main)

if __name__ == "__main__":
    app()
