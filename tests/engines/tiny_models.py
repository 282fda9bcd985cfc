"""Small random models of each supported family, saved as Hugging Face saves them.

Between them: head_dim other than hidden / heads, grouped KV heads, every kind of bias, tied and untied
embeddings, a vocabulary no number of ranks divides, both scaled rotary types, one file and several.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers

_SIZES: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 88,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": None,
}

_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}

_LINEAR = {"rope_type": "linear", "rope_theta": 5e4, "factor": 2.0}


def _configs() -> dict[str, Any]:
    return {
        "llama": transformers.LlamaConfig(vocab_size=97, head_dim=16, rope_parameters=_LLAMA3, **_SIZES),
        "llama_biased": transformers.LlamaConfig(
            vocab_size=96, attention_bias=True, tie_word_embeddings=True, **{**_SIZES, "hidden_size": 64}
        ),
        "llama_mlp_biased": transformers.LlamaConfig(
            vocab_size=96, mlp_bias=True, rope_parameters=_LINEAR, **{**_SIZES, "hidden_size": 64}
        ),
        "mistral": transformers.MistralConfig(vocab_size=101, head_dim=8, sliding_window=40, **_SIZES),
        "qwen2": transformers.Qwen2Config(vocab_size=103, tie_word_embeddings=True, **{**_SIZES, "hidden_size": 64}),
    }


NAMES = tuple(_configs())


def save(name: str, folder: Path) -> Any:
    """Save the model `name` into `folder`, float32, and return it."""
    torch.manual_seed(NAMES.index(name))
    model = transformers.AutoModelForCausalLM.from_config(_configs()[name])
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            # Far from the initialisation, which would leave logits flat and norms and biases untested.
            parameter.normal_(1.0 if "norm" in key else 0.0, 0.15)
    model.save_pretrained(folder, max_shard_size="100KB" if name == "llama" else "1GB")
    return model.eval()


def save_all(folder: Path) -> dict[str, Any]:
    """Every model, each in the subfolder of its name."""
    return {name: save(name, folder / name) for name in NAMES}


def save_tokenizer(folder: Path) -> None:
    """A tokenizer into the model folder `folder`: token i is the word "wi", and words are put between spaces."""
    words = tokenizers.models.WordLevel({f"w{i}": i for i in range(96)}, unk_token="w0")
    tokenizer = tokenizers.Tokenizer(words)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
