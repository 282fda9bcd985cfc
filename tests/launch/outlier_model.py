"""A small Llama that has outlier features, as large ones do."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from engines import tiny_models

FEATURES, LAYERS, VOCABULARY = 128, 2, 96
OUTLIERS = (7, 40)
SITES = tuple(f"layers.{layer}.{module}" for layer in range(LAYERS) for module in ("attention", "mlp"))


def save(folder: Path) -> None:
    """Write the model, float32, with a tokenizer; `OUTLIERS` are an order of magnitude larger at every site."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=FEATURES,
        intermediate_size=96,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.15)
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter[list(OUTLIERS)] *= 20
    model.save_pretrained(folder)
    tiny_models.save_tokenizer(folder)


def tokens(sequences: int = 6, length: int = 20, seed: int = 1) -> torch.Tensor:
    """int64 [sequences, length]."""
    return torch.randint(VOCABULARY, (sequences, length), generator=torch.Generator().manual_seed(seed))
