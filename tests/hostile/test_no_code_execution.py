"""Nothing a file or a message holds is ever executed: no pickle, no eval, no remote code."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted(path for room in ("megacomp", "kernels", "patches", "launch") for path in (ROOT / room).rglob("*.py"))

MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "yaml"}
BUILTINS = {"eval", "exec", "compile", "__import__"}
LOADERS = {("torch", "load"), ("torch", "hub"), ("torch", "package")}
ARGUMENTS = {"trust_remote_code", "allow_pickle", "shell"}
BETWEEN_RANKS = {
    "megacomp/agreement.py": {"all_gather_object"},
    "launch/calibration.py": {"all_gather_object"},
    "launch/distributed.py": {"broadcast_object_list"},
    "launch/harness.py": {"all_gather_object"},
    "launch/inspection.py": {"all_gather_object"},
    "launch/tune.py": {"all_gather_object", "broadcast_object_list"},
}
"""torch.distributed pickles these; docs/security.md says what that means."""


def executes(path: Path) -> Iterator[str]:
    """What in a source file could run, or have run, code that it does not contain."""
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names if alias.name.partition(".")[0] in MODULES)
            case ast.ImportFrom(module=str(module)) if module.partition(".")[0] in MODULES:
                yield module
            case ast.Name(id=name) if name in BUILTINS:
                yield name
            case ast.Attribute(value=ast.Name(id=module), attr=name) if (module, name) in LOADERS:
                yield f"{module}.{name}"
            case ast.Attribute(attr=name) if name.endswith(("_object", "_object_list")):
                yield name
            case ast.keyword(arg=str(name), value=value) if name in ARGUMENTS:
                if not (isinstance(value, ast.Constant) and value.value is False):
                    yield name


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_file_is_executed(path: Path) -> None:
    assert set(executes(path)) == BETWEEN_RANKS.get(path.relative_to(ROOT).as_posix(), set())


def test_the_search_finds_what_it_looks_for(tmp_path: Path) -> None:
    path = tmp_path / "bad.py"
    path.write_text(
        "import pickle\nfrom yaml import load\neval('1')\ntorch.load('x')\nmodel.eval()\ntorch.compile(f)\n"
        "dist.broadcast_object_list([])\nf(trust_remote_code=True, shell=False)\n"
    )
    assert sorted(executes(path)) == [
        "broadcast_object_list",
        "eval",
        "pickle",
        "torch.load",
        "trust_remote_code",
        "yaml",
    ]
