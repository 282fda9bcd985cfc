"""Do something right after a module is imported for the first time, or stop waiting for it."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

__all__ = ["ImportWatch"]


class ImportWatch(MetaPathFinder):
    """Calls `action` when the module `name` has been imported, before its importer goes on.

    Importing DeepSpeed takes seconds and touches devices, so a framework that nobody has imported is waited
    for rather than imported. What `action` raises makes the import fail, and so the next one, which is met again.
    """

    def __init__(self, name: str, action: Callable[[], None]) -> None:
        self._name = name
        self._action = action
        self._searching = False

    def start(self) -> None:
        """Begin to wait."""
        sys.meta_path.insert(0, self)

    def stop(self) -> None:
        """Stop waiting; harmless if that is over."""
        if self in sys.meta_path:
            sys.meta_path.remove(self)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Find the module as if this finder did not exist, and have its loader report to us."""
        if fullname != self._name or self._searching:
            return None
        self._searching = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._searching = False
        if spec is not None and spec.loader is not None:
            self._report_from(spec.loader)
        return spec

    def _report_from(self, loader: Loader) -> None:
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            # An attribute of this one loader object hides the method; taken away, the loader is as it was.
            del loader.exec_module
            execute(module)
            if self in sys.meta_path:
                self._action()
                self.stop()

        loader.exec_module = exec_module  # type: ignore[method-assign]
