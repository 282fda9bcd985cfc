"""The floors of the house: who may import whom, and what importing the package does (nothing)."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import megacomp

ROOT = Path(__file__).resolve().parents[1]
ROOMS = {
    "megacomp": "megacomp",
    "kernels": "megacomp.kernels",
    "patches": "megacomp.patches",
    "launch": "megacomp.launch",
}

FLOORS = {
    "megacomp.version": 0,
    "megacomp.machine": 0,
    "megacomp.kernels": 0,
    "megacomp.codecs": 1,
    "megacomp.collectives": 2,
    "megacomp.calibration": 2,
    "megacomp.gptq": 2,
    "megacomp.config": 3,
    "megacomp.tuning": 3,
    "megacomp.policy": 3,
    "megacomp.agreement": 3,
    "megacomp.telemetry": 3,
    "megacomp.guard": 3,
    "megacomp.door": 3,
    "megacomp.patches": 4,
    "megacomp.report": 5,
    "megacomp.installation": 5,
    "megacomp": 5,
    "megacomp.launch": 6,
}
FRAMEWORKS = {"deepspeed", "megatron", "transformers"}
READS_FILES = {"megacomp.calibration.file", "megacomp.gptq.tensor_files"}
EXTENDS_FRAMEWORKS = {"megacomp.patches.deepspeed_layers", "megacomp.patches.megatron_layers"}
"""They subclass a framework's layers, so they import it; nobody imports them before the framework."""


class Import(NamedTuple):
    module: str
    at_import: bool
    """Whether it is executed when the importing module is: neither inside a function nor for type checkers only."""


def sources() -> dict[str, Path]:
    """Every module of the package by its installed name."""
    found = {}
    for folder, package in ROOMS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join((package, *(part for part in parts if part != "__init__")))] = path
    return found


SOURCES = sources()


def floor_of(module: str) -> int:
    while module not in FLOORS:
        module = module.rpartition(".")[0]
    return FLOORS[module]


def imports_of(module: str) -> Iterator[Import]:
    def visit(node: ast.AST, at_import: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from (Import(alias.name, at_import) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{module}: relative import"
                assert child.module is not None
                for alias in child.names:
                    submodule = f"{child.module}.{alias.name}"
                    yield Import(submodule if submodule in SOURCES else child.module, at_import)
            elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                yield from visit(child, False)
            elif isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
                yield from visit(ast.Module(child.body, []), False)
                yield from visit(ast.Module(child.orelse, []), at_import)
            else:
                yield from visit(child, at_import)

    return visit(ast.parse(SOURCES[module].read_text()), True)


@pytest.mark.parametrize("module", SOURCES)
def test_a_room_imports_only_from_its_own_floor_and_below(module: str) -> None:
    ours = {found.module for found in imports_of(module) if found.module.partition(".")[0] == "megacomp"}
    assert not {other for other in ours if floor_of(other) > floor_of(module)}


@pytest.mark.parametrize("module", [module for module in SOURCES if floor_of(module) <= 2])
def test_the_lower_floors_need_torch_and_triton_only(module: str) -> None:
    tops = {found.module.partition(".")[0] for found in imports_of(module)}
    allowed = {"torch", "triton", "megacomp"} | ({"safetensors"} if module in READS_FILES else set())
    assert tops - sys.stdlib_module_names <= allowed


@pytest.mark.parametrize("module", [module for module in SOURCES if floor_of(module) <= 5])
def test_frameworks_are_imported_only_where_they_are_used(module: str) -> None:
    at_import = {found.module for found in imports_of(module) if found.at_import}
    assert not at_import & EXTENDS_FRAMEWORKS
    if module not in EXTENDS_FRAMEWORKS:
        assert not {name.partition(".")[0] for name in at_import} & FRAMEWORKS


def test_no_circles() -> None:
    finished: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, f"a circle: {' -> '.join((*path[path.index(module) :], module))}"
        if module not in finished:
            for found in imports_of(module):
                if found.at_import and found.module in SOURCES and found.module != module:
                    visit(found.module, (*path, module))
            finished.add(module)

    for module in SOURCES:
        visit(module, ())


def python(program: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, cwd=ROOT.parent)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_the_package_loads_and_changes_nothing() -> None:
    output = python(
        "import logging, sys, warnings\n"
        "def state():\n"
        "    return [list(sys.meta_path), list(sys.path_hooks), list(warnings.filters), logging.root.handlers[:],\n"
        "            sys.excepthook, sys.displayhook]\n"
        "before, modules = state(), set(sys.modules)\n"
        "import megacomp\n"
        "dir(megacomp), megacomp.__version__, megacomp.__all__\n"
        "assert state() == before\n"
        "new = {name for name in set(sys.modules) - modules if name.partition('.')[0] not in sys.stdlib_module_names}\n"
        "print(*sorted(new))"
    )
    assert output.split() == ["megacomp", "megacomp.version"]


def test_the_lower_floors_import_on_a_bare_host() -> None:
    output = python(
        "import sys\n"
        "class Bare:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] in {'pydantic', 'rich', 'typer', 'deepspeed', 'megatron', 'transformers'}:\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Bare())\n"
        "import megacomp\n"
        "print(megacomp.all_reduce.__name__, megacomp.CodecError.__name__)\n"
    )
    assert output.split() == ["all_reduce", "CodecError"]


def test_public_names_resolve_and_are_what_type_checkers_see() -> None:
    tree = ast.parse(SOURCES["megacomp"].read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    for_checkers = {
        alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert for_checkers == megacomp._HOMES
    assert set(megacomp.__all__) == {*for_checkers, "__version__"}
    for name in megacomp.__all__:
        assert getattr(megacomp, name) is not None
        assert name in dir(megacomp)
    with pytest.raises(AttributeError, match="has no attribute 'instal'"):
        megacomp.instal  # noqa: B018
