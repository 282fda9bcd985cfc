"""Tables in the documentation that a benchmark writes."""

from __future__ import annotations

from pathlib import Path

from megacomp.launch.errors import LaunchError
from megacomp.launch.files import check_writable, replacing

END = "<!-- end of table -->"


def check_table(path: Path | None, module: str) -> None:
    """Raise LaunchError if `replace_table` could not put a table into `path`; None is fine."""
    if path is not None:
        check_writable(path)
        _around(path, module)


def replace_table(path: Path, module: str, text: str) -> None:
    """Put `text` where `path` says that `python -m module` writes a table.

    Raises LaunchError if it says no such thing.
    """
    head, tail = _around(path, module)
    with replacing(path) as file:
        file.write(f"{head}\n{text}\n{tail}".encode())


def _around(path: Path, module: str) -> tuple[str, str]:
    """What stands before the module's table, its mark included, and what after it."""
    begin = f"<!-- table: python -m {module} -->"
    try:
        before, found, rest = path.read_text(encoding="utf-8").partition(begin)
    except OSError as error:
        raise LaunchError(f"cannot read {path}: {error.strerror}") from None
    _, ended, after = rest.partition(END)
    if not (found and ended):
        raise LaunchError(f"{path} has no place for the table: {begin} ... {END}")
    return before + begin, END + after
