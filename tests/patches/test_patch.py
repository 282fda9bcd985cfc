"""A patch replaces one attribute and puts the very same object back."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest

from megacomp.patches.patch import MissingSymbolError, Patch


class Base:
    def inherited(self) -> str:
        return "inherited"


class Victim(Base):
    @staticmethod
    def static(text: str) -> str:
        """Static."""
        return text

    def method(self, text: str) -> str:
        return text


def function(text: str) -> str:
    return text


@pytest.fixture
def framework(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    module = ModuleType("somebodys_framework")
    module.Victim, module.function = Victim, function  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    yield module


def loudly(original: Callable[..., Any]) -> Callable[..., Any]:
    def loud(*args: Any) -> Any:
        return original(*args).upper()

    return loud


def test_a_function_of_a_module(framework: ModuleType) -> None:
    patch = Patch("somebodys_framework.function", loudly)
    patch.apply()
    assert framework.function("a") == "A"
    assert framework.function.__name__ == "function"
    patch.undo()
    assert framework.function is function


@pytest.mark.parametrize(("name", "kind"), [("static", staticmethod), ("method", type(function))])
def test_a_class_attribute_comes_back_as_the_object_in_its_dict(framework: ModuleType, name: str, kind: type) -> None:
    original = vars(Victim)[name]
    patch = Patch(f"somebodys_framework.Victim.{name}", loudly)
    patch.apply()
    assert isinstance(vars(Victim)[name], kind)
    assert getattr(Victim(), name)("a") == "A"
    patch.undo()
    assert vars(Victim)[name] is original


def test_patches_on_one_function_come_off_in_reverse_order(framework: ModuleType) -> None:
    first, second = (Patch("somebodys_framework.function", loudly) for _ in range(2))
    first.apply()
    second.apply()
    second.undo()
    first.undo()
    assert framework.function is function


def test_what_others_put_over_ours_is_left_alone(framework: ModuleType, caplog: pytest.LogCaptureFixture) -> None:
    patch = Patch("somebodys_framework.function", loudly)
    patch.apply()
    framework.function = theirs = loudly(framework.function)  # type: ignore[attr-defined]
    with caplog.at_level(logging.WARNING, "megacomp"):
        patch.undo()
    assert framework.function is theirs
    assert "somebodys_framework.function was replaced by others" in caplog.text


@pytest.mark.parametrize(
    "path",
    [
        "somebodys_framework.missing",
        "somebodys_framework.Missing.method",
        "somebodys_framework.Victim.missing",
        "somebodys_framework.Victim.inherited",
        "nobodys_framework.function",
        "nobodys_framework.core.Victim.method",
    ],
)
def test_a_missing_symbol_is_named_with_what_is_supported(framework: ModuleType, path: str) -> None:
    with pytest.raises(MissingSymbolError) as caught:
        Patch(path, loudly).check("somebodys-framework >=1,<3")
    assert f"{path} does not exist" in str(caught.value)
    assert "somebodys-framework >=1,<3" in str(caught.value)


def test_checking_changes_nothing(framework: ModuleType) -> None:
    before = dict(vars(Victim))
    Patch("somebodys_framework.Victim.static", loudly).check("")
    assert dict(vars(Victim)) == before
