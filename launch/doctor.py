"""`megacomp doctor`: what would work here, what would not, and what to change."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from megacomp import config as configuration
from megacomp.config import Config, ConfigError
from megacomp.launch import command, diagnosis, distributed, environment, files, ranked
from megacomp.launch.diagnosis import Finding, Message, Verdict
from megacomp.launch.engines.architecture import Architecture
from megacomp.launch.errors import LaunchError

PROBLEMS = 1
"""The exit code if something would not work."""

_MARKS = {Verdict.FINE: ("ok", "green"), Verdict.NOTE: ("note", "yellow"), Verdict.PROBLEM: ("NO", "bold red")}
_DTYPES = {
    torch.bfloat16: ("bf16", "bfloat16", "torch.bfloat16"),
    torch.float16: ("fp16", "half", "float16", "torch.float16", "torch.half"),
    torch.float32: ("fp32", "float", "float32", "torch.float32", "torch.float"),
}
_AREAS = ("versions", "frameworks", "devices", "backends", "configuration")
_FEATURES = 256
"""Of the message that backends are tried with, where no model says."""


def run(
    config: Annotated[
        Path | None, typer.Option("--config", help='The DeepSpeed JSON whose "megacomp" section is to be used.')
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option("--model", help="The Hugging Face folder of the model, or its config.json; weights are not read."),
    ] = None,
    tp: Annotated[
        int | None,
        typer.Option(
            "--tp",
            min=1,
            help="Tensor-parallel ranks it will run on; none are started. Default: those a launcher started, "
            "else tensor_parallel.tp_size of the JSON, else one per GPU, else 2.",
        ),
    ] = None,
    details: Annotated[bool, typer.Option("--details", help="Also list every symbol and device looked at.")] = False,
    json_file: command.JsonOption = None,
) -> None:
    """Check versions, frameworks, devices, backends, and what a configuration would do to a model.

    Nothing is patched. Exit code 0: everything would work; 1: something would not, and the output says what and why.
    """
    files.check_writable(json_file)
    findings: list[Finding] = diagnosis.versions()
    section, rest, found = _section(config)
    findings += found
    ranks = _ranks(tp, rest)
    architecture, found = _architecture(model)
    findings += found
    features = _FEATURES if architecture is None else architecture.hidden_size
    findings += diagnosis.frameworks(section)
    findings += diagnosis.devices(ranks)
    findings += diagnosis.backends(section, features)
    messages: list[Message] = []
    dtype = _dtype(rest)
    if section is not None:
        found, messages = diagnosis.configured(section, architecture, ranks, dtype)
        findings += found
    fine = not any(finding.verdict is Verdict.PROBLEM for finding in findings)
    title = f"what would happen to reductions: {ranks} ranks, {str(dtype).removeprefix('torch.')}"
    command.results().print(Group(*_shown(findings, messages, title, details)))
    if json_file is not None and command.is_main_rank():
        files.write_json(
            json_file,
            {
                "fine": fine,
                "ranks": ranks,
                "findings": [asdict(finding) for finding in findings],
                "messages": [asdict(message) for message in messages],
                "environment": environment.describe(distributed.default_device()),
            },
        )
    if not fine:
        raise typer.Exit(PROBLEMS)


def _section(path: Path | None) -> tuple[Config | None, Mapping[str, Any], list[Finding]]:
    """The configuration, the rest of its JSON, and what is to be said about it."""
    if path is None:
        advice = "give --config and --model to see what would be compressed"
        return None, {}, [Finding("configuration", "section", Verdict.FINE, f"none given; {advice}")]
    try:
        section, rest = configuration.load(path)
    except ConfigError as error:
        return None, {}, [Finding("configuration", "section", Verdict.PROBLEM, line) for line in str(error).split("\n")]
    found = [Finding("configuration", "section", Verdict.FINE, f"{path} is valid")]
    checkpoint = section.weights.checkpoint
    if checkpoint is not None and not Path(checkpoint).is_dir():
        why = f"weights.checkpoint: there is no folder {checkpoint}"
        found.append(Finding("configuration", "weights", Verdict.PROBLEM, why))
    return section, rest, found


def _architecture(path: Path | None) -> tuple[Architecture | None, list[Finding]]:
    if path is None:
        return None, []
    try:
        return Architecture.read(path), []
    except LaunchError as error:
        return None, [Finding("configuration", "model", Verdict.PROBLEM, str(error))]


def _ranks(tp: int | None, rest: Mapping[str, Any]) -> int:
    parallel = rest.get("tensor_parallel")
    configured = parallel.get("tp_size") if isinstance(parallel, Mapping) else None
    if not isinstance(configured, int) or configured < 1:
        configured = None
    return tp or distributed.launched_world_size() or configured or torch.cuda.device_count() or 2


def _dtype(rest: Mapping[str, Any]) -> torch.dtype:
    """Of the JSON; bf16 where it is silent, which DeepSpeed is not: its default is fp16."""
    name = str(rest.get("dtype", "bf16")).lower()
    return next((dtype for dtype, names in _DTYPES.items() if name in names), torch.bfloat16)


def _shown(
    findings: Sequence[Finding], messages: Sequence[Message], title: str, details: bool
) -> Iterator[RenderableType]:
    """One table of findings by area, one of messages, and the verdict."""
    table = Table(show_header=False, title="megacomp doctor", title_justify="left")
    for _ in range(3):
        table.add_column(overflow="fold")
    for area in _AREAS:
        members = [finding for finding in findings if finding.area == area]
        for index, finding in enumerate(members):
            mark, style = _MARKS[finding.verdict]
            text = escape(finding.found)
            if finding.advice:
                text += f"\n[italic]-> {escape(finding.advice)}[/italic]"
            if details:
                text += "".join(f"\n[dim]   {escape(line)}[/dim]" for line in finding.details)
            last = index == len(members) - 1
            table.add_row(f"[{style}]{mark}[/{style}]", f"{area}: {escape(finding.subject)}", text, end_section=last)
    yield table
    if messages:
        yield _messages(messages, title)
    problems = sum(finding.verdict is Verdict.PROBLEM for finding in findings)
    notes = sum(finding.verdict is Verdict.NOTE for finding in findings)
    remarks = f"{notes} note{'s' * (notes != 1)}" if notes else "nothing to remark"
    if problems:
        yield Text(f"{problems} thing{'s' * (problems != 1)} would not work here (NO); {remarks}.", style="bold red")
    else:
        yield Text(f"Everything looked at would work; {remarks}.", style="green")


def _messages(messages: Sequence[Message], title: str) -> Table:
    table = Table(title=title, title_justify="left")
    for name, justify in (
        ("tokens", "right"),
        ("bytes", "right"),
        ("reductions", "right"),
        ("layers", "left"),
        ("what", "left"),
        ("by", "left"),
        ("of a ring's bytes", "right"),
    ):
        table.add_column(name, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for message in messages:
        table.add_row(
            f"{message.tokens:,}",
            f"{message.bytes:,}",
            str(message.sites),
            f"{message.layers} {message.module}".strip(),
            message.what,
            message.decided_by,
            f"{message.sent / message.ring:.2f}" if message.compressed and message.ring else "",
            style=None if message.compressed else "dim",
        )
    return table


app = ranked.single(run)

if __name__ == "__main__":
    app()
