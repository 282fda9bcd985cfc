"""Tables in the documentation that a benchmark writes."""

from __future__ import annotations

from pathlib import Path

from megacomp.launch.errors import LaunchError
from megacomp.launch.files import replacing

END = "<!-- end of table -->"


def replace_table(path: Path, module: str, text: str) -> None:
    """Put `text` where `path` says that `python -m module` writes a table.

    Raises LaunchError if it says no such thing.
    """
    begin = f"<!-- table: python -m {module} -->"
    head, found, rest = path.read_text(encoding="utf-8").partition(begin)
    _, ended, tail = rest.partition(END)
    if not (found and ended):
        raise LaunchError(f"{path} has no place for the table: {begin} ... {END}")
    with replacing(path) as file:
        file.write(f"{head}{begin}\n{text}\n{END}{tail}".encode())
