"""Files that are written as a whole or not at all."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
    """Write `data` as indented JSON."""
    with replacing(path) as file:
        file.write((json.dumps(data, indent=2) + "\n").encode())


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
