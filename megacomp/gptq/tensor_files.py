"""The safetensors of a model folder, one file or many, found, opened and read by slices."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open

__all__ = ["CheckpointError", "TensorFiles", "read_json"]

Files = TypeVar("Files", bound="TensorFiles")

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_ALL = slice(None)


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file or tensor, and no model has been changed."""


class TensorFiles:
    """The tensors of some safetensors files. Nothing but headers is read before it is asked for.

    A context manager: the files are open (memory-mapped) inside the `with` block.
    """

    def __init__(self, folder: Path, paths: Iterable[Path] | None = None) -> None:
        """Read the headers of `paths`, or of the weights in `folder`, as Hugging Face and GPTQ tools name them.

        Raises CheckpointError if there are none, a file of the index is missing, or a file is damaged.
        """
        self.folder = folder
        self._files = ExitStack()
        self._handles: dict[str, Any] = {}
        for path in weight_files(folder) if paths is None else paths:
            try:
                handle = self._files.enter_context(safe_open(path, framework="pt"))
            except (SafetensorError, OSError) as error:
                self._files.close()
                raise CheckpointError(f"{folder}: damaged safetensors: {_damage(path) or error}") from None
            self._handles.update(dict.fromkeys(handle.keys(), handle))

    def __enter__(self: Files) -> Files:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files."""
        self._handles.clear()
        self._files.close()

    def names(self) -> set[str]:
        """The names of all tensors."""
        return set(self._handles)

    def __contains__(self, name: str) -> bool:
        return name in self._handles

    def header(self, name: str) -> tuple[tuple[int, ...], str]:
        """Shape and dtype ("F16", "I32", ...) of a tensor."""
        header = self._handles[name].get_slice(name)
        return tuple(header.get_shape()), header.get_dtype()

    def read(self, name: str, rows: slice = _ALL, columns: slice = _ALL) -> torch.Tensor:
        """A tensor, or its part in `rows` (first dimension) and `columns` (second), in its own dtype, on the CPU."""
        part = self._handles[name].get_slice(name)
        try:
            # safetensors takes slices by way of torch's default device.
            with torch.device("cpu"):
                return part[rows] if columns == _ALL else part[rows, columns]
        except (SafetensorError, ValueError, TypeError, KeyError, IndexError, RuntimeError) as error:
            raise CheckpointError(f"{self.folder}: {name} cannot be read: {error}") from None


def weight_files(folder: Path) -> list[Path]:
    """The safetensors that hold the weights of the model in `folder`.

    They are model.safetensors, or what model.safetensors.index.json lists, or the only other safetensors or index
    there is: GPTQ tools also write gptq_model-4bit-128g.safetensors. Raises CheckpointError.
    """
    if (folder / _SINGLE).is_file():
        return [folder / _SINGLE]
    indices = [folder / _INDEX] if (folder / _INDEX).is_file() else sorted(folder.glob("*.safetensors.index.json"))
    if not indices:
        others = sorted(folder.glob("gptq_model*.safetensors"))
        if len(others) == 1:
            return others
        legacy = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
        hint = f"; {legacy[0]} is not read: save the model as safetensors" if legacy else ""
        raise CheckpointError(f"{folder} holds no weights: neither {_SINGLE} nor {_INDEX}{hint}")
    index = indices[0]
    try:
        names = sorted(set(read_json(index)["weight_map"].values()))
    except (KeyError, AttributeError, TypeError):
        raise CheckpointError(f"{index} is not an index: it needs an object weight_map") from None
    return [named_file(index, name) for name in names]


def named_file(index: Path, name: object) -> Path:
    """The file beside `index` that it calls `name`. Raises CheckpointError: it is missing, or elsewhere."""
    if not isinstance(name, str) or Path(name).name != name:
        raise CheckpointError(f"{index} names {name!r}, which is no name of a file beside it")
    if not (index.parent / name).is_file():
        raise CheckpointError(f"{index.parent}: {index.name} names {name!r}, which is missing")
    return index.parent / name


def read_json(path: Path) -> Any:
    """The contents of a JSON file. Raises CheckpointError if it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from None
    except RecursionError:
        raise CheckpointError(f"{path} is not valid JSON: it is nested too deeply") from None


def _damage(path: Path) -> str | None:
    """Which tensor of a file that cannot be opened is cut off, in words; None if that is not what is wrong."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            # No more is asked for than there is: a buffer of that size comes first.
            tensors = json.loads(file.read(min(length, size)))
        tensors.pop("__metadata__", None)
        first, end = min(
            ((name, 8 + length + entry["data_offsets"][1]) for name, entry in tensors.items()),
            key=lambda tensor: (tensor[1] <= size, tensor[1]),
        )
    except (OSError, ValueError, struct.error, LookupError, TypeError, AttributeError, RecursionError):
        return None
    return None if end <= size else f"{path.name} ends within {first}: it has {size:,} bytes of at least {end:,}"
