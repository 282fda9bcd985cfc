"""A compressed all_reduce measured against the plain one, over the process group there is.

`measure` is to be called by every rank of an initialised group; what carries the messages (loopback, a real
network, NVLink) is the caller's doing and decides the outcome, so figures mean something only with it named.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist

from megacomp.collectives import (
    Route,
    Trace,
    all_reduce,
    choose_algorithm,
    choose_chunks,
    payload_ratio,
    wire_bytes,
)
from megacomp.launch.made_up import Distribution, partial, route_with_tables


def measure(
    route: Route,
    *,
    rows: int,
    features: int,
    dtype: torch.dtype = torch.bfloat16,
    group: dist.ProcessGroup | None = None,
    device: torch.device | str = "cpu",
    distribution: Distribution = "gaussian",
    warmup: int = 3,
    repeats: int = 15,
) -> dict[str, Any]:
    """Time and error of `route` on partials [rows, features] of `dtype`, beside torch.distributed's all_reduce.

    Static codecs of `route` get made-up tables.

    The two alternate, each repetition behind a barrier, so that what disturbs the machine disturbs both alike.
    A repetition's time is that of the slowest rank.

    Returns a JSON-able dict, the same on every rank but for "traffic":
        message: rows, features, dtype, bytes, distribution
        route: codec, gather_codec, algorithm and pipeline_chunks (those chosen), world_size
        plain, compressed: {median_ms, min_ms, max_ms}
        speedup: ratio of the medians
        stages: medians of {encode_ms, wire_ms, decode_ms} on the slowest rank of each; host time
        traffic: bytes this rank sends: {sent, uncompressed, ring}; payload_ratio
        sqnr_db: of the compressed and of the plain result against the sum in float64
    """
    device = torch.device(device)
    route = route_with_tables(route, dist.get_world_size(group), features)
    x = partial(rows, features, dtype, dist.get_rank(group), distribution).to(device)
    plain_buffer, result = torch.empty_like(x), torch.empty_like(x)
    times: dict[str, list[float]] = {name: [] for name in ("plain", "compressed", "encode", "wire", "decode")}
    for repetition in range(warmup + repeats):
        trace = Trace()
        plain_buffer.copy_(x)
        plain_s = _seconds(lambda: dist.all_reduce(plain_buffer, group=group), group, device)
        compress = functools.partial(all_reduce, x, group, route, out=result, trace=trace)
        compressed_s = _seconds(compress, group, device)
        if repetition >= warmup:
            seconds = (plain_s, compressed_s, trace.encode, trace.wire, trace.decode)
            for name, value in zip(times, slowest(seconds, group, device), strict=True):
                times[name].append(value)
    median_ms = {name: 1e3 * statistics.median(values) for name, values in times.items()}
    world_size = dist.get_world_size(group)
    traffic = wire_bytes(route, rows, features, dtype, rank=dist.get_rank(group), world_size=world_size)
    return {
        "message": {
            "rows": rows,
            "features": features,
            "dtype": str(dtype).removeprefix("torch."),
            "bytes": rows * features * dtype.itemsize,
            "distribution": distribution,
        },
        "route": {
            "codec": route.codec.name,
            "gather_codec": route.second_codec.name,
            "algorithm": choose_algorithm(route, world_size, rows, features),
            "pipeline_chunks": choose_chunks(route, rows, features, device),
            "world_size": world_size,
        },
        "plain": _spread(times["plain"]),
        "compressed": _spread(times["compressed"]),
        "speedup": median_ms["plain"] / median_ms["compressed"],
        "stages": {f"{stage}_ms": median_ms[stage] for stage in ("encode", "wire", "decode")},
        "traffic": {**asdict(traffic), "payload_ratio": payload_ratio(route.codec, features, dtype)},
        "sqnr_db": _errors(x, route, group),
    }


def sqnr_db(result: torch.Tensor, exact: torch.Tensor) -> float:
    """Signal to quantization noise in dB, in float64; infinite where nothing was lost."""
    noise = (result.double() - exact).square().sum()
    return float(10 * torch.log10(exact.square().sum() / noise))


def _errors(x: torch.Tensor, route: Route, group: dist.ProcessGroup | None) -> dict[str, float]:
    exact = x.double()
    dist.all_reduce(exact, group=group)
    plain = x.clone()
    dist.all_reduce(plain, group=group)
    return {
        "compressed": sqnr_db(all_reduce(x, group, route), exact),
        "plain": sqnr_db(plain, exact),
    }


def _seconds(call: Callable[[], object], group: dist.ProcessGroup | None, device: torch.device) -> float:
    dist.barrier(group)
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    """Wait for what a GPU has been given to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def slowest(seconds: tuple[float, ...], group: dist.ProcessGroup | None, device: torch.device) -> list[float]:
    """Each figure's maximum over the ranks."""
    figures = torch.tensor(seconds, dtype=torch.float32, device=device)
    dist.all_reduce(figures, op=dist.ReduceOp.MAX, group=group)
    return figures.tolist()


def _spread(seconds: list[float]) -> dict[str, float]:
    return {
        "median_ms": 1e3 * statistics.median(seconds),
        "min_ms": 1e3 * min(seconds),
        "max_ms": 1e3 * max(seconds),
    }
