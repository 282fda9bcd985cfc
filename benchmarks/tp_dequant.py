"""The experiment of arXiv 2402.04925: an int4 act-order MLP, split over ranks in four ways.

deepspeed --num_gpus 2 --module benchmarks.tp_dequant --out benchmarks/results/tp-dequant-cpu.json

W1 [hidden, inner] -> ReLU -> W2 [inner, hidden], random codes, groups of 128 in activation order, bf16 activations, the
shapes of Llama-2-70B and Granite-20B divided by --scale:

* tp_aware: W1's columns in the order of W2's rows. One all_reduce, nothing permuted between the two.
* naive: what act-order needs without that: all_gather of the inner activation, permutation, chunk, and the all_reduce.
* replicated: W2's rows stay where they are, each rank keeps the scales of every group and permutes its activation by
  its own sort (vLLM's way). One all_reduce, one permutation, N times the scales.
* bf16: dense weights.

Each figure is a median over repetitions in which the schemes alternate; a repetition is as slow as its slowest rank.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from rich.table import Table

from megacomp.gptq import ordering
from megacomp.gptq.ordering import Arrangement
from megacomp.kernels.dequant_gemm import Int4Pack, dequant_gemm
from megacomp.kernels.grouped_weight import GroupedWeight
from megacomp.launch import command, distributed, environment, files, ranked

SHAPES = {"Llama-2-70B": (8192, 28672), "Granite-20B": (6144, 24576)}
ROWS = (1, 2, 4, 8, 16)
BITS, GROUP_SIZE, CODES_PER_WORD = 4, 128, 8


@dataclass(frozen=True)
class Linear:
    """A quantized linear, entire: uint8 codes and zeros, fp16 scales, the group of each input feature."""

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    g_idx: torch.Tensor

    @classmethod
    def random(cls, in_features: int, out_features: int, group_size: int, seed: int) -> Linear:
        """The same on every rank."""
        generator = torch.Generator().manual_seed(seed)
        groups = in_features // group_size
        return cls(
            codes=torch.randint(2**BITS, (in_features, out_features), generator=generator, dtype=torch.uint8),
            scales=(torch.rand(groups, out_features, generator=generator) * 0.1 / in_features**0.5).half(),
            zeros=torch.randint(2**BITS, (groups, out_features), generator=generator, dtype=torch.uint8),
            g_idx=torch.randperm(in_features, generator=generator) // group_size,
        )

    def shard(self, rows: Arrangement, outputs: torch.Tensor) -> GroupedWeight:
        """The part of the rows and output features given."""
        return ordering.group_weight(
            self.codes[rows.inputs][:, outputs],
            self.scales[rows.groups][:, outputs],
            self.zeros[rows.groups][:, outputs],
            BITS,
            rows,
        )

    def dense(self) -> torch.Tensor:
        """bf16 [in_features, out_features]."""
        difference = self.codes.float() - self.zeros[self.g_idx].float()
        return (difference * self.scales[self.g_idx].float()).bfloat16()


class Scheme:
    """One way to split the two linears; `forward` computes the MLP on this rank's part."""

    def __init__(self, up: Linear, down: Linear, rank: int, ranks: int) -> None:
        self.collectives: dict[str, float] = {}
        self.collective_seconds = 0.0
        self._rank, self._ranks = rank, ranks
        self._packs = (Int4Pack(), Int4Pack())
        self._build(up, down)

    def _build(self, up: Linear, down: Linear) -> None:
        raise NotImplementedError

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x bf16 [rows, hidden] -> [rows, hidden], the same on every rank."""
        raise NotImplementedError

    @property
    def weight_bytes(self) -> int:
        """Of the weights one rank holds."""
        held = [weight for weight in vars(self).values() if isinstance(weight, GroupedWeight | torch.Tensor)]
        return sum(weight.nbytes if isinstance(weight, torch.Tensor) else _stored_bytes(weight) for weight in held)

    def _collect(self, name: str, sent_bytes: float, collective: Callable[[], Any]) -> None:
        """Run a collective, timed; the bytes this rank sends by a ring are kept by its name."""
        start = time.perf_counter()
        collective()
        self.collective_seconds += time.perf_counter() - start
        self.collectives[name] = sent_bytes

    def _all_reduce(self, y: torch.Tensor) -> torch.Tensor:
        sent = 2 * (self._ranks - 1) / self._ranks * y.nbytes
        self._collect("all_reduce", sent, lambda: dist.all_reduce(y))
        return y

    def _mine(self, features: torch.Tensor) -> torch.Tensor:
        return ordering.share(features, self._rank, self._ranks)


class TpAware(Scheme):
    def _build(self, up: Linear, down: Linear) -> None:
        order = ordering.tp_aware_order(down.g_idx, self._ranks, CODES_PER_WORD)
        assert order is not None, "the inner features do not split in whole words"
        mine = self._mine(order)
        self.up = up.shard(ordering.arrange(up.g_idx, torch.arange(len(up.g_idx)), CODES_PER_WORD), mine)
        hidden = torch.arange(down.codes.shape[1])
        self.down = down.shard(ordering.arrange(down.g_idx, mine, CODES_PER_WORD), hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(dequant_gemm(x, self.up, int4pack=self._packs[0]))
        return self._all_reduce(dequant_gemm(y, self.down, int4pack=self._packs[1]))


class Naive(Scheme):
    def _build(self, up: Linear, down: Linear) -> None:
        inner = torch.arange(len(down.g_idx))
        self.order = ordering.sort_by_group(down.g_idx)
        self.up = up.shard(ordering.arrange(up.g_idx, torch.arange(len(up.g_idx)), CODES_PER_WORD), self._mine(inner))
        rows = ordering.arrange(down.g_idx, self._mine(self.order), CODES_PER_WORD)
        self.down = down.shard(rows, torch.arange(down.codes.shape[1]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(dequant_gemm(x, self.up, int4pack=self._packs[0]))
        parts = [torch.empty_like(y) for _ in range(self._ranks)]
        sent = (self._ranks - 1) * y.nbytes
        self._collect("all_gather", sent, lambda: dist.all_gather(parts, y))
        permuted = torch.cat(parts, dim=1).index_select(1, self.order)
        mine = permuted.chunk(self._ranks, dim=1)[self._rank].contiguous()
        return self._all_reduce(dequant_gemm(mine, self.down, int4pack=self._packs[1]))


class Replicated(Scheme):
    def _build(self, up: Linear, down: Linear) -> None:
        mine = self._mine(torch.arange(len(down.g_idx)))
        self.up = up.shard(ordering.arrange(up.g_idx, torch.arange(len(up.g_idx)), CODES_PER_WORD), mine)
        rows = ordering.arrange(down.g_idx, mine, CODES_PER_WORD)
        assert rows.input_index is not None
        self.permutation = rows.input_index
        hidden = torch.arange(down.codes.shape[1])
        shard = down.shard(rows, hidden)
        self.down = GroupedWeight(shard.codes, shard.scales, shard.zeros, BITS, shard.word_groups)
        self.scales, self.zeros = down.scales, down.zeros  # every group's, though few rows of most are here

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(dequant_gemm(x, self.up, int4pack=self._packs[0]))
        permuted = y.index_select(1, self.permutation)
        return self._all_reduce(dequant_gemm(permuted, self.down, int4pack=self._packs[1]))


class Dense(Scheme):
    def _build(self, up: Linear, down: Linear) -> None:
        mine = self._mine(torch.arange(len(down.g_idx)))
        self.up, self.down = up.dense()[:, mine].contiguous(), down.dense()[mine].contiguous()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._all_reduce(torch.relu(x @ self.up) @ self.down)


SCHEMES: dict[str, type[Scheme]] = {"tp_aware": TpAware, "naive": Naive, "replicated": Replicated, "bf16": Dense}


def _stored_bytes(weight: GroupedWeight) -> int:
    tensors = (weight.codes, weight.scales, weight.zeros, weight.word_groups, weight.input_index)
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def build(hidden: int, inner: int) -> dict[str, Scheme]:
    """Every scheme on this rank of the default group, of the same MLP."""
    up, down = Linear.random(hidden, inner, GROUP_SIZE, 1), Linear.random(inner, hidden, GROUP_SIZE, 2)
    return {name: scheme(up, down, dist.get_rank(), dist.get_world_size()) for name, scheme in SCHEMES.items()}


def measure(schemes: dict[str, Scheme], x: torch.Tensor, repeats: int, warmup: int = 3) -> dict[str, Any]:
    """All schemes on bf16 x [rows, hidden], over the default group; the same JSON-able dict on every rank.

    bytes_sent: by a ring, per rank and forward. collective_share: of the scheme's own time, waiting included.
    tp_aware_speedup: the scheme's time over that of tp_aware, the median over repetitions, which run back to back.
    """
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in schemes}
    with torch.inference_mode():
        for _ in range(warmup + repeats):
            for name, scheme in schemes.items():
                scheme.collective_seconds = 0.0
                dist.barrier()
                start = time.perf_counter()
                scheme.forward(x)
                seconds = torch.tensor([time.perf_counter() - start, scheme.collective_seconds], dtype=torch.float64)
                dist.all_reduce(seconds, dist.ReduceOp.MAX)
                times[name].append((1e3 * seconds[0].item(), 1e3 * seconds[1].item()))
    results: dict[str, Any] = {}
    for name, scheme in schemes.items():
        total = statistics.median(one for one, _ in times[name][warmup:])
        waiting = statistics.median(one for _, one in times[name][warmup:])
        results[name] = {
            "median_ms": total,
            "collective_ms": waiting,
            "collective_share": waiting / total,
            "collectives": len(scheme.collectives),
            "bytes_sent": round(sum(scheme.collectives.values())),
            "weight_bytes": scheme.weight_bytes,
        }
    for name in schemes:
        pairs = zip(times[name][warmup:], times["tp_aware"][warmup:], strict=True)
        results[name]["tp_aware_speedup"] = statistics.median(mine / aware for (mine, _), (aware, _) in pairs)
    return results


def main(
    ctx: typer.Context,
    scale: Annotated[int, typer.Option(min=1, help="Divides both sizes of every model.")] = 4,
    repeats: Annotated[int, typer.Option(min=1)] = 101,
    tp: Annotated[int, typer.Option(help="Ranks to start without a launcher.")] = 2,
    link: Annotated[str, typer.Option(help="What carries the messages, for the record.")] = "loopback",
    out: Annotated[Path | None, typer.Option(help="Write the results to this JSON file.")] = None,
) -> None:
    """Measure every scheme for both models and 1 to 16 rows."""
    files.check_writable(out)
    ranks = distributed.ensure_ranks(
        distributed.launched_world_size() or tp, "benchmarks.tp_dequant", ranked.arguments(ctx)
    )
    device = torch.device("cpu")
    results = []
    with distributed.process_group(ranks, device):
        for model, (hidden, inner) in SHAPES.items():
            hidden, inner = hidden // scale, inner // scale
            schemes = build(hidden, inner)
            for rows in ROWS:
                x = torch.randn(rows, hidden, generator=torch.Generator().manual_seed(3)).bfloat16()
                sizes = {"hidden": hidden, "inner": inner, "rows": rows, "ranks": ranks}
                results.append({"model": model, **sizes, "schemes": measure(schemes, x, repeats)})
        described = environment.describe(device)
    command.results().print(_table(results, scale))
    if out is not None and command.is_main_rank():
        files.write_json(out, {"scale": scale, "link": link, "rows": results, "environment": described})


def _table(results: list[dict[str, Any]], scale: int) -> Table:
    table = Table(title=f"int4 act-order MLP, TP {results[0]['ranks']}, both sizes / {scale}; medians in ms")
    table.add_column("model")
    for heading in ("rows", *SCHEMES, "naive / tp_aware", "collectives' share", "bytes naive", "bytes tp_aware"):
        table.add_column(heading, justify="right")
    for result in results:
        schemes = result["schemes"]
        naive = schemes["naive"]
        table.add_row(
            result["model"],
            str(result["rows"]),
            *(f"{schemes[name]['median_ms']:.2f}" for name in SCHEMES),
            f"{naive['tp_aware_speedup']:.2f}",
            f"{naive['collective_share']:.0%}",
            f"{naive['bytes_sent']:,}",
            f"{schemes['tp_aware']['bytes_sent']:,}",
        )
    return table


app = ranked.single(main)

if __name__ == "__main__":
    app()
