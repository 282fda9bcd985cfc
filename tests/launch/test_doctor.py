"""`megacomp doctor`: each look by itself, and the command as a newcomer runs it."""

from __future__ import annotations

import importlib
import json
import pkgutil
import socket
from pathlib import Path
from typing import Any

import pytest
import static_cases
import torch
from engines import tiny_models
from typer.testing import CliRunner

from megacomp import codecs
from megacomp.calibration import Calibration, SiteTables
from megacomp.codecs import StaticCodec
from megacomp.collectives import Route
from megacomp.config import Config, load
from megacomp.door import Door
from megacomp.launch import calibration, cli, diagnosis
from megacomp.launch.diagnosis import Finding, Verdict
from megacomp.launch.engines.architecture import Architecture
from megacomp.patches import FRAMEWORKS, Patch
from megacomp.patches.megatron import Megatron
from megacomp.policy import Policy, Site

TOPOLOGY = """
\t\x1b[4mGPU0\tGPU1\tGPU2\tGPU3\tNIC0\tCPU Affinity\x1b[0m
GPU0\t X \tNV12\tPHB\tSYS\tPXB\t0-31
GPU1\tNV12\t X \tSYS\tSYS\tPXB\t0-31
GPU2\tPHB\tSYS\t X \tNV12\tSYS\t32-63
GPU3\tSYS\tSYS\tNV12\t X \tSYS\t32-63
NIC0\tPXB\tPXB\tSYS\tSYS\t X

Legend:
  NV#  = Connection traversing a bonded set of # NVLinks
"""


@pytest.fixture(autouse=True)
def bare(no_launcher: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GLOO_SOCKET_IFNAME", "OMP_NUM_THREADS", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    tiny_models.save("llama_biased", folder)
    return folder


def _architecture(**changes: Any) -> Architecture:
    return Architecture.parse(
        {
            "model_type": "llama",
            "vocab_size": 96,
            "hidden_size": 512,
            "intermediate_size": 1024,
            "num_hidden_layers": 6,
            "num_attention_heads": 8,
            "num_key_value_heads": 8,
            "max_position_embeddings": 1024,
            **changes,
        }
    )


def _config(**communication: Any) -> Config:
    return load({"megacomp": {"communication": communication}})[0]


def _by(findings: list[Finding], subject: str) -> Finding:
    (found,) = (finding for finding in findings if finding.subject == subject)
    return found


def test_versions_are_those_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _by(diagnosis.versions(), "torch").found == torch.__version__
    monkeypatch.setattr(diagnosis, "installed", lambda package: {"torch": "2.1.0"}.get(package))
    findings = diagnosis.versions()
    old, absent = _by(findings, "torch"), _by(findings, "triton")
    assert old.verdict is Verdict.PROBLEM and ">=2.10" in old.found and "pip install 'torch>=2.10'" in old.advice
    assert absent.verdict is Verdict.PROBLEM and absent.found == "not installed"


@pytest.mark.parametrize(("inside", "verdict"), [("normalization", Verdict.FINE), ("lib", Verdict.NOTE)])
def test_the_apex_of_pypi_is_recognised(
    inside: str, verdict: Verdict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "apex" / inside).mkdir(parents=True)
    (tmp_path / "apex" / "__init__.py").write_text("raise RuntimeError('nobody is to import it')")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = diagnosis.apex()
    assert found.verdict is verdict
    assert ("NVIDIA apex" in found.found) and ("pip uninstall apex" in found.advice) is (verdict is Verdict.NOTE)


def test_every_symbol_is_looked_up_and_nothing_is_patched() -> None:
    config = _config(collectives=["all_reduce", "all_gather"])
    paths = {}
    for framework in FRAMEWORKS:
        if diagnosis.installed(framework.name):
            importlib.import_module(framework.module)
            paths[framework.name] = [patch.path for patch in framework.patches(Door(config))]
    assert paths
    originals = {path: pkgutil.resolve_name(path) for each in paths.values() for path in each}
    found = {finding.subject: finding for finding in diagnosis.frameworks(config)}
    assert all(pkgutil.resolve_name(path) is original for path, original in originals.items())
    for name, its in paths.items():
        assert found[name].verdict is Verdict.FINE
        assert found[name].details == tuple(f"{path}: there" for path in its)
    # The others are named as what they are: not installed.
    others = {framework.name for framework in FRAMEWORKS} - set(paths)
    assert all("not installed" in found[name].found for name in others)


def test_a_missing_symbol_and_an_unknown_version_are_problems(monkeypatch: pytest.MonkeyPatch) -> None:
    class Renamed(Megatron):
        def patches(self, door: Door) -> list[Patch]:
            return [*super().patches(door), Patch("megatron.core.tensor_parallel.mappings._gone", lambda f: f)]

    class Newer(Megatron):
        supported = ">=99"

    class Absent(Megatron):
        name = "megatron-hull"

    def look(*frameworks: Any) -> list[Finding]:
        monkeypatch.setattr(diagnosis, "FRAMEWORKS", frameworks)
        return diagnosis.frameworks(None)

    renamed, nothing = look(Renamed())
    assert renamed.verdict is Verdict.PROBLEM and "1 of the 5 places" in renamed.found
    assert "megatron.core.tensor_parallel.mappings._gone: missing" in renamed.details
    assert nothing.verdict is Verdict.PROBLEM and "megacomp[deepspeed]" in nothing.advice
    newer, absent, fine = look(Newer(), Absent(), Megatron())
    assert newer.verdict is Verdict.PROBLEM and ">=99" in newer.found
    assert absent.verdict is Verdict.NOTE and fine.verdict is Verdict.FINE


def test_pairs_of_nvlink_are_read_from_the_topology() -> None:
    assert diagnosis.nvlink_pairs(TOPOLOGY) == 2
    assert diagnosis.nvlink_pairs(TOPOLOGY.replace("NV12", "PIX")) == 0
    assert diagnosis.nvlink_pairs(None) is None and diagnosis.nvlink_pairs("no devices") is None


def test_gpus_their_link_and_a_want_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    # No GPU here: what torch would say of four, and nvidia-smi of their links.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA L4")
    memory = type("Properties", (), {"total_memory": 24e9})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: memory)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda a, b: {a, b} != {0, 3})
    monkeypatch.setattr(diagnosis, "_topology", lambda: TOPOLOGY)
    findings = diagnosis.devices(8)
    assert _by(findings, "GPUs").found == "4: NVIDIA L4 (24 GB)"
    assert "8 ranks, 4 GPUs" in _by(findings, "ranks").found
    link = _by(findings, "link")
    assert link.verdict is Verdict.NOTE and "2 of 6 pairs" in link.found and "GPUs 0-3" in link.found
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda a, b: True)
    assert _by(diagnosis.devices(4), "link").verdict is Verdict.FINE
    monkeypatch.setattr(diagnosis, "nvlink_pairs", lambda topology: 6)
    assert "NVLink between all" in _by(diagnosis.devices(4), "link").found
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    assert _by(diagnosis.devices(4), "NCCL").verdict is Verdict.PROBLEM


@pytest.mark.parametrize(
    ("setting", "ranks", "verdict"),
    [(None, 1, "fine"), (None, 2, "note"), ("1", 2, "fine"), ("2", 2, "note"), ("1", 8, "fine"), ("²", 2, "note")],
)
def test_more_threads_than_cores_are_seen(
    setting: str | None, ranks: int, verdict: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(diagnosis.os, "sched_getaffinity", lambda pid: {0, 1})
    if setting is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", setting)
    found = _by(diagnosis.devices(ranks), "threads")
    assert found.verdict.value == verdict
    assert ("export OMP_NUM_THREADS=1" in found.advice) is (verdict == "note")


def test_the_interface_of_gloo_must_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    assert _by(diagnosis.devices(2), "gloo").verdict is Verdict.FINE
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib99")
    found = _by(diagnosis.devices(2), "gloo")
    assert found.verdict is Verdict.PROBLEM and "ib99" in found.found and "lo" in found.advice
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")

    def nameless(name: str) -> str:
        raise socket.gaierror

    monkeypatch.setattr(socket, "gethostbyname", nameless)
    found = _by(diagnosis.devices(2), "gloo")
    assert found.verdict is Verdict.PROBLEM and "GLOO_SOCKET_IFNAME=lo" in found.advice


def test_torchrun_without_local_size_is_a_problem_of_deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.delenv("LOCAL_SIZE", raising=False)
    assert _by(diagnosis.devices(2), "torchrun").verdict is Verdict.PROBLEM


def test_backends_are_tried_and_compared() -> None:
    findings = diagnosis.backends(_config(codec="mxfp4"), 256)
    # TRITON_INTERPRET is set in these tests, so the kernels run here as well.
    assert [finding.verdict for finding in findings] == [Verdict.FINE, Verdict.FINE]
    assert all("bit for bit" in finding.found for finding in findings)


def test_a_static_codec_is_tried_without_its_calibration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnosis, "BACKENDS", ("triton",))
    (finding,) = diagnosis.backends(_config(codec="static4", calibration="not-there"), 256)
    assert finding.verdict is Verdict.FINE and "static4" in finding.found and "bit for bit" in finding.found


def test_a_backend_that_differs_or_is_absent_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    config = _config(codec="mxfp4")
    real = diagnosis.codecs.get

    def spoiled(spec: Any, *, backend: str) -> Any:
        return real("mxfp4" if backend == "reference" else "int8", backend="reference")

    monkeypatch.setattr(diagnosis.codecs, "get", spoiled)
    assert {finding.verdict for finding in diagnosis.backends(config, 64)} == {Verdict.PROBLEM}
    monkeypatch.setattr(diagnosis.codecs, "get", real)
    monkeypatch.setattr(diagnosis, "backend_problem", lambda backend, device: "no compiler")
    assert _by(diagnosis.backends(config, 64), "compiled").verdict is Verdict.NOTE
    asked = load({"megacomp": {"backend": "compiled"}})[0]
    assert _by(diagnosis.backends(asked, 64), "compiled").verdict is Verdict.PROBLEM


def test_messages_are_what_the_policy_decides_and_name_the_rule() -> None:
    config = _config(
        codec="mxfp4",
        min_bytes=0,
        rules=[
            {"layers": "0,-1", "codec": "int8"},
            {"module": "attention", "codec": None, "max_bytes": 200_000},
            {"layers": "2", "module": "mlp", "algorithm": "two_shot", "min_bytes": 500_000},
        ],
    )
    findings, messages = diagnosis.configured(config, _architecture(), 4, torch.bfloat16)
    assert {message.tokens for message in messages} == {1, 128, 512}
    policy = Policy(config)
    for tokens in (1, 128, 512):
        said: dict[str, tuple[bool, str]] = {}
        for message in messages:
            if message.tokens != tokens:
                continue
            for part in message.layers.split(", "):
                first, _, last = part.partition("-")
                for layer in range(int(first), int(last or first) + 1):
                    for module in [message.module] if message.module else ["attention", "mlp"]:
                        said[f"layers.{layer}.{module}"] = (message.compressed, message.decided_by)
        assert len(said) == 12
        for name, (compressed, decided_by) in said.items():
            layer, module = int(name.split(".")[1]), name.split(".")[2]
            site = Site(name, module, layer, 6)  # type: ignore[arg-type]
            outcome = policy.decide(site, "all_reduce", tokens, 512, torch.bfloat16, 4)
            assert compressed is isinstance(outcome, Route)
            size = tokens * 512 * 2
            expected = "communication"
            if layer in (0, 5):
                expected = "rules[0]"
            elif module == "attention" and size <= 200_000:
                expected = "rules[1]"
            elif (layer, module) == (2, "mlp") and size >= 500_000:
                expected = "rules[2]"
            assert decided_by == expected, name
    assert _by(findings, "single tokens").verdict is Verdict.NOTE
    assert "from 1 token at" in _by(findings, "prompts").found


def test_the_shortest_prompt_is_found() -> None:
    findings, _ = diagnosis.configured(_config(min_bytes=100_000), _architecture(), 2, torch.bfloat16)
    # 97 tokens of 1,024 bytes are too few.
    assert "from 98 tokens" in _by(findings, "prompts").found
    assert _by(findings, "single tokens").verdict is Verdict.FINE
    findings, _ = diagnosis.configured(_config(min_bytes=2**21), _architecture(), 2, torch.bfloat16)
    prompts = _by(findings, "prompts")
    assert prompts.verdict is Verdict.NOTE and "2048 tokens" in prompts.found and "1024 at most" in prompts.found


@pytest.mark.parametrize(
    ("communication", "ranks", "why"),
    [
        ({"codec": None}, 2, "leaves it exact"),
        ({}, 1, "one rank"),
        ({"collectives": ["all_gather"]}, 2, "not listed"),
        ({"min_bytes": 2**40}, 2, "smaller than min_bytes"),
        ({"rules": [{"layers": "17", "codec": "int8"}]}, 2, "'17' matches no layer"),
        ({}, 3, "does not divide"),
    ],
)
def test_a_configuration_that_does_nothing_is_a_problem(communication: Any, ranks: int, why: str) -> None:
    findings, _ = diagnosis.configured(_config(**communication), _architecture(), ranks, torch.bfloat16)
    assert findings[0].verdict is Verdict.PROBLEM and why in findings[0].found


def test_a_calibration_must_be_for_as_many_ranks(tmp_path: Path) -> None:
    architecture, codec, file = _architecture(), codecs.get("static4"), tmp_path / "calibration.safetensors"
    assert isinstance(codec, StaticCodec)
    hidden = architecture.hidden_size
    tables = {
        f"layers.{layer}.{module}": SiteTables(*(static_cases.tables(codec.format, hidden, ranks) for ranks in (2, 1)))
        for layer in range(architecture.num_layers)
        for module in ("attention", "mlp")
    }
    calibration.write(Calibration(2, hidden, "0" * 64, {codec.name: dict(codec.spec)}, {codec.name: tables}), file)
    config = _config(codec="static4", calibration=str(file))
    findings, messages = diagnosis.configured(config, architecture, 2, torch.bfloat16)
    assert {finding.verdict for finding in findings} == {Verdict.FINE} and any(one.compressed for one in messages)
    (finding,), _ = diagnosis.configured(config, architecture, 4, torch.bfloat16)
    assert finding.verdict is Verdict.PROBLEM and "tensor-parallel size 2, not 4" in finding.found


@pytest.mark.parametrize(
    "communication",
    [
        {"codec": "static4", "calibration": "missing.safetensors"},
        {"codec": "int8", "min_bytes": "tuned", "tuning": "missing.json"},
    ],
)
@pytest.mark.parametrize("model", [None, _architecture()], ids=["no model", "model"])
def test_files_that_a_configuration_names_must_be_there(communication: Any, model: Architecture | None) -> None:
    (finding,), _ = diagnosis.configured(_config(**communication), model, 2, torch.bfloat16)
    assert finding.verdict is Verdict.PROBLEM and "missing." in finding.found


def test_one_shot_among_many_ranks_is_remarked() -> None:
    findings, messages = diagnosis.configured(_config(algorithm="one_shot"), _architecture(), 8, torch.bfloat16)
    assert _by(findings, "algorithm").verdict is Verdict.NOTE
    (longest,) = (message for message in messages if message.tokens == 512)
    assert longest.sent > longest.ring


def _call(*arguments: Any) -> Any:
    return CliRunner().invoke(cli.app, ["doctor", *(str(argument) for argument in arguments)])


def test_the_command_is_content(folder: Path, tmp_path: Path) -> None:
    section = {"backend": "reference", "communication": {"min_bytes": 8192}}
    document = {"dtype": "fp32", "tensor_parallel": {"tp_size": 2}, "megacomp": section}
    (tmp_path / "ds.json").write_text(json.dumps(document))
    out = tmp_path / "out.json"
    result = _call("--config", tmp_path / "ds.json", "--model", folder, "--json", out, "--details")
    assert result.exit_code == 0, result.output
    assert "Everything looked at would work" in result.output
    assert "megatron.core.tensor_parallel.mappings._reduce" in result.output
    written = json.loads(out.read_text())
    assert written["fine"] is True and written["ranks"] == 2
    assert {finding["verdict"] for finding in written["findings"]} <= {"fine", "note"}
    hidden = Architecture.read(folder).hidden_size
    assert all(message["bytes"] == message["tokens"] * hidden * 4 for message in written["messages"])
    assert any(message["compressed"] for message in written["messages"])


def test_the_command_names_what_would_not_work(tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text('{"megacomp": {"comunication": {}, "backend": "fast"}}')
    result = _call("--config", tmp_path / "ds.json", "--model", tmp_path / "nowhere")
    assert result.exit_code == 1
    output = " ".join(result.output.split())
    assert "comunication" in output and "megacomp.backend" in output and "no model folder" in output
    assert "3 things would not work" in output
