"""The int4 GEMM's part of `python -m benchmarks.gpu`, as far as it goes without a GPU: no times are asserted."""

from __future__ import annotations

import json
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import triton

from benchmarks import gpu, gpu_gemm, gpu_worker
from megacomp.kernels.grouped_weight import dequantize
from megacomp.launch import kernel_bench

pytestmark = [
    pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="needs TRITON_INTERPRET=1"),
    # The interpreter computes with numpy, which warns of divisions by zero whose results are not used.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

CPU = torch.device("cpu")
SMALL = {"in_features": 256, "out_features": 64}
MLP = {"Llama-70B": gpu_gemm.Mlp(256, 1024, gated=True), "Granite-20B": gpu_gemm.Mlp(256, 512, gated=False)}


def one(**changes: Any) -> dict[str, Any]:
    (case,) = [case for case in gpu_gemm.check_grid(False) if case["spec"] == "4 bits, sorted, 16 rows, bfloat16"]
    return {**case, **SMALL, **changes}


def test_the_grids_cover_what_they_are_for() -> None:
    full, quick = gpu_gemm.check_grid(False), gpu_gemm.check_grid(True)
    # 4 bits: the product, and two codecs of it.
    assert len({case["spec"] for case in full}) == len(full) == (3 + 1) * 2 * 3 * 4
    assert {case["encoded"] for case in full} == {None, "mxfp4", "int8"}
    assert {case["rows"] for case in full} == {1, 16, 64, 200}
    assert all(case in full for case in quick)
    times = gpu_gemm.time_grid(False)
    json.dumps([full, times])
    assert {(model, ranks) for model, ranks, _ in times} == {(m, n) for m in gpu_gemm.MLPS for n in (1, 2, 4, 8)}
    assert all(rows == (1, 2, 4, 8, 16, 4096) for _, _, rows in times)
    assert gpu_gemm.MLPS["Llama-70B"].linears(8) == {"up": (8192, 7168), "down": (3584, 8192)}
    assert gpu_gemm.MLPS["Granite-20B"].linears(2) == {"up": (6144, 12288), "down": (12288, 6144)}
    shapes = [shape for model, ranks, _ in times for shape in gpu_gemm.MLPS[model].linears(ranks).values()]
    assert all(in_features % gpu_gemm.GROUP_SIZE == 0 for in_features, _ in shapes)


@pytest.mark.parametrize("bits", [4, 8])
def test_unequal_groups_are_parts_of_every_group_in_whole_words(bits: int) -> None:
    weight = gpu_gemm.random_weight(512, 32, "unequal", torch.Generator().manual_seed(1), bits, ranks=4)
    assert weight.word_groups is not None and weight.input_index is not None
    assert len(weight.scales) == 16 and weight.word_groups.diff().min() >= 0
    assert len(weight.input_index) == weight.rows > 512
    assert set(weight.input_index.tolist()) == set(range(512))
    groups = weight.word_groups.repeat_interleave(32 // bits)
    # A feature that is met again fills up a word of its own group.
    assert all(len(groups[weight.input_index == feature].unique()) == 1 for feature in range(512))
    assert dequantize(weight).shape == (weight.rows, 32)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("order", ["sorted", "gathered", "unequal"])
def test_the_checks_pass_in_the_interpreter(order: str, bits: int, dtype: str) -> None:
    for seed, rows in enumerate((1, 20)):
        found = gpu_gemm.check(one(order=order, bits=bits, dtype=dtype, rows=rows), CPU, seed)
        json.dumps(found, allow_nan=False)
        assert found["error"] is None and found["passed"], found
        assert found["sqnr_db"] > gpu_gemm.FLOORS_DB[dtype] and found["launch"]["backend"] == "triton"


@pytest.mark.parametrize("order", ["sorted", "gathered", "unequal"])
@pytest.mark.parametrize("encoded", gpu_gemm.ENCODED)
def test_the_checks_of_encoded_products_pass_in_the_interpreter(order: str, encoded: str) -> None:
    for seed, rows in enumerate((1, 20)):
        found = gpu_gemm.check(one(order=order, rows=rows, encoded=encoded), CPU, seed)
        json.dumps(found, allow_nan=False)
        assert found["passed"] and found["error"] is found["sqnr_db"] is None


def test_checks_of_encoded_products_fail_for_other_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    real = gpu_gemm.dequant_gemm_encode

    def other(format: Any, x: Any, weight: Any, wire: torch.Tensor, *backends: str) -> None:
        real(format, x, weight, wire, *backends)
        wire[0, :3] ^= 1

    monkeypatch.setattr(gpu_gemm, "dequant_gemm_encode", other)
    found = gpu_gemm.check(one(encoded="int8"), CPU, 1)
    assert not found["passed"] and found["error"] == "3 bytes are not those of two steps"


def test_pytorchs_int4_gemm_is_timed_only_where_it_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = gpu_gemm.torch_int4_problem(CPU)
    assert problem is not None and "int4pack" in problem
    # Its layout for GPUs, as PyTorch documents it: two codes to a byte, the first one high.
    monkeypatch.setattr(
        torch.ops.aten, "_convert_weight_to_int4pack", lambda codes, tiles: codes.repeat_interleave(2, 1), raising=False
    )

    def multiply(x: torch.Tensor, bytes_: torch.Tensor, group_size: int, scales: torch.Tensor) -> torch.Tensor:
        codes = torch.where(torch.arange(bytes_.shape[1]) % 2 == 0, bytes_ >> 4, bytes_ & 15).float()
        scale, offset = scales.float().repeat_interleave(group_size, 0).unbind(-1)
        return (x.float() @ ((codes.t() - 8) * scale + offset)).bfloat16()

    monkeypatch.setattr(torch.ops.aten, "_weight_int4pack_mm", multiply, raising=False)
    assert gpu_gemm.torch_int4_problem(CPU) is None
    monkeypatch.setattr(torch.ops.aten, "_weight_int4pack_mm", lambda *given: 2 * multiply(*given))
    assert str(gpu_gemm.torch_int4_problem(CPU)).startswith("SQNR ")


def test_checks_fail_for_wrong_weights_for_changing_bits_and_for_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    real = gpu_gemm.dequant_gemm
    calls = []

    def changing(*arguments: Any) -> torch.Tensor:
        calls.append(1)
        y = real(*arguments)
        y[0, 0] *= 1 + 2.0**-7 * len(calls)
        return y

    def failing(*arguments: Any) -> torch.Tensor:
        raise RuntimeError("no\nkernel")

    for stand_in, error in (
        (lambda *arguments: real(*arguments) * 1.1, "SQNR "),
        (lambda *arguments: real(*arguments) * torch.nan, "SQNR nan dB, not above 48"),
        (changing, "two calls give different bits"),
        (failing, "RuntimeError: no kernel"),
    ):
        monkeypatch.setattr(gpu_gemm, "dequant_gemm", stand_in)
        found = gpu_gemm.check(one(out_features=512), CPU, 1)
        json.dumps(found, allow_nan=False)
        assert not found["passed"] and found["error"].startswith(error), found


def host_times(contenders: Mapping[str, Sequence[Callable[[], object]]], repeats: int) -> dict[str, dict[str, Any]]:
    """Stands in for `graph_times`: every contender runs, and takes as long as its place in the list."""
    assert all(call() is not None for calls in contenders.values() for call in calls)
    return {name: {"median_us": float(place)} for place, name in enumerate(contenders, 1)}


def always(what: str) -> bool:
    """There is time for everything."""
    return True


@pytest.mark.parametrize("model", list(MLP))
def test_an_mlp_is_timed(monkeypatch: pytest.MonkeyPatch, model: str) -> None:
    monkeypatch.setattr(kernel_bench, "graph_times", host_times)
    monkeypatch.setattr(kernel_bench, "context_is_lost", lambda: False)
    monkeypatch.setattr(gpu_gemm, "ENCODED_ROWS", (1, 17))
    found = list(gpu_gemm.time_mlp(model, 2, (1, 17), CPU, 3, always, MLP))
    json.dumps(found, allow_nan=False)
    assert [kind for kind, _ in found] == ["gemms"] * 4 + ["products"] * 4 + ["mlps"] * 2
    for kind, case in found:
        assert case["error"] is None
        assert case.get("times_bf16") == {"gemms": 2.0, "products": None, "mlps": 3.0}[kind]
        assert case.get("times_two_steps") == (2.0 if kind == "products" else None)
    assert all("int4pack" in case["torch_int4_problem"] for kind, case in found if kind == "gemms")
    assert {case["linear"] for kind, case in found if kind == "products"} == {"down"}
    assert {case["linear"] for kind, case in found if kind == "gemms"} == {"up", "down"}
    assert all(case["sqnr_db"] > gpu_gemm.TIMED_FLOOR_DB for kind, case in found if kind == "gemms")
    whole = found[-1][1]
    assert list(whole["contenders"]) == ["tp_aware", "replicated", "bf16"] and "no communication" in whole["note"]
    assert whole["all_gather_modelled_us"] == pytest.approx(0.5 * 17 * MLP[model].inner * 2 / 450e3)


def test_a_gemm_that_fails_is_recorded_and_the_next_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def times(contenders: Mapping[str, Any], repeats: int) -> dict[str, dict[str, Any]]:
        return {name: {"error": "E: no"} if name == "int4" else {"median_us": 1.0} for name in contenders}

    monkeypatch.setattr(kernel_bench, "graph_times", times)
    monkeypatch.setattr(kernel_bench, "context_is_lost", lambda: False)
    timed = gpu_gemm.time_mlp("Granite-20B", 2, (1,), CPU, 3, always, MLP)
    found = [case for kind, case in timed if kind == "gemms"]
    assert [(case["error"], case["times_bf16"]) for case in found] == [("int4: E: no", None)] * 2


def test_time_is_looked_at_before_every_gemm(monkeypatch: pytest.MonkeyPatch) -> None:
    """What there is no time for is listed, and no weights are made for it."""
    monkeypatch.setattr(gpu_gemm, "_timed", lambda case, *others, **options: {**case, "contenders": None})
    monkeypatch.setattr(kernel_bench, "context_is_lost", lambda: False)
    seconds = 0.0
    monkeypatch.setattr(gpu_worker, "time", types.SimpleNamespace(monotonic=lambda: seconds))
    weights: list[tuple[int, ...]] = []
    real = gpu_gemm.random_weight

    def random_weight(*shape: Any, **options: Any) -> Any:
        weights.append(shape[:2])
        return real(*shape, **options)

    monkeypatch.setattr(gpu_gemm, "random_weight", random_weight)
    result: dict[str, Any] = {"skipped": []}
    found = []
    go = gpu_worker.goes_on(3, result, lambda result: None)
    for kind, case in gpu_gemm.time_mlp("Granite-20B", 2, (1, 17), CPU, 3, go, MLP):
        found.append((kind, case["linear"], case["rows"]))
        seconds += 1
    assert found == [("gemms", "up", 1), ("gemms", "up", 17), ("gemms", "down", 1)]
    assert result["skipped"] == [
        "Granite-20B, TP 2, down, 17 rows",
        *(f"Granite-20B, TP 2, down, {n} rows, {codec}" for n in gpu_gemm.ENCODED_ROWS for codec in gpu_gemm.ENCODED),
        "Granite-20B, TP 2, MLP",
    ]
    made = [shape for shape in weights if shape != (256, 64)]  # those that PyTorch's own GEMM is tried with
    assert made == [(256, 256), (256, 256)]


def gemm(rows: int, times_bf16: float | None, model: str = "Llama-70B", ranks: int = 8) -> dict[str, Any]:
    case = {"model": model, "ranks": ranks, "linear": "up", "rows": rows, "error": None, "contenders": None}
    return {**case, "times_bf16": times_bf16}


def verdicts(*gemms: dict[str, Any]) -> list[bool | None]:
    return [aim["met"] for aim in gpu.gemm_aims(gemms, [])[:2]]


def product(rows: int, times: float | None) -> dict[str, Any]:
    case = {"model": "Llama-70B", "ranks": 8, "linear": "down", "rows": rows, "encoded": "mxfp4", "error": None}
    return {**case, "contenders": None, "times_two_steps": times}


def test_the_aim_of_encoded_products() -> None:
    for times, met in (([], None), ([1.3, 1.0], True), ([1.3, 0.9], False), ([1.3, None], None)):
        assert gpu.gemm_aims([], [product(16, figure) for figure in times])[2]["met"] is met
    assert gpu.gemm_aims([], [product(16, 0.9)])[2]["where"] == "Llama-70B, TP 8, down, 16 rows, mxfp4"


def test_aims() -> None:
    assert verdicts() == [None, None]
    good = [gemm(1, 3.5), gemm(16, 3.0), gemm(4096, 0.92)]
    assert verdicts(*good) == [True, True]
    assert verdicts(*good, gemm(16, 2.9), gemm(4096, 0.9, "Granite-20B", 1)) == [False, False]
    # Neither another model nor an undivided one has the first aim; what was not measured leaves one open.
    assert verdicts(*good, gemm(1, 1.0, "Granite-20B"), gemm(1, 1.0, ranks=1)) == [True, True]
    assert verdicts(*good, gemm(2, None), gemm(4096, None)) == [None, None]
    assert gpu.gemm_aims([gemm(16, 2.9)], [])[0]["where"] == "Llama-70B, TP 8, up, 16 rows"


class PretendWorkers(gpu.Workers):
    """Answers jobs at once."""

    def __init__(self, folder: Path, **changes: dict[str, Any]) -> None:
        super().__init__(folder)
        self.changes = changes

    def run(self, job: dict[str, Any], seconds: float) -> dict[str, Any]:
        json.dumps(job)
        if job["kind"] == "gemm_check":
            checks = [{**case, "codec": case["spec"], "passed": True, "error": None} for case in job["cases"]]
            return {"checks": checks, "error": None, **self.changes.get("check", {})}
        cases = [gemm(rows, 3.5, model, ranks) for model, ranks, many in job["grid"] for rows in many]
        found = {"gemms": cases, "products": [product(1, 1.5)], "mlps": [], "skipped": [], "error": None}
        return {**found, **self.changes.get("time", {})}


@pytest.mark.parametrize("quick", [True, False])
def test_a_run(tmp_path: Path, quick: bool) -> None:
    plan = gpu.QUICK if quick else gpu.FULL
    found = gpu.run_gemm(PretendWorkers(tmp_path), plan, quick)
    json.dumps(found)
    assert [check["spec"] for check in found["checks"]] == [case["spec"] for case in gpu_gemm.check_grid(quick)]
    assert [aim["met"] for aim in found["aims"]] == [True, True, True]
    nothing: dict[str, Any] = {"checks": [], "cases": [], "small": [], "errors": []}
    assert gpu.failures({**nothing, "gemm": found}) == []
    broken = PretendWorkers(
        tmp_path,
        check={"checks": [], "error": "exit code 1: X"},
        time={"gemms": [{**gemm(1, None), "error": "RuntimeError: no"}], "error": "no end after 9 s"},
    )
    lines = gpu.failures({**nothing, "gemm": gpu.run_gemm(broken, plan, quick)})
    assert len(lines) == len(found["checks"]) + 2
    assert lines[0].startswith("dequant_gemm, 4 bits, sorted, 1 rows") and lines[0].endswith("exit code 1: X")
    assert lines[-2:] == [
        "dequant_gemm, Llama-70B, TP 8, up, 1 rows: RuntimeError: no",
        "timing: no end after 9 s",
    ]


def test_the_worker_runs_checks_in_a_process_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    job = {"kind": "gemm_check", "device": "cpu", "seed": 3, "cases": [one(), one(bits=3)]}
    found = gpu.Workers(tmp_path).run(job, 120)
    assert found["error"] is None
    assert [check["passed"] for check in found["checks"]] == [True, False]


def test_the_worker_times_model_by_model_and_goes_on_after_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def time_mlp(
        model: str, ranks: int, rows: Any, device: Any, repeats: int, go: Callable[[str], bool]
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        if not go(f"MLP of {model}, TP {ranks}"):
            return
        yield "gemms", gemm(1, 3.0, model, ranks)
        if ranks == 8:
            raise torch.OutOfMemoryError("3 GiB")
        yield "mlps", {"model": model, "error": None}

    monkeypatch.setattr(gpu_gemm, "time_mlp", time_mlp)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(kernel_bench, "warm_up", lambda device: None)
    monkeypatch.setattr(kernel_bench, "context_is_lost", lambda: False)
    written: list[dict[str, Any]] = []
    job = {"grid": [("Llama-70B", 8, (1,)), ("Llama-70B", 4, (1,))], "repeats": 3, "seconds": 60}
    gpu_worker.measure_gemm(job, written.append)
    found = written[-1]
    assert [case["error"] for case in found["gemms"]] == [None, "OutOfMemoryError: 3 GiB", None]
    assert len(found["mlps"]) == 1 and found["skipped"] == []
    # Out of memory is no failed check, yet leaves the aim open.
    result = {"checks": [], "cases": [], "small": [], "errors": [], "gemm": {**found, "checks": [], "errors": []}}
    assert gpu.failures(result) == [] and gpu.gemm_aims(found["gemms"], [])[0]["met"] is None
    gpu_worker.measure_gemm({**job, "seconds": 0}, written.append)
    assert written[-1]["skipped"] == ["MLP of Llama-70B, TP 8", "MLP of Llama-70B, TP 4"]
