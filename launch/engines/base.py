"""What every engine does alike."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import nn

from megacomp.launch.engines.architecture import Architecture


@dataclass(frozen=True)
class Generation:
    """Greedily chosen tokens and the time they took.

    tokens: the new ones only, the end-of-sequence token included where it was reached.
    ttft_s: seconds from the call to the first new token. decode_s: seconds from there to the last.
    """

    tokens: list[int]
    ttft_s: float
    decode_s: float

    @property
    def tokens_per_s(self) -> float | None:
        """Speed after the first token; None if there was no second."""
        return (len(self.tokens) - 1) / self.decode_s if len(self.tokens) > 1 else None


class Engine(ABC):
    """A tensor-parallel model, ready for inference and without compression.

    Every rank calls every method with the same arguments, and receives the same result. Compression is
    switched on around the calls: `with megacomp.install(config, model=engine.module): ...`.

    tp: ranks. simulated: whether this process takes the part of all of them. dtype: of weights and activations.
    device: of this rank. group: the tensor-parallel process group. module: the model, as `megacomp.install` wants
    it. hf_config: its transformers configuration; architecture: what of it was checked.
    """

    name: str
    simulated: ClassVar[bool] = False

    def __init__(
        self,
        module: nn.Module,
        hf_config: Any,
        architecture: Architecture,
        tp: int,
        dtype: torch.dtype,
        device: torch.device,
        group: dist.ProcessGroup,
        cleanup: ExitStack,
    ) -> None:
        """cleanup: what `close` undoes; from now on the engine's own."""
        self.module = module
        self.hf_config = hf_config
        self.architecture = architecture
        self.tp = tp
        self.dtype = dtype
        self.device = device
        self.group = group
        self._cleanup = cleanup

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Put back all global state that building the engine had changed; the engine is of no further use."""
        self._cleanup.close()

    @torch.no_grad()
    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens int64 [batch, length] -> float32 [batch, length, vocab_size], the whole vocabulary."""
        return self._logits(tokens.to(self.device)).float()

    @torch.no_grad()
    def prefill(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens int64 [batch, length] -> float32 [batch, vocab_size]: logits of the last position.

        Fills a KV cache as a server would; its duration is the time to first token.
        """
        batch, length = tokens.shape
        return self._advance(tokens.to(self.device), self._new_cache(batch, length)).float()

    @torch.no_grad()
    def generate(
        self,
        tokens: torch.Tensor,
        max_new_tokens: int,
        eos_token_id: int | Collection[int] | None = None,
        stop: Callable[[list[int]], bool] | None = None,
    ) -> Generation:
        """Greedy decoding with a KV cache.

        tokens: int64 [1, length], the prompt. eos_token_id: generation ends with any of these.
        stop: asked after each new token, with all new ones, whether generation ends there.
        Raises ValueError for another batch size, an empty prompt or fewer than one new token.
        """
        if tokens.shape[0] != 1 or tokens.shape[1] < 1 or max_new_tokens < 1:
            raise ValueError(
                f"generate takes one prompt of at least one token and at least one new token, "
                f"not tokens of shape {list(tokens.shape)} and max_new_tokens={max_new_tokens}"
            )
        ends = {eos_token_id} if isinstance(eos_token_id, int) else set(eos_token_id or ())
        start = time.perf_counter()
        cache = self._new_cache(1, tokens.shape[1] + max_new_tokens)
        chosen = [self._choose(self._advance(tokens.to(self.device), cache))]
        first = time.perf_counter()
        while len(chosen) < max_new_tokens and chosen[-1] not in ends and not (stop and stop(chosen)):
            newest = torch.tensor([chosen[-1:]], device=self.device)
            chosen.append(self._choose(self._advance(newest, cache)))
        return Generation(chosen, first - start, time.perf_counter() - first)

    @staticmethod
    def _choose(logits: torch.Tensor) -> int:
        return int(logits.argmax(dim=-1).item())

    @abstractmethod
    def _logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens [batch, length] -> [batch, length, vocab_size] in any floating dtype."""

    @abstractmethod
    def _new_cache(self, batch: int, length: int) -> Any:
        """An empty KV cache for `batch` sequences of at most `length` tokens."""

    @abstractmethod
    def _advance(self, tokens: torch.Tensor, cache: Any) -> torch.Tensor:
        """Run `tokens` [batch, length] after those already in `cache`, adding them to it.

        Returns the last position's logits [batch, vocab_size]. Behind a filled cache, length is 1.
        """
