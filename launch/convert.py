"""`megacomp convert`: a GPTQ checkpoint permuted and split once, for loading without that work."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from safetensors.torch import save_file

from megacomp.gptq import CheckpointError, Order
from megacomp.gptq.shards import CONVERTED_INDEX, CONVERTED_VERSION, CheckpointShards, LinearShard, Shards, rank_file
from megacomp.launch import command, ranked
from megacomp.launch.engines.architecture import Architecture
from megacomp.launch.errors import LaunchError

_KEPT = ("*.json", "*.model", "*.txt", "*.jinja")
"""Files of a model folder that go along: configuration and tokenizer."""

_LEFT = ("quantize_config.json", "*.safetensors.index.json")


def run(
    checkpoint: Annotated[Path, typer.Option("--checkpoint", help="The folder of a GPTQ checkpoint.")],
    tp: Annotated[int, typer.Option("--tp", min=1, help="The tensor-parallel size it is to be run at.")],
    out: Annotated[Path, typer.Option("--out", help="The folder to write; it must not exist, or be empty.")],
    order: Annotated[
        command.OrderName, typer.Option("--order", help="Of the MLP's features, as `weights.order` in a configuration.")
    ] = command.OrderName.TP_AWARE,
) -> None:
    """Write one file per rank, in the order in which a model runs.

    The folder takes the place of the checkpoint in `--model` and in `weights.checkpoint`, for this tensor-parallel
    size and either engine.
    """
    out = out.absolute()  # "." has no name
    convert(checkpoint, tp, out, order.value)
    written = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    command.results().print(f"{out}: {tp} rank{'s' * (tp > 1)}, {written:,} bytes of weights")


def convert(checkpoint: Path, tp: int, out: Path, order: Order = "tp_aware") -> None:
    """What the command does. Raises LaunchError; `out` is then as it was."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise LaunchError(f"{out} exists and is not an empty folder")
    if not out.parent.is_dir():
        raise LaunchError(f"cannot write {out}: there is no folder {out.parent}")
    if (checkpoint / CONVERTED_INDEX).is_file():
        raise LaunchError(f"{checkpoint} has been converted already; convert the GPTQ checkpoint it was made of")
    architecture = Architecture.read(checkpoint)
    architecture.check_tensor_parallel(tp)
    staging = out.with_name(f".{out.name}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    try:
        _write(checkpoint, tp, staging, order, architecture)
        if out.exists():
            # It stays the folder it is: somebody may stand in it. The index comes last, for it says that all is there.
            for path in sorted(staging.iterdir(), key=lambda path: path.name == CONVERTED_INDEX):
                path.rename(out / path.name)
        else:
            staging.rename(out)
    except CheckpointError as error:
        raise LaunchError(str(error)) from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _write(checkpoint: Path, tp: int, out: Path, order: Order, architecture: Architecture) -> None:
    linears: dict[str, Any] = {}
    for rank in range(tp):
        with CheckpointShards(checkpoint, rank, tp, order) as shards:
            if rank == 0:
                shards.check(architecture.linear_shapes())
                dense = {name: shards.files.read(name) for name in _dense_names(shards)}
                save_file(dense, out / "model.safetensors", {"format": "pt"})
            tensors: dict[str, torch.Tensor] = {}
            for name in sorted(shards.linears):
                shard = shards.read(name)
                tensors |= _tensors(name, shard)
                linears[name] = {
                    "bits": shard.weight.bits,
                    "in_features": shard.in_features,
                    "out_features": shard.out_features,
                    "order": shard.order,
                }
            save_file(tensors, out / rank_file(rank, tp))
    index = {
        "version": CONVERTED_VERSION,
        "ranks": tp,
        "order": order,
        "files": [rank_file(rank, tp) for rank in range(tp)],
        "linears": linears,
    }
    (out / CONVERTED_INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")
    for path in (path for pattern in _KEPT for path in checkpoint.glob(pattern)):
        if not any(path.match(pattern) for pattern in _LEFT):
            shutil.copyfile(path, out / path.name)
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    config.pop("quantization_config", None)  # what it describes is no longer what is stored
    (out / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def _dense_names(shards: Shards) -> list[str]:
    """The tensors that belong to no quantized linear."""
    return sorted(name for name in shards.files.names() if name.rpartition(".")[0] not in shards.linears)


def _tensors(name: str, shard: LinearShard) -> dict[str, torch.Tensor]:
    weight = shard.weight
    tensors = {
        "codes": weight.codes,
        "scales": weight.scales,
        "zeros": weight.zeros,
        "word_groups": weight.word_groups,
        "input_index": weight.input_index,
        "bias": shard.bias,
    }
    return {f"{name}.{kind}": tensor.contiguous() for kind, tensor in tensors.items() if tensor is not None}


app = ranked.single(run)

if __name__ == "__main__":
    app()
