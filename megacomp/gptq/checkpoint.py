"""GPTQ checkpoints as tools write them: what their configuration says, what their tensors must be, and reading them.

Two families, which store the same numbers in different places (W is [in, out] here):

* AutoGPTQ, GPTQModel, Neural Compressor, Optimum: `qweight` int32 [in / 8, out], `qzeros` int32 [groups, out / 8],
  `scales` [groups, out], `g_idx` int32 [in]. The first format stores zero points minus one, subtracted from the whole
  int32 word, so that a zero point of 0 has borrowed from its neighbour; `checkpoint_format: gptq_v2` stores them as
  they are.
* compressed-tensors `pack-quantized` (llm-compressor): `weight_packed` int32 [out, in / 8] of codes plus 8,
  `weight_scale` [out, groups], `weight_zero_point` packed int32 [out / 8, groups] or int8 [out, groups],
  `weight_g_idx` int32 [in], `weight_shape` int64 [2].

(8 is 32 / bits, and 2^(bits - 1) where codes are offset.) Linears may be left out of quantization; they hold a
`weight` and are none of ours.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from megacomp.gptq.tensor_files import CheckpointError, TensorFiles, read_json
from megacomp.kernels.grouped_weight import WORD_BITS, unpack_codes

__all__ = ["GPTQCheckpoint", "Quantization", "Scheme", "read_quantization"]

Format = Literal["gptq", "gptq_v2", "pack-quantized"]

FLOATS = ("F32", "BF16", "F16")
_WIDTHS = (4, 8)
_MAX_GROUP_SIZE = 2**24
_PATTERN_LENGTH, _CHOICES = 512, 6
_CODES = {"gptq": "qweight", "gptq_v2": "qweight", "pack-quantized": "weight_packed"}


@dataclass(frozen=True)
class Scheme:
    """How one linear is quantized.

    bits: width of a code. group_size: input features that share a scale; -1: all. symmetric: whether zero points are
    2^(bits - 1) everywhere (GPTQ tools store them all the same). ordered: whether groups follow the activation order,
    so that g_idx cannot be missing.
    """

    bits: int
    group_size: int
    symmetric: bool
    ordered: bool

    def groups(self, in_features: int) -> int:
        """Groups of a linear of that many input features."""
        return 1 if self.group_size == -1 else -(-in_features // self.group_size)


@dataclass(frozen=True)
class Quantization:
    """What the configuration of a checkpoint says. Which linears are quantized, their tensors say."""

    format: Format
    default: Scheme | None
    rules: tuple[tuple[str, Scheme], ...]
    """Regular expressions of names and the schemes of the linears they match; the first match counts."""

    def scheme(self, name: str) -> Scheme | None:
        """The scheme of the linear `name`; None if the configuration leaves it unquantized."""
        return next((scheme for pattern, scheme in self.rules if re.match(pattern, name)), self.default)


def read_quantization(folder: Path) -> Quantization | None:
    """What quantize_config.json, or else config.json, says; None if the model is not quantized.

    Raises CheckpointError for a format or a setting that is not supported, naming the file and the key.
    """
    path = folder / "quantize_config.json"
    raw = read_json(path) if path.is_file() else None
    if raw is None:
        path = folder / "config.json"
        config = read_json(path) if path.is_file() else {}
        if not isinstance(config, dict):
            raise CheckpointError(f"{path} holds no object")
        raw = config.get("quantization_config")
    if raw is None:
        return None
    try:
        if not isinstance(raw, dict):
            raise CheckpointError(f"quantization settings must be an object, not {raw!r}")
        method = raw.get("quant_method", "gptq")
        if method == "gptq":
            return _gptq(raw)
        if method == "compressed-tensors":
            return _compressed_tensors(raw)
        raise CheckpointError(f"quant_method is {method!r}; supported are 'gptq' and 'compressed-tensors'")
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    except (AttributeError, TypeError) as error:
        raise CheckpointError(f"{path}: quantization settings are damaged: {error}") from None


def _gptq(raw: dict[str, Any]) -> Quantization:
    layout: Any = raw.get("checkpoint_format") or "gptq"
    if layout not in ("gptq", "gptq_v2") or raw.get("is_marlin_format"):
        found = "marlin" if raw.get("is_marlin_format") else layout
        raise CheckpointError(f"checkpoint_format is {found!r}; supported are 'gptq' and 'gptq_v2'")
    if raw.get("pack_dtype", "int32") not in ("int32", "torch.int32"):
        raise CheckpointError(f"pack_dtype is {raw['pack_dtype']!r}; supported is 'int32'")

    def scheme(settings: Mapping[str, Any]) -> Scheme:
        return Scheme(
            bits=_bits(settings, "bits"),
            group_size=_group_size(settings, "group_size"),
            symmetric=bool(settings.get("sym", True)),
            ordered=bool(settings.get("desc_act", False)),
        )

    # GPTQModel's per-module settings: "-:" leaves modules out, "+:" or nothing changes what they state.
    dynamic = raw.get("dynamic") or {}
    rules = [
        (_pattern(key.removeprefix("+:")), scheme({**raw, **value}))
        for key, value in dynamic.items()
        if key[:2] != "-:"
    ]
    return Quantization(layout, scheme(raw), tuple(rules))


def _compressed_tensors(raw: dict[str, Any]) -> Quantization:
    default, rules = None, []
    for group_name, group in (raw.get("config_groups") or {}).items():
        where = f"config_groups.{group_name}"
        layout = group.get("format") or raw.get("format")
        if layout != "pack-quantized":
            raise CheckpointError(f"{where}.format is {layout!r}; supported is 'pack-quantized'")
        if group.get("input_activations"):
            raise CheckpointError(f"{where}.input_activations: quantized activations are not supported")
        weights = group.get("weights") or {}
        strategy = weights.get("strategy")
        if weights.get("type", "int") != "int" or strategy not in ("group", "channel"):
            raise CheckpointError(
                f"{where}.weights: type {weights.get('type')!r} with strategy {strategy!r} is not supported; "
                f"type 'int' with strategy 'group' or 'channel' is"
            )
        scheme = Scheme(
            bits=_bits(weights, "num_bits", where),
            group_size=-1 if strategy == "channel" else _group_size(weights, "group_size", where),
            symmetric=bool(weights.get("symmetric", True)),
            ordered=weights.get("actorder") in ("group", "dynamic"),
        )
        for target in group.get("targets", ()):
            if target == "Linear":
                default = scheme
            else:
                exact = not target.startswith("re:")
                rules.append((f"{re.escape(target)}$" if exact else _pattern(target.removeprefix("re:")), scheme))
    if default is None and not rules:
        raise CheckpointError("config_groups: no group of weights with targets")
    return Quantization("pack-quantized", default, tuple(rules))


def _pattern(text: str) -> str:
    """`text`, a regular expression of module names. Raises CheckpointError if it is none, or could take forever.

    Python tries every way to match: with each choice within the pattern their number multiplies, and where a group is
    repeated it doubles with every character of a name.
    """
    few = len(text) <= _PATTERN_LENGTH
    bare = re.sub(r"\\.|\[[^\]]*\]", "x", text, flags=re.DOTALL) if few else ""
    choices = len(re.findall(r"(?<!\()(?:[*+?]|\{[^}]*\})[?+]?", bare)) + (bare.count("(") + 1) * ("|" in bare)
    if not few or choices > _CHOICES or re.search(r"\)[*+{]", bare):
        raise CheckpointError(
            f"the pattern {text[:80]!r} is not supported: allowed are {_PATTERN_LENGTH} characters and "
            f"{_CHOICES} choices (repetitions, optional parts, groups with alternatives), and no repetition of a group"
        )
    try:
        re.compile(text)
    except (re.error, OverflowError, RecursionError) as error:
        raise CheckpointError(f"the pattern {text[:80]!r} is no regular expression: {error}") from None
    return text


def _bits(settings: Mapping[str, Any], key: str, where: str = "") -> int:
    value = settings.get(key)
    if type(value) is not int or value not in _WIDTHS:
        raise CheckpointError(f"{where}{'.weights.' if where else ''}{key} is {value!r}; supported are 4 and 8")
    return value


def _group_size(settings: Mapping[str, Any], key: str, where: str = "") -> int:
    value = settings.get(key)
    if (
        not isinstance(value, int)
        or isinstance(value, bool)
        or (value != -1 and (value < 8 or value % 8 or value > _MAX_GROUP_SIZE))
    ):
        path = f"{where}{'.weights.' if where else ''}{key}"
        raise CheckpointError(f"{path} is {value!r}; supported are multiples of 8, and -1: one group")
    return value


class GPTQCheckpoint:
    """The quantized linears of a model folder. Tensors are read one at a time, when asked for.

    A context manager: the files are open (memory-mapped) inside the `with` block.

    quantization: what the configuration says. linears: the scheme of each quantized linear, by its name.
    """

    def __init__(self, folder: Path) -> None:
        """Read configuration and headers. Raises CheckpointError if the folder is no GPTQ checkpoint, or damaged."""
        quantization = read_quantization(folder)
        if quantization is None:
            raise CheckpointError(f"{folder} is not quantized: neither quantize_config.json nor quantization_config")
        self.quantization = quantization
        self.files = TensorFiles(folder)
        suffix = f".{_CODES[quantization.format]}"
        self.linears: dict[str, Scheme] = {}
        try:
            for tensor in sorted(self.files.names()):
                if tensor.endswith(suffix):
                    name = tensor.removesuffix(suffix)
                    scheme = quantization.scheme(name)
                    if scheme is None:
                        raise CheckpointError(f"{folder}: {tensor} is there, but the configuration gives it no scheme")
                    self.linears[name] = scheme
            if not self.linears:
                raise CheckpointError(f"{folder}: no tensor is called *{suffix}: nothing is quantized")
        except CheckpointError:
            self.files.close()
            raise

    def __enter__(self) -> GPTQCheckpoint:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files."""
        self.files.close()

    @property
    def _packs_rows(self) -> bool:
        """Whether words run along the input features of [in, out], as opposed to rows of [out, in]."""
        return self.quantization.format != "pack-quantized"

    def check(self, shapes: Mapping[str, tuple[int, int]]) -> None:
        """Raise CheckpointError unless every tensor of these linears is there and fits.

        shapes: (out_features, in_features) of each linear, by its name. Those the checkpoint left unquantized are
        skipped. Names, shapes and dtypes are checked, and that each g_idx is within the groups.
        """
        for name, (out_features, in_features) in shapes.items():
            if name in self.linears:
                self._check(name, out_features, in_features)
            elif f"{name}.weight" not in self.files:
                self._missing(f"{name}.{_CODES[self.quantization.format]}")

    def _check(self, name: str, out_features: int, in_features: int) -> None:
        scheme = self.linears[name]
        per_word, groups = WORD_BITS // scheme.bits, scheme.groups(in_features)
        if self._packs_rows:
            if in_features % per_word or out_features % per_word:
                raise CheckpointError(f"{name}: {in_features} x {out_features} does not fill words of {per_word} codes")
            self._require(f"{name}.qweight", (in_features // per_word, out_features), ("I32",))
            self._require(f"{name}.qzeros", (groups, out_features // per_word), ("I32",))
            self._require(f"{name}.scales", (groups, out_features), FLOATS)
        else:
            self._require(f"{name}.weight_packed", (out_features, -(-in_features // per_word)), ("I32",))
            self._require(f"{name}.weight_scale", (out_features, groups), FLOATS)
            if f"{name}.weight_shape" in self.files:
                found = tuple(self._whole(f"{name}.weight_shape").tolist())
                if found != (out_features, in_features):
                    self._unfit(f"{name}.weight_shape", f"says {list(found)}", [out_features, in_features])
            if not scheme.symmetric:
                self._check_zero_points(f"{name}.weight_zero_point", out_features, groups, per_word)
        g_idx = self._g_idx_name(name)
        if g_idx in self.files:
            self._require(g_idx, (in_features,), ("I32", "I64"))
            self.g_idx(name)
        elif scheme.ordered:
            self._missing(g_idx)
        if f"{name}.bias" in self.files:
            self._require(f"{name}.bias", (out_features,), FLOATS)

    def _check_zero_points(self, tensor: str, out_features: int, groups: int, per_word: int) -> None:
        if tensor not in self.files:
            self._missing(tensor)
        if self.files.header(tensor)[1] == "I32":
            self._require(tensor, (-(-out_features // per_word), groups), ("I32",))
        else:
            self._require(tensor, (out_features, groups), ("I8",))

    def _require(self, tensor: str, shape: tuple[int, ...], dtypes: tuple[str, ...]) -> None:
        if tensor not in self.files:
            self._missing(tensor)
        found, dtype = self.files.header(tensor)
        if found != shape:
            self._unfit(tensor, f"has shape {list(found)}", list(shape))
        if dtype not in dtypes:
            raise CheckpointError(f"{self.files.folder}: {tensor} has dtype {dtype}; supported are {', '.join(dtypes)}")

    def _missing(self, tensor: str) -> None:
        raise CheckpointError(f"{self.files.folder}: the weights lack {tensor}")

    def _unfit(self, tensor: str, found: str, expected: list[int]) -> None:
        raise CheckpointError(f"{self.files.folder}: {tensor} {found}, the model and its quantization imply {expected}")

    def _g_idx_name(self, name: str) -> str:
        return f"{name}.{'g_idx' if self._packs_rows else 'weight_g_idx'}"

    def _whole(self, tensor: str) -> torch.Tensor:
        return self.files.read(tensor)

    def shape(self, name: str) -> tuple[int, int]:
        """(out_features, in_features) of a linear, from the tensors themselves."""
        if self._packs_rows:
            (words, out_features), _ = self.files.header(f"{name}.qweight")
            return out_features, words * WORD_BITS // self.linears[name].bits
        if f"{name}.weight_shape" in self.files:
            out_features, in_features = self._whole(f"{name}.weight_shape").tolist()
            return out_features, in_features
        (out_features, words), _ = self.files.header(f"{name}.weight_packed")
        return out_features, words * WORD_BITS // self.linears[name].bits

    def g_idx(self, name: str) -> torch.Tensor:
        """The group of each input feature, int64 [in_features]. Raises CheckpointError if one is out of range."""
        scheme, (_, in_features) = self.linears[name], self.shape(name)
        size = in_features if scheme.group_size == -1 else scheme.group_size
        natural = torch.arange(in_features, device="cpu") // size
        tensor = self._g_idx_name(name)
        if tensor not in self.files:
            return natural
        g_idx = self._whole(tensor).long()
        if not self._packs_rows and bool((g_idx == -1).all()):
            return natural  # compressed-tensors' mark for "not in activation order"
        groups = scheme.groups(in_features)
        if not bool(((g_idx >= 0) & (g_idx < groups)).all()):
            worst = g_idx.min() if g_idx.min() < 0 else g_idx.max()
            raise CheckpointError(
                f"{self.files.folder}: {tensor} names group {int(worst)}; there are {groups}, 0 to {groups - 1}"
            )
        return g_idx

    def codes(self, name: str, inputs: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
        """Codes of the given input and output features: uint8 [inputs, outputs].

        Reads no words but those between the first and the last that hold any of them.
        """
        bits = self.linears[name].bits
        per_word = WORD_BITS // bits
        first_word, first_output = int(inputs.min()) // per_word, int(outputs.min())
        words = slice(first_word, int(inputs.max()) // per_word + 1)
        columns = slice(first_output, int(outputs.max()) + 1)
        if self._packs_rows:
            packed = self.files.read(f"{name}.qweight", words, columns)[:, outputs - first_output]
        else:
            packed = self.files.read(f"{name}.weight_packed", columns, words)[outputs - first_output].t()
        return unpack_codes(packed, bits)[inputs - first_word * per_word]

    def scales(self, name: str, groups: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
        """Scales [groups, outputs] of the given groups and output features, in their own dtype."""
        if self._packs_rows:
            return self._whole(f"{name}.scales")[groups][:, outputs]
        return self._whole(f"{name}.weight_scale")[outputs][:, groups].t()

    def zeros(self, name: str, groups: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor | None:
        """Zero points, uint8 [groups, outputs]; None if all are 2^(bits - 1)."""
        scheme = self.linears[name]
        bits = scheme.bits
        if self._packs_rows:
            words = self._whole(f"{name}.qzeros")[groups]
            if self.quantization.format == "gptq":
                one_each = sum(1 << shift for shift in range(0, WORD_BITS, bits))
                words = (words.long() + one_each).to(torch.int32)
            return unpack_codes(words.t(), bits)[outputs].t()
        tensor = f"{name}.weight_zero_point"
        if scheme.symmetric or tensor not in self.files:
            return None
        points = self._whole(tensor)
        if points.dtype == torch.int8:
            return (points[outputs][:, groups].t().to(torch.int16) + 2 ** (bits - 1)).to(torch.uint8)
        return unpack_codes(points, bits)[outputs][:, groups].t()

    def bias(self, name: str) -> torch.Tensor | None:
        """The bias [out_features]; None if there is none, or if it is zero: some tools write one everywhere."""
        if f"{name}.bias" not in self.files:
            return None
        bias = self._whole(f"{name}.bias")
        return bias if bool(bias.any()) else None
