"""What the demo model is worth and what its row-parallel outputs look like: figures for training.json."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM


@dataclass(frozen=True)
class SiteStatistics:
    """Distribution of the partial sums one row-parallel layer leaves on one tensor-parallel rank.

    `max_over_median` compares channel ranges: the range of a channel is its largest magnitude over the
    tokens, and the ratio is that of the widest channel to the median one. `kurtosis` is the fourth
    standardised moment over all values (3 for a Gaussian). `widest` lists the widest channels, widest first.
    """

    site: str
    tp: int
    rank: int
    max_over_median: float
    kurtosis: float
    widest: list[int]


def windows(tokens: Sequence[int], length: int) -> Tensor:
    """Cut a token sequence in rows: int64 [rows, length], without the incomplete last row.

    Raises ValueError when there is not a single full row.
    """
    rows = len(tokens) // length
    if rows == 0:
        raise ValueError(f"{len(tokens)} tokens do not fill one row of {length}")
    return torch.tensor(tokens[: rows * length]).view(rows, length)


@torch.no_grad()
def perplexity(model: LlamaForCausalLM, rows: Tensor, batch: int = 16) -> float:
    """exp of the mean negative log-likelihood of each next token in its row; rows int64 [rows, length]."""
    total = 0.0
    for chunk in rows.split(batch):
        total += float(model(input_ids=chunk, labels=chunk).loss) * len(chunk)
    return math.exp(total / len(rows))


def row_parallel_layers(model: LlamaForCausalLM) -> dict[str, nn.Linear]:
    """The layers whose outputs tensor parallelism reduces, by module name, in the order they run."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.endswith(("o_proj", "down_proj"))
    }


@torch.no_grad()
def site_statistics(model: LlamaForCausalLM, rows: Tensor, tp: int) -> list[SiteStatistics]:
    """Statistics of every row-parallel layer's partial sums on each of `tp` ranks; rows int64 [rows, length].

    Rank r of a row-parallel layer holds the r-th contiguous slice of the input features, so its partial sum
    is that slice of the layer's input times the same columns of the weight.
    """
    inputs: dict[str, Tensor] = {}
    layers = row_parallel_layers(model)

    def keep_input(name: str) -> Callable[[nn.Module, tuple[Tensor]], None]:
        return lambda _, args: inputs.update({name: args[0].flatten(0, 1)})

    handles = [layer.register_forward_pre_hook(keep_input(name)) for name, layer in layers.items()]
    try:
        model(input_ids=rows)
    finally:
        for handle in handles:
            handle.remove()
    statistics = []
    for name, layer in layers.items():
        shards = zip(inputs[name].chunk(tp, dim=1), layer.weight.chunk(tp, dim=1), strict=True)
        for rank, (activation, weight) in enumerate(shards):
            partial = (activation @ weight.T).float()
            ranges = partial.abs().amax(dim=0)
            centred = partial - partial.mean()
            statistics.append(
                SiteStatistics(
                    site=name,
                    tp=tp,
                    rank=rank,
                    max_over_median=float(ranges.max() / ranges.median()),
                    kurtosis=float(centred.pow(4).mean() / centred.square().mean().square()),
                    widest=ranges.topk(4).indices.tolist(),
                )
            )
    return statistics


@contextmanager
def features_removed(model: LlamaForCausalLM, features: Sequence[int]) -> Iterator[None]:
    """Inside the context every row-parallel layer writes zero to these output features."""
    layers = row_parallel_layers(model).values()
    index = list(features)
    kept = [layer.weight.detach()[index].clone() for layer in layers]
    with torch.no_grad():
        for layer in layers:
            layer.weight[index] = 0
    try:
        yield
    finally:
        with torch.no_grad():
            for layer, weight in zip(layers, kept, strict=True):
                layer.weight[index] = weight
