"""The weights of a Hugging Face model folder that are not quantized, found, checked and read a slice at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from megacomp.gptq import CheckpointError
from megacomp.gptq.tensor_files import TensorFiles
from megacomp.launch.errors import LaunchError

_FLOATS = ("F32", "BF16", "F16")


class Checkpoint(TensorFiles):
    """The weights of one model folder, one file or many. Nothing is read before it is asked for.

    A context manager: the files are open (memory-mapped) inside the `with` block.
    """

    def __init__(self, folder: Path) -> None:
        """Find the files and read their headers.

        Raises LaunchError if there are no safetensors, a file of the index is missing, or a file is damaged.
        """
        try:
            super().__init__(folder)
        except CheckpointError as error:
            raise LaunchError(str(error)) from None

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise LaunchError unless every tensor of `shapes` is there with its shape and a floating dtype."""
        missing = [name for name in shapes if name not in self]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise LaunchError(f"{self.folder}: the weights lack {missing[0]}{more}, which config.json calls for")
        for name, shape in shapes.items():
            found, dtype = self.header(name)
            if found != shape:
                raise LaunchError(f"{self.folder}: {name} has shape {list(found)}, config.json implies {list(shape)}")
            if dtype not in _FLOATS:
                raise LaunchError(f"{self.folder}: {name} has dtype {dtype}; supported are {', '.join(_FLOATS)}")

    def unused(self, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
        """Names of the tensors that `shapes` does not call for, sorted."""
        return sorted(self.names() - shapes.keys())


_SAMPLES, _SAMPLE_BYTES = 64, 4096


def model_digest(folder: Path) -> str:
    """SHA-256 of a model folder: its config.json, and of each weights file the name, the size, and samples.

    Samples are 4 KiB at 64 evenly spaced places, headers among them: any training in between changes them, and a
    model of hundreds of gigabytes is not read whole.
    """
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name},{size}".encode())
        with path.open("rb") as file:
            for sample in range(_SAMPLES):
                file.seek(sample * max(0, size - _SAMPLE_BYTES) // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()
