"""The `megacomp` program: every command of this room under one name."""

from __future__ import annotations

from typing import Annotated

import typer

from megacomp.launch import bench, calibrate, convert, doctor, generate, inspect, plan, run, search, tune
from megacomp.launch import eval as eval_command
from megacomp.launch.command import RankedCommand, RankedGroup
from megacomp.version import __version__

app = typer.Typer(
    name="megacomp",
    cls=RankedGroup,
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


app.command("run", cls=RankedCommand, context_settings=run.CONTEXT_SETTINGS)(run.run)
app.command("generate", cls=RankedCommand)(generate.run)
app.command("eval", cls=RankedCommand)(eval_command.run)
app.command("calibrate", cls=RankedCommand)(calibrate.run)
app.command("inspect", cls=RankedCommand)(inspect.run)
app.command("search", cls=RankedCommand)(search.run)
app.command("convert", cls=RankedCommand)(convert.run)
app.command("tune", cls=RankedCommand)(tune.run)
app.command("doctor", cls=RankedCommand)(doctor.run)
app.command("plan", cls=RankedCommand)(plan.run)
app.add_typer(bench.app, name="bench")


def main() -> None:
    """The entry point of the installed `megacomp` script."""
    app()


if __name__ == "__main__":
    main()
