"""`megacomp run`: any Megatron or DeepSpeed script, unmodified, with its reductions compressed."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Annotated

import typer

import megacomp
from megacomp import config as configuration
from megacomp.installation import ScriptInstallation
from megacomp.launch import command, files, ranked
from megacomp.launch.distributed import ensure_ranks
from megacomp.launch.errors import LaunchError

# Whatever stands behind the script is the script's.
CONTEXT_SETTINGS = {"allow_interspersed_args": False}


def run(
    ctx: typer.Context,
    script: Annotated[str, typer.Argument(help="A Python file, or with -m the name of a module.")],
    script_arguments: Annotated[
        list[str] | None, typer.Argument(metavar="[ARGUMENTS]...", help="The script's own, options too.")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            "--config",
            help='A DeepSpeed JSON with a "megacomp" section. Default: the section in the JSON the script '
            "itself gives to deepspeed.init_inference.",
        ),
    ] = None,
    module: Annotated[bool, typer.Option("--module", "-m", help="SCRIPT names a module.")] = False,
    tp: command.TpOption = None,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", help="Write the report of what was compressed to this file; null where nothing was."),
    ] = None,
) -> None:
    """Run SCRIPT as `python SCRIPT` would, with megacomp installed; report at its end what was compressed.

    Options before SCRIPT are megacomp's, those after it the script's. The exit code is the script's.
    """
    section = configuration.load(config)[0] if config is not None else None
    files.check_writable(json_file)
    if not module and not Path(script).is_file():
        raise LaunchError(f"no file {script}")
    ensure_ranks(tp, "megacomp.launch.run", ranked.arguments(ctx))
    own = [*ranked.local_rank_argument(ctx), *(script_arguments or [])]
    if section is None:
        with ScriptInstallation() as found:
            try:
                _run_as_main(script, own, module)
            finally:
                _report(found.installation, json_file)
    else:
        with megacomp.install(section) as installation:
            try:
                _run_as_main(script, own, module)
            finally:
                _report(installation, json_file)


def _run_as_main(script: str, arguments: list[str], module: bool) -> None:
    """What `python script arguments` or `python -m script arguments` does; sys is put back afterwards."""
    argv, path = sys.argv, list(sys.path)
    sys.argv = [script, *arguments]
    try:
        if module:
            sys.path[0] = str(Path.cwd())
            runpy.run_module(script, run_name="__main__", alter_sys=True)
        else:
            sys.path[0] = str(Path(script).resolve().parent)
            runpy.run_path(script, run_name="__main__")
    finally:
        sys.argv, sys.path[:] = argv, path


def _report(installation: megacomp.Installation | None, json_file: Path | None) -> None:
    """Rank 0 says what was compressed, on standard error: standard output is the script's."""
    if not command.is_main_rank():
        return
    report = None if installation is None else installation.report()
    command.messages().print(
        "megacomp: nothing was compressed: no --config, and no section from the script" if report is None else report
    )
    if json_file is not None:
        files.write_json(json_file, None if report is None else report.to_dict())


app = ranked.single(run, context_settings=CONTEXT_SETTINGS)

if __name__ == "__main__":
    app()
