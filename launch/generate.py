"""`megacomp generate`: a continuation of a prompt, and how fast it came."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import megacomp
from megacomp import config as configuration
from megacomp.launch import command, engines, environment, files, ranked, text
from megacomp.launch.distributed import ensure_ranks
from megacomp.launch.errors import LaunchError


def run(
    ctx: typer.Context,
    model: command.ModelOption,
    prompt: Annotated[str | None, typer.Option("--prompt", help="The text to continue.")] = None,
    tokens_file: Annotated[
        Path | None,
        typer.Option(
            "--tokens", help="Tokens instead of a prompt: .npy, int64, 1 x length; for a model without tokenizer."
        ),
    ] = None,
    config: command.ConfigOption = None,
    engine: command.EngineOption = command.EngineName.DEEPSPEED,
    tp: command.TpOption = None,
    simulate_tp: command.SimulateTpOption = None,
    dtype: command.DtypeOption = command.DtypeName.BF16,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The most tokens to generate.")] = 64,
    json_file: command.JsonOption = None,
) -> None:
    """Continue a prompt greedily; prints the text, the time to first token and the tokens per second.

    A short run comes first, so that the times are those of a server that has been running. Of simulated ranks there
    are no times.
    """
    if (prompt is None) == (tokens_file is None):
        raise LaunchError("give either --prompt TEXT or --tokens FILE.npy")
    section = configuration.load(config)[0] if config is not None else None
    files.check_writable(json_file)
    weights = section.weights.checkpoint if section is not None else None
    architecture = engines.check(model, engine.value, tp=command.requested_ranks(tp, simulate_tp), weights=weights)
    tokenizer: Any = None
    if tokens_file is not None:
        tokens = text.read_tokens(tokens_file, architecture.vocab_size)
        if len(tokens) > 1:
            raise LaunchError(f"{tokens_file} holds {len(tokens)} sequences; generate continues one")
    else:
        tokenizer = text.load_tokenizer(model)
        tokens = torch.tensor([tokenizer(prompt)["input_ids"]], dtype=torch.int64)
        if tokens.shape[1] < 1:
            raise LaunchError("the prompt is empty")
    # The last one is not read again.
    if (length := tokens.shape[1] + max_new_tokens - 1) > architecture.max_positions:
        raise LaunchError(
            f"{tokens.shape[1]} tokens of the prompt and --max-new-tokens {max_new_tokens} take {length} positions, "
            f"but the model has {architecture.max_positions}"
        )
    ranks = ensure_ranks(tp, "megacomp.launch.generate", ranked.arguments(ctx))

    with command.build_engine(model, engine.value, ranks, dtype.value, section, simulate_tp) as built:
        compression = megacomp.install(section, model=built.module) if section is not None else nullcontext()
        with compression:
            if not built.simulated:
                built.generate(tokens, min(2, max_new_tokens))
            generation = built.generate(tokens, max_new_tokens, eos_token_id=built.hf_config.eos_token_id)
        described = environment.describe(built.device)
    result = {
        "engine": built.name,
        "tp": built.tp,
        "simulated": built.simulated,
        "dtype": dtype.value,
        "codec": section.communication.codec if section is not None else None,
        "prompt": prompt,
        "text": tokenizer.decode(generation.tokens, skip_special_tokens=True) if tokenizer else None,
        "tokens": generation.tokens,
        "ttft_ms": None if built.simulated else 1e3 * generation.ttft_s,
        "tokens_per_s": None if built.simulated else generation.tokens_per_s,
    }
    console = command.results()
    shown = result["text"] if tokenizer else " ".join(map(str, generation.tokens))
    console.print(shown, markup=False, highlight=False, soft_wrap=True)
    if not built.simulated:
        speed = f", {generation.tokens_per_s:.1f} tokens/s" if generation.tokens_per_s else ""
        console.print(f"{len(generation.tokens)} tokens, first after {result['ttft_ms']:.1f} ms{speed}", style="dim")
    if json_file is not None and command.is_main_rank():
        files.write_json(json_file, {**result, "environment": described})


app = ranked.single(run)

if __name__ == "__main__":
    app()
