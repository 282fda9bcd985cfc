"""The transport on a single GPU: the definition's bits, no waiting host, no allocation, CUDA graphs, torch.compile.

Run by `python -m benchmarks.gpu`; needs torch and triton only. One GPU makes a group of one NCCL rank, where
all_reduce itself would send nothing; so its two algorithms are called as they are, with that rank as the only peer:
every kernel, hop, link and NCCL call takes part, and nothing but the number of peers differs from a real group.
Whether chunks overlap what they should, and how fast the wire is, takes more GPUs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from megacomp import codecs
from megacomp.collectives import Route
from megacomp.collectives.all_reduce import one_shot, two_shot
from megacomp.collectives.hops import into
from megacomp.collectives.message import peers_of

CODECS: tuple[str | dict[str, Any], ...] = ("mxfp4", "nvfp4", {"preset": "int4", "rotation": 128}, "int8")
ALGORITHMS = {"one_shot": one_shot, "two_shot": two_shot}
CHUNKS = (1, 4)
ROWS, FEATURES = 259, 4096
"""Rows that divide neither by the chunks nor by a kernel's tile."""

CALLS = 100


class Call:
    """One call of an algorithm on a tensor of its own, again and again."""

    def __init__(self, route: Route, device: torch.device, rows: int = ROWS, features: int = FEATURES) -> None:
        self.route = route
        self.x = torch.empty(rows, features, dtype=torch.bfloat16, device=device)
        self.result = torch.empty_like(self.x)
        self._peers = peers_of(None)
        self.renew(0)

    def renew(self, seed: int) -> None:
        """Other data in the same place, and a result that nothing has been written to."""
        values = torch.randn(self.x.shape, generator=torch.Generator().manual_seed(seed))
        values[:, ::64] *= 30
        self.x.copy_(values)
        self.result.fill_(torch.nan)

    def __call__(self) -> torch.Tensor:
        assert self.route.algorithm != "auto"
        ALGORITHMS[self.route.algorithm](self.x, into(self.result), self._peers, self.route, None)
        return self.result

    def expected(self) -> torch.Tensor:
        """What the definition makes of the data, on the CPU."""
        x, features = self.x.cpu(), self.x.shape[1]
        first = codecs.get(self.route.codec, backend="reference")
        second = codecs.get(self.route.second_codec, backend="reference")
        wires = first.encode(x).unsqueeze(0)
        if self.route.algorithm == "one_shot":
            return first.decode_sum(wires, features, x.dtype)
        wire = second.encode(first.decode_sum(wires, features, torch.float32))
        return second.decode(wire, features, x.dtype)


def check_bits(call: Call) -> dict[str, Any]:
    """The result is the definition's, bit for bit, whatever the data."""
    for seed in range(2):
        call.renew(seed)
        if not torch.equal(call().cpu(), call.expected()):
            return {"passed": False, "error": f"another result than the definition's for seed {seed}"}
    return {"passed": True}


def check_no_synchronisation(call: Call) -> dict[str, Any]:
    """No operation of a call makes the host wait for the device: PyTorch would raise."""
    call()
    torch.cuda.synchronize()
    usual = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode(usual)
    return {"passed": True}


def check_no_allocation(call: Call) -> dict[str, Any]:
    """After the first calls memory comes from the caching allocator alone, and goes back to it.

    allocations: requests the allocator served per call. device_allocations: those for which it went to the device.
    """
    device = call.x.device

    def now() -> dict[str, int]:
        statistics = torch.cuda.memory_stats(device)
        names = ("segment.all.allocated", "segment.all.freed", "num_alloc_retries", "allocated_bytes.all.current")
        return {name: statistics[name] for name in names}

    # The host runs ahead of the device here as it will there: memory that only came back later would show.
    for _ in range(10):
        call()
    requests, before = torch.cuda.memory_stats(device)["allocation.all.allocated"], now()
    start = time.perf_counter()
    for _ in range(CALLS):
        call()
    host_us = 1e6 * (time.perf_counter() - start) / CALLS
    after = now()
    requests = torch.cuda.memory_stats(device)["allocation.all.allocated"] - requests
    torch.cuda.synchronize()
    return {
        "passed": before == after,
        "before": before,
        "after": after,
        "allocations": requests / CALLS,
        "device_allocations": after["segment.all.allocated"] - before["segment.all.allocated"],
        "host_us": host_us,
    }


def check_graph(call: Call) -> dict[str, Any]:
    """A captured call gives, replayed on other data, the bits of an eager one.

    replay_us: the time of one replay, among many.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # compiles kernels and makes NCCL's communicator, neither of which can be captured
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    # NCCL's watchdog thread may ask for an event meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        call()
    for seed in range(10, 13):
        call.renew(seed)
        graph.replay()
        replayed = call.result.clone()
        call.renew(seed)
        if not torch.equal(replayed, call()):
            return {"passed": False, "error": f"a replay differs from the call for seed {seed}"}
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(CALLS):
        graph.replay()
    end.record()
    torch.cuda.synchronize()
    return {"passed": True, "replay_us": 1e3 * start.elapsed_time(end) / CALLS}


def check_compile(call: Call) -> dict[str, Any]:
    """torch.compile passes through the codec without a graph break, for any number of rows, with the same bits."""
    codec, features = call.route.codec, call.x.shape[1]
    torch._dynamo.reset()

    def layer(x: torch.Tensor) -> torch.Tensor:
        wires = codec.encode(x * 2).unsqueeze(0)
        return codec.decode_sum(wires, features, x.dtype) + 1

    compiled = torch.compile(layer, fullgraph=True)
    for rows in (call.x.shape[0], 64, 33):
        x = call.x[:rows]
        if not torch.equal(compiled(x), layer(x)):
            return {"passed": False, "error": f"compiled differs from eager for {rows} rows"}
    return {"passed": True}


COMPILED = f"{CODECS[0]} one_shot in 1"
"""The route torch.compile is checked with: one is enough, and each would take seconds."""

# A failed capture can leave the process unable to go on, so graphs come last.
CHECKS: dict[str, Callable[[Call], dict[str, Any]]] = {
    "bits": check_bits,
    "no_synchronisation": check_no_synchronisation,
    "no_allocation": check_no_allocation,
    "compile": check_compile,
    "graph": check_graph,
}


def routes() -> dict[str, Route]:
    """Every combination to check, by name."""
    found = {}
    for spec in CODECS:
        codec = codecs.get(spec)
        for algorithm in ALGORITHMS:
            for chunks in CHUNKS:
                gather_codec = codecs.get("int8") if algorithm == "two_shot" else None
                name = f"{codec.name} {algorithm} in {chunks}"
                found[name] = Route(codec, gather_codec, algorithm, chunks)  # type: ignore[arg-type]
    return found


@contextmanager
def only_rank() -> Iterator[None]:
    """A default process group of this process alone over NCCL, unless there is one."""
    if dist.is_initialized():
        yield
        return
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def check_transport() -> dict[str, Any]:
    """Every check of every route on the current CUDA device.

    Returns a JSON-able dict: device, torch, nccl, passed (all of them), and by check and route what it found.
    """
    device = torch.device("cuda", torch.cuda.current_device())
    checks: dict[str, dict[str, Any]] = {name: {} for name in CHECKS}
    with only_rank():
        calls = {name: Call(route, device) for name, route in routes().items()}
        for check_name, check in CHECKS.items():
            for route_name, call in calls.items():
                if check is check_compile and route_name != COMPILED:
                    continue
                try:
                    outcome = check(call)
                except Exception as error:  # whatever it is, it is the finding, and the other checks go on
                    outcome = {"passed": False, "error": f"{type(error).__name__}: {error}"[:2000]}
                checks[check_name][route_name] = outcome
    return {
        "device": torch.cuda.get_device_name(device),
        "torch": torch.__version__,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        "passed": all(outcome["passed"] for by_route in checks.values() for outcome in by_route.values()),
        "message": {"rows": ROWS, "features": FEATURES, "dtype": "bfloat16"},
        "checks": checks,
    }
