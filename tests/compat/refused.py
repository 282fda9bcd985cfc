"""A version that is not supported is refused by name before anything is patched. matrix.py runs this in such a one."""

from __future__ import annotations

import importlib
import os
import sys
from types import FunctionType, ModuleType
from typing import Any

import pytest

import megacomp
from megacomp.patches import FRAMEWORKS

CONFIG = {"megacomp": {"communication": {"codec": "mxfp4"}}}


def functions(package: str) -> dict[str, Any]:
    """Every function of the modules imported from `package` and of their classes, as stored, by its full name."""
    found: dict[str, Any] = {}
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] == package.split(".")[0] and isinstance(module, ModuleType):
            for key, value in list(vars(module).items()):
                if isinstance(value, FunctionType):
                    found[f"{name}.{key}"] = value
                elif isinstance(value, type):
                    found.update({f"{name}.{key}.{inner}": stored for inner, stored in vars(value).items()})
    return found


def test_the_version_is_refused_and_nothing_is_patched() -> None:
    framework = next(one for one in FRAMEWORKS if one.name == os.environ["MEGACOMP_COMPAT"])
    module = importlib.import_module(framework.module)
    before = functions(framework.module)
    assert len(before) > 100
    with pytest.raises(megacomp.UnsupportedVersionError) as caught:
        megacomp.install(CONFIG)
    supported = f"{framework.name} {framework.supported}"
    assert str(caught.value) == (
        f"{framework.name} {module.__version__} is not supported; megacomp works with {supported}"
    )
    after = functions(framework.module)
    assert before.keys() == after.keys()
    assert all(after[name] is value for name, value in before.items())
