"""Quantized checkpoints as tools write them, packed here by an independent and slow reading of their formats."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from models import HEADS, HIDDEN, LAYERS, VOCABULARY
from safetensors.torch import load_file, save_file

FORMATS = ("gptq", "gptq_v2", "pack-quantized")


@dataclass(frozen=True)
class Linear:
    """A quantized linear, unpacked: W[i, o] = scales[g_idx[i], o] * (codes[i, o] - zeros[g_idx[i], o])."""

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    g_idx: torch.Tensor
    bits: int
    bias: torch.Tensor | None = None

    def dense(self) -> torch.Tensor:
        """float32 [in_features, out_features]."""
        return self.scales.float()[self.g_idx] * (self.codes - self.zeros[self.g_idx]).float()


def linear(
    in_features: int,
    out_features: int,
    *,
    bits: int = 4,
    group_size: int = 32,
    symmetric: bool = False,
    ordered: bool = True,
    g_idx: torch.Tensor | None = None,
    seed: int = 0,
) -> Linear:
    """A random one. `g_idx`: for linears that share their input."""
    generator = torch.Generator().manual_seed(seed)
    size = in_features if group_size == -1 else group_size
    groups = -(-in_features // size)
    if g_idx is None:
        g_idx = torch.arange(in_features) // size
        if ordered:
            g_idx = g_idx[torch.randperm(in_features, generator=generator)]
    zeros = torch.randint(2**bits, (groups, out_features), generator=generator)
    return Linear(
        codes=torch.randint(2**bits, (in_features, out_features), generator=generator),
        scales=(torch.rand(groups, out_features, generator=generator) * 2**-bits / in_features**0.5 + 1e-3).half(),
        zeros=torch.full_like(zeros, 2 ** (bits - 1)) if symmetric else zeros,
        g_idx=g_idx,
        bits=bits,
    )


def pack(values: torch.Tensor, bits: int, minus_one: bool = False) -> torch.Tensor:
    """int [rows, n] -> int32 [rows, n * bits / 32], the first of each word in its lowest bits."""
    per_word = 32 // bits
    rows = np.pad(values.numpy().astype(np.uint64), ((0, 0), (0, -values.shape[1] % per_word)))
    words = np.zeros((len(rows), rows.shape[1] // per_word), dtype=np.uint64)
    for column in range(rows.shape[1]):
        words[:, column // per_word] += rows[:, column] << np.uint64(bits * (column % per_word))
    if minus_one:
        # From the word as a whole: a field of zero borrows from its neighbour.
        words = (words - np.uint64(sum(1 << shift for shift in range(0, 32, bits)))) & np.uint64(0xFFFFFFFF)
    return torch.from_numpy(words.astype(np.uint32).view(np.int32))


def tensors_of(name: str, linear: Linear, layout: str) -> dict[str, torch.Tensor]:
    """The tensors of one linear as `layout` has them."""
    tensors: dict[str, torch.Tensor]
    if layout == "pack-quantized":
        symmetric = bool((linear.zeros == 2 ** (linear.bits - 1)).all())
        tensors = {
            "weight_packed": pack(linear.codes.t(), linear.bits),
            "weight_scale": linear.scales.t(),
            "weight_shape": torch.tensor(linear.codes.t().shape),
            "weight_g_idx": linear.g_idx.int(),
        }
        if not symmetric:
            tensors["weight_zero_point"] = pack(linear.zeros, linear.bits).t()
    else:
        tensors = {
            "qweight": pack(linear.codes.t(), linear.bits).t(),
            "qzeros": pack(linear.zeros, linear.bits, minus_one=layout == "gptq"),
            "scales": linear.scales,
            "g_idx": linear.g_idx.int(),
        }
    if linear.bias is not None:
        tensors["bias"] = linear.bias
    return {f"{name}.{key}": tensor.contiguous() for key, tensor in tensors.items()}


def settings(layout: str, bits: int = 4, group_size: int = 32, symmetric: bool = False, **more: Any) -> dict[str, Any]:
    """What the configuration says of it."""
    if layout == "pack-quantized":
        weights = {
            "num_bits": bits,
            "type": "int",
            "symmetric": symmetric,
            "actorder": "group",
            **({"strategy": "channel"} if group_size == -1 else {"strategy": "group", "group_size": group_size}),
        }
        group = {"targets": ["Linear"], "weights": weights, "format": layout}
        return {"quant_method": "compressed-tensors", "format": layout, "config_groups": {"group_0": group}, **more}
    written = {"quant_method": "gptq", "bits": bits, "group_size": group_size, "desc_act": True, "sym": symmetric}
    return {**written, **({"checkpoint_format": layout} if layout == "gptq_v2" else {}), **more}


def write(
    folder: Path, linears: dict[str, Linear], layout: str, config: dict[str, Any], dense: dict[str, torch.Tensor]
) -> None:
    """A checkpoint of `linears` and the unquantized tensors `dense` into `folder`, which may hold a config.json."""
    tensors = dict(dense)
    for name, one in linears.items():
        tensors |= tensors_of(name, one, layout)
    save_file(tensors, folder / "model.safetensors")
    path = folder / "config.json"
    document = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**document, "quantization_config": config}))


def quantize_model(source: Path, folder: Path, layout: str, *, left_out: tuple[str, ...] = (), **options: Any) -> None:
    """Give every linear of the Hugging Face model in `source` random codes: a checkpoint in `folder`.

    `source` then holds the dense equivalent. left_out: linears (by the end of their names) that stay dense.
    """
    weights = load_file(source / "model.safetensors")
    linears: dict[str, Linear] = {}
    shared: dict[str, torch.Tensor] = {}
    for seed, key in enumerate(sorted(weights)):
        name = key.removesuffix(".weight")
        if not (key.endswith("_proj.weight") and not name.endswith(left_out)):
            continue
        parent, _, role = name.rpartition(".")
        out_features, in_features = weights[key].shape
        # Linears that read the same input have the same order, as in GPTQ.
        g_idx = None if role in ("o_proj", "down_proj") else shared.get(parent)
        one = linear(in_features, out_features, g_idx=g_idx, seed=seed, **options)
        if role not in ("o_proj", "down_proj"):
            shared[parent] = one.g_idx
        bias = weights.pop(f"{name}.bias", None)
        linears[name] = Linear(one.codes, one.scales, one.zeros, one.g_idx, one.bits, bias)
        weights[key] = one.dense().t().contiguous()
        if bias is not None:
            weights[f"{name}.bias"] = bias
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    folder.mkdir(exist_ok=True)
    for file in source.iterdir():
        if file.suffix == ".json":
            shutil.copy(file, folder)
    taken = {f"{name}.{kind}" for name in linears for kind in ("weight", "bias")}
    dense = {key: tensor for key, tensor in weights.items() if key not in taken}
    chosen = {key: options[key] for key in ("bits", "group_size", "symmetric") if key in options}
    write(folder, linears, layout, settings(layout, **chosen), dense)


def save_for_megatron(folder: Path) -> Path:
    """A checkpoint in activation order below `folder`, of the sizes of `models.megatron_gpt`."""
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=4 * HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        tie_word_embeddings=False,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "dense")
    quantize_model(folder / "dense", folder / "gptq", "gptq", group_size=16)
    return folder / "gptq"
