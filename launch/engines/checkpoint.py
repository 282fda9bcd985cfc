"""Reading the safetensors of a Hugging Face model folder, a slice at a time."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from megacomp.launch.errors import LaunchError

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_FLOATS = ("F32", "BF16", "F16")
_ALL = slice(None)


class Checkpoint:
    """The weights of one model folder, one file or many. Nothing is read before it is asked for.

    A context manager: the files are open (memory-mapped) inside the `with` block.
    """

    def __init__(self, folder: Path) -> None:
        """Find the files and read their headers.

        Raises LaunchError if there are no safetensors, a file of the index is missing, or a file is damaged.
        """
        self._folder = folder
        self._files = ExitStack()
        self._handles: dict[str, Any] = {}
        try:
            for path in _paths(folder):
                handle = self._files.enter_context(safe_open(path, framework="pt"))
                self._handles.update(dict.fromkeys(handle.keys(), handle))
        except (SafetensorError, OSError) as error:
            self._files.close()
            raise LaunchError(f"{folder}: damaged safetensors: {error}") from None

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exception: object) -> None:
        self._handles.clear()
        self._files.close()

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise LaunchError unless every tensor of `shapes` is there with its shape and a floating dtype."""
        missing = [name for name in shapes if name not in self._handles]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise LaunchError(f"{self._folder}: the weights lack {missing[0]}{more}, which config.json calls for")
        for name, shape in shapes.items():
            header = self._handles[name].get_slice(name)
            found, dtype = tuple(header.get_shape()), header.get_dtype()
            if found != shape:
                raise LaunchError(f"{self._folder}: {name} has shape {list(found)}, config.json implies {list(shape)}")
            if dtype not in _FLOATS:
                raise LaunchError(f"{self._folder}: {name} has dtype {dtype}; supported are {', '.join(_FLOATS)}")

    def unused(self, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
        """Names of the tensors that `shapes` does not call for, sorted."""
        return sorted(self._handles.keys() - shapes.keys())

    def read(self, name: str, rows: slice = _ALL, columns: slice = _ALL) -> torch.Tensor:
        """A tensor, or its part in `rows` (first dimension) and `columns` (second), in its own dtype."""
        part = self._handles[name].get_slice(name)
        return part[rows] if columns == _ALL else part[rows, columns]


def _paths(folder: Path) -> list[Path]:
    if (folder / _SINGLE).is_file():
        return [folder / _SINGLE]
    if not (folder / _INDEX).is_file():
        legacy = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
        hint = f"; {legacy[0]} is not read: save the model as safetensors" if legacy else ""
        raise LaunchError(f"{folder} holds no weights: neither {_SINGLE} nor {_INDEX}{hint}")
    try:
        names = sorted(set(json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, AttributeError, TypeError):
        raise LaunchError(f"{folder / _INDEX} is not an index: it needs an object weight_map") from None
    absent = [name for name in names if not (folder / name).is_file()]
    if absent:
        raise LaunchError(f"{folder}: {_INDEX} names {absent[0]}, which is missing")
    return [folder / name for name in names]
