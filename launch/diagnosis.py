"""What `megacomp doctor` looks at: versions, frameworks, devices, backends, and what a configuration would do.

Nothing is patched and no rank is started. Every look gives findings: what is there, whether that works, and what
to change.
"""

from __future__ import annotations

import logging
import os
import platform
import re
import shutil
import socket
import subprocess
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from enum import Enum
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from megacomp import codecs
from megacomp.codecs import Codec
from megacomp.collectives import Route, choose_algorithm, wire_bytes
from megacomp.config import Communication, Config, ConfigError
from megacomp.door import Door
from megacomp.kernels.backend import BACKENDS, backend_problem
from megacomp.launch import distributed
from megacomp.launch.allocation import notation
from megacomp.launch.engines import cpu_host
from megacomp.launch.engines.architecture import Architecture
from megacomp.launch.errors import LaunchError
from megacomp.launch.made_up import with_tables
from megacomp.patches import FRAMEWORKS, Framework, MissingSymbolError
from megacomp.policy import Decline, Policy, Site

PROMPTS = (128, 512, 2048)
"""Tokens of the prompts a configuration is held against, beside a single token."""

MOST_TOKENS = 2**17
"""Where the search for the shortest prompt that is compressed ends."""

CHECK_RANKS, CHECK_ROWS = 2, 64


class Verdict(str, Enum):
    """FINE; NOTE: works, and there is something to know; PROBLEM: something would not work."""

    FINE = "fine"
    NOTE = "note"
    PROBLEM = "problem"


@dataclass(frozen=True)
class Finding:
    """One thing looked at.

    area, subject: what. found: what is there, a sentence. advice: what to change; "" for nothing.
    details: each thing looked at for it.
    """

    area: str
    subject: str
    verdict: Verdict
    found: str
    advice: str = ""
    details: tuple[str, ...] = ()


# -- versions ---------------------------------------------------------------------------------------------------------


def versions() -> list[Finding]:
    """Python, what megacomp requires, and what its frameworks use where it is there."""
    needed = {
        requirement.name: requirement.specifier
        for requirement in map(Requirement, _requirements())
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    }
    found = [_version_finding("Python", platform.python_version(), SpecifierSet(">=3.10"))]
    for package in ("torch", "triton"):
        found.append(_version_finding(package, installed(package), needed.get(package, SpecifierSet())))
    for name, why in (
        ("transformers", "needed by eval, generate and run of Hugging Face models"),
        ("transformer-engine", "not needed; where Megatron uses its linear layers, they are patched"),
    ):
        version = installed(name)
        found.append(Finding("versions", name, Verdict.FINE, f"{version or 'not installed'}: {why}"))
    return [*found, apex()]


def installed(package: str) -> str | None:
    """The version of a distribution, without importing it."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _requirements() -> Sequence[str]:
    try:
        return metadata.requires("megacomp") or ()
    except metadata.PackageNotFoundError:
        return ()


def _version_finding(name: str, version: str | None, supported: SpecifierSet) -> Finding:
    advice = f"pip install '{name}{supported}'"
    if version is None:
        return Finding("versions", name, Verdict.PROBLEM, "not installed", advice)
    if not supported.contains(Version(version), prereleases=True):
        return Finding("versions", name, Verdict.PROBLEM, f"{version} is not supported: needed is {supported}", advice)
    return Finding("versions", name, Verdict.FINE, version)


def apex() -> Finding:
    """Which package goes by that name. PyPI's is a toolkit for web applications; NVIDIA's has `apex.normalization`."""
    spec = find_spec("apex")
    if spec is None:
        return Finding("versions", "apex", Verdict.FINE, "not installed; not needed")
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    if any((folder / "normalization").is_dir() for folder in folders):
        return Finding("versions", "apex", Verdict.FINE, "NVIDIA apex; Megatron-core uses it")
    return Finding(
        "versions",
        "apex",
        Verdict.NOTE,
        f"{installed('apex') or 'a package'} that is not NVIDIA apex: PyPI has another project of that name",
        "pip uninstall apex; NVIDIA's is built from its sources, and megacomp needs neither",
    )


# -- frameworks -------------------------------------------------------------------------------------------------------


def frameworks(config: Config | None) -> list[Finding]:
    """What could be patched of each framework, for `config` (the default one if None); a problem if none could."""
    collectives = (config or Config()).communication.collectives
    door = Door(Config(communication=Communication(collectives=collectives)))
    findings = [_framework(framework, door) for framework in FRAMEWORKS]
    if any(finding.details and finding.verdict is not Verdict.PROBLEM for finding in findings):
        return findings
    advice = "pip install 'megacomp[deepspeed]' or 'megacomp[megatron]' (DeepSpeed with DS_BUILD_OPS=0)"
    return [
        *findings,
        Finding("frameworks", "patching", Verdict.PROBLEM, "there is no framework here that could be patched", advice),
    ]


def _framework(framework: Framework, door: Door) -> Finding:
    """Its version and every symbol of it that would be replaced."""
    version = installed(framework.name)
    if version is None:
        return Finding("frameworks", framework.name, Verdict.NOTE, "not installed: nothing of it to patch")
    problem = f"pip install '{framework.name}{framework.supported}'"
    if not SpecifierSet(framework.supported).contains(Version(version), prereleases=True):
        why = f"{version} would be refused as soon as it is imported: supported is {framework.supported}"
        return Finding("frameworks", framework.name, Verdict.PROBLEM, why, problem)
    details, missing = [], 0
    try:
        with _quietly_imported(framework):
            patches = framework.patches(door)
            for patch in patches:
                try:
                    patch.check(framework.supported)
                    details.append(f"{patch.path}: there")
                except MissingSymbolError:
                    missing += 1
                    details.append(f"{patch.path}: missing")
    except Exception as error:  # importing a framework may fail in any way
        why = f"{version} cannot be imported: {type(error).__name__}: {_first_line(error)}"
        advice = f"python -c 'import {framework.module}' shows all of it"
        return Finding("frameworks", framework.name, Verdict.PROBLEM, why, advice)
    if missing:
        why = f"{version}: {missing} of the {len(details)} places megacomp patches do not exist"
        return Finding("frameworks", framework.name, Verdict.PROBLEM, why, problem, tuple(details))
    why = f"{version} (supported: {framework.supported}): all {len(details)} places to patch are there"
    return Finding("frameworks", framework.name, Verdict.FINE, why, details=tuple(details))


@contextmanager
def _quietly_imported(framework: Framework) -> Iterator[None]:
    """Its package imported, on a host without a GPU too; what it says about absent accelerators is not ours to say."""
    on_cpu = framework.name == "deepspeed" and not torch.cuda.is_available()
    with cpu_host.deepspeed_on_cpu() if on_cpu else nullcontext(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _ = framework.version
        yield


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0]


# -- devices and links ------------------------------------------------------------------------------------------------


def devices(ranks: int) -> list[Finding]:
    """What `ranks` ranks would run on and reduce over."""
    if not dist.is_available():
        return [Finding("devices", "torch.distributed", Verdict.PROBLEM, "this PyTorch was built without it")]
    return [*_gpus(ranks)] if torch.cuda.is_available() else [*_cpu(ranks)]


def _gpus(ranks: int) -> Iterator[Finding]:
    count = torch.cuda.device_count()
    names = [
        f"{torch.cuda.get_device_name(index)} ({torch.cuda.get_device_properties(index).total_memory / 1e9:.0f} GB)"
        for index in range(count)
    ]
    yield Finding("devices", "GPUs", Verdict.FINE, f"{count}: {', '.join(sorted(set(names)))}", details=tuple(names))
    if ranks > count:
        yield Finding(
            "devices",
            "ranks",
            Verdict.NOTE,
            f"{ranks} ranks, {count} GPUs here",
            "start them on several nodes (docs/deploying.md), or fewer",
        )
    if not dist.is_nccl_available():
        yield Finding("devices", "NCCL", Verdict.PROBLEM, "this PyTorch has no NCCL", "install a CUDA build of PyTorch")
    blind = [
        f"{a}-{b}" for a in range(count) for b in range(count) if a < b and not torch.cuda.can_device_access_peer(a, b)
    ]
    if count > 1:
        yield _link(nvlink_pairs(_topology()), count, blind)


def _link(nvlinks: int | None, count: int, blind: Sequence[str]) -> Finding:
    """What joins the GPUs. nvlinks: pairs joined by NVLink; None if nvidia-smi did not tell."""
    pairs = count * (count - 1) // 2
    if nvlinks == pairs:
        return Finding(
            "devices",
            "link",
            Verdict.NOTE,
            "NVLink between all GPUs: compression pays for large messages only",
            "find out from which size on: megacomp tune",
        )
    told = "" if nvlinks is None else f"NVLink between {nvlinks} of {pairs} pairs; "
    if blind:
        return Finding(
            "devices",
            "link",
            Verdict.NOTE,
            f"{told}no peer-to-peer access between GPUs {', '.join(blind)}: NCCL goes through the host's memory",
            "see whether ACS and the IOMMU can be switched off; compression pays the sooner",
        )
    return Finding("devices", "link", Verdict.FINE, f"{told}peer-to-peer access between all GPUs")


def _topology() -> str | None:
    """What `nvidia-smi topo -m` prints."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    try:
        result = subprocess.run([program, "topo", "-m"], capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout


def nvlink_pairs(topology: str | None) -> int | None:
    """Pairs of GPUs joined by NVLink in the matrix of `nvidia-smi topo -m`; None without one."""
    rows = [line.split() for line in re.sub(r"\x1b\[[0-9;]*m", "", topology or "").splitlines()]
    matrix = [row[1:] for row in rows if len(row) > 1 and re.fullmatch(r"GPU\d+", row[0]) and "X" in row]
    if not matrix:
        return None
    cells = [cell for row in matrix for cell in row[: len(matrix)]]
    return sum(cell.startswith("NV") for cell in cells) // 2


def _cpu(ranks: int) -> Iterator[Finding]:
    cores = len(os.sched_getaffinity(0))
    yield Finding("devices", "CPU", Verdict.FINE, f"no GPU: {cores} cores, reductions over gloo")
    if not dist.is_gloo_available():
        yield Finding(
            "devices", "gloo", Verdict.PROBLEM, "this PyTorch has no gloo", "install another build of PyTorch"
        )
    yield _threads(ranks, cores)
    yield _interface(os.environ.get("GLOO_SOCKET_IFNAME"))
    if "TORCHELASTIC_RUN_ID" in os.environ and "LOCAL_SIZE" not in os.environ and installed("deepspeed"):
        yield Finding(
            "devices",
            "torchrun",
            Verdict.PROBLEM,
            "DeepSpeed's shared-memory all_reduce crashes on CPUs under torchrun if LOCAL_SIZE is not set",
            "export LOCAL_SIZE with the ranks of this host, or use the deepspeed launcher",
        )


def _threads(ranks: int, cores: int) -> Finding:
    setting = os.environ.get("OMP_NUM_THREADS")
    share = max(1, cores // ranks)
    threads = int(setting) if setting and setting.isdecimal() else cores
    if ranks == 1 or ranks * threads <= max(cores, ranks):
        how = f"OMP_NUM_THREADS={setting}" if setting else "OMP_NUM_THREADS is not set"
        return Finding("devices", "threads", Verdict.FINE, f"{how}: {ranks} x {threads} threads on {cores} cores")
    how = f"OMP_NUM_THREADS={setting}" if setting else "OMP_NUM_THREADS is not set: under the deepspeed launcher"
    return Finding(
        "devices",
        "threads",
        Verdict.NOTE,
        f"{how} {ranks} ranks would run {threads} threads each on {cores} cores, several times slower than with "
        f"{share} each",
        f"export OMP_NUM_THREADS={share} (torchrun sets 1 by itself; `--tp` of our commands sets {share})",
    )


def _interface(name: str | None) -> Finding:
    """What gloo will listen on: the interface named, or else that of this host's own name."""
    if name is not None:
        unknown = [one for one in name.split(",") if one not in dict(socket.if_nameindex()).values()]
        if not unknown:
            return Finding("devices", "gloo", Verdict.FINE, f"GLOO_SOCKET_IFNAME={name}")
        known = ", ".join(interface for _, interface in socket.if_nameindex())
        return Finding(
            "devices",
            "gloo",
            Verdict.PROBLEM,
            f"GLOO_SOCKET_IFNAME={name}, but this host has no interface {', '.join(unknown)}",
            f"name one of: {known}",
        )
    try:
        address = socket.gethostbyname(socket.gethostname())
    except OSError:
        return Finding(
            "devices",
            "gloo",
            Verdict.PROBLEM,
            f"gloo looks up the address of this host's name, {socket.gethostname()!r}, which has none",
            "export GLOO_SOCKET_IFNAME=lo for ranks of one host; for several, the interface between them",
        )
    if address.startswith("127."):
        return Finding(
            "devices",
            "gloo",
            Verdict.FINE,
            f"{socket.gethostname()} is {address}: fit for the ranks of one host "
            "(for several, set GLOO_SOCKET_IFNAME to the interface between them)",
        )
    return Finding("devices", "gloo", Verdict.FINE, f"{socket.gethostname()} is {address}")


# -- backends ---------------------------------------------------------------------------------------------------------


def backends(config: Config | None, features: int) -> list[Finding]:
    """Each backend encodes and decodes a small message here, which must be equal to the definition bit for bit.

    features: values per row. Compiling takes some seconds.
    """
    asked = (config or Config()).backend
    spec = (config or Config()).communication.codec or "mxfp4"
    device = distributed.default_device()
    findings = []
    for backend in BACKENDS:
        if backend in ("auto", "reference"):
            continue
        kind = Verdict.PROBLEM if asked == backend else Verdict.NOTE
        problem = backend_problem(backend, device)
        if backend == "compiled" and device.type != "cpu":
            findings.append(Finding("backends", backend, Verdict.FINE, "for CPUs; here Triton's kernels run"))
        elif problem is None:
            findings.append(_equal(backend, spec, features, device))
        elif backend == "triton" and device.type == "cpu" and asked != backend:
            findings.append(Finding("backends", backend, Verdict.FINE, f"not here: {problem}"))
        else:
            findings.append(Finding("backends", backend, kind, problem, _BACKEND_ADVICE[backend]))
    return findings


_BACKEND_ADVICE = {
    "compiled": 'apt-get install g++ (or set CXX); "backend": "auto" runs codecs without it, about 20 times slower',
    "triton": '"backend": "auto" runs codecs without it, slower',
}


def _equal(backend: str, spec: Any, features: int, device: torch.device) -> Finding:
    definition, tried = (
        with_tables(codecs.get(spec, backend=name), CHECK_RANKS, features) for name in ("reference", backend)
    )
    x = torch.randn(CHECK_ROWS, features, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    wires = _encoded(definition, x)
    total = definition.decode_sum(wires, features, torch.bfloat16)
    try:
        with _logged() as said:
            encoded = _encoded(tried, x.to(device))
            decoded = tried.decode_sum(encoded, features, torch.bfloat16)
    except Exception as error:  # whatever a compiler or a device raises
        why = f"{tried.name} fails: {type(error).__name__}: {_first_line(error)}"
        return Finding("backends", backend, Verdict.PROBLEM, why, 'set "backend": "reference", and report it')
    what = f"{tried.name}, {CHECK_ROWS} x {features}"
    if not (torch.equal(encoded.cpu(), wires) and torch.equal(decoded.cpu(), total)):
        why = f"{what}: not equal to its definition"
        return Finding("backends", backend, Verdict.PROBLEM, why, 'set "backend": "reference", and report it')
    if said:
        return Finding("backends", backend, Verdict.NOTE, f"{what}: equal bit for bit, but {said[0]}")
    return Finding("backends", backend, Verdict.FINE, f"{what}: equal to its definition bit for bit")


def _encoded(codec: Codec, x: torch.Tensor) -> torch.Tensor:
    """Wires [CHECK_RANKS, rows, row_bytes]."""
    return torch.stack([codec.sender(rank).encode(x) for rank in range(CHECK_RANKS)])


@contextmanager
def _logged() -> Iterator[list[str]]:
    """The warnings megacomp logs inside, which is how a backend says that it stood aside."""

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    said: list[str] = []
    logger, handler = logging.getLogger("megacomp"), Keep(logging.WARNING)
    logger.addHandler(handler)
    try:
        yield said
    finally:
        logger.removeHandler(handler)


# -- what a configuration would do ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Message:
    """What would happen to some of a model's reductions of one size.

    tokens, bytes: rows of the message, and its size on one rank, uncompressed.
    sites: how many reductions; layers: of which layers ("0, 31", "1-30"), module: and of which half ("" for both).
    compressed: whether any codec.
    what: codec and algorithm, or why not.
    decided_by: "rules[0]", "communication".
    sent, ring: bytes a rank sends, and would by a plain ring.
    """

    tokens: int
    bytes: int
    sites: int
    layers: str
    module: str
    compressed: bool
    what: str
    decided_by: str
    sent: int
    ring: int


def configured(
    config: Config, architecture: Architecture | None, ranks: int, dtype: torch.dtype
) -> tuple[list[Finding], list[Message]]:
    """What `config` would do to the all_reduces of a model, for a token and for prompts of PROMPTS tokens.

    Without a model: only what is wrong with the files that `config` names.
    """
    try:
        policy = Policy(config)
    except ConfigError as error:
        return [Finding("configuration", "section", Verdict.PROBLEM, str(error))], []
    if architecture is None:
        return [], []
    sites = [
        Site(f"layers.{layer}.{module}", module, layer, architecture.num_layers)
        for layer in range(architecture.num_layers)
        for module in ("attention", "mlp")
    ]
    try:
        architecture.check_tensor_parallel(ranks)
        policy.check_rules(sites)
        policy.check_calibration(sites, [architecture.hidden_size], [ranks])
    except (ConfigError, LaunchError) as error:
        return [Finding("configuration", "model", Verdict.PROBLEM, str(error))], []
    features = architecture.hidden_size
    lengths = [1, *(prompt for prompt in PROMPTS if prompt <= architecture.max_positions)]
    messages = [
        message for tokens in lengths for message in _messages(config, policy, sites, tokens, features, dtype, ranks)
    ]

    def compresses(tokens: int) -> bool:
        return any(
            isinstance(policy.decide(site, "all_reduce", tokens, features, dtype, ranks), Route) for site in sites
        )

    return [*_verdicts(messages, compresses, architecture, dtype, ranks, policy)], messages


def _messages(
    config: Config,
    policy: Policy,
    sites: Iterable[Site],
    tokens: int,
    features: int,
    dtype: torch.dtype,
    ranks: int,
) -> Iterator[Message]:
    """The sites of one size of message, grouped by what happens to it."""
    prefixes = [_with_rules(config, count) for count in range(len(config.communication.rules))] + [policy]
    groups: dict[tuple[Route | Decline, str], list[Site]] = {}
    for site in sites:
        outcomes = [prefix.decide(site, "all_reduce", tokens, features, dtype, ranks) for prefix in prefixes]
        # The first rule with which the answer is the final one is the rule that gives it.
        same = len(outcomes) - 1
        while same and outcomes[same - 1] == outcomes[-1]:
            same -= 1
        decided_by = f"rules[{same - 1}]" if same else "communication"
        groups.setdefault((outcomes[-1], decided_by), []).append(site)
    for (outcome, decided_by), members in groups.items():
        if isinstance(outcome, Route):
            traffic = wire_bytes(outcome, tokens, features, dtype, rank=0, world_size=ranks)
            algorithm = choose_algorithm(outcome, ranks, tokens, features).replace("_", "-")
            names = dict.fromkeys((outcome.codec.name, outcome.second_codec.name))
            what, sent, ring = f"{' + '.join(names)}, {algorithm}", traffic.sent, traffic.ring
        else:
            what, sent, ring = f"exact: {outcome.why}", 0, 0
        modules = {site.module for site in members}
        yield Message(
            tokens=tokens,
            bytes=tokens * features * dtype.itemsize,
            sites=len(members),
            layers=notation(site.layer for site in members).replace(",", ", "),
            module="" if len(modules) == 2 else str(*modules),
            compressed=isinstance(outcome, Route),
            what=what,
            decided_by=decided_by,
            sent=sent,
            ring=ring,
        )


def _with_rules(config: Config, count: int) -> Policy:
    """The policy of the first `count` rules alone."""
    communication = config.communication.model_copy(update={"rules": config.communication.rules[:count]})
    return Policy(config.model_copy(update={"communication": communication}))


def _verdicts(
    messages: Sequence[Message],
    compresses: Callable[[int], bool],
    architecture: Architecture,
    dtype: torch.dtype,
    ranks: int,
    policy: Policy,
) -> Iterator[Finding]:
    row = architecture.hidden_size * dtype.itemsize
    shortest = _shortest(compresses)
    if shortest is None:
        why = "; ".join(dict.fromkeys(message.what for message in messages if message.tokens > 1))
        advice = "give --tp with the ranks you will have" if ranks == 1 else 'change "codec", "rules" or "collectives"'
        yield Finding("configuration", "model", Verdict.PROBLEM, f"nothing would be compressed: {why}", advice)
        return
    decode = [message for message in messages if message.tokens == 1 and message.compressed]
    if decode:
        yield Finding(
            "configuration",
            "single tokens",
            Verdict.NOTE,
            f"{sum(message.sites for message in decode)} reductions of a single token ({row:,} bytes) would be "
            "compressed: at such sizes encoding mostly costs more than it saves",
            f'"min_bytes": {2 * row} or more leaves them exact; megacomp tune finds the best',
        )
    else:
        yield Finding("configuration", "single tokens", Verdict.FINE, f"stay exact ({row:,} bytes a reduction)")
    verdict, advice, limit = Verdict.FINE, "", ""
    if shortest > min(max(PROMPTS), architecture.max_positions):
        verdict, advice = Verdict.NOTE, 'a smaller "min_bytes" would compress shorter ones'
    if shortest > architecture.max_positions:
        limit = f"; a sequence of this model has {architecture.max_positions} at most"
    yield Finding(
        "configuration",
        "prompts",
        verdict,
        f"compressed from {shortest} token{'s' * (shortest > 1)} at a time on ({shortest * row:,} bytes), "
        f"the batch's sequences together{limit}",
        advice,
    )
    longest = [message for message in messages if message.compressed and message.sent > message.ring]
    if longest:
        message = longest[-1]
        yield Finding(
            "configuration",
            "algorithm",
            Verdict.NOTE,
            f"{message.what} among {ranks} ranks sends {message.sent / message.ring:.1f} times what a plain ring does "
            f"(messages of {message.tokens} tokens)",
            '"algorithm": "auto" or "two_shot"',
        )
    if policy.tunings is not None:
        for what, why in policy.tunings.describe().items():
            absent = why.startswith("defaults")
            yield Finding(
                "configuration",
                f"tuned, {what}",
                Verdict.NOTE if absent else Verdict.FINE,
                why,
                f"megacomp tune --tp {ranks}" if absent else "",
            )


def _shortest(compresses: Callable[[int], bool]) -> int | None:
    """The fewest tokens of which some reduction is compressed; None up to MOST_TOKENS."""
    high = 1
    while not compresses(high):
        high *= 2
        if high > MOST_TOKENS:
            return None
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if compresses(middle) else (middle, high)
    return high
