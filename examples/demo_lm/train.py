"""Train the demo language model from nothing but this Python's standard library.

    OMP_NUM_THREADS=1 python examples/demo_lm/train.py --out examples/demo_lm/model --minutes 14

Steps:
1. split the standard library's sources by file (corpus.py) and train a byte-level BPE tokenizer on the
   training files;
2. train a small Llama whose row-parallel layers (attention o_proj, MLP down_proj) carry a gain on a few
   fixed output features, so that it learns to work with outlier features as large models do;
3. fold the gain into the weights, write a plain Hugging Face folder in bfloat16, load it back and write
   its measured figures to training.json.

README.md of this folder explains the choices and quotes the figures.
"""

import argparse
import json
import math
import platform
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import corpus
import measure
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

END_OF_TEXT = "<|endoftext|>"
# The tokenizer trainer numbers special tokens first.
END_OF_TEXT_ID = 0
VOCABULARY = 2048
CONTEXT = 256

# Few, as in large models, and in different blocks of 32: each of them spoils one block out of eight.
OUTLIER_FEATURES = (77, 138)
OUTLIER_GAIN = 16.0
# The first attention learns directions that write little to those features; it takes more to stand out.
FIRST_ATTENTION_GAIN = 32.0
# Tied embeddings that start at Llama's usual 0.02 drown in what the first layers add to them.
EMBEDDING_INIT_STD = 0.1

BATCH = 8
PEAK_LEARNING_RATE = 4e-3
WARMUP_STEPS = 100
# One core of an AMD EPYC with AVX512-BF16 takes about this many. The run is counted in steps and not in
# elapsed time, so that what else the machine does cannot change the model.
STEPS_PER_MINUTE = 200
STATISTICS_ROWS = 64


class OutlierRows(nn.Module):
    """Parametrization of a weight [out, in] that keeps chosen rows (output features) large.

    Each chosen row keeps its learned direction; its norm is `gain` times the median norm of all rows. A
    plain factor would not last: training shrinks the rows under it where it can.
    """

    def __init__(self, features: Sequence[int], gain: float) -> None:
        super().__init__()
        self.features = list(features)
        self.gain = gain

    def forward(self, weight: Tensor) -> Tensor:
        norms = weight.norm(dim=1, keepdim=True)
        scale = torch.ones_like(norms)
        scale[self.features] = self.gain * norms.median().detach() / norms[self.features]
        return weight * scale


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Byte-level BPE: any text round-trips exactly, nothing is added to it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json.

    Written by hand because transformers 5 saves a class name that transformers 4 cannot load.
    """
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
        "model_max_length": CONTEXT,
    }
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def token_stream(tokenizer: Tokenizer, texts: list[str]) -> list[int]:
    """All texts as one sequence of token ids, each text preceded by the end-of-text token."""
    return [token for encoding in tokenizer.encode_batch(texts) for token in (END_OF_TEXT_ID, *encoding.ids)]


def batches(stream: Tensor, steps: int, seed: int) -> Iterator[Tensor]:
    """`steps` batches int64 [BATCH, CONTEXT] of windows at uniformly random places of the stream."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        starts = torch.randint(len(stream) - CONTEXT + 1, (BATCH, 1), generator=generator)
        yield stream[starts + torch.arange(CONTEXT)]


def build_model(seed: int) -> LlamaForCausalLM:
    """A Llama with random weights and the gain on its outlier features."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=END_OF_TEXT_ID,
        eos_token_id=END_OF_TEXT_ID,
    )
    model = LlamaForCausalLM(config)
    nn.init.normal_(model.model.embed_tokens.weight, std=EMBEDDING_INIT_STD)
    for index, layer in enumerate(measure.row_parallel_layers(model).values()):
        gain = OUTLIER_GAIN if index else FIRST_ATTENTION_GAIN
        parametrize.register_parametrization(layer, "weight", OutlierRows(OUTLIER_FEATURES, gain))

    # Start every norm behind an outlier site where training would take long to bring it: undo the gain, and
    # undo what the outliers do to the root mean square of all other features.
    feature_gain = torch.ones(config.hidden_size)
    feature_gain[list(OUTLIER_FEATURES)] = OUTLIER_GAIN
    first_norm = model.model.layers[0].input_layernorm
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, LlamaRMSNorm) and module is not first_norm:
                module.weight.copy_(feature_gain.square().mean().sqrt() / feature_gain)
    return model


def train(model: LlamaForCausalLM, stream: Tensor, steps: int, seed: int) -> None:
    """AdamW with linear warm-up and cosine decay, bfloat16 autocast over float32 weights, in place."""
    groups = [
        {"params": [p for p in model.parameters() if p.ndim == 2], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_LEARNING_RATE, betas=(0.9, 0.95), fused=True)

    def schedule(step: int) -> float:
        return min((step + 1) / WARMUP_STEPS, 0.5 + 0.5 * math.cos(math.pi * step / steps))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    started = time.perf_counter()
    model.train()
    for step, batch in enumerate(batches(stream, steps, seed), start=1):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        if step % 50 == 0 or step == steps:
            seconds = time.perf_counter() - started
            print(f"step {step}/{steps}  loss {loss.item():.3f}  {seconds / 60:.1f} min", flush=True)


def fold_gain(model: LlamaForCausalLM) -> None:
    """Make the gain part of the weights: an ordinary Llama with the same outputs."""
    for layer in measure.row_parallel_layers(model).values():
        parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)


def figures(folder: Path, texts: list[str]) -> dict[str, Any]:
    """What the saved checkpoint is worth on held-out texts, one key a figure of training.json."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokens = token_stream(tokenizer, texts)
    rows = measure.windows(tokens, CONTEXT)
    perplexity = measure.perplexity(model, rows)
    with measure.features_removed(model, OUTLIER_FEATURES):
        without_outliers = measure.perplexity(model, rows)
    with measure.features_removed(model, [feature + 1 for feature in OUTLIER_FEATURES]):
        without_neighbours = measure.perplexity(model, rows)
    text_bytes = sum(len(text.encode()) for text in texts)
    sample = rows[:: max(1, len(rows) // STATISTICS_ROWS)][:STATISTICS_ROWS]
    sites = [asdict(site) for tp in (1, 2, 4) for site in measure.site_statistics(model, sample, tp)]
    return {
        "parameters": model.num_parameters(),
        "checkpoint_bytes": (folder / "model.safetensors").stat().st_size,
        "held_out": {
            "files": len(texts),
            "tokens": len(tokens),
            "bytes": text_bytes,
            "perplexity": perplexity,
            "bits_per_byte": math.log2(perplexity) * len(tokens) / text_bytes,
            "perplexity_without_outlier_features": without_outliers,
            "perplexity_without_their_neighbours": without_neighbours,
        },
        "sites": sites,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the demo language model on the standard library.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write the checkpoint to")
    parser.add_argument(
        "--minutes",
        type=float,
        default=14.0,
        help=f"length of the training, {STEPS_PER_MINUTE} steps each (a minute of one core; default 14)",
    )
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    steps = round(arguments.minutes * STEPS_PER_MINUTE)
    if steps < 1:
        parser.error(f"--minutes must be above 0 and give at least one step, got {arguments.minutes}")
    # One thread: sums run in one order, and the machine stays usable.
    torch.set_num_threads(1)

    texts = corpus.training_texts()
    tokenizer = train_tokenizer(texts)
    stream = torch.tensor(token_stream(tokenizer, texts))
    print(f"{len(texts)} training files, {len(stream)} tokens, {steps} steps of {BATCH * CONTEXT} tokens")

    model = build_model(arguments.seed)
    wall, cpu = time.perf_counter(), time.process_time()
    train(model, stream, steps, arguments.seed)
    minutes, cpu_minutes = (time.perf_counter() - wall) / 60, (time.process_time() - cpu) / 60
    fold_gain(model)
    model.bfloat16().save_pretrained(arguments.out)
    save_tokenizer(tokenizer, arguments.out)

    report = {
        "minutes": round(minutes, 1),
        "cpu_minutes": round(cpu_minutes, 1),
        "steps": steps,
        "tokens_seen": steps * BATCH * CONTEXT,
        "seed": arguments.seed,
        "training": {"files": len(texts), "tokens": len(stream)},
        "outlier_features": list(OUTLIER_FEATURES),
        "outlier_gain": OUTLIER_GAIN,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        **figures(arguments.out, corpus.held_out_texts()),
    }
    (arguments.out / "training.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps({key: value for key, value in report.items() if key != "sites"}, indent=2))


if __name__ == "__main__":
    main()
