"""Commands that may run in many ranks: where their arguments come from, and how their errors end.

Imports nothing that takes long: the program lists its commands without loading them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

import megacomp
from megacomp.launch.errors import LaunchError

USAGE_ERROR = 2

_ARGUMENTS = "megacomp.arguments"
_LOCAL_RANK = "megacomp.local_rank"


class RankedCommand(TyperCommand):
    """A command that may run in many ranks and may start them.

    Errors of the request end it with exit code 2 and their message alone; anything else is a bug or a failing
    machine and keeps its traceback (exit code 1). Its arguments are kept as given, for starting it again in
    other processes. The `--local_rank=N` with which the deepspeed launcher begins them is taken off.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        args = _without_local_rank(ctx, args)
        ctx.meta[_ARGUMENTS] = list(args)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        request_errors = (
            LaunchError,
            megacomp.ConfigError,
            megacomp.CodecError,
            megacomp.CheckpointError,
            megacomp.CalibrationError,
            megacomp.AgreementError,
            megacomp.UnsupportedVersionError,
            megacomp.MissingSymbolError,
        )
        try:
            return super().invoke(ctx)
        except request_errors as error:
            from megacomp.launch import distributed  # imports torch, as the command has by now

            world_size = distributed.launched_world_size()
            who = f"rank {distributed.rank()}: " if world_size and world_size > 1 else ""
            sys.stderr.write(f"{who}error: {error}\n")
            sys.stderr.flush()
            raise typer.Exit(USAGE_ERROR) from None


class RankedGroup(TyperGroup):
    """A group of such commands, which the deepspeed launcher may start as well."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, _without_local_rank(ctx, args))


def _without_local_rank(ctx: typer.Context, args: list[str]) -> list[str]:
    if args and args[0].startswith("--local_rank="):
        ctx.meta[_LOCAL_RANK], *args = args
    return args


def arguments(ctx: typer.Context) -> list[str]:
    """The command's arguments as they were given."""
    return ctx.meta[_ARGUMENTS]


def local_rank_argument(ctx: typer.Context) -> list[str]:
    """The argument the deepspeed launcher put before them, if it did."""
    return [ctx.meta[_LOCAL_RANK]] if _LOCAL_RANK in ctx.meta else []


def single(function: Callable[..., None], **settings: Any) -> typer.Typer:
    """A program of this one command, for `python -m` and the launchers."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command(cls=RankedCommand, **settings)(function)
    return app
