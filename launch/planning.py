"""A model of what compressed collectives do to a model's first token and to those after it. Nothing here is measured.

Compute is a roofline: a GEMM takes what its operations or its weights' bytes take, whichever is longer. A
collective is steps that each cost a latency (alpha) and bytes that each cost time on the link (beta); plain
ones are NCCL's ring, compressed ones those of megacomp.collectives, encoding and decoding as their kernels
move bytes and execute instructions. The constants are those of hardware.py.

Left out: the host that launches (CUDA graphs, or prompts long enough to hide it), contention beyond the two
bandwidths of a link, all-to-all being slower than a ring over PCIe, NVLink SHARP, the embedding and the
sampling. docs/planning.md holds the model against published measurements.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch

from megacomp import codecs
from megacomp.codecs import Codec
from megacomp.collectives import Route, choose_algorithm, choose_chunks
from megacomp.launch import hardware
from megacomp.launch.engines.architecture import Architecture
from megacomp.launch.errors import LaunchError
from megacomp.launch.hardware import Gpu, Link

CODECS: tuple[str | Mapping[str, Any], ...] = ("int8", "int6", {"preset": "int4", "rotation": 128}, "nvfp4", "mxfp4")
"""Planned with unless others are named, none of which needs a calibration: from the most exact (docs/codecs.md) to the
shortest."""

VALUE_BYTES = 2
"""bf16 activations."""

PAYS = 1.1
"""Compressing a message pays from here on: plain / compressed. By less the model cannot tell."""

WORTH = 1.03
"""A first token sooner by less is not worth an error in every activation."""

CLOSE = 1.03
"""Codecs whose first tokens differ by less count as equal: of those the first in the list is recommended."""

MOST_ROWS = 2**18
"""Tokens of the largest message looked at."""

_CUDA = torch.device("cuda")

Transport = Literal["collectives", "one_kernel"]


@dataclass(frozen=True)
class System:
    """`ranks` equal GPUs in `nodes` equal hosts; `network` joins the hosts.

    Raises LaunchError if the ranks do not spread evenly, or several hosts have no network.
    """

    gpu: Gpu
    link: Link
    ranks: int
    nodes: int = 1
    network: Link | None = None

    def __post_init__(self) -> None:
        if self.ranks < 1 or self.nodes < 1:
            raise LaunchError(f"there must be at least one rank and one node, not {self.ranks} and {self.nodes}")
        if self.ranks % self.nodes:
            raise LaunchError(f"{self.nodes} nodes cannot hold {self.ranks} ranks in equal numbers")
        if self.nodes > 1 and self.network is None:
            raise LaunchError(f"{self.nodes} nodes need a network between them: {_names(networks())}")

    @property
    def ring_gbs(self) -> float:
        """10^9 bytes per second that pass each of a ring's links: the slowest of them counts."""
        inside = self.link.gbs_for(self.ranks) if self.ranks > self.nodes else float("inf")
        return inside if self.network is None or self.nodes == 1 else min(inside, self.network.gbs)


def networks() -> list[str]:
    """The names of links between hosts."""
    return [name for name, link in hardware.LINKS.items() if link.wiring == "network"]


def _names(names: Iterable[str]) -> str:
    return ", ".join(names)


# -- collectives ------------------------------------------------------------------------------------------------------


def all_reduce_s(system: System, message_bytes: float) -> float:
    """Seconds of a plain all_reduce: a ring of 2(N-1) steps, 2(N-1)/N of the message over every link."""
    ranks = system.ranks
    return _fastest(
        system, 2 * (ranks - 1), 2 * (system.nodes - 1), 2 * (ranks - 1) / ranks * message_bytes, reduce=True
    )


def all_gather_s(system: System, part_bytes: float) -> float:
    """Seconds until everyone has everyone's `part_bytes`: a ring of N-1 steps."""
    return _fastest(system, system.ranks - 1, system.nodes - 1, (system.ranks - 1) * part_bytes, reduce=False)


def all_to_all_s(system: System, message_bytes: float) -> float:
    """Seconds until everyone has its Nth of everyone's `message_bytes`: one step.

    Between hosts all GPUs of a host send to all GPUs of the others: G (N-G)/N of a message leave a host of G,
    where a ring's reduce-scatter sends less than one.
    """
    ranks, inside = system.ranks, system.ranks // system.nodes
    sent = (ranks - 1) / ranks * message_bytes
    if system.network is not None and system.nodes > 1:
        leaving = inside * (ranks - inside) / ranks * message_bytes
        sent = max(sent, leaving * system.ring_gbs / system.network.gbs)
    return _fastest(system, 1, min(1, system.nodes - 1), sent, reduce=False)


def _fastest(system: System, steps: int, between_nodes: int, link_bytes: float, *, reduce: bool) -> float:
    """By the protocol NCCL would choose.

    steps, between_nodes: one after the other, and how many of them from host to host.
    """
    if system.ranks == 1:
        return 0.0
    times = []
    for protocol in hardware.PROTOCOLS:
        latency = protocol.base_us
        for link, count in ((system.link, steps - between_nodes), (system.network, between_nodes)):
            if link is None or not count:
                continue
            hop = protocol.hop_us.get(link.wiring)
            if hop is None:
                break
            latency += count * (hop if link.hop_us is None else link.hop_us)
        else:
            share = protocol.reduce_share if reduce else protocol.gather_share
            times.append(1e-6 * latency + link_bytes / (1e9 * system.ring_gbs * share))
    return min(times)


# -- codecs -----------------------------------------------------------------------------------------------------------


def _kernel_s(gpu: Gpu, moved: float, instructions: float) -> float:
    """Seconds of a kernel that moves so many bytes and executes so many instructions; not its launch."""
    return max(
        moved / (1e9 * gpu.memory_gbs * hardware.MEMORY_SHARE),
        instructions / (1e12 * gpu.issue * hardware.ISSUE_SHARE),
    )


def _encode_instructions(codec: Codec) -> float:
    if codec.static:
        return hardware.INSTRUCTIONS_ENCODE_STATIC
    spec = codec.spec
    row_scale = spec["scale"] == "e4m3"
    return (
        (hardware.INSTRUCTIONS_ENCODE_ROW_SCALE if row_scale else hardware.INSTRUCTIONS_ENCODE)
        + hardware.INSTRUCTIONS_SEARCH * bool(spec["scale_search"])
        + hardware.INSTRUCTIONS_ROTATION * bool(spec["rotation"])
    )


def _decode_instructions(codec: Codec, peers: int) -> float:
    if codec.static:
        return hardware.INSTRUCTIONS_DECODE_STATIC * peers
    return hardware.INSTRUCTIONS_DECODE * peers + hardware.INSTRUCTIONS_ROTATION * bool(codec.spec["rotation"])


def _encode_s(gpu: Gpu, codec: Codec, rows: float, features: int) -> float:
    moved = rows * (features * VALUE_BYTES + codec.row_bytes(features))
    return _kernel_s(gpu, moved, rows * features * _encode_instructions(codec))


def _decode_s(gpu: Gpu, codec: Codec, peers: int, rows: float, features: int) -> float:
    moved = rows * (peers * codec.row_bytes(features) + features * VALUE_BYTES)
    return _kernel_s(gpu, moved, rows * features * _decode_instructions(codec, peers))


def _decode_encode_s(gpu: Gpu, first: Codec, second: Codec, peers: int, rows: float, features: int) -> float:
    moved = rows * (peers * first.row_bytes(features) + second.row_bytes(features))
    instructions = _decode_instructions(first, peers) + _encode_instructions(second)
    return _kernel_s(gpu, moved, rows * features * instructions)


def compressed_s(system: System, route: Route, rows: int, features: int, transport: Transport = "collectives") -> float:
    """Seconds of a compressed all_reduce of bf16 [rows, features].

    transport: "collectives" as megacomp does it: a kernel, a collective, a kernel; chunks overlap the two.
        "one_kernel" as published systems do over memory that peers can read: one launch, a barrier in place
        of each collective. It is here to hold the model against what they measured.
    """
    if system.ranks == 1:
        return 0.0
    gpu, ranks = system.gpu, system.ranks
    first, second = route.codec, route.second_codec
    wire, second_wire = first.row_bytes(features), second.row_bytes(features)
    if choose_algorithm(route, ranks, rows, features) == "one_shot":
        kernels = [_encode_s(gpu, first, rows, features), _decode_s(gpu, first, ranks, rows, features)]
        hops = [all_gather_s(system, rows * wire)]
        sent = float((ranks - 1) * rows * wire)
    else:
        own = rows / ranks
        kernels = [
            _encode_s(gpu, first, rows, features),
            _decode_encode_s(gpu, first, second, ranks, own, features),
            _decode_s(gpu, second, 1, rows, features),
        ]
        hops = [all_to_all_s(system, rows * wire), all_gather_s(system, own * second_wire)]
        sent = (ranks - 1) * own * (wire + second_wire)
    if transport == "one_kernel":
        barrier = 1e-6 * hardware.PROTOCOLS[-1].hop_us[system.link.wiring]
        return hardware.KERNEL_S + len(hops) * barrier + sum(kernels) + sent / (1e9 * system.ring_gbs)
    chunks = choose_chunks(route, rows, features, _CUDA)
    computing = sum(kernels) + chunks * len(kernels) * hardware.KERNEL_S
    # Latencies are paid for each chunk, bytes once.
    travelling = sum(hops) + (chunks - 1) * sum(_latency_s(system, hop) for hop in range(len(hops)))
    return max(computing, travelling) + min(computing, travelling) / chunks


def _latency_s(system: System, hop: int) -> float:
    """Seconds of the first or second collective of a message without bytes."""
    return all_to_all_s(system, 0) if hop == 0 else all_gather_s(system, 0)


# -- models -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Workload:
    """batch: sequences at a time. prompt: tokens of each. weight_bits: of the linear layers' weights."""

    prompt: int = 1024
    batch: int = 1
    weight_bits: float = 16


def weight_bytes(architecture: Architecture, ranks: int, weight_bits: float) -> float:
    """Bytes of weights a rank holds; embeddings, not quantized, included."""
    linears = sum(rows * columns for rows, columns in architecture.linear_shapes().values())
    tables = (1 if architecture.tied_embeddings else 2) * architecture.vocab_size * architecture.hidden_size
    return (linears * weight_bits / 8 + tables * VALUE_BYTES) / ranks


def compute_s(architecture: Architecture, system: System, workload: Workload, *, first_token: bool) -> float:
    """Seconds a forward takes without its all_reduces: of the whole prompt, or of one token after it."""
    gpu, ranks = system.gpu, system.ranks
    tokens = workload.batch * (workload.prompt if first_token else 1)
    seconds = sum(
        _gemm_s(gpu, tokens, rows * columns / ranks, workload.weight_bits)
        for rows, columns in architecture.linear_shapes().values()
    )
    # Attention: scores and their products with the values, over the half of each that a causal mask leaves.
    queries = architecture.num_heads * architecture.head_dim / ranks
    keys = architecture.num_kv_heads * architecture.head_dim / ranks
    seen = tokens * (workload.prompt / 2 if first_token else workload.prompt)
    cached = 2 * VALUE_BYTES * keys * workload.batch * workload.prompt
    attention = max(
        4 * queries * seen / (1e12 * gpu.tflops * hardware.COMPUTE_SHARE),
        cached / (1e9 * gpu.memory_gbs * hardware.MEMORY_SHARE),
    )
    passes: float = (
        hardware.ACTIVATION_PASSES * architecture.hidden_size
        + hardware.MLP_PASSES * architecture.intermediate_size / ranks
    )
    elementwise = _kernel_s(gpu, tokens * passes * VALUE_BYTES, 0)
    output = _gemm_s(gpu, workload.batch, architecture.vocab_size * architecture.hidden_size / ranks, 16)
    return seconds + architecture.num_layers * (attention + elementwise) + output


def _gemm_s(gpu: Gpu, tokens: int, weights: float, weight_bits: float) -> float:
    return max(
        2 * tokens * weights / (1e12 * gpu.tflops * hardware.COMPUTE_SHARE),
        weights * weight_bits / 8 / (1e9 * gpu.memory_gbs * hardware.MEMORY_SHARE),
    )


# -- the plan ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Forecast:
    """What one codec and algorithm are predicted to do; everything in seconds and bytes.

    ttft_s, token_s: to the first token, for each one after it, every reduction compressed.
    message_s: of one reduction of the prompt.
    pays_from: the smallest message (bytes of the uncompressed tensor) from which on compressing takes at most
        1 / PAYS of the plain time; None if no size does.
    """

    codec: str | Mapping[str, Any]
    name: str
    algorithm: Literal["one_shot", "two_shot"]
    bits_per_value: float
    ttft_s: float
    token_s: float
    message_s: float
    pays_from: int | None


@dataclass(frozen=True)
class Plan:
    """A forecast for one model, system and workload, and what follows from it.

    message_bytes, token_message_bytes: of a reduction of the prompt, and of a token after it.
    ttft_s, token_s, message_s: uncompressed.
    compute_s: of ttft_s, without its reductions.
    forecasts: a codec's algorithms one after the other.
    best: the forecast the section follows; None if it leaves everything exact.
    section: a DeepSpeed JSON's "megacomp" section.
    planned_ttft_s, planned_token_s: under that section, its min_bytes included.
    notes: what a user ought to know.
    """

    message_bytes: int
    token_message_bytes: int
    ttft_s: float
    token_s: float
    message_s: float
    compute_s: float
    forecasts: tuple[Forecast, ...]
    best: Forecast | None
    section: dict[str, Any]
    planned_ttft_s: float
    planned_token_s: float
    notes: tuple[str, ...]


def plan(
    architecture: Architecture,
    system: System,
    workload: Workload,
    specs: Sequence[str | Mapping[str, Any]] = CODECS,
) -> Plan:
    """The forecast for every codec of `specs` under both algorithms, and the section it speaks for.

    specs: in order of preference where their speed is about the same.

    Raises LaunchError if `system.ranks` does not divide the model's heads.
    """
    architecture.check_tensor_parallel(system.ranks)
    features, reductions = architecture.hidden_size, 2 * architecture.num_layers
    rows, token_rows = workload.batch * workload.prompt, workload.batch
    plain, plain_token = (all_reduce_s(system, count * features * VALUE_BYTES) for count in (rows, token_rows))
    computing = compute_s(architecture, system, workload, first_token=True)
    computing_token = compute_s(architecture, system, workload, first_token=False)
    ttft, per_token = computing + reductions * plain, computing_token + reductions * plain_token
    forecasts = []
    for spec in specs:
        codec = codecs.get(spec)
        for algorithm in ("one_shot", "two_shot"):
            route = Route(codec, algorithm=algorithm)
            message = compressed_s(system, route, rows, features)
            forecasts.append(
                Forecast(
                    codec=spec,
                    name=codec.name,
                    algorithm=algorithm,
                    bits_per_value=codec.bits_per_value(features),
                    ttft_s=computing + reductions * message,
                    token_s=computing_token + reductions * compressed_s(system, route, token_rows, features),
                    message_s=message,
                    pays_from=pays_from(system, route, features),
                )
            )
    best = _choose(forecasts, ttft, rows * features * VALUE_BYTES)
    if best is None:
        section: dict[str, Any] = {"communication": {"codec": None}}
        planned, planned_token = ttft, per_token
    else:
        section = _section(best, system, features, rows * features * VALUE_BYTES)
        smallest = section["communication"]["min_bytes"]
        planned = best.ttft_s
        planned_token = best.token_s if token_rows * features * VALUE_BYTES >= smallest else per_token
    return Plan(
        message_bytes=rows * features * VALUE_BYTES,
        token_message_bytes=token_rows * features * VALUE_BYTES,
        ttft_s=ttft,
        token_s=per_token,
        message_s=plain,
        compute_s=computing,
        forecasts=tuple(forecasts),
        best=best,
        section={"megacomp": section},
        planned_ttft_s=planned,
        planned_token_s=planned_token,
        notes=tuple(_notes(architecture, system, workload, best, ttft)),
    )


def pays_from(system: System, route: Route, features: int) -> int | None:
    """See `Forecast.pays_from`; a multiple of a row's bytes."""
    if system.ranks == 1:
        return None
    pays = lru_cache(maxsize=None)(
        lambda rows: (
            compressed_s(system, route, rows, features) * PAYS <= all_reduce_s(system, rows * features * VALUE_BYTES)
        )
    )
    if not pays(MOST_ROWS):
        return None
    # Down from the largest by halves to the first that does not pay, then between the two.
    high = MOST_ROWS
    while high > 1 and pays(high // 2):
        high //= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if pays(middle) else (middle, high)
    return high * features * VALUE_BYTES


def _choose(forecasts: Sequence[Forecast], ttft_s: float, message_bytes: int) -> Forecast | None:
    """The first codec that is about as fast as the fastest, if that is fast enough to be worth it."""
    paying = [one for one in forecasts if one.pays_from is not None and one.pays_from <= message_bytes]
    worth = [one for one in paying if one.ttft_s * WORTH < ttft_s]
    if not worth:
        return None
    fastest = min(one.ttft_s for one in worth)
    preferred = next(one for one in worth if one.ttft_s <= fastest * CLOSE).name
    return min((one for one in worth if one.name == preferred), key=lambda one: one.ttft_s)


def _section(best: Forecast, system: System, features: int, message_bytes: int) -> dict[str, Any]:
    """The section of `best`; "auto" where that means the same from min_bytes on."""
    assert best.pays_from is not None
    # Two digits are more than a model knows; but the message it was planned for is to stay above.
    step = 1 << max(0, best.pays_from.bit_length() - 3)
    smallest = min(-(-best.pays_from // step) * step, message_bytes)
    auto = Route(codecs.get(best.codec))
    rows = -(-smallest // (features * VALUE_BYTES))
    same = choose_algorithm(auto, system.ranks, rows, features) == best.algorithm
    codec = dict(best.codec) if isinstance(best.codec, Mapping) else best.codec
    return {"communication": {"codec": codec, "algorithm": "auto" if same else best.algorithm, "min_bytes": smallest}}


def _notes(
    architecture: Architecture, system: System, workload: Workload, best: Forecast | None, ttft_s: float
) -> Iterable[str]:
    held = weight_bytes(architecture, system.ranks, workload.weight_bits) / 1e9
    keys = 2 * architecture.num_layers * architecture.num_kv_heads * architecture.head_dim / system.ranks
    cache = VALUE_BYTES * keys * workload.batch * workload.prompt / 1e9
    if system.gpu.memory_gb is not None and held + cache > system.gpu.memory_gb:
        yield (
            f"{held:.1f} GB of weights and {cache:.1f} GB of keys and values per rank do not fit into the "
            f"{system.gpu.memory_gb:g} GB of this GPU"
        )
    if workload.prompt > architecture.max_positions:
        yield f"the model has positions for {architecture.max_positions} tokens, fewer than the prompt's"
    if system.ranks == 1:
        yield "one rank reduces nothing: there is nothing to compress"
    elif best is None:
        yield (
            f"no codec is predicted to bring the first token sooner by {WORTH - 1:.0%} or more with this prompt: "
            "leave communication exact"
        )
    else:
        yield "what the codec costs this model in quality is not predicted: megacomp eval measures it"
        if codecs.get(best.codec).static:
            yield f'{best.name} is static: name the file of its calibration (megacomp calibrate) as "calibration"'
    if system.nodes > 1 and system.ranks > system.nodes:
        yield (
            "between hosts of several GPUs each, two-shot's all-to-all sends more than its share of a ring would: the "
            "gain stays below the codec's ratio; tensor parallelism inside of a host needs neither"
        )


@dataclass(frozen=True)
class Curve:
    """Predicted seconds to the first token over `x`: uncompressed and under the plan's codec and algorithm."""

    x: tuple[float, ...]
    plain: tuple[float, ...]
    compressed: tuple[float, ...]


def over_prompts(
    architecture: Architecture, system: System, workload: Workload, forecast: Forecast, prompts: Sequence[int]
) -> Curve:
    """The first token against the length of the prompt."""
    workloads = [Workload(prompt, workload.batch, workload.weight_bits) for prompt in prompts]
    pairs = [_ttft_pair(architecture, system, one, forecast) for one in workloads]
    return Curve(tuple(map(float, prompts)), *map(tuple, zip(*pairs, strict=True)))


def over_links(
    architecture: Architecture, systems: Mapping[float, System], workload: Workload, forecast: Forecast
) -> Curve:
    """The first token on systems of different links, by their 10^9 bytes per second."""
    pairs = [_ttft_pair(architecture, system, workload, forecast) for system in systems.values()]
    return Curve(tuple(systems), *map(tuple, zip(*pairs, strict=True)))


def _ttft_pair(
    architecture: Architecture, system: System, workload: Workload, forecast: Forecast
) -> tuple[float, float]:
    rows, features = workload.batch * workload.prompt, architecture.hidden_size
    computing = compute_s(architecture, system, workload, first_token=True)
    route = Route(codecs.get(forecast.codec), algorithm=forecast.algorithm)
    reductions = 2 * architecture.num_layers
    return (
        computing + reductions * all_reduce_s(system, rows * features * VALUE_BYTES),
        computing + reductions * compressed_s(system, route, rows, features),
    )
