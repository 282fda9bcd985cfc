"""What config.json may say, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megacomp.launch.engines.architecture import Architecture, Rope
from megacomp.launch.errors import LaunchError

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
}


def _read(folder: Path, **changes: Any) -> Architecture:
    raw = {key: value for key, value in {**LLAMA, **changes}.items() if value != "absent"}
    (folder / "config.json").write_text(json.dumps(raw))
    return Architecture.read(folder)


def test_defaults_are_those_of_the_llama_class(tmp_path: Path) -> None:
    read = _read(tmp_path, num_key_value_heads="absent")
    assert (read.num_kv_heads, read.head_dim, read.norm_eps) == (8, 8, 1e-6)
    assert (read.rope.theta, read.rope.type, read.tied_embeddings) == (1e4, "default", False)
    assert not (read.qkv_bias or read.output_bias or read.mlp_bias)
    assert len(read.tensor_shapes()) == 3 + 2 * 9


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mixtral"}, "model_type is 'mixtral'; supported are llama, mistral, qwen2"),
        ({"model_type": "absent"}, "model_type is None"),
        ({"num_local_experts": 8}, "num_local_experts: mixture-of-experts"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; supported is 'silu'"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling.rope_type is 'yarn'; supported are"),
        ({"rope_parameters": {"rope_type": "dynamic"}}, "rope_parameters.rope_type is 'dynamic'"),
        ({"rope_parameters": {"rope_type": "linear"}}, "rope_parameters.factor is missing"),
        ({"rope_parameters": [1]}, "rope_parameters must be an object"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
        ({"rope_theta": -1}, "rope_theta must be a positive number, not -1"),
        ({"hidden_size": "absent"}, "hidden_size is missing"),
        ({"vocab_size": "100"}, "vocab_size must be a positive whole number, not '100'"),
        ({"num_hidden_layers": True}, "num_hidden_layers must be a positive whole number, not True"),
        ({"num_attention_heads": 7}, "num_attention_heads 7 does not divide hidden_size 64; set head_dim"),
        ({"num_key_value_heads": 3}, "num_key_value_heads 3 does not divide num_attention_heads 8"),
        ({"model_type": "qwen2", "num_key_value_heads": "absent"}, "num_key_value_heads is missing"),
    ],
)
def test_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(LaunchError, match=message) as caught:
        _read(tmp_path, **changes)
    assert str(tmp_path / "config.json") in str(caught.value)


@pytest.mark.parametrize("text", ["{", "[1]", "\xff"])
def test_broken_json(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(LaunchError, match="JSON"):
        Architecture.read(tmp_path)


@pytest.mark.parametrize(
    ("changes", "window"),
    [
        ({"sliding_window": 16}, None),
        ({"model_type": "mistral"}, None),
        ({"model_type": "mistral", "sliding_window": 16}, 16),
        ({"model_type": "qwen2", "sliding_window": 16, "use_sliding_window": False}, None),
        ({"model_type": "qwen2", "sliding_window": 16, "use_sliding_window": True}, None),
        (
            {
                "model_type": "qwen2",
                "sliding_window": 16,
                "use_sliding_window": True,
                "max_window_layers": 1,
            },
            16,
        ),
        (
            {
                "model_type": "qwen2",
                "sliding_window": 16,
                "use_sliding_window": True,
                "max_window_layers": 1,
                "layer_types": ["full_attention"] * 2,
            },
            None,
        ),
    ],
)
def test_sliding_window_counts_only_where_it_is_in_effect(
    tmp_path: Path, changes: dict[str, Any], window: int | None
) -> None:
    assert _read(tmp_path, **changes).sliding_window == window


def test_llama3_frequencies_keep_short_waves_and_stretch_long_ones() -> None:
    scaling = {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192.0,
    }
    plain = Rope(5e5, "default", {}).inverse_frequencies(128)
    scaled = Rope(5e5, "llama3", scaling).inverse_frequencies(128)
    turns = 8192 * plain / (2 * torch.pi)
    assert torch.equal(scaled[turns > 4], plain[turns > 4])
    torch.testing.assert_close(scaled[turns < 1], plain[turns < 1] / 8)
    assert (scaled.diff() < 0).all()
