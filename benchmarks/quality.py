"""What codecs cost real small models, single and mixed; writes the tables of docs/quality.md.

python -m benchmarks.quality --data DIR --out benchmarks/results/quality.json --write docs/quality.md

Every model is split over two and four simulated ranks, in float32. Static codecs are calibrated on one half of the
sequences, everything is measured on the other. `megacomp search` does the work: every codec everywhere, every codec at
every site alone, and the mix of fewest bits whose perplexity rises by at most one percent.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from benchmarks.markdown import check_table, replace_table
from examples.demo_lm.corpus import held_out_text
from megacomp import codecs
from megacomp.config import Config
from megacomp.launch import engines, environment, files, ranked, text
from megacomp.launch.engines.checkpoint import model_digest
from megacomp.launch.errors import LaunchError
from megacomp.launch.searching import Budget, Measured, Search, search

MODULE = "benchmarks.quality"
DEMO = Path(__file__).resolve().parents[1] / "examples" / "demo_lm" / "model"
RANKS = (2, 4)
ENGINE = "megatron"
BUDGET = Budget(perplexity=0.01)
SAMPLES, SAMPLE_LENGTH = 128, 256


def demo() -> tuple[Path, torch.Tensor]:
    """The demo model and held-out Python source, 128 sequences of 128 tokens."""
    tokens = text.cut_text(held_out_text(), text.load_tokenizer(DEMO), 128)
    return DEMO, tokens[:128]


def stories(data: Path) -> tuple[Path, torch.Tensor]:
    """A pretrained Llama of 260 thousand parameters and validation stories, 64 sequences of 256 tokens."""
    tokens = np.load(data / "stories260K" / "tinystories_ids.npy", allow_pickle=False)
    return data / "stories260K", torch.from_numpy(tokens[:64, :256])


def bytellama(data: Path) -> tuple[Path, torch.Tensor]:
    """A byte-level Llama and 128 sequences of 256 tokens sampled from itself.

    The prose it was trained on is not at hand, and on other text, which it predicts badly, noise may help it. On its
    own samples the loss rises, in expectation, by the KL divergence.
    """
    from transformers import AutoModelForCausalLM

    folder = data / "bytellama-h256"
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    torch.manual_seed(0)
    prompt = torch.full((SAMPLES, 1), model.config.bos_token_id)
    tokens = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=True,
        top_k=0,
        max_length=SAMPLE_LENGTH,
        eos_token_id=None,
        pad_token_id=0,
    )
    return folder, tokens


def choices(features: int) -> list[codecs.Codec]:
    """The codecs that are compared, as far as a rotation divides the rows."""
    rotation = next(size for size in (128, 64, 32) if features % size == 0)
    specs: list[str | dict[str, Any]] = [
        {"preset": "static4", "bits": 2},
        {"preset": "static4", "bits": 3},
        "static4_paper",
        "static4",
        {"preset": "static4", "outlier_features": 1 / 16},
        "mxfp4",
        {"preset": "int4", "block_size": 64, "rotation": rotation},
        {"preset": "int4", "rotation": rotation},
        {"preset": "static4", "bits": 5},
        {"preset": "static4", "bits": 5, "outlier_features": 1 / 16},
        {"preset": "static4", "bits": 6},
        "int6",
        "int8",
    ]
    return [codecs.get(spec) for spec in specs]


def measure(folder: Path, tokens: torch.Tensor, tp: int) -> Search:
    """One model over `tp` simulated ranks, every codec by the same algorithm, whatever its wires' size."""
    base = Config.model_validate({"communication": {"algorithm": "one_shot" if tp == 2 else "two_shot"}})
    with (
        tempfile.TemporaryDirectory() as out,
        engines.build(folder, ENGINE, tp=tp, dtype=torch.float32, simulate=True) as engine,
    ):
        tried = choices(engine.architecture.hidden_size)
        section = Path(out) / "section.json"
        return search(engine, tokens, tried, BUDGET, model_digest(folder), section, base=base, batch_size=16)


def table(found: Sequence[tuple[str, Search]]) -> str:
    """Markdown: every codec everywhere and the mix, by model and ranks."""
    lines = []
    for name, result in found:
        lines += [
            f"**{name}, TP {result.tp}** ({result.sequences} x {result.length} tokens; perplexity "
            f"{result.baseline_perplexity:.3f} uncompressed)",
            "",
            "| codec | bits per value | site SQNR, dB | perplexity | KL, nats per token |",
            "|---|---|---|---|---|",
            *(_row(measured.name, measured) for measured in sorted(result.singles, key=lambda single: single.bits)),
        ]
        if result.best is not None:
            lines.append(_row("**searched mix, at most +1 %**", result.best))
        single = result.best_single
        lines += [
            "",
            "No single codec keeps the perplexity within 1 %."
            if single is None
            else f"The single codec of fewest bits within 1 % is {single.name}, {single.bits:.3f} bits.",
            "",
        ]
    return "\n".join(lines)


def _row(name: str, measured: Measured) -> str:
    sqnr = "" if measured.sqnr_db is None else f"{measured.sqnr_db:.1f}"
    error = "" if measured.stderr is None else f" ± {100 * measured.stderr:.2f}"
    return f"| {name} | {measured.bits:.3f} | {sqnr} | {100 * measured.increase:+.2f}{error} % | {measured.kl:.2e} |"


def main(
    data: Annotated[Path | None, typer.Option(help="The folder of stories260K and bytellama-h256.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the figures to this JSON file.")] = None,
    write: Annotated[Path | None, typer.Option(help="Replace the tables in this markdown file.")] = None,
) -> None:
    """Measures, prints the tables, and writes them where asked to."""
    files.check_writable(out)
    check_table(write, MODULE)
    models = {"Demo model, hidden 256, outlier features": demo()}
    if data is not None:
        for needed in ("stories260K", "bytellama-h256"):
            if not (data / needed).is_dir():
                raise LaunchError(f"no model {data / needed}")
        models["stories260K, hidden 64"] = stories(data)
        models["bytellama-h256, hidden 256"] = bytellama(data)
    logging.getLogger("megacomp").setLevel(logging.ERROR)
    found = []
    for name, (folder, tokens) in models.items():
        for tp in RANKS:
            found.append((name, measure(folder, tokens, tp)))
            typer.echo(table(found[-1:]))
    if out is not None:
        described = environment.describe(torch.device("cpu"))
        results = [{"model": name, **result.to_dict()} for name, result in found]
        files.write_json(out, {"environment": described, "results": results})
    if write is not None:
        replace_table(write, MODULE, table(found))


app = ranked.single(main)

if __name__ == "__main__":
    app()
