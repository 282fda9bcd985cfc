"""Files that are written as a whole or not at all."""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO

import torch

from megacomp.launch.errors import LaunchError


def check_writable(path: Path | None) -> None:
    """Raise LaunchError if a file at `path` could not be made; None is fine."""
    if path is None:
        return
    if path.is_dir():
        raise LaunchError(f"{path} is a folder; give the name of a file")
    if not path.parent.is_dir():
        raise LaunchError(f"cannot write {path}: there is no folder {path.parent}")
    if not os.access(path.parent, os.W_OK):
        raise LaunchError(f"cannot write {path}: its folder is not writable")


def require_matplotlib() -> None:
    """Raise LaunchError without matplotlib."""
    if find_spec("matplotlib") is None:
        raise LaunchError("charts are drawn by matplotlib, which is not installed: pip install 'megacomp[plot]'")


def check_figure(path: Path | None) -> None:
    """Raise LaunchError if `write_figure` could not write to `path`; None is fine."""
    if path is None:
        return
    require_matplotlib()
    from matplotlib.backend_bases import FigureCanvasBase

    formats = sorted(FigureCanvasBase.get_supported_filetypes())
    if path.suffix and path.suffix.removeprefix(".").lower() not in formats:
        raise LaunchError(f"cannot draw {path}: its suffix must be one of {', '.join(formats)}")
    check_writable(path)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file that takes the place of `path` if the `with` block ends well, and vanishes otherwise."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            yield file
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, data: Any) -> None:
    """Write `data` as indented JSON; null for numbers that are not finite, for which JSON has no word."""
    with replacing(path) as file:
        file.write((json.dumps(_finite(data), indent=2, allow_nan=False) + "\n").encode())


def _finite(data: Any) -> Any:
    """`data` with None in place of infinities and NaN."""
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def write_figure(figure: Any, path: Path) -> None:
    """Draw a matplotlib figure into `path`, in the format that its suffix names, or PNG; whole or not at all."""
    with replacing(path) as file:
        figure.savefig(file, dpi=150, format=path.suffix.removeprefix(".") or "png")


@contextmanager
def logits_file(path: Path, shape: tuple[int, int, int]) -> Iterator[Callable[[torch.Tensor], None]]:
    """A safetensors file of one float32 tensor `logits` of `shape` [sequences, length, vocab_size].

    Yields the function that writes the next sequences, float32 [some, length, vocab_size]; the caller brings
    them all within the `with` block.
    """
    size = torch.Size(shape).numel() * torch.float32.itemsize
    header = {"logits": {"dtype": "F32", "shape": list(shape), "data_offsets": [0, size]}}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the data is to begin at a multiple of 8 bytes
    with replacing(path) as file:
        file.write(struct.pack("<Q", len(text)) + text)

        def write(logits: torch.Tensor) -> None:
            file.write(logits.cpu().numpy().astype("<f4").tobytes())

        yield write
