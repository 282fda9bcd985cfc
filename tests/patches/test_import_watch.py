"""Waiting for an import, and stopping to wait, leaves the import system as it was."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megacomp.patches.importing import ImportWatch


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A package with an inner module, on the path and not imported."""
    folder = tmp_path / "watched_package"
    folder.mkdir()
    (folder / "__init__.py").write_text("ready = False\nfrom watched_package import inner\nready = True\n")
    (folder / "inner.py").write_text("value = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "watched_package"
    for name in [name for name in sys.modules if name.startswith("watched_package")]:
        del sys.modules[name]


@pytest.fixture(autouse=True)
def unchanged_finders() -> Iterator[None]:
    before = list(sys.meta_path)
    yield
    assert sys.meta_path == before


def test_the_action_runs_once_after_the_module(package: str) -> None:
    seen = []
    watch = ImportWatch(package, lambda: seen.append(sys.modules[package].ready))
    watch.start()
    importlib.import_module("json")
    assert seen == []
    module = importlib.import_module(package)
    assert seen == [True]
    assert "exec_module" not in vars(module.__spec__.loader)  # type: ignore[arg-type,union-attr]
    importlib.reload(module)
    assert seen == [True]


def test_an_inner_module_is_met_while_its_package_is_being_imported(package: str) -> None:
    seen = []
    ImportWatch(f"{package}.inner", lambda: seen.append(sys.modules[package].ready)).start()
    importlib.import_module(package)
    assert seen == [False]


def test_after_stop_nothing_happens(package: str) -> None:
    seen: list[int] = []
    watch = ImportWatch(package, lambda: seen.append(1))
    watch.start()
    watch.stop()
    watch.stop()
    importlib.import_module(package)
    assert seen == []


def test_an_error_of_the_action_fails_the_import_until_it_succeeds(package: str) -> None:
    problems = ["unsupported version", "missing symbol"]

    def refuse() -> None:
        if problems:
            raise RuntimeError(problems.pop(0))

    ImportWatch(package, refuse).start()
    for problem in list(problems):
        with pytest.raises(RuntimeError, match=problem):
            importlib.import_module(package)
        assert package not in sys.modules
    assert importlib.import_module(package).ready


def test_after_an_error_of_the_action_it_can_be_stopped(package: str) -> None:
    def refuse() -> None:
        raise RuntimeError("unsupported version")

    watch = ImportWatch(package, refuse)
    watch.start()
    with pytest.raises(RuntimeError, match="unsupported version"):
        importlib.import_module(package)
    watch.stop()
    assert importlib.import_module(package).ready


def test_a_module_that_does_not_exist_is_still_not_found(package: str) -> None:
    watch = ImportWatch(f"{package}.missing", lambda: None)
    watch.start()
    with pytest.raises(ModuleNotFoundError, match=r"watched_package\.missing"):
        importlib.import_module(f"{package}.missing")
    watch.stop()
