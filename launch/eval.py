"""`megacomp eval`: what a configuration costs a model in quality, and what it saves."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from megacomp import config as configuration
from megacomp.launch import command, engines, environment, files, ranked, text
from megacomp.launch.distributed import ensure_ranks
from megacomp.launch.errors import LaunchError
from megacomp.launch.evaluation import Evaluation, evaluate

if TYPE_CHECKING:
    from megacomp.launch.harness import Score, TaskEvaluation


def run(
    ctx: typer.Context,
    model: command.ModelOption,
    text_file: command.TextOption = None,
    tokens_file: command.TokensOption = None,
    config: command.ConfigOption = None,
    engine: command.EngineOption = command.EngineName.DEEPSPEED,
    tp: command.TpOption = None,
    simulate_tp: command.SimulateTpOption = None,
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
    sequence_length: command.SequenceLengthOption = None,
    batch_size: command.BatchSizeOption = 8,
    max_sequences: Annotated[int | None, typer.Option(min=1, help="Use only the first ones.")] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            "--tasks",
            metavar="NAMES",
            help="Instead of a text: tasks of the Language Model Evaluation Harness, separated by commas.",
        ),
    ] = None,
    task_dir: Annotated[Path | None, typer.Option(help="A folder of YAML files that define further tasks.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Use only the first documents of each task.")] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(min=0, help="Examples before each document. Default: the tasks' own number.")
    ] = None,
) -> None:
    """Perplexity, divergence, bytes on the wire and time to first token, uncompressed and compressed.

    Perplexity is over the next token within each sequence. Both runs use one instance of the model.

    With --tasks: the scores of tasks instead, such as arc_easy,arc_challenge,winogrande,hellaswag,boolq.
    """
    of_tokens = {
        "--text": text_file,
        "--tokens": tokens_file,
        "--logits-out": logits_out,
        "--sequence-length": sequence_length,
        "--max-sequences": max_sequences,
    }
    of_tasks = {"--task-dir": task_dir, "--limit": limit, "--num-fewshot": num_fewshot}
    misplaced = [name for name, value in (of_tasks if tasks is None else of_tokens).items() if value is not None]
    if misplaced:
        raise LaunchError(f"{'only' if tasks is None else 'not'} with --tasks: {', '.join(misplaced)}")
    if tasks is None and (text_file is None) == (tokens_file is None):
        raise LaunchError("give either --text FILE or --tokens FILE.npy, or --tasks NAMES")
    section = configuration.load(config)[0] if config is not None else None
    files.check_writable(json_file)
    files.check_writable(logits_out)
    weights = section.weights.checkpoint if section is not None else None
    architecture = engines.check(model, engine.value, tp=command.requested_ranks(tp, simulate_tp), weights=weights)
    if tasks is not None:
        _check_harness()
        from megacomp.launch import harness

        tokenizer = text.load_tokenizer(model)
        names = [name.strip() for name in tasks.split(",") if name.strip()]
        loaded = harness.load_tasks(names, task_dir, num_fewshot=num_fewshot)
    else:
        tokens = text.read(model, architecture, text_file, tokens_file, sequence_length)
    ranks = ensure_ranks(tp, "megacomp.launch.eval", ranked.arguments(ctx))

    with (
        command.build_engine(model, engine.value, ranks, dtype.value, section, simulate_tp) as built,
        command.progress() as progress,
    ):
        task = progress.add_task("sequences", total=None)
        if tasks is not None:
            scores = harness.evaluate_tasks(
                built,
                tokenizer,
                loaded,
                section,
                limit=limit,
                batch_size=batch_size,
                progress=lambda what, done, total: progress.update(
                    task, description=f"requests, {what}", completed=done, total=total
                ),
            )
            table, figures = _scores_table(scores), scores.to_dict()
        else:
            evaluation = evaluate(
                built,
                tokens[:max_sequences],
                section,
                batch_size=batch_size,
                logits_out=logits_out,
                progress=lambda done, total: progress.update(task, completed=done, total=total),
            )
            table, figures = _table(evaluation), evaluation.to_dict()
        described = environment.describe(built.device)
    command.results().print(table)
    if json_file is not None and command.is_main_rank():
        files.write_json(json_file, {**figures, "environment": described})


def _check_harness() -> None:
    """Raise LaunchError without lm_eval, which megacomp does not require and, slow to import, asks for only here."""
    if find_spec("lm_eval") is None:
        raise LaunchError(
            "--tasks is the Language Model Evaluation Harness, which is not installed: pip install 'megacomp[eval]'"
        )


def _table(result: Evaluation) -> Table:
    """The two runs side by side."""
    shown = Table(title=f"{_run_by(result)}, {result.sequences} x {result.length}")
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


def _scores_table(result: TaskEvaluation) -> Table:
    """Every score of the two runs, with standard errors, and how much of it is left."""
    limited = "" if result.limit is None else f", first {result.limit} documents"
    shown = Table(title=f"{_run_by(result)}, lm_eval {result.lm_eval}{limited}")
    if result.codec is not None:
        shown.caption = (
            f"{result.bits_per_value:.3f} bits per value; {result.compressed_messages:.1%} of messages compressed"
        )
    compared = any(score.score is not None for score in result.scores)
    shown.add_column("task")
    shown.add_column("metric")
    for heading in ("uncompressed", result.codec or "nothing compressed", "kept")[: 3 if compared else 1]:
        shown.add_column(heading, justify="right")
    for score in result.scores:
        cells = (
            score.task,
            score.metric if score.filter == "none" else f"{score.metric}, {score.filter}",
            _with_error(score.baseline_score, score.baseline_stderr),
            _with_error(score.score, score.stderr),
            _kept(score),
        )
        shown.add_row(*cells[: len(shown.columns)])
    return shown


def _run_by(result: Evaluation | TaskEvaluation) -> str:
    return f"{result.engine}, {'simulated ' if result.simulated else ''}TP {result.tp}, {result.dtype}"


def _with_error(value: float | None, error: float | None) -> str:
    return _shown(value, ".4f") + ("" if error is None else f" ± {error:.4f}")


def _kept(score: Score) -> str:
    """The share of a score that is kept, with the standard error of what compression changed."""
    error = f" ± {score.change_stderr / score.baseline_score:.2%}" if score.kept and score.change_stderr else ""
    return _shown(score.kept, ".2%") + error


def _shown(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


app = ranked.single(run)

if __name__ == "__main__":
    app()
