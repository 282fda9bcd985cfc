"""Text that every Python installation carries: the sources of its standard library.

`training_files` and `held_out_files` split it by file. A file's side depends on its path alone (the SHA-256
of its path relative to the library's root), never on its text or on the Python version, so a file held out
from training stays held out on a machine with another Python. The one exception is a file that another
version renamed or moved: its new path may fall on the other side (README.md, "Held-out text").
"""

import hashlib
import sysconfig
from pathlib import Path

# One file in this many is held out: about 5 %.
HELD_OUT_ONE_IN = 20

# Tests, vendored packages, generated tables and what newer Python versions no longer ship.
EXCLUDED_PARTS = frozenset(
    {
        "__phello__",
        "_bundled",
        "dist-packages",
        "distutils",
        "encodings",
        "idlelib",
        "lib2to3",
        "msilib",
        "pydoc_data",
        "site-packages",
        "test",
        "tests",
        "turtledemo",
    }
)
EXCLUDED_PREFIXES = ("_sysconfigdata", "sitecustomize", "usercustomize")


def library_root() -> Path:
    """The folder of this Python's standard library."""
    return Path(sysconfig.get_path("stdlib"))


def path_digest(relative: str) -> str:
    """SHA-256, in hexadecimal, of a source file's path relative to the library, with forward slashes."""
    return hashlib.sha256(relative.encode()).hexdigest()


def is_held_out(relative: str) -> bool:
    """Whether the source file at this relative path (forward slashes) is kept from training."""
    return int(path_digest(relative), 16) % HELD_OUT_ONE_IN == 0


def source_files(root: Path | None = None) -> list[str]:
    """Relative paths of the corpus below `root` (default: `library_root()`), ordered by `path_digest`.

    The order scatters related files, and is the same everywhere: any prefix is a fair sample.
    """
    root = root or library_root()
    files = (
        path.relative_to(root)
        for path in root.rglob("*.py")
        if not path.name.startswith(EXCLUDED_PREFIXES) and path.stat().st_size
    )
    names = (path.as_posix() for path in files if EXCLUDED_PARTS.isdisjoint(path.parts))
    return sorted(names, key=path_digest)


def read_source(relative: str, root: Path | None = None) -> str:
    """Text of one source file of the corpus."""
    return ((root or library_root()) / relative).read_text(encoding="utf-8")


def training_texts(root: Path | None = None) -> list[str]:
    """Texts of all training files, one string a file.

    Raises FileNotFoundError if this Python was installed without its sources.
    """
    return _texts(root, held_out=False)


def held_out_texts(root: Path | None = None) -> list[str]:
    """Texts of all held-out files, one string a file, in the fixed order of `source_files`.

    Raises FileNotFoundError if this Python was installed without its sources.
    """
    return _texts(root, held_out=True)


def held_out_text(root: Path | None = None) -> str:
    """All held-out files as one text; a prefix of it is a fair sample of them."""
    return "\n".join(held_out_texts(root))


def _texts(root: Path | None, *, held_out: bool) -> list[str]:
    texts = [read_source(name, root) for name in source_files(root) if is_held_out(name) == held_out]
    if not texts:
        raise FileNotFoundError(
            f"no Python sources below {root or library_root()}: this Python carries its standard library "
            "without .py files; use one that has them"
        )
    return texts
