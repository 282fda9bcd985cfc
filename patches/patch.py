"""One function of somebody else's module or class, replaced, and put back exactly."""

from __future__ import annotations

import functools
import logging
import pkgutil
from collections.abc import Callable
from typing import Any

__all__ = ["MissingSymbolError", "Patch"]

_log = logging.getLogger("megacomp")


class MissingSymbolError(RuntimeError):
    """What a patch replaces does not exist in the version of the framework that is installed.

    No ImportError, which whoever imports a framework only if it is there would take for its absence.
    """


class Patch:
    """Replaces the function at `path` by `wrap(function)`, until `undo`.

    path: full dotted path of a module's global or of what a class itself defines, such as
        "megatron.core.tensor_parallel.mappings._reduce". Both are looked up at every call, unlike names that
        other modules imported.
    wrap: given the original function, returns its replacement. What a class stores as a staticmethod is given
        as its function and stored as a staticmethod again.
    """

    def __init__(self, path: str, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        self.path = path
        self._wrap = wrap
        # The very objects in the owner's __dict__, not what attribute access makes of them.
        self._original: Any = None
        self._replacement: Any = None

    def check(self, supported: str) -> None:
        """Raise MissingSymbolError, naming `path` and what is `supported`, if there is nothing to replace."""
        try:
            owner, name = self._find()
            found = name in vars(owner)
        except (ImportError, AttributeError):
            found = False
        if not found:
            raise MissingSymbolError(f"{self.path} does not exist; megacomp supports {supported}")

    def apply(self) -> None:
        """Replace the function."""
        owner, name = self._find()
        self._original = original = vars(owner)[name]
        is_static = isinstance(original, staticmethod)
        function = original.__func__ if is_static else original
        replacement = functools.update_wrapper(self._wrap(function), function)
        self._replacement = staticmethod(replacement) if is_static else replacement
        setattr(owner, name, self._replacement)

    def undo(self) -> None:
        """Put the original object back.

        If somebody replaced ours meanwhile, theirs is left alone: it may call ours, which does nothing of its
        own once the door is closed.
        """
        owner, name = self._find()
        if vars(owner).get(name) is self._replacement:
            setattr(owner, name, self._original)
        else:
            _log.warning("%s was replaced by others after megacomp; left as it is", self.path)

    def _find(self) -> tuple[Any, str]:
        """The module or class that holds the function, and the function's name in it."""
        parent, _, name = self.path.rpartition(".")
        return pkgutil.resolve_name(parent), name
