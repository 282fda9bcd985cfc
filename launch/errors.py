"""The one exception of this room."""

from __future__ import annotations


class LaunchError(ValueError):
    """A request that cannot be served: a model, a parallel size, an input or a missing program.

    The message is complete by itself, naming what was wrong and what is allowed: commands print it without a
    traceback and exit with 2.
    """
