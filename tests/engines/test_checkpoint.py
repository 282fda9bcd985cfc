"""Weights found, checked and read by slices."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megacomp.launch.engines.checkpoint import Checkpoint
from megacomp.launch.errors import LaunchError

A = torch.arange(24.0).reshape(6, 4)
B = torch.arange(4, dtype=torch.bfloat16)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_file({"a": A}, tmp_path / "one.safetensors")
    save_file({"b": B}, tmp_path / "two.safetensors")
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    return tmp_path


def test_slices_of_several_files(folder: Path) -> None:
    with Checkpoint(folder) as checkpoint:
        assert torch.equal(checkpoint.read("a"), A)
        assert torch.equal(checkpoint.read("a", rows=slice(2, 4)), A[2:4])
        assert torch.equal(checkpoint.read("a", columns=slice(1, 3)), A[:, 1:3])
        assert torch.equal(checkpoint.read("b"), B)
        checkpoint.check({"a": (6, 4), "b": (4,)})
        assert checkpoint.unused({"a": (6, 4)}) == ["b"]


def test_weights_that_do_not_fit(folder: Path) -> None:
    save_file({"a": A.to(torch.int32), "b": B}, folder / "model.safetensors")
    with Checkpoint(folder) as checkpoint:  # the single file comes first
        with pytest.raises(LaunchError, match=r"the weights lack c and 1 more, which config\.json calls for"):
            checkpoint.check({"a": (6, 4), "c": (1,), "d": (1,)})
        with pytest.raises(LaunchError, match=r"b has shape \[4\], config.json implies \[5\]"):
            checkpoint.check({"b": (5,)})
        with pytest.raises(LaunchError, match="a has dtype I32; supported are F32, BF16, F16"):
            checkpoint.check({"a": (6, 4)})


def test_folders_without_usable_weights(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    empty = tmp_path_factory.mktemp("empty")
    with pytest.raises(LaunchError, match=r"holds no weights: neither model\.safetensors nor"):
        Checkpoint(empty)
    (empty / "pytorch_model.bin").touch()
    with pytest.raises(LaunchError, match=r"pytorch_model\.bin is not read: save the model as safetensors"):
        Checkpoint(empty)
    (empty / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    with pytest.raises(LaunchError, match="damaged safetensors"):
        Checkpoint(empty)
    (folder / "two.safetensors").unlink()
    with pytest.raises(LaunchError, match=r"names 'two.safetensors', which is missing"):
        Checkpoint(folder)
    (folder / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(LaunchError, match="is not an index"):
        Checkpoint(folder)
