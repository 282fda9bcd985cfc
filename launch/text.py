"""Reading what a model is run on: token arrays, texts, and the tokenizer between them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from megacomp.launch.engines.architecture import Architecture
from megacomp.launch.errors import LaunchError

DEFAULT_LENGTH = 512
"""Tokens in a sequence cut from a text."""

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")


def read(
    model: Path, architecture: Architecture, text_file: Path | None, tokens_file: Path | None, length: int | None
) -> torch.Tensor:
    """int64 [sequences, length] from one of the two files.

    length: None for the tokens' own, or for `DEFAULT_LENGTH` of a text, as far as the model has positions.

    Raises LaunchError unless just one file is given, if the model has no positions for so many tokens, and as
    `read_tokens` and `read_text` do.
    """
    if (text_file is None) == (tokens_file is None):
        raise LaunchError("give either --text FILE or --tokens FILE.npy")
    if tokens_file is not None:
        tokens = read_tokens(tokens_file, architecture.vocab_size)
        if length is not None and length > tokens.shape[1]:
            raise LaunchError(f"--sequence-length {length}, but {tokens_file} has {tokens.shape[1]}")
        tokens = tokens[:, :length]
        check_positions(tokens.shape[1], architecture)
        return tokens
    assert text_file is not None
    length = length or min(DEFAULT_LENGTH, architecture.max_positions)
    check_positions(length, architecture)
    return read_text(text_file, load_tokenizer(model), length)


def check_positions(length: int, architecture: Architecture) -> None:
    """Raise LaunchError if a sequence of so many tokens is longer than the model was made for."""
    if length > architecture.max_positions:
        raise LaunchError(
            f"sequences of {length} tokens, but the model has positions for {architecture.max_positions}; "
            "--sequence-length N cuts them"
        )


def read_tokens(path: Path, vocab_size: int) -> torch.Tensor:
    """The array of a .npy file: int64 [sequences, length].

    Raises LaunchError if it is no such array, holds no next token to predict, or a token outside of the
    vocabulary.
    """
    if not path.is_file():
        raise LaunchError(f"no file {path}")
    try:
        array = np.load(path, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise LaunchError(f"{path} is not a .npy array: {error}") from None
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "iu" or array.ndim != 2:
        found = f"{array.dtype} {list(array.shape)}" if isinstance(array, np.ndarray) else "an archive"
        raise LaunchError(f"{path} must hold whole numbers [sequences, length], not {found}")
    if array.shape[0] < 1 or array.shape[1] < 2:
        raise LaunchError(f"{path} has shape {list(array.shape)}: it needs a sequence of at least 2 tokens")
    low, high = int(array.min()), int(array.max())
    if low < 0 or high >= vocab_size:
        raise LaunchError(
            f"{path} has tokens from {low} to {high}, but the model's vocabulary is 0 to {vocab_size - 1}"
        )
    return torch.from_numpy(array.astype(np.int64))


def read_text(path: Path, tokenizer: Any, length: int) -> torch.Tensor:
    """A UTF-8 text file as int64 [sequences, length]; see `cut_text`.

    Raises LaunchError without a readable text of at least 2 tokens.
    """
    if not path.is_file():
        raise LaunchError(f"no file {path}")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise LaunchError(f"{path} is not UTF-8 text: {error}") from None
    tokens = cut_text(text, tokenizer, length)
    if tokens.numel() < 2:
        raise LaunchError(f"{path} is empty: it gives {tokens.numel()} tokens, at least 2 are needed")
    return tokens


def cut_text(text: str, tokenizer: Any, length: int) -> torch.Tensor:
    """`text` as int64 [sequences, length]: its tokens cut into rows, the incomplete last one dropped.

    A text of fewer than `length` tokens is one shorter row.
    """
    # Not verbose: it would warn that the text is longer than the model's context, which sees only rows of it.
    tokens = torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)
    length = max(1, min(length, len(tokens)))
    return tokens[: len(tokens) // length * length].view(-1, length)


def check_tokenizer(folder: Path) -> None:
    """Raise LaunchError if there is no tokenizer in the model folder."""
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise LaunchError(f"{folder} holds no tokenizer ({', '.join(_TOKENIZER_FILES)}); use --tokens FILE.npy")


def load_tokenizer(folder: Path) -> Any:
    """The transformers tokenizer of the model folder; LaunchError if there is none or it cannot be read."""
    check_tokenizer(folder)
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise LaunchError(f"the tokenizer in {folder} cannot be read: {error}") from None
