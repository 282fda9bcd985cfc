"""What is asked of a benchmark and cannot be served ends it at once, in one line, as it does megacomp's commands."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
from typer.testing import CliRunner

pytestmark = pytest.mark.usefixtures("no_launcher")

WRITERS = ("codec_quality", "compile_report", "planning_published", "quality", "ttft_link")


def said(name: str, *arguments: str) -> str:
    """The one line that a benchmark says to arguments that are wrong."""
    result = CliRunner().invoke(importlib.import_module(f"benchmarks.{name}").app, arguments)
    assert result.exit_code == 2, result.output
    (line,) = result.output.splitlines()
    return line


@pytest.mark.parametrize("name", ["codec", "collective", "compile_report", "quality", "reduce_norm", "tp_dequant"])
def test_results_that_could_not_be_written(name: str, tmp_path: Path) -> None:
    out = tmp_path / "none" / "out.json"
    assert said(name, "--out", str(out)) == f"error: cannot write {out}: there is no folder {out.parent}"


@pytest.mark.parametrize("name", WRITERS)
def test_tables_that_could_not_be_written(name: str, tmp_path: Path) -> None:
    """Before anything is measured, which takes minutes."""
    page = tmp_path / "page.md"
    assert said(name, "--write", str(page)) == f"error: cannot read {page}: No such file or directory"
    page.write_text("nothing here")
    assert said(name, "--write", str(page)).startswith(f"error: {page} has no place for the table: <!-- table: python")
    assert said(name, "--write", str(tmp_path)).startswith(f"error: {tmp_path} is a folder")


@pytest.mark.parametrize("operation", ["decode", "decode_sum:x", "decode_sum:0", "decode_sum:²"])
def test_operations_that_are_none(operation: str) -> None:
    assert said("compile_report", "--operation", operation).startswith(f"error: --operation {operation}: give encode, ")


def test_models_that_are_not_there(tmp_path: Path) -> None:
    assert said("quality", "--data", str(tmp_path)) == f"error: no model {tmp_path / 'stories260K'}"
