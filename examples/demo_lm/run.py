"""`make run`: the demo model, tensor-parallel over real processes, through both engines, with four ways to reduce.

For each engine the held-out text is scored uncompressed and with each codec; one table is printed, and
`report.json` and `report.png` (perplexity change against bits per value) are written.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table

from examples.demo_lm.corpus import held_out_text
from megacomp.launch import command, engines, environment, files, ranked, text
from megacomp.launch.distributed import ensure_ranks
from megacomp.launch.evaluation import Evaluation, evaluate

MODEL = Path(__file__).parent / "model"
CODECS: tuple[str | dict[str, Any], ...] = ("mxfp4", {"preset": "int4", "rotation": 128}, "int8")
SEQUENCE_LENGTH = 256


@dataclass(frozen=True)
class Row:
    """One line of the report; the fields are those of :class:`megacomp.launch.evaluation.Evaluation`."""

    engine: str
    tp: int
    codec: str
    bits_per_value: float
    ratio: float
    wire_bytes_per_token: float
    perplexity: float
    baseline_perplexity: float
    top1_agreement: float
    kl: float
    ttft_ms: float
    baseline_ttft_ms: float

    @classmethod
    def compressed(cls, result: Evaluation) -> Row:
        """The compressed side of an evaluation."""
        values = result.to_dict()
        return cls(**{name: values[name] for name in cls.__dataclass_fields__})

    @classmethod
    def uncompressed(cls, result: Evaluation) -> Row:
        """The other side of the same evaluation: bf16 on the wire, and equal to itself."""
        assert result.plain_bytes_per_token is not None and result.baseline_ttft_ms is not None
        return cls(
            engine=result.engine,
            tp=result.tp,
            codec="uncompressed",
            bits_per_value=16.0,
            ratio=1.0,
            wire_bytes_per_token=result.plain_bytes_per_token,
            perplexity=result.baseline_perplexity,
            baseline_perplexity=result.baseline_perplexity,
            top1_agreement=1.0,
            kl=0.0,
            ttft_ms=result.baseline_ttft_ms,
            baseline_ttft_ms=result.baseline_ttft_ms,
        )

    @property
    def perplexity_change(self) -> float:
        """Relative to the uncompressed run; 0.01 is one percent worse."""
        return self.perplexity / self.baseline_perplexity - 1


def run(
    ctx: typer.Context,
    out: Annotated[Path, typer.Option(help="Folder for report.json and report.png.")] = Path("runs/demo"),
    tp: Annotated[int, typer.Option(min=2, help="Tensor-parallel ranks.")] = 2,
    sequences: Annotated[int, typer.Option(min=1, help=f"Held-out sequences of {SEQUENCE_LENGTH} tokens.")] = 64,
) -> None:
    """Evaluates the demo model with every engine and codec."""
    files.require_matplotlib()
    out.mkdir(parents=True, exist_ok=True)
    for name in engines.ENGINES:
        engines.check(MODEL, name, tp=tp)
    ranks = ensure_ranks(tp, "examples.demo_lm.run", ranked.arguments(ctx))
    tokens = text.cut_text(held_out_text(), text.load_tokenizer(MODEL), SEQUENCE_LENGTH)[:sequences]
    rows: list[Row] = []
    with command.progress() as progress:
        task = progress.add_task("evaluations", total=len(engines.ENGINES) * len(CODECS))
        for name in engines.ENGINES:
            with command.build_engine(MODEL, name, ranks, "bf16") as engine:
                for codec in CODECS:
                    config = {"megacomp": {"communication": {"codec": codec, "min_bytes": 0}}}
                    result = evaluate(engine, tokens, config, prefills=9)
                    rows += [Row.uncompressed(result)] if codec is CODECS[0] else []
                    rows.append(Row.compressed(result))
                    progress.advance(task)
                described = environment.describe(engine.device)
    command.results().print(_table(rows, tokens))
    if command.is_main_rank():
        files.write_json(out / "report.json", {"rows": [vars(row) for row in rows], "environment": described})
        _chart(rows, out / "report.png")
        command.results().print(f"Written: {out / 'report.json'}, {out / 'report.png'}")


def _table(rows: list[Row], tokens: torch.Tensor) -> Table:
    shape = f"{tokens.shape[0]} x {tokens.shape[1]} tokens"
    table = Table(title=f"Demo model, TP {rows[0].tp}, bf16, {shape} of held-out Python")
    table.add_column("engine")
    table.add_column("codec")
    for heading in ("bits", "ratio", "bytes/token", "perplexity", "change", "same top-1", "KL", "TTFT ms"):
        table.add_column(heading, justify="right")
    for row in rows:
        if row.codec == "uncompressed" and row is not rows[0]:
            table.add_section()
        table.add_row(
            row.engine,
            row.codec,
            f"{row.bits_per_value:.2f}",
            f"{row.ratio:.2f}",
            f"{row.wire_bytes_per_token:,.0f}",
            f"{row.perplexity:.4f}",
            f"{row.perplexity_change:+.2%}",
            f"{row.top1_agreement:.2%}",
            f"{row.kl:.1e}",
            f"{row.ttft_ms:.1f}",
        )
    return table


def _chart(rows: list[Row], path: Path) -> None:
    """Perplexity change in percent against bits per value, a line per engine."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    names = list(dict.fromkeys(row.engine for row in rows))
    for name, marker, style in zip(names, "os", ("-", "--"), strict=True):
        line = sorted((row for row in rows if row.engine == name), key=lambda row: row.bits_per_value)
        bits, changes = [row.bits_per_value for row in line], [100 * row.perplexity_change for row in line]
        axes.plot(bits, changes, marker=marker, linestyle=style, label=name, alpha=0.8)
    for row in rows:
        if row.engine == names[0]:
            point = (row.bits_per_value, 100 * row.perplexity_change)
            axes.annotate(row.codec, point, textcoords="offset points", xytext=(6, 8), fontsize=9)
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.set_xlabel("bits per value on the wire")
    axes.set_ylabel("perplexity change, %")
    axes.set_xlim(3, 20)
    axes.margins(y=0.15)
    axes.set_title(f"Demo model, TP {rows[0].tp}: what compressed reductions cost")
    axes.legend()
    axes.grid(alpha=0.3)
    files.write_figure(figure, path)
    pyplot.close(figure)


app = ranked.single(run)

if __name__ == "__main__":
    app()
