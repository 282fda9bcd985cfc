"""`megacomp eval`: what a configuration costs a model in quality, and what it saves."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from megacomp import config as configuration
from megacomp.launch import command, engines, environment, files, text
from megacomp.launch.distributed import ensure_ranks
from megacomp.launch.errors import LaunchError
from megacomp.launch.evaluation import Evaluation, evaluate

_DEFAULT_LENGTH = 512


def run(
    ctx: typer.Context,
    model: command.ModelOption,
    text_file: Annotated[
        Path | None, typer.Option("--text", help="A UTF-8 text, for the model's own tokenizer.")
    ] = None,
    tokens_file: Annotated[
        Path | None, typer.Option("--tokens", help="Tokens instead of a text: .npy, int64, sequences x length.")
    ] = None,
    config: command.ConfigOption = None,
    engine: command.EngineOption = command.EngineName.DEEPSPEED,
    tp: command.TpOption = None,
    dtype: command.DtypeOption = command.DtypeName.BF16,
    json_file: command.JsonOption = None,
    logits_out: Annotated[
        Path | None,
        typer.Option(
            "--logits-out",
            help="Write the logits of the configured run to this safetensors file: `logits`, float32, "
            "sequences x length x vocabulary.",
        ),
    ] = None,
    sequence_length: Annotated[
        int | None,
        typer.Option(
            min=2,
            help=f"Tokens per sequence. Default: the tokens' own; of a text {_DEFAULT_LENGTH}, "
            "or what the model has positions for.",
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences per forward.")] = 8,
    max_sequences: Annotated[int | None, typer.Option(min=1, help="Use only the first ones.")] = None,
) -> None:
    """Perplexity, divergence, bytes on the wire and time to first token, uncompressed and compressed.

    Perplexity is over the next token within each sequence. Both runs use one instance of the model.
    """
    if (text_file is None) == (tokens_file is None):
        raise LaunchError("give either --text FILE or --tokens FILE.npy")
    section = configuration.load(config)[0] if config is not None else None
    files.check_writable(json_file)
    files.check_writable(logits_out)
    weights = section.weights.checkpoint if section is not None else None
    architecture = engines.check(model, engine.value, tp=tp or 1, weights=weights)
    if tokens_file is not None:
        tokens = text.read_tokens(tokens_file, architecture.vocab_size)
        if sequence_length is not None and sequence_length > tokens.shape[1]:
            raise LaunchError(f"--sequence-length {sequence_length}, but {tokens_file} has {tokens.shape[1]}")
        tokens = tokens[:, :sequence_length]
    elif text_file is not None:
        length = sequence_length or min(_DEFAULT_LENGTH, architecture.max_positions)
        tokens = text.read_text(text_file, text.load_tokenizer(model), length)
    ranks = ensure_ranks(tp, "megacomp.launch.eval", command.arguments(ctx))

    with (
        command.build_engine(model, engine.value, ranks, dtype.value, section) as built,
        command.progress() as progress,
    ):
        task = progress.add_task("sequences", total=None)
        evaluation = evaluate(
            built,
            tokens[:max_sequences],
            section,
            batch_size=batch_size,
            logits_out=logits_out,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
        described = environment.describe(built.device)
    command.results().print(_table(evaluation))
    if json_file is not None and command.is_main_rank():
        files.write_json(json_file, {**evaluation.to_dict(), "environment": described})


def _table(result: Evaluation) -> Table:
    """The two runs side by side."""
    shown = Table(title=f"{result.engine}, TP {result.tp}, {result.dtype}, {result.sequences} x {result.length}")
    shown.add_column("")
    shown.add_column("uncompressed", justify="right")
    if result.perplexity is not None:
        shown.add_column(result.codec or "nothing compressed", justify="right")
        change = result.perplexity / result.baseline_perplexity - 1
        shown.add_column("", justify="right")
    else:
        change = 0.0
    rows = (
        ("perplexity", result.baseline_perplexity, result.perplexity, ".4f", f"{change:+.2%}"),
        ("KL divergence, nats per token", None, result.kl, ".2e", ""),
        ("same first choice", None, result.top1_agreement, ".2%", ""),
        ("bits per value", None, result.bits_per_value, ".3f", ""),
        (
            "bytes sent per token (plain: bf16)",
            result.plain_bytes_per_token,
            result.wire_bytes_per_token,
            ",.0f",
            "" if result.ratio is None else f"{result.ratio:.2f} x fewer",
        ),
        ("time to first token, ms", result.baseline_ttft_ms, result.ttft_ms, ".1f", ""),
    )
    for label, plain, compressed, form, remark in rows:
        if plain is not None or compressed is not None:
            cells = (label, _shown(plain, form), _shown(compressed, form), remark)
            shown.add_row(*cells[: len(shown.columns)])
    return shown


def _shown(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


app = command.single(run)

if __name__ == "__main__":
    app()
