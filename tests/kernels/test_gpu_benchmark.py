"""`python -m benchmarks.gpu` and `megacomp bench kernels`, as far as they go without a GPU: no times are asserted."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import sysconfig
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from benchmarks import gpu, gpu_worker
from megacomp import codecs
from megacomp.kernels import launch_config as launching
from megacomp.launch import cli, kernel_bench
from megacomp.launch.kernel_bench import Case

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
MIB = kernel_bench.MIB


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def kernels_are(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Makes another codec's definition run in place of the kernels."""

    def replace(spec: str | None) -> None:
        def codec(self: Case, backend: str) -> codecs.Codec:
            chosen = self.spec if spec is None or backend != "triton" else spec
            return kernel_bench.codec_of(chosen, "reference")

        monkeypatch.setattr(Case, "codec", codec)

    return replace


def interpreted_worker(tmp_path: Path, job: Any, seconds: float = 600) -> dict[str, Any]:
    previous = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        return gpu.Workers(tmp_path).run(job, seconds)
    finally:
        if previous is None:
            del os.environ["TRITON_INTERPRET"]
        else:
            os.environ["TRITON_INTERPRET"] = previous


def test_without_a_gpu_it_says_so_in_one_line(no_gpu, capsys, tmp_path):
    for arguments in ([], ["--quick"], ["--tune", "--out", str(tmp_path)]):
        assert gpu.main(arguments) == 2
        said = capsys.readouterr()
        assert said.out == "" and said.err.count("\n") == 1 and "no CUDA GPU" in said.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [["--fast"], ["--out"], ["64"]])
def test_wrong_arguments(arguments, capsys):
    with pytest.raises(SystemExit) as raised:
        gpu.main(arguments)
    assert raised.value.code == 2
    assert "usage: python -m benchmarks.gpu" in capsys.readouterr().err


def test_it_runs_from_a_source_tree_where_nothing_is_installed():
    packages = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    program = (
        f"import sys; sys.path[:0] = [{str(ROOT)!r}]; sys.path += {sorted(packages)!r}\n"
        "class Bare:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] in {'pydantic', 'rich', 'typer', 'deepspeed', 'megatron', 'transformers'}:\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Bare())\n"
        "from benchmarks import gpu\n"
        "import megacomp.kernels, megacomp.launch.kernel_bench\n"
        "print(megacomp.kernels.__file__)\n"
    )
    # -S: no .pth files, hence no editable installs.
    done = subprocess.run([sys.executable, "-S", "-c", program], capture_output=True, text=True, cwd="/", timeout=120)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()) == ROOT / "kernels" / "__init__.py"


@pytest.mark.parametrize("quick", [True, False])
def test_every_kernel_is_checked_with_small_and_large_tiles(quick):
    for spec in gpu.CHECKED:
        cases = gpu.plan_checks(spec, quick)
        json.dumps(cases)
        for operation in launching.OPERATIONS:
            assert {case.get("large", False) for case in cases if case["operation"] == operation} == {False, True}
    assert set(gpu.TIMED) <= set(gpu.CHECKED)
    assert {kernel_bench.codec_of(spec).name for spec in gpu.CHECKED} >= set(codecs.presets())


def test_the_checks_pass_in_the_interpreter(tmp_path):
    cases = [
        {"operation": operation, "spec": spec, "peers": peers, "rows": rows, "features": features, "dtype": dtype}
        for spec in gpu.TIMED
        for operation, peers in gpu_worker.operations([2])
        for rows, features, dtype in ((36, 256, "bfloat16"), (5, 100, "float16"))
    ]
    cases.append({**cases[0], "large": True})
    found = interpreted_worker(tmp_path, {"kind": "check", "device": "cpu", "seed": 7, "cases": cases})
    assert found["error"] is None
    assert [check["error"] or check["wrong"] for check in found["checks"]] == [0] * len(cases)
    assert all(check["passed"] for check in found["checks"])
    assert found["checks"][-1]["launch"]["blocks"] > found["checks"][1]["launch"]["blocks"]


@pytest.mark.parametrize("operation", launching.OPERATIONS)
def test_a_wrong_kernel_fails_its_check(kernels_are, operation):
    case = Case(operation, "mxfp4", 1 if operation == "encode" else 2, 40, 512)
    kernels_are("mxfp4")
    right = kernel_bench.check(case, CPU, 1)
    assert right["passed"] and right["wrong"] == 0
    kernels_are('{"format": "mx", "element": "fp4_e1m2", "block_size": 32}')
    wrong = kernel_bench.check(case, CPU, 1)
    assert not wrong["passed"] and wrong["wrong"] > 0 and wrong["error"] is None
    kernels_are("int8")
    raised = kernel_bench.check(case, CPU, 1)
    assert not raised["passed"] and raised["error"].startswith("ValueError: ")


def test_a_large_message_of_a_static_codec_has_programs_of_two_rows(monkeypatch):
    """On whatever GPU is current, which is what "cuda" without an index means."""
    encoding = importlib.import_module("megacomp.kernels.static_encode")
    for module in (launching, encoding):
        monkeypatch.setattr(module, "current_gpu", lambda: 0)
        monkeypatch.setattr(module, "gpu_processors", lambda gpu: 1 if gpu is None else 132)
    seen: list[Case] = []

    def compare(case: Case, device: torch.device, generator: torch.Generator) -> tuple[int, None]:
        seen.append(case)
        return 0, None

    monkeypatch.setattr(kernel_bench, "_compare", compare)
    small = Case("encode", "static4", 1, 67, 4096)
    for large in (False, True):
        assert kernel_bench.check(small, torch.device("cuda"), 1, large)["passed"]
    assert [encoding.rows_per_program(case.rows) for case in seen] == [1, 2]


def test_nans_are_one_and_signs_of_zero_are_two():
    a = torch.tensor([0.0, float("nan"), 1.0])
    b = torch.tensor([-0.0, -float("nan"), 1.0])
    assert kernel_bench.differing(a, b) == 1
    assert kernel_bench.differing(a, a) == 0
    assert kernel_bench.differing(a, torch.tensor([0.0, 1.0, float("nan")])) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_data_of_the_checks_are_hard(dtype):
    x = kernel_bench.check_values(67, 256, dtype, torch.Generator().manual_seed(0))
    hard = x[~kernel_bench.ordinary(x)]
    assert x[kernel_bench.ordinary(x)].isfinite().all()
    assert hard.isnan().any() and hard.isinf().any() == (dtype is not torch.float16)
    assert ((hard == 0) & hard.signbit()).any()
    subnormal = (hard != 0) & (hard.abs() < torch.finfo(dtype).smallest_normal)
    assert subnormal.any() and (hard == torch.finfo(dtype).max).any()


def test_jobs_that_break_off_are_failed_checks(tmp_path):
    cases = gpu.plan_checks("mxfp4", True)
    crashed = interpreted_worker(tmp_path, {"kind": "none"})
    assert crashed["error"].startswith("exit code 1: KeyError")
    hung = interpreted_worker(tmp_path, {"kind": "check", "device": "cpu", "seed": 0, "cases": cases}, 0.1)
    assert "no end after" in hung["error"]
    for found in (crashed, hung):
        checks = gpu.complete(cases, found)
        assert len(checks) == len(cases) and not any(check["passed"] for check in checks)
        assert len(gpu.failures({"checks": checks, "cases": [], "small": [], "errors": []})) == len(cases)


def timed(operation: str, mebibytes: float, codec: str = "mxfp4", peers: int = 1, **changes: Any) -> dict[str, Any]:
    """A case as of `time_case`."""
    return {
        "operation": operation,
        "codec": codec,
        "peers": peers,
        "message_bytes": int(mebibytes * MIB),
        "contenders": {},
        "median_us": 100.0,
        "gb_per_s": 1000.0,
        "copy_gb_per_s": 1100.0,
        "percent_of_copy": 90.0,
        "times_compiled": None,
        "wrong": 0,
        "error": None,
        **changes,
    }


def verdicts(cases: Sequence[Mapping[str, Any]], small: Sequence[Mapping[str, Any]] = ()) -> list[bool | None]:
    return [aim["met"] for aim in gpu.aims(cases, small)]


def test_aims():
    every = [timed("encode", 64), timed("decode_sum", 256), timed("decode_sum_encode", 1024)]
    assert verdicts([]) == [None] * 5
    assert verdicts(every) == [True, True, True, None, None]
    slow = timed("encode", 64, "int8", percent_of_copy=84.9)
    assert verdicts([*every, slow])[0] is False
    assert gpu.aims([*every, slow], [])[0]["where"] == "encode, int8, 64 MiB"
    assert verdicts([timed("decode_sum_encode", 64, percent_of_copy=80.0)])[2] is True
    # Smaller messages have no aim, and what could not be measured leaves one open.
    assert verdicts([*every, timed("encode", 16, percent_of_copy=1.0)])[0] is True
    unknown = timed("encode", 1024, percent_of_copy=None, error="OutOfMemoryError: 3 GiB")
    assert verdicts([*every, unknown])[0] is None
    assert verdicts([*every, unknown, slow])[0] is False


def test_aims_against_the_compiler_and_for_small_messages():
    compiled = {"compiled": {"median_us": 1.0}, "kernel": {}}
    rotated = timed("encode", 64, "int4+rotation128", contenders=compiled, times_compiled=2.0)
    assert verdicts([rotated])[3] is True
    assert verdicts([rotated, {**rotated, "times_compiled": 1.9}])[3] is False
    assert verdicts([rotated, {**rotated, "times_compiled": None}])[3] is None
    assert verdicts([{**rotated, "codec": "mxfp4", "times_compiled": 1.0}])[3] is None
    fast, slow = ({"codec": "int8", "message": {"median_us": us}} for us in (9.9, 10.0))
    assert verdicts([], [fast])[4] is True
    assert verdicts([], [fast, slow])[4] is False
    assert verdicts([], [fast, {"codec": "int8", "message": {"error": "RuntimeError: no"}}])[4] is None


def test_figures():
    times = {"kernel": {"median_us": 20.0}, "copy_torch": {"median_us": 18.0}, "copy_triton": {"median_us": 16.0}}
    found = kernel_bench.figures(40_000_000, {**times, "compiled": {"error": "E: no"}})
    assert (found["gb_per_s"], found["copy_gb_per_s"], found["percent_of_copy"]) == (2000.0, 2500.0, 80.0)
    assert found["times_compiled"] is None and found["error"] is None
    assert kernel_bench.figures(1, {**times, "compiled": {"median_us": 50.0}})["times_compiled"] == 2.5
    failed = kernel_bench.figures(1, {"kernel": {"error": "E: no"}, "copy_torch": {"error": "E: no"}})
    assert failed["error"] == "E: no" and failed["percent_of_copy"] is None


def test_bytes_are_the_fewest():
    row_bytes = codecs.get("int8").row_bytes(4096)
    assert Case("encode", "int8", 1, 10, 4096).moved_bytes == 10 * (8192 + row_bytes)
    assert Case("decode_sum", "int8", 4, 10, 4096).moved_bytes == 10 * (4 * row_bytes + 8192)
    assert Case("decode_sum_encode", "int8", 4, 10, 4096).moved_bytes == 10 * 5 * row_bytes


def host_times(contenders: Mapping[str, Sequence[Callable[[], object]]], repeats: int) -> dict[str, dict[str, Any]]:
    """Stands in for `graph_times`: every contender runs, and takes as long as its place in the list."""
    times: dict[str, dict[str, Any]] = {}
    for place, (name, calls) in enumerate(contenders.items(), 1):
        try:
            for call in calls:
                call()
            times[name] = {"median_us": float(place), "min_us": 0.0, "max_us": 9.0, "eager_us": 1.0}
        except Exception as error:
            times[name] = {"error": kernel_bench.describe_error(error)}
    return times


@pytest.fixture
def pretend_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What is measured runs on the CPU, and nothing is measured."""
    properties = types.SimpleNamespace(multi_processor_count=4)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(kernel_bench, "graph_times", host_times)
    monkeypatch.setattr(kernel_bench, "context_is_lost", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Test GPU")
    launching.forget()


@pytest.mark.parametrize("operation", launching.OPERATIONS)
def test_a_case_is_timed_and_what_it_wrote_is_checked(pretend_gpu, kernels_are, monkeypatch, operation):
    case = Case(operation, '{"preset": "int4", "rotation": 128}', 3, 24, 512)
    kernels_are(None)
    found = kernel_bench.time_case(case, CPU, 1)
    json.dumps(found)
    assert found["error"] is None and found["wrong"] == 0 and found["percent_of_copy"] == 200.0
    assert {"blocks", "piece", "num_warps"} <= set(found["launch"])
    kernels_are('{"preset": "int4", "rotation": 64}')
    assert kernel_bench.time_case(case, CPU, 1)["wrong"] > 0

    def fail(*arguments: Any, **options: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "randn", fail)
    failed = kernel_bench.time_case(case, CPU, 1)
    assert failed["error"].startswith("OutOfMemoryError: ") and failed["median_us"] is None
    assert gpu.failures({"checks": [], "cases": [failed], "small": [], "errors": []}) == []
    # What a GEMM was to be compared with may need memory that is not there.
    gemm = {"model": "M", "ranks": 2, "linear": "up", "rows": 1, "error": f"bf16: {failed['error']}"}
    result = {"checks": [], "gemms": [gemm], "products": [], "mlps": [], "errors": []}
    assert gpu.failures({"checks": [], "cases": [], "small": [], "errors": [], "gemm": result}) == []
    gemm["error"] = "bf16: RuntimeError: no"
    assert len(gpu.failures({"checks": [], "cases": [], "small": [], "errors": [], "gemm": result})) == 1


def test_tuning_checks_every_candidate_and_keeps_the_fastest(pretend_gpu, kernels_are, monkeypatch):
    kernels_are(None)
    format = codecs.get("mxfp4").format
    tried = launching.candidates("decode_sum", format, format.layout(512), torch.bfloat16)
    real = kernel_bench.check

    def check(case: Case, device: torch.device, seed: int) -> dict[str, Any]:
        failing = kernel_bench.describe_launch(case) == kernel_bench._flat(tried[0])
        return {**real(case, device, seed), **({"passed": False, "wrong": 3} if failing else {})}

    monkeypatch.setattr(kernel_bench, "check", check)
    cases = [Case("decode_sum", "mxfp4", 2, rows, 512) for rows in (32, 64)]
    results = list(kernel_bench.tune(cases, CPU, 1))
    for (found, report), case in zip(results, cases, strict=True):
        json.dumps(report)
        assert found is not None and found.config == tried[1] and report["best"] == kernel_bench._flat(tried[1])
        assert report["tried"][0]["error"].startswith("3 wrong")
        assert len(report["tried"]) >= len(tried)
        assert found.log2_values == (case.rows * case.features).bit_length() - 1
    launching.record("Test GPU", [found for found, _ in results if found is not None])
    args = ("decode_sum", format, format.layout(512), 14, torch.bfloat16)
    assert launching.measured("Test GPU", *args) == tried[1]
    launching.forget()


def run_with(monkeypatch: pytest.MonkeyPatch, folder: Path, results: Callable[[dict[str, Any]], dict[str, Any]]) -> int:
    monkeypatch.setattr(gpu, "gpu_problem", lambda: None)
    monkeypatch.setattr(gpu, "describe_gpu", lambda: {"cuda": "13.0"})
    monkeypatch.setattr(gpu.environment, "describe", lambda device: {"device": "Test GPU"})
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA Test 9000")
    monkeypatch.setattr(gpu.Workers, "run", lambda self, job, seconds: results(job))
    return gpu.main(["--out", str(folder), *(["--quick"] if folder.name == "quick" else [])])


def job_results(job: dict[str, Any]) -> dict[str, Any]:
    json.dumps(job)
    if job["kind"] == "transport":
        return {"transport": {"passed": True}, "error": None}
    if job["kind"] == "time":
        cases = [
            timed(operation, size, kernel_bench.codec_of(spec).name, peers)
            for size in job["mebibytes"]
            for spec in job["specs"]
            for operation, peers in gpu_worker.operations(job["peers"])
        ]
        small = [{"codec": spec, "message": {"median_us": 5.0}} for spec in job["specs"]]
        return {"cases": cases, "small": small, "tuning": [], "skipped": [], "clocks": {"sm": "1"}, "error": None}
    passed = {"passed": True, "wrong": 0, "float64_error": None, "error": None, "codec": "mxfp4"}
    cases = job.get("cases", [{"operation": "encode", "peers": 1}])
    return {"checks": [{**case, **passed} for case in cases], "error": None}


@pytest.mark.parametrize("name", ["quick", "full"])
def test_a_run_writes_what_it_found(monkeypatch, tmp_path, capsys, name):
    assert run_with(monkeypatch, tmp_path / name, job_results) == 0
    written = json.loads((tmp_path / name / "nvidia-test-9000" / "kernels.json").read_text())
    assert all(check["passed"] for check in written["checks"])
    assert [aim["met"] for aim in written["aims"]] == [True, True, True, None, True]
    assert written["environment"] == {"device": "Test GPU", "cuda": "13.0"}
    plan = gpu.QUICK if name == "quick" else gpu.FULL
    assert len(written["cases"]) == len(plan.mebibytes) * len(gpu.TIMED) * (1 + 2 * len(plan.peers))
    assert ("transport" in written) == (name == "full")
    said = capsys.readouterr().out
    assert "0 failures" in said and "met" in said and "int4+rotation128" in said


@pytest.mark.parametrize(
    ("kind", "change", "line"),
    [
        ("check", {"checks": [], "error": "exit code 1: AcceleratorError: illegal access"}, "illegal access"),
        ("large", {"checks": [], "error": "no end after 180 s"}, "messages beyond 2**31"),
        ("transport", {"transport": {"passed": False}}, "transport: see its checks"),
        ("transport", {"transport": {}, "error": "exit code 1: X"}, "transport: exit code 1: X"),
        ("time", {"cases": [timed("encode", 64, wrong=3)]}, "encode, mxfp4, 64 MiB: 3 values differ"),
        ("time", {"cases": [timed("encode", 64, error="RuntimeError: no")]}, "encode, mxfp4, 64 MiB: RuntimeError: no"),
        ("time", {"small": [{"codec": "int8", "error": "RuntimeError: no"}]}, "4 KiB message, int8: RuntimeError: no"),
        (
            "time",
            {"small": [{"codec": "int8", "encode": {"median_us": 5.0}, "decode_sum": {"error": "RuntimeError: no"}}]},
            "4 KiB message, int8, decode_sum: RuntimeError: no",
        ),
        ("time", {"cases": [], "error": "exit code -11: "}, "timing: exit code -11"),
    ],
)
def test_a_failed_check_fails_the_run_and_the_rest_goes_on(monkeypatch, tmp_path, capsys, kind, change, line):
    def results(job: dict[str, Any]) -> dict[str, Any]:
        return {**job_results(job), **(change if job["kind"] == kind else {})}

    assert run_with(monkeypatch, tmp_path / "full", results) == 1
    said = capsys.readouterr().out
    assert f"FAILED {line}" in said or (line in said and "FAILED" in said)
    written = json.loads((tmp_path / "full" / "nvidia-test-9000" / "kernels.json").read_text())
    assert written["checks"] and written["aims"] and ("cases" in written)


def test_tables_without_rich(monkeypatch, capsys):
    monkeypatch.setattr(gpu, "find_spec", lambda name: None)
    gpu.table(("kernel", "us"), [["encode", "1.5"], ["decode_sum", "12"]])
    gpu.table(("kernel", "us"), [])
    assert capsys.readouterr().out.splitlines()[:3] == ["kernel      us", "encode      1.5", "decode_sum  12"]


def bench(*arguments: Any) -> Any:
    return CliRunner().invoke(cli.app, ["bench", "kernels", *map(str, arguments)])


def test_bench_kernels_on_a_cpu(no_gpu, monkeypatch, tmp_path):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    out = tmp_path / "kernels.json"
    result = bench("--codec", "mxfp4", "--mib", 1, "--hidden", 512, "--peers", 2, "--repeats", 1, "--out", out)
    assert result.exit_code == 0, result.output
    assert "decode_sum_encode of 2" in result.output
    written = json.loads(out.read_text())
    assert [case["operation"] for case in written["cases"]] == list(launching.OPERATIONS)
    assert all(case["message_bytes"] == MIB and case["median_us"] > 0 for case in written["cases"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tune"], "--tune measures launch configurations on a CUDA GPU, and there is none here"),
        (["--codec", "mxfp5"], "unknown preset 'mxfp5'"),
        (["--codec", "{"], "error: "),
        (["--out", "/no/such/folder/file.json"], "there is no folder"),
    ],
)
def test_bench_kernels_refuses(no_gpu, arguments, message):
    result = bench(*arguments)
    assert result.exit_code == 2 and message in result.output


class PretendCuda:
    """Events that count seconds by calls, and graphs that replay what was called while they were captured."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.clock = 0
        self.log: list[str] = []
        pretend = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = pretend.clock

            def elapsed_time(self, other: Event) -> float:
                return float(other.at - self.at)

        class CUDAGraph:
            def replay(self) -> None:
                for name in self.calls:
                    pretend.run(name)

        class Capture:
            def __init__(self, graph: CUDAGraph) -> None:
                self.graph = graph

            def __enter__(self) -> None:
                self.start = len(pretend.log)

            def __exit__(self, *error: object) -> None:
                self.graph.calls = pretend.log[self.start :]

        for name, stand_in in (("Event", Event), ("CUDAGraph", CUDAGraph), ("graph", Capture)):
            monkeypatch.setattr(torch.cuda, name, stand_in)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)

    def run(self, name: str) -> None:
        self.log.append(name)
        self.clock += {"a": 1, "b": 5}[name[0]]


def test_contenders_alternate_graph_by_graph_over_all_sets(monkeypatch):
    cuda = PretendCuda(monkeypatch)
    names = {"slow": [f"b{index}" for index in range(3)], "fast": [f"a{index}" for index in range(12)]}
    calls = {kind: [lambda name=name: cuda.run(name) for name in sets] for kind, sets in names.items()}

    def fail() -> None:
        raise RuntimeError("no\nkernel  here")

    found = kernel_bench.graph_times({**calls, "broken": [fail]}, 4)
    # A graph has at least eight calls and every set; the pretended milliseconds come out as microseconds per call.
    assert found["slow"] == {"eager_us": 5e3, "median_us": 5e3, "min_us": 5e3, "max_us": 5e3}
    assert found["fast"] == {"eager_us": 1e3, "median_us": 1e3, "min_us": 1e3, "max_us": 1e3}
    assert found["broken"] == {"error": "RuntimeError: no kernel here"}
    once = [*(names["slow"] * 3)[:8], *names["fast"]]
    assert cuda.log[-4 * len(once) :] == once * 4


def test_a_small_message_is_an_encode_and_a_decode(monkeypatch, kernels_are):
    kernels_are(None)
    seen: dict[str, int] = {}

    def times(contenders: Mapping[str, Sequence[Callable[[], object]]], repeats: int) -> dict[str, dict[str, Any]]:
        seen.update({name: len(calls) for name, calls in contenders.items()})
        return host_times(contenders, repeats)

    monkeypatch.setattr(kernel_bench, "graph_times", times)
    found = kernel_bench.time_small_message("int8", CPU, 3)
    assert found["message_bytes"] == 4096 and found["codec"] == "int8"
    assert seen == {"encode": 64, "decode_sum": 64, "message": 64}
    assert all("error" not in found[step] for step in seen)


def test_tuning_without_a_place_for_what_it_finds_is_refused_first(monkeypatch, no_home, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    result = bench("--tune")
    assert result.exit_code == 2 and "no home folder" in " ".join(result.output.split())
    monkeypatch.setattr(gpu, "gpu_problem", lambda: None)
    assert gpu.main(["--tune", "--out", str(tmp_path)]) == 2
    assert "no home folder" in capsys.readouterr().err and not list(tmp_path.iterdir())
