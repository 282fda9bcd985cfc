"""One part of `python -m benchmarks.gpu`, in a process of its own, so that a kernel that breaks its GPU breaks no more.

python -m benchmarks.gpu_worker JOB.json RESULT.json

The result is written anew after every case, so that what was found before a crash is not lost.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from megacomp.kernels import launch_config as launching
from megacomp.launch import files, kernel_bench
from megacomp.launch.kernel_bench import Case, describe_error

Write = Callable[[dict[str, Any]], None]


def main(job_file: str, result_file: str) -> None:
    job = json.loads(Path(job_file).read_text())

    def write(result: dict[str, Any]) -> None:
        files.write_json(Path(result_file), result)

    torch.set_num_threads(int(job.get("threads", 1)))
    kinds: dict[str, Callable[[Mapping[str, Any], Write], None]] = {
        "check": check,
        "large": check_large,
        "time": measure,
        "transport": transport,
        "gemm_check": check_gemm,
        "gemm_time": measure_gemm,
    }
    kinds[job["kind"]](job, write)


def check(job: Mapping[str, Any], write: Write) -> None:
    """``job``: device, seed, and cases as keyword arguments of ``Case``. Result: ``checks``.

    With ``large``, a case is launched as a large message would be.
    """
    device = torch.device(job["device"])
    checks: list[dict[str, Any]] = []
    for number, arguments in enumerate(job["cases"]):
        large = arguments.pop("large", False)
        case = Case(**{**arguments, "dtype": getattr(torch, arguments["dtype"])})
        checks.append(kernel_bench.check(case, device, job["seed"] + number, large))
        write({"checks": checks})
        if device.type == "cuda" and kernel_bench.context_is_lost():
            return


def check_large(job: Mapping[str, Any], write: Write) -> None:
    """More than 2**31 values, and wires of more than 2**31 bytes together: the first and the last rows."""
    device = torch.device(job["device"])
    features = 8192
    rows = 2**31 // features + 3
    checks: list[dict[str, Any]] = []
    for operation, peers in (("encode", 1), ("decode_sum", 2)):
        case = Case(operation, "int8", peers, rows, features)
        result = {**case.describe(), "passed": False, "wrong": None, "float64_error": None, "error": None}
        free, _ = torch.cuda.mem_get_info(device)
        needed = case.moved_bytes + 2 * case.message_bytes
        if free < needed:
            result |= {"passed": None, "error": f"not run: {needed >> 30} GiB needed, {free >> 30} GiB free"}
        else:
            try:
                buffers = kernel_bench.Buffers.of(case, device, 1)
                buffers.calls("triton")[0]()
                result["wrong"] = buffers.wrong()
                result["passed"] = result["wrong"] == 0
                del buffers
            except Exception as error:  # out of memory after all, or the kernel
                result["error"] = describe_error(error)
        torch.cuda.empty_cache()
        checks.append(result)
        write({"checks": checks})


def goes_on(seconds: float, result: dict[str, Any], write: Write) -> Callable[[str], bool]:
    """What says whether something is still to be begun: for so many seconds from now, and while there is a GPU.

    It is asked before every measurement. What was found until then is written first; what is not begun is listed in
    ``result["skipped"]``.
    """
    end = time.monotonic() + seconds

    def go(what: str) -> bool:
        write(result)
        if time.monotonic() < end and not kernel_bench.context_is_lost():
            return True
        result["skipped"].append(what)
        return False

    return go


def measure(job: Mapping[str, Any], write: Write) -> None:
    """Times codecs one after the other.

    ``job``: specs, mebibytes (in the order of interest), features, peers, repeats, tune, compiled (codecs,
    operations and numbers of wires, at ``compiled_mebibytes``), and seconds: nothing is begun after that. Result:
    ``clocks``, ``tuning``, ``cases``, ``small`` and ``skipped``, what there was no time for.
    """
    device = torch.device("cuda", torch.cuda.current_device())
    result: dict[str, Any] = {"clocks": None, "tuning": [], "cases": [], "small": [], "skipped": []}

    go = goes_on(job["seconds"], result, write)
    kernel_bench.warm_up(device)
    result["clocks"] = clocks_under_load(device)
    features, repeats = job["features"], job["repeats"]
    for spec in job["specs"]:
        if job["tune"]:
            for cases in kernel_bench.tuning_cases(spec, features, job["tune_mebibytes"]):
                if go(f"tuning of {cases[0].operation} {spec}"):
                    found = []
                    for measurement, report in kernel_bench.tune(cases, device, max(5, repeats // 2)):
                        found += [measurement] if measurement is not None else []
                        result["tuning"].append(report)
                    result["cache_file"] = str(launching.record(torch.cuda.get_device_name(device), found))
        if go(f"4 KiB message {spec}"):
            try:
                result["small"].append(kernel_bench.time_small_message(spec, device, repeats))
            except Exception as error:  # as in the cases below
                result["small"].append({"codec": spec, "error": describe_error(error)})
    for mebibytes in job["mebibytes"]:
        for spec in job["specs"]:
            rows = kernel_bench.rows_of(mebibytes, features)
            for operation, peers in operations(job["peers"]):
                if go(f"{operation} of {peers}, {spec}, {mebibytes} MiB"):
                    case = Case(operation, spec, peers, rows, features)
                    result["cases"].append(kernel_bench.time_case(case, device, repeats))
    # Last, for the compiler takes longest: the same cases again, beside torch.compile.
    rows = kernel_bench.rows_of(job["compiled_mebibytes"], features)
    for spec, operation, peers in job["compiled"]:
        if go(f"torch.compile of {operation} of {peers}, {spec}"):
            case = Case(operation, spec, peers, rows, features)
            result["cases"].append(kernel_bench.time_case(case, device, repeats, compiled=True))
    write(result)


def operations(peers: list[int]) -> list[tuple[str, int]]:
    """What is measured: encode, then decode_sum and decode_sum_encode of every number of wires."""
    return [
        ("encode", 1),
        *(("decode_sum", count) for count in peers),
        *(("decode_sum_encode", count) for count in peers),
    ]


def clocks_under_load(device: torch.device) -> dict[str, str] | None:
    """What nvidia-smi tells of the clocks while the GPU copies; None where it tells nothing."""
    calls = kernel_bench.copy_calls(512 * kernel_bench.MIB, device, 1)["copy_torch"]
    for _ in range(1000):
        calls[0]()
    clocks = nvidia_smi("clocks.sm", "clocks.max.sm", "clocks.mem", "power.draw", "temperature.gpu")
    torch.cuda.synchronize(device)
    return clocks


def nvidia_smi(*fields: str) -> dict[str, str] | None:
    """Fields of the current GPU by nvidia-smi, which is asked and never told; None if it does not answer."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    uuid = getattr(properties, "uuid", None)
    chosen = [f"--id=GPU-{uuid}"] if uuid is not None else []
    command = ["nvidia-smi", *chosen, f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=15, check=True)
        values = [value.strip() for value in done.stdout.strip().splitlines()[0].split(",")]
    except (OSError, subprocess.SubprocessError, IndexError):
        return None
    return dict(zip(fields, values, strict=True)) if len(values) == len(fields) else None


def transport(job: Mapping[str, Any], write: Write) -> None:
    """The transport's check of itself. Result: ``transport``."""
    from benchmarks import gpu_transport

    write({"transport": gpu_transport.check_transport()})


def check_gemm(job: Mapping[str, Any], write: Write) -> None:
    """``job``: device, seed, and cases of ``gpu_gemm.check_grid``. Result: ``checks``."""
    from benchmarks import gpu_gemm

    device = torch.device(job["device"])
    checks: list[dict[str, Any]] = []
    for number, case in enumerate(job["cases"]):
        checks.append(gpu_gemm.check(case, device, job["seed"] + number))
        write({"checks": checks})
        if device.type == "cuda" and kernel_bench.context_is_lost():
            return


def measure_gemm(job: Mapping[str, Any], write: Write) -> None:
    """``job``: grid, as of ``gpu_gemm.time_grid``, repeats, and seconds: nothing is begun after that.

    Result: ``gemms``, ``products`` and ``mlps``, as of ``gpu_gemm.time_mlp``, and ``skipped``, what there was no time
    for.
    """
    from benchmarks import gpu_gemm

    device = torch.device("cuda", torch.cuda.current_device())
    result: dict[str, Any] = {"gemms": [], "products": [], "mlps": [], "skipped": []}
    go = goes_on(job["seconds"], result, write)
    kernel_bench.warm_up(device)
    for model, ranks, rows in job["grid"]:
        try:
            for kind, found in gpu_gemm.time_mlp(model, ranks, rows, device, job["repeats"], go):
                result[kind].append(found)
        except Exception as error:  # out of memory for the weights: fewer of them may do
            failed = {"model": model, "ranks": ranks, "linear": "", "rows": 0, "error": describe_error(error)}
            result["gemms"].append({**failed, "contenders": None, "times_bf16": None})
    write(result)


if __name__ == "__main__":
    main(*sys.argv[1:])
