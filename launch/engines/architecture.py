"""What a Hugging Face Llama-family `config.json` says, checked: shapes, rotary frequencies, limits.

Read from the JSON itself and not through transformers, so that a command can refuse a model before it starts
a launcher, and so that both spellings of the rotary settings (`rope_theta` + `rope_scaling` up to
transformers 4, `rope_parameters` from 5 on) mean the same whichever transformers is installed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megacomp.launch.errors import LaunchError

MODEL_TYPES = ("llama", "mistral", "qwen2")
_ROPE_SCALING = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


@dataclass(frozen=True)
class Rope:
    """Rotary position settings. `scaling`: the parameters of the type, by their config.json names."""

    theta: float
    type: str
    scaling: Mapping[str, float]

    def inverse_frequencies(self, head_dim: int) -> torch.Tensor:
        """Angular frequency of each pair of features: float32 [head_dim / 2], radians per position.

        default: theta^(-2i / head_dim) (RoFormer, arXiv 2104.09864). linear: all divided by `factor`
        (arXiv 2306.15595). llama3: waves longer than the original context / low_freq_factor divided by
        `factor`, those shorter than the original context / high_freq_factor kept, between them a linear
        blend in turns per context (Llama 3.1).
        """
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
        frequencies = 1.0 / self.theta**exponents
        if self.type == "linear":
            return frequencies / self.scaling["factor"]
        if self.type == "llama3":
            low, high = self.scaling["low_freq_factor"], self.scaling["high_freq_factor"]
            turns = self.scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
            kept = ((turns - low) / (high - low)).clamp(0, 1)
            return kept * frequencies + (1 - kept) * frequencies / self.scaling["factor"]
        return frequencies


@dataclass(frozen=True)
class Architecture:
    """A decoder of the Llama family. Sizes count features or heads of the entire model, not of one rank."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    rope: Rope
    tied_embeddings: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    max_positions: int
    sliding_window: int | None
    """Positions a token sees where some layer's view is limited; None if every layer sees everything."""

    @classmethod
    def read(cls, model: Path) -> Architecture:
        """The architecture of a model: of its folder, or of a config.json alone.

        Raises LaunchError if the folder or its config.json is missing or unreadable, or if a key asks for
        something no engine here computes; the message names the key.
        """
        path = model if model.is_file() else model / "config.json"
        if not model.exists():
            raise LaunchError(f"no model folder at {model}")
        if not path.is_file():
            raise LaunchError(f"{model} holds no config.json: it is no Hugging Face model folder")
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise LaunchError(f"{path} is not valid JSON: {error}") from None
        if not isinstance(raw, dict):
            raise LaunchError(f"{path} must hold a JSON object, not {type(raw).__name__}")
        try:
            return cls.parse(raw)
        except LaunchError as error:
            raise LaunchError(f"{path}: {error}") from None

    @classmethod
    def parse(cls, raw: Mapping[str, Any]) -> Architecture:
        """The architecture that the contents of a config.json describe; LaunchError as `read`."""
        model_type = raw.get("model_type")
        if model_type not in MODEL_TYPES:
            raise LaunchError(f"model_type is {model_type!r}; supported are {', '.join(MODEL_TYPES)}")
        _refuse_unsupported(raw)
        hidden_size, num_heads = _count(raw, "hidden_size"), _count(raw, "num_attention_heads")
        if raw.get("head_dim") is None and hidden_size % num_heads:
            raise LaunchError(
                f"num_attention_heads {num_heads} does not divide hidden_size {hidden_size}; set head_dim"
            )
        # transformers gives each class its own default here; only Llama's follows from the other keys.
        kv_default = num_heads if model_type == "llama" else None
        num_kv_heads = _count(raw, "num_key_value_heads", kv_default)
        if num_heads % num_kv_heads:
            raise LaunchError(f"num_key_value_heads {num_kv_heads} does not divide num_attention_heads {num_heads}")
        attention_bias = bool(raw.get("attention_bias", False)) and model_type == "llama"
        return cls(
            model_type=model_type,
            vocab_size=_count(raw, "vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=_count(raw, "intermediate_size"),
            num_layers=_count(raw, "num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=_count(raw, "head_dim", hidden_size // num_heads),
            norm_eps=_number(raw, "rms_norm_eps", 1e-6),
            rope=_rope(raw),
            tied_embeddings=bool(raw.get("tie_word_embeddings", False)),
            qkv_bias=attention_bias or model_type == "qwen2",
            output_bias=attention_bias,
            mlp_bias=bool(raw.get("mlp_bias", False)) and model_type == "llama",
            max_positions=_count(raw, "max_position_embeddings"),
            sliding_window=_sliding_window(raw, model_type),
        )

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """(out_features, in_features) of every linear of the decoder layers, which may be quantized, by its name."""
        return {
            name.removesuffix(".weight"): (shape[0], shape[1])
            for name, shape in self.tensor_shapes().items()
            if name.endswith("_proj.weight")
        }

    def tensor_shapes(self, quantized: Collection[str] = ()) -> dict[str, tuple[int, ...]]:
        """Name and shape of every weight the checkpoint must hold, as transformers names them.

        quantized: linears whose tensors are not counted.
        """
        hidden, mlp = self.hidden_size, self.intermediate_size
        queries, keys = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        linears = {
            "self_attn.q_proj": (queries, hidden, self.qkv_bias),
            "self_attn.k_proj": (keys, hidden, self.qkv_bias),
            "self_attn.v_proj": (keys, hidden, self.qkv_bias),
            "self_attn.o_proj": (hidden, queries, self.output_bias),
            "mlp.gate_proj": (mlp, hidden, self.mlp_bias),
            "mlp.up_proj": (mlp, hidden, self.mlp_bias),
            "mlp.down_proj": (hidden, mlp, self.mlp_bias),
        }
        shapes: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (self.vocab_size, hidden),
            "model.norm.weight": (hidden,),
        }
        if not self.tied_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, hidden)
        for layer in range(self.num_layers):
            prefix = f"model.layers.{layer}."
            shapes[f"{prefix}input_layernorm.weight"] = (hidden,)
            shapes[f"{prefix}post_attention_layernorm.weight"] = (hidden,)
            for name, (rows, columns, bias) in linears.items():
                if f"{prefix}{name}" in quantized:
                    continue
                shapes[f"{prefix}{name}.weight"] = (rows, columns)
                if bias:
                    shapes[f"{prefix}{name}.bias"] = (rows,)
        return shapes

    def check_tensor_parallel(self, tp: int) -> None:
        """Raise LaunchError unless `tp` ranks can each take the same number of heads and MLP features."""
        if tp < 1:
            raise LaunchError(f"the tensor-parallel size must be at least 1, not {tp}")
        shared = {
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "intermediate_size": self.intermediate_size,
        }
        for key, count in shared.items():
            if count % tp:
                fitting = [size for size in range(1, 9) if all(value % size == 0 for value in shared.values())]
                raise LaunchError(
                    f"tensor-parallel size {tp} does not divide {key} {count} of this model; "
                    f"sizes up to 8 that fit: {', '.join(map(str, fitting))}"
                )


def _refuse_unsupported(raw: Mapping[str, Any]) -> None:
    for key in ("num_local_experts", "num_experts", "n_routed_experts"):
        if raw.get(key) is not None:
            raise LaunchError(f"{key}: mixture-of-experts models are not supported")
    activation = raw.get("hidden_act", "silu")
    if activation != "silu":
        raise LaunchError(f"hidden_act is {activation!r}; supported is 'silu'")


def _rope(raw: Mapping[str, Any]) -> Rope:
    key = "rope_parameters" if raw.get("rope_parameters") is not None else "rope_scaling"
    settings = raw.get(key) or {}
    if not isinstance(settings, dict):
        raise LaunchError(f"{key} must be an object, not {settings!r}")
    rope_type = settings.get("rope_type", settings.get("type", "default"))
    if rope_type not in _ROPE_SCALING:
        raise LaunchError(f"{key}.rope_type is {rope_type!r}; supported are {', '.join(_ROPE_SCALING)}")
    fraction = settings.get("partial_rotary_factor", raw.get("partial_rotary_factor"))
    if fraction not in (None, 1.0):
        raise LaunchError(f"partial_rotary_factor is {fraction!r}; supported is 1.0")
    theta = _number(settings if "rope_theta" in settings else raw, "rope_theta", 10000.0)
    try:
        scaling = {name: _number(settings, name) for name in _ROPE_SCALING[rope_type]}
    except LaunchError as error:
        raise LaunchError(f"{key}.{error}") from None
    return Rope(theta=theta, type=rope_type, scaling=scaling)


def _sliding_window(raw: Mapping[str, Any], model_type: str) -> int | None:
    """The window where one is in effect, following the rules of each transformers class."""
    if raw.get("sliding_window") is None or model_type == "llama":
        return None
    window = _count(raw, "sliding_window")
    if model_type == "mistral":
        return window
    if not raw.get("use_sliding_window", False):
        return None
    layer_types = raw.get("layer_types")
    if layer_types is not None:
        return window if "sliding_attention" in layer_types else None
    return window if _count(raw, "max_window_layers", 28) < _count(raw, "num_hidden_layers") else None


def _count(raw: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = _value(raw, key, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise LaunchError(f"{key} must be a positive whole number, not {value!r}")
    return value


def _number(raw: Mapping[str, Any], key: str, default: float | None = None) -> float:
    value = _value(raw, key, default)
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not value > 0:
        raise LaunchError(f"{key} must be a positive number, not {value!r}")
    return float(value)


def _value(raw: Mapping[str, Any], key: str, default: float | None) -> Any:
    value = raw.get(key)
    if value is None:
        value = default
    if value is None:
        raise LaunchError(f"{key} is missing")
    return value
