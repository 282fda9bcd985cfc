"""The `megacomp` program: every command of this room under one name."""

from __future__ import annotations

from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from megacomp.launch.ranked import RankedGroup
from megacomp.version import __version__

COMMANDS = {
    "run": "Run an unmodified inference script with megacomp installed; report at its end what was compressed.",
    "generate": "Continue a prompt greedily.",
    "eval": "Perplexity, divergence, bytes on the wire and time to first token, uncompressed and compressed.",
    "calibrate": "Write what static codecs need to know of every site and rank, from a text.",
    "inspect": "Ranges, kurtosis and outlier features of the partials at every site, and each codec's SQNR on them.",
    "search": "Find the codec of each site: the fewest bits by which the whole model stays within a budget.",
    "convert": "Write a GPTQ checkpoint as one file per rank, in the order in which a model runs.",
    "tune": "Find the fastest way to all_reduce each size of message, and from which size on compression pays.",
    "doctor": "Check versions, frameworks, devices, backends, and what a configuration would do to a model.",
    "plan": "Predict the first token and those after it, uncompressed and for each codec; recommend a section.",
    "bench": "How long collectives and kernels take on this machine.",
}
"""What the list of commands says of each. A command is the `app` of the module of its name."""


class _Commands(RankedGroup):
    """The commands, of which only the one that is started is imported: torch and all behind it take seconds."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """For the list of commands and for the spelling of one; `resolve_command` brings the one to run."""
        return TyperCommand(cmd_name, help=COMMANDS[cmd_name]) if cmd_name in COMMANDS else None

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, listed, rest = super().resolve_command(ctx, args)
        if listed is None:
            return name, listed, rest
        return name, typer.main.get_command(import_module(f"megacomp.launch.{name}").app), rest


app = typer.Typer(
    name="megacomp",
    cls=_Commands,
    help="Compressed communication for tensor-parallel LLM inference with DeepSpeed and Megatron-core.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """The entry point of the installed `megacomp` script."""
    app()


if __name__ == "__main__":
    main()
