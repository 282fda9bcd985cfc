"""One rank's part of every quantized linear of a decoder, from a GPTQ checkpoint or from files `convert` has written.

Linears go by the names Hugging Face gives them in the Llama family. q, k, v, gate and up are split by output features,
o and down by input features. Down decides the order in which gate and up hold theirs, if all three are quantized.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from megacomp.gptq import ordering
from megacomp.gptq.checkpoint import FLOATS, GPTQCheckpoint, read_quantization
from megacomp.gptq.tensor_files import CheckpointError, TensorFiles, named_file, read_json
from megacomp.kernels.grouped_weight import WORD_BITS, GroupedWeight

__all__ = [
    "CONVERTED_INDEX",
    "CheckpointShards",
    "ConvertedShards",
    "LinearShard",
    "Order",
    "Shards",
    "is_quantized",
    "open_shards",
    "rank_file",
]

Order = Literal["tp_aware", "local"]

CONVERTED_INDEX = "megacomp_tp.index.json"
"""The file that marks a folder as written by `megacomp convert`."""

CONVERTED_VERSION = 1

_log = logging.getLogger("megacomp")

_SPLIT_BY_OUTPUT = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
_SPLIT_BY_INPUT = ("o_proj", "down_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class LinearShard:
    """One rank's part of one linear.

    in_features, out_features: of the rank's part. order: "tp_aware" where its features are in the order of the down
    projection's groups, else "local". bias: [out_features] for linears split by output, the whole bias for others.
    """

    weight: GroupedWeight
    bias: torch.Tensor | None
    in_features: int
    out_features: int
    order: Order


class Shards(ABC):
    """What one rank reads. A context manager: files are open inside the `with` block.

    folder: where from. rank, ranks: which part. order: as asked for.
    """

    folder: Path
    rank: int
    ranks: int
    order: Order

    def __enter__(self) -> Shards:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    @abstractmethod
    def linears(self) -> frozenset[str]:
        """The names of the quantized linears; others are left in floating point."""

    @property
    @abstractmethod
    def files(self) -> TensorFiles:
        """The files that hold the tensors that are not quantized."""

    @abstractmethod
    def check(self, shapes: Mapping[str, tuple[int, int]]) -> None:
        """Raise CheckpointError unless the tensors of these linears, given by (out, in) features, are there and fit."""

    @abstractmethod
    def read(self, name: str) -> LinearShard:
        """This rank's part of a linear, on the CPU."""

    @abstractmethod
    def close(self) -> None:
        """Close the files."""


def is_quantized(folder: Path) -> bool:
    """Whether the model in `folder` is quantized, by its configuration. Raises CheckpointError if that is not read."""
    return (folder / CONVERTED_INDEX).is_file() or read_quantization(folder) is not None


def open_shards(folder: Path, rank: int, ranks: int, order: Order = "tp_aware") -> Shards:
    """What rank `rank` of `ranks` reads from a GPTQ checkpoint, or from a folder that `convert` has written.

    order: of the MLP's features; a converted folder has an order already.

    Raises CheckpointError if the folder is neither, is damaged, or was converted for another number of ranks.
    """
    if (folder / CONVERTED_INDEX).is_file():
        return ConvertedShards(folder, rank, ranks)
    return CheckpointShards(folder, rank, ranks, order)


class CheckpointShards(Shards):
    """Permuted and split while it is read."""

    def __init__(self, folder: Path, rank: int, ranks: int, order: Order) -> None:
        self.folder, self.rank, self.ranks, self.order = folder, rank, ranks, order
        self._checkpoint = GPTQCheckpoint(folder)
        for name in self._checkpoint.linears:
            if name.rpartition(".")[2] not in (*_SPLIT_BY_OUTPUT, *_SPLIT_BY_INPUT):
                self.close()
                known = ", ".join((*_SPLIT_BY_OUTPUT, *_SPLIT_BY_INPUT))
                raise CheckpointError(f"{folder}: {name} is quantized, which is supported for {known} only")
        # Gate and up ask again for the order of the same down projection.
        self._order_of = lru_cache(maxsize=1)(self._mlp_order)

    @property
    def linears(self) -> frozenset[str]:
        return frozenset(self._checkpoint.linears)

    @property
    def files(self) -> TensorFiles:
        return self._checkpoint.files

    def check(self, shapes: Mapping[str, tuple[int, int]]) -> None:
        self._checkpoint.check(shapes)

    def read(self, name: str) -> LinearShard:
        checkpoint = self._checkpoint
        parent, _, role = name.rpartition(".")
        out_features, in_features = checkpoint.shape(name)
        features = self._order_of(parent) if role in _MLP else None
        order: Order = "local" if features is None else "tp_aware"
        inputs, outputs = torch.arange(in_features, device="cpu"), torch.arange(out_features, device="cpu")
        if role in _SPLIT_BY_OUTPUT:
            outputs = self._share(name, outputs if features is None else features)
        else:
            inputs = self._share(name, inputs if features is None else features)

        scheme = checkpoint.linears[name]
        rows = ordering.arrange(checkpoint.g_idx(name), inputs, WORD_BITS // scheme.bits)
        weight = ordering.group_weight(
            checkpoint.codes(name, rows.inputs, outputs),
            checkpoint.scales(name, rows.groups, outputs),
            checkpoint.zeros(name, rows.groups, outputs),
            scheme.bits,
            rows,
        )
        bias = checkpoint.bias(name)
        return LinearShard(weight, None if bias is None else bias[outputs], len(inputs), len(outputs), order)

    def _share(self, name: str, features: torch.Tensor) -> torch.Tensor:
        try:
            return ordering.share(features, self.rank, self.ranks)
        except ValueError as error:
            raise CheckpointError(f"{self.folder}: {name}: {error}") from None

    def _mlp_order(self, mlp: str) -> torch.Tensor | None:
        """The order of an MLP's inner features; None: as they are."""
        if self.order == "local" or any(f"{mlp}.{role}" not in self._checkpoint.linears for role in _MLP):
            return None
        down = f"{mlp}.down_proj"
        per_word = WORD_BITS // self._checkpoint.linears[down].bits
        order = ordering.tp_aware_order(self._checkpoint.g_idx(down), self.ranks, per_word)
        if order is None and self.rank == 0:
            _log.info(
                "%s: local order; the groups of its features do not split in whole words of %d codes over %d ranks",
                *(mlp, per_word, self.ranks),
            )
        return order

    def close(self) -> None:
        self._checkpoint.close()


class ConvertedShards(Shards):
    """Read as they are stored, from this rank's own file.

    Tensors of a linear X: `X.codes`, `X.scales`, and where there are any `X.zeros`, `X.word_groups`, `X.input_index`,
    `X.bias`, as GroupedWeight describes them. The index holds {"version", "ranks", "order", "files": the ranks' files,
    "linears": {X: {"bits", "in_features", "out_features", "order"}}}, features counting those of one rank. What is not
    quantized is in model.safetensors.
    """

    def __init__(self, folder: Path, rank: int, ranks: int) -> None:
        self.folder, self.rank, self.ranks = folder, rank, ranks
        path = folder / CONVERTED_INDEX
        index = read_json(path)
        try:
            version, converted_for = index["version"], index["ranks"]
            self.order, names = index["order"], list(index["files"])
            self._linears: dict[str, dict[str, Any]] = dict(index["linears"])
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path} is not an index that `megacomp convert` writes: {error!r}") from None
        if version != CONVERTED_VERSION:
            raise CheckpointError(f"{path}: version {version!r} is not supported; convert the checkpoint again")
        if converted_for != ranks:
            raise CheckpointError(
                f"{folder} was converted for a tensor-parallel size of {converted_for}, not {ranks}; convert it again"
            )
        if len(names) != ranks:
            raise CheckpointError(f"{path} names {len(names)} files for {ranks} ranks")
        for name, linear in self._linears.items():
            if not _is_converted(linear):
                raise CheckpointError(f"{path}: what it says of {name!r} is damaged: {str(linear)[:80]}")
        own = named_file(path, names[rank])
        self._files = TensorFiles(folder)
        try:
            self._own = TensorFiles(folder, [own])
        except CheckpointError:
            self._files.close()
            raise

    @property
    def linears(self) -> frozenset[str]:
        return frozenset(self._linears)

    @property
    def files(self) -> TensorFiles:
        return self._files

    def check(self, shapes: Mapping[str, tuple[int, int]]) -> None:
        for name, (out_features, in_features) in shapes.items():
            if name not in self._linears:
                if f"{name}.weight" not in self._files:
                    raise CheckpointError(f"{self.folder}: the weights lack {name}.codes")
                continue
            settings = self._linears[name]
            split = name.rpartition(".")[2] in _SPLIT_BY_INPUT
            expected = (
                out_features if split else out_features // self.ranks,
                in_features // self.ranks if split else in_features,
            )
            if (settings["out_features"], settings["in_features"]) != expected:
                raise CheckpointError(
                    f"{self.folder}: {CONVERTED_INDEX} gives {name} {settings['out_features']} x "
                    f"{settings['in_features']} features, the model implies {expected[0]} x {expected[1]}"
                )
            self._check(name, settings["bits"], *expected)

    def _check(self, name: str, bits: int, out_features: int, in_features: int) -> None:
        own, per_word = self._own, WORD_BITS // bits
        for tensor in (f"{name}.codes", f"{name}.scales"):
            if tensor not in own:
                raise CheckpointError(f"{self.folder}: the weights lack {tensor}")
            if len(own.header(tensor)[0]) != 2 or 0 in own.header(tensor)[0]:
                raise CheckpointError(
                    f"{self.folder}: {tensor} has shape {list(own.header(tensor)[0])}, not of a matrix"
                )
        words, groups = own.header(f"{name}.codes")[0][0], own.header(f"{name}.scales")[0][0]
        irregular = f"{name}.word_groups" in own
        if words * per_word < in_features or (not irregular and words % groups):
            raise CheckpointError(f"{self.folder}: {name}.codes has {words} words for {in_features} features")
        expected: dict[str, tuple[tuple[int, ...], tuple[str, ...]]] = {
            "codes": ((words, out_features), ("I32",)),
            "scales": ((groups, out_features), FLOATS),
            "zeros": ((groups, out_features), ("U8",)),
            "word_groups": ((words,), ("I32",)),
            "input_index": ((words * per_word,), ("I32",)),
            "bias": ((out_features,), FLOATS),
        }
        for kind, (shape, dtypes) in expected.items():
            tensor = f"{name}.{kind}"
            if tensor in own and (own.header(tensor)[0] != shape or own.header(tensor)[1] not in dtypes):
                found, dtype = own.header(tensor)
                wanted = f"{', '.join(dtypes)} {list(shape)}"
                raise CheckpointError(f"{self.folder}: {tensor} is {dtype} {list(found)}, expected {wanted}")
        for kind, limit in (("word_groups", groups), ("input_index", in_features)):
            indices = self._optional(f"{name}.{kind}")
            if indices is not None and not bool(((indices >= 0) & (indices < limit)).all()):
                raise CheckpointError(f"{self.folder}: {name}.{kind} is out of range: there are {limit}")
            if indices is not None and kind == "word_groups" and bool((indices.diff() < 0).any()):
                raise CheckpointError(f"{self.folder}: {name}.{kind} is not in ascending order")

    def read(self, name: str) -> LinearShard:
        settings = self._linears[name]
        weight = GroupedWeight(
            codes=self._own.read(f"{name}.codes"),
            scales=self._own.read(f"{name}.scales"),
            zeros=self._optional(f"{name}.zeros"),
            bits=settings["bits"],
            word_groups=self._optional(f"{name}.word_groups"),
            input_index=self._optional(f"{name}.input_index"),
        )
        bias = self._optional(f"{name}.bias")
        return LinearShard(weight, bias, settings["in_features"], settings["out_features"], settings["order"])

    def _optional(self, tensor: str) -> torch.Tensor | None:
        return self._own.read(tensor) if tensor in self._own else None

    def close(self) -> None:
        self._files.close()
        self._own.close()


def _is_converted(linear: object) -> bool:
    """Whether this is what the index of a converted folder says of a linear."""
    if not isinstance(linear, dict) or linear.get("bits") not in (4, 8) or linear.get("order") not in get_args(Order):
        return False
    return all(type(linear.get(key)) is int for key in ("bits", "in_features", "out_features"))


def rank_file(rank: int, ranks: int) -> str:
    """The name of a rank's file in a converted folder."""
    return f"rank-{rank:02d}-of-{ranks:02d}.safetensors"
