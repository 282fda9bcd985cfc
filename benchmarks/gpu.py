"""The kernels on a CUDA GPU: first whether they are right, then how fast they are.

python -m benchmarks.gpu [--quick] [--tune] [--out DIR]

Needs torch and triton, and nothing installed. Meant to take under 10 minutes on an H200, --quick under 2.5.

1. Every kernel against its definition in PyTorch on the CPU, on fresh random data: bit for bit, as every backend has
   the definition's float32 arithmetic; decode_sum against a sum in float64 as well. Then messages of more than 2**31
   values, and the transport (gpu_transport.py).
2. With --tune, the fastest launch configuration of each kernel, into the user's cache (kernels/launch_config.py).
3. encode, decode_sum and decode_sum_encode (into the same codec) of messages of 1 MiB to 1 GiB, beside copies that
   read and write as many bytes, torch's and a Triton kernel's, whichever is faster. Times are medians over CUDA graphs
   of at least eight calls that rotate through sets of buffers four times as large as the L2 cache; ``eager_us`` is
   without the graph. Copies and kernels alternate; the clocks are warmed up before.
4. The same at 64 MiB beside torch.compile of the definition, and a 4 KiB message.
5. dequant_gemm and dequant_gemm_encode, checked, and timed beside bf16, PyTorch's int4 GEMM and two steps, without
   communication (gpu_gemm.py).

The result is written to DIR/<gpu>/kernels.json (DIR: benchmarks/results), anew after every step. The exit code is 1 if
a check failed, 2 if there is nothing to run on; missed aims are no failure.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu_gemm
from benchmarks.gpu_worker import nvidia_smi, operations
from megacomp import codecs
from megacomp.kernels.launch_config import NO_CACHE, cache_folder, device_problem, slug
from megacomp.launch import environment, files, kernel_bench

ROOT = Path(__file__).resolve().parents[1]

ROTATED = '{"preset": "int4", "rotation": 128}'
TIMED = ("mxfp4", "nvfp4", ROTATED, "int8", "static4")
CHECKED = (
    *TIMED,
    *(name for name in (*codecs.presets(), *codecs.presets(static=True)) if name not in TIMED),
    '{"preset": "mxfp4", "rotation": 32, "scale": "e5m0"}',
    '{"preset": "nvfp4", "rotation": 64}',
    '{"preset": "int8", "rotation": 256}',
    '{"format": "mx", "element": "fp3_e2m0", "block_size": 8, "scale": "bf16", "scale_search": true}',
    '{"format": "mx", "element": "int3", "block_size": 8, "scale": "e5m0", "scale_rounding": "best"}',
    '{"format": "mx", "element": "fp8_e4m3", "block_size": 128, "scale": "e5m0", "scale_rounding": "best"}',
    '{"format": "int", "bits": 4, "block_size": 128, "scale": "fp16", "symmetric": false}',
    '{"format": "int", "bits": 7, "block_size": 16, "scale": "bf16", "symmetric": false, "rotation": 64}',
    '{"format": "static", "bits": 3, "outlier_features": 1, "symmetric": true}',
    '{"format": "static", "bits": 5, "outlier_features": 0.5, "row_scale": false}',
    '{"format": "static", "bits": 8, "outlier_features": 0}',
)
FEATURES = 4096
GEMM_SECONDS = 120
"""No GEMM is timed that would begin that long after the first; meant to be enough for all, compiling included."""

LARGE = 64
"""MiB from which the aims hold, and the size at which torch.compile is measured."""


@dataclass(frozen=True)
class Plan:
    """What a run does.

    Attributes:
        mebibytes: sizes of messages, in the order of interest.
        peers: numbers of wires.
        repeats: of each measurement.
        compiled: (codec, operation, wires) measured beside torch.compile, whose compiler takes long.
        checked: codecs that are compared with their definitions.
        seconds: for the whole run; measurements not begun by then are skipped, and listed.
    """

    mebibytes: tuple[int, ...]
    peers: tuple[int, ...]
    repeats: int
    compiled: tuple[tuple[str, str, int], ...]
    checked: tuple[str, ...]
    seconds: float


FULL = Plan(
    (64, 256, 1024, 16, 4, 1),
    (2, 4, 8),
    20,
    (
        (ROTATED, "encode", 1),
        (ROTATED, "decode_sum", 4),
        (ROTATED, "decode_sum_encode", 4),
        ("mxfp4", "encode", 1),
        ("mxfp4", "decode_sum", 4),
        ("int8", "encode", 1),
        ("int8", "decode_sum", 4),
    ),
    CHECKED,
    430,
)
QUICK = Plan((64, 256), (2,), 9, ((ROTATED, "encode", 1),), TIMED, 75)


def plan_checks(spec: str, quick: bool) -> list[dict[str, Any]]:
    """The arguments of the cases in which a codec's kernels are compared with their definitions."""
    # Rows that divide by 16, rows that do not and single ones are compiled differently; so are short last blocks.
    shapes: list[tuple[int, int, str, tuple[int, ...]]] = [
        (67, FEATURES, "bfloat16", (2,)),
        (5, 2880, "bfloat16", (3,)),
    ]
    if not quick:
        shapes += [(48, 100, "float32", (2,)), (1, FEATURES, "float16", (1,))]
        if spec in TIMED:
            shapes += [(33, 8192, "bfloat16", (4, 8)), (37, FEATURES, "float16", (2,)), (37, FEATURES, "float32", (2,))]
    cases = [
        {"operation": operation, "spec": spec, "peers": count, "rows": rows, "features": features, "dtype": dtype}
        for rows, features, dtype, peers in shapes
        for operation, count in operations(list(peers))
    ]
    return cases + [{**case, "large": True} for case in cases[:3]]


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer codecs, sizes and repetitions; no transport")
    parser.add_argument("--tune", action="store_true", help="search launch configurations first; some minutes more")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", metavar="DIR")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    options = arguments(argv)
    problem = gpu_problem()
    if problem is None and options.tune and cache_folder("kernels") is None:
        problem = f"--tune keeps what it finds in the cache, and {NO_CACHE}"
    if problem is not None:
        print(f"benchmarks.gpu: {problem}", file=sys.stderr)
        return 2
    plan = QUICK if options.quick else FULL
    start = time.monotonic()
    gpu = torch.cuda.get_device_name()
    path = options.out / slug(gpu) / "kernels.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"benchmarks.gpu: cannot write {path}: {error}", file=sys.stderr)
        return 2
    result: dict[str, Any] = {
        "command": ["python", "-m", "benchmarks.gpu", *(sys.argv[1:] if argv is None else argv)],
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "environment": {**environment.describe(torch.device("cuda")), **describe_gpu()},
        "method": (__doc__ or "").partition("\n\n")[2],
        "checks": [],
    }
    with tempfile.TemporaryDirectory() as folder:
        workers = Workers(Path(folder))
        say(f"checking {len(plan.checked)} codecs")
        for found in run_checks(workers, plan, options.quick):
            result["checks" if isinstance(found, list) else "transport"] = (
                [*result["checks"], *found] if isinstance(found, list) else found
            )
            files.write_json(path, result)
        timings = []
        groups = [list(TIMED)] if options.quick else [[spec] for spec in TIMED]
        for number, specs in enumerate(groups):
            seconds = max(0.0, plan.seconds - (time.monotonic() - start)) / (len(groups) - number)
            # A GPU's own tuning is worth waiting for.
            seconds += 60 * len(specs) if options.tune else 0
            say(f"timing {', '.join(codecs_named(specs))} for at most {seconds:.0f} s")
            timings.append(run_timing(workers, plan, specs, options.tune, seconds))
            result |= merge(timings)
            files.write_json(path, result)
        say("checking and timing dequant_gemm")
        result["gemm"] = run_gemm(workers, plan, options.quick)
        files.write_json(path, result)
    result["aims"] = aims(result["cases"], result["small"])
    result["seconds"] = round(time.monotonic() - start, 1)
    files.write_json(path, result)
    show(result)
    failed = failures(result)
    for line in failed:
        print(f"FAILED {line}")
    print(f"{path}: {len(failed)} failures, {result['seconds']:.0f} s")
    return 1 if failed else 0


def gpu_problem() -> str | None:
    """Why nothing can be measured here; None if it can."""
    if not torch.cuda.is_available():
        return "no CUDA GPU (torch.cuda.is_available() is False): nothing to measure"
    device = torch.device("cuda", torch.cuda.current_device())
    return device_problem(device)


def describe_gpu() -> dict[str, Any]:
    """Facts about the current GPU; JSON-able."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "cuda": torch.version.cuda,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_cache_bytes": properties.L2_cache_size,
        **(nvidia_smi("driver_version", "clocks.max.sm", "clocks.max.mem", "power.limit") or {"driver_version": None}),
    }


class Workers:
    """Runs jobs of gpu_worker.py, each in a process of its own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._numbers = itertools.count(1)  # jobs run in threads

    def run(self, job: dict[str, Any], seconds: float) -> dict[str, Any]:
        """What the job wrote; with ``error`` if it ended badly or took longer than ``seconds``."""
        name = f"{next(self._numbers)}-{job['kind']}"
        job_file, result_file = self._folder / f"{name}.json", self._folder / f"{name}-result.json"
        job_file.write_text(json.dumps(job))
        command = [sys.executable, "-m", "benchmarks.gpu_worker", str(job_file), str(result_file)]
        problem = None
        try:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds)
            if done.returncode != 0:
                last = done.stderr.strip().splitlines()[-1:] or [""]
                problem = f"exit code {done.returncode}: {last[0][:300]}"
        except subprocess.TimeoutExpired:
            problem = f"no end after {seconds:.0f} s"
        written = json.loads(result_file.read_text()) if result_file.exists() else {}
        return {**written, "error": problem}


def run_checks(workers: Workers, plan: Plan, quick: bool, device: str = "cuda") -> Iterable[Any]:
    """Yields lists of checks, codec by codec, and the transport's own check as a dict."""
    seed = int.from_bytes(os.urandom(3), "big")
    cores = len(os.sched_getaffinity(0))
    with ThreadPoolExecutor(min(12, max(1, cores - 1))) as pool:
        # The two longest first.
        others = []
        if not quick and find_spec("benchmarks.gpu_transport") is not None:
            others.append(("transport", pool.submit(workers.run, {"kind": "transport"}, 180.0)))
        if not quick:
            others.append(("large", pool.submit(workers.run, {"kind": "large", "device": device}, 180.0)))
        jobs: list[dict[str, Any]] = [
            {"kind": "check", "device": device, "seed": seed + 100 * number, "cases": plan_checks(spec, quick)}
            for number, spec in enumerate(plan.checked)
        ]
        for job, found in zip(jobs, pool.map(lambda job: workers.run(job, 300.0), jobs), strict=True):
            yield complete(job["cases"], found)
        for name, future in others:
            found = future.result()
            if name == "large":
                yield found.get("checks", []) + (
                    [ended_badly("messages beyond 2**31", found)] if found["error"] else []
                )
            else:
                yield {"passed": False, **found.get("transport", {}), "error": found["error"]}


def complete(cases: list[dict[str, Any]], found: dict[str, Any]) -> list[dict[str, Any]]:
    """The checks of a job; those it did not come to, for it broke off, as failed."""
    checks = found.get("checks", [])
    why = found["error"] or "not run: the GPU's context was lost"
    missing = [
        {**case, "codec": case["spec"], "passed": False, "wrong": None, "float64_error": None, "error": why}
        for case in cases[len(checks) :]
    ]
    return [*checks, *missing]


def ended_badly(what: str, found: dict[str, Any]) -> dict[str, Any]:
    return {"operation": what, "codec": "", "passed": False, "wrong": None, "error": found["error"]}


def run_timing(workers: Workers, plan: Plan, specs: list[str], tune: bool, seconds: float) -> dict[str, Any]:
    job = {
        "kind": "time",
        "specs": specs,
        "mebibytes": plan.mebibytes,
        "features": FEATURES,
        "peers": plan.peers,
        "repeats": plan.repeats,
        "tune": tune,
        "tune_mebibytes": (1, 16, 256),
        "compiled": [(spec, *case) for spec, *case in plan.compiled if spec in specs],
        "compiled_mebibytes": LARGE,
        "seconds": seconds,
        "threads": 4,
    }
    return workers.run(job, seconds + 90)


def run_gemm(workers: Workers, plan: Plan, quick: bool, device: str = "cuda") -> dict[str, Any]:
    """Checks of dequant_gemm, in processes beside each other, as each compiles kernels; then, alone, times."""
    seed = int.from_bytes(os.urandom(3), "big")
    grid = gpu_gemm.check_grid(quick)
    jobs: list[dict[str, Any]] = [
        {"kind": "gemm_check", "device": device, "seed": seed + 100 * number, "cases": list(cases)}
        for number, (_, cases) in enumerate(itertools.groupby(grid, key=lambda case: (case["bits"], case["dtype"])))
    ]
    checks = []
    with ThreadPoolExecutor(max(1, min(len(jobs), len(os.sched_getaffinity(0)) - 1))) as pool:
        for job, found in zip(jobs, pool.map(lambda job: workers.run(job, 180.0), jobs), strict=True):
            checks += complete(job["cases"], found)
    job = {"kind": "gemm_time", "grid": gpu_gemm.time_grid(quick), "repeats": plan.repeats, "seconds": GEMM_SECONDS}
    timed = workers.run({**job, "threads": 4}, GEMM_SECONDS + 60)
    gemms, products, mlps = (timed.get(kind, []) for kind in ("gemms", "products", "mlps"))
    return {
        "note": gpu_gemm.NOTE,
        "all_gather_model": gpu_gemm.ALL_GATHER_MODEL,
        "method": (gpu_gemm.__doc__ or "").partition("\n\n")[2],
        "checks": checks,
        "gemms": gemms,
        "products": products,
        "mlps": mlps,
        "aims": gemm_aims(gemms, products),
        "skipped": timed.get("skipped", []),
        "errors": [timed["error"]] if timed["error"] else [],
    }


def merge(timings: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The results of all jobs as one."""
    merged: dict[str, Any] = {name: [] for name in ("clocks", "tuning", "cases", "small", "skipped", "errors")}
    for timing in timings:
        for name in ("tuning", "cases", "small", "skipped"):
            merged[name] += timing.get(name, [])
        merged["clocks"] += [timing["clocks"]] if timing.get("clocks") else []
        merged["errors"] += [timing["error"]] if timing.get("error") else []
    return merged


def aims(cases: Sequence[dict[str, Any]], small: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What was aimed at, the worst that was measured, and whether it is met: None if there is no figure.

    A case without a figure, out of memory or failed, leaves an aim open that the others meet.
    """
    found = []
    for operation, least in (("encode", 85), ("decode_sum", 85), ("decode_sum_encode", 80)):
        large = [c for c in cases if c["operation"] == operation and c["message_bytes"] >= LARGE * kernel_bench.MIB]
        if operation == "decode_sum_encode":  # of static codecs two kernels, with the sums between them
            large = [c for c in large if not c["codec"].startswith("static")]
        aim = f"{operation} of {LARGE} MiB and more: at least {least} % of the copy bandwidth"
        found.append(_aim(aim, [(c["percent_of_copy"], where(c)) for c in large], least=least))
    ratios = [(c["times_compiled"], where(c)) for c in cases if "rotation" in c["codec"] and tried_compiled(c)]
    found.append(_aim("rotated formats: at least 2 times as fast as torch.compile", ratios, least=2))
    times = [(message.get("message", {}).get("median_us"), message["codec"]) for message in small]
    found.append(_aim("a 4 KiB message, encoded and decoded: under 10 us in a graph", times, most=10))
    return found


def gemm_aims(gemms: Sequence[dict[str, Any]], products: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """As of ``aims``. A shard is one of at least two ranks' parts."""
    encoded = [(case["times_two_steps"], gpu_gemm.where(case)) for case in products]
    few = [
        (case["times_bf16"], gpu_gemm.where(case))
        for case in gemms
        if case["model"] == "Llama-70B" and case["ranks"] > 1 and case["rows"] <= gpu_gemm.FEW_ROWS
    ]
    many = [(case["times_bf16"], gpu_gemm.where(case)) for case in gemms if case["rows"] == gpu_gemm.LARGE_ROWS]
    return [
        _aim("dequant_gemm, 1 to 16 rows, Llama-70B shards: at least 3 times as fast as bf16", few, least=3),
        _aim("dequant_gemm, 4096 rows: at most 10 % slower than bf16", many, least=1 / 1.1),
        _aim("dequant_gemm_encode: faster than dequant_gemm and then encode", encoded, least=1),
    ]


def _aim(
    aim: str, figures: Sequence[tuple[float | None, str]], least: float | None = None, most: float | None = None
) -> dict[str, Any]:
    known = [(figure, where) for figure, where in figures if figure is not None]
    if not known:
        return {"aim": aim, "worst": None, "where": None, "met": None, "unmeasured": len(figures)}
    worst, place = min(known) if least is not None else max(known)
    met: bool | None = worst >= least if least is not None else worst < (most or 0)
    if met and len(known) < len(figures):
        met = None
    return {"aim": aim, "worst": worst, "where": place, "met": met, "unmeasured": len(figures) - len(known)}


def tried_compiled(case: dict[str, Any]) -> bool:
    return "compiled" in (case.get("contenders") or {})


def where(case: dict[str, Any]) -> str:
    """Which case it was, in words."""
    wires = f" of {case['peers']}" if case["operation"].startswith("decode") else ""
    size = f", {case['message_bytes'] / kernel_bench.MIB:g} MiB" if "message_bytes" in case else ""
    return f"{case['operation']}{wires}, {case['codec']}{size}"


def failures(result: dict[str, Any]) -> list[str]:
    """A line for every check that failed: of the checks, of the transport, of what was timed."""
    gemm = result.get("gemm", {"checks": [], "gemms": [], "products": [], "mlps": [], "errors": []})
    lines = [
        f"{where(check)}: {check['error'] or describe_wrong(check)}"
        for check in [*result["checks"], *gemm["checks"]]
        if check["passed"] is False
    ]
    transport = result.get("transport")
    if transport is not None and not transport["passed"]:
        lines.append(f"transport: {transport.get('error') or 'see its checks in the file'}")
    lines += [f"{where(case)}: {case['wrong']} values differ" for case in result["cases"] if case["wrong"]]
    lines += [
        f"{where(case)}: {case['error']}" for case in result["cases"] if case["error"] and not out_of_memory(case)
    ]
    lines += [
        f"4 KiB message, {what}: {timed['error']}"
        for message in result["small"]
        for what, timed in small_message_parts(message)
        if timed.get("error") and not out_of_memory(timed)
    ]
    lines += [
        f"dequant_gemm, {gpu_gemm.where(case)}: {case['error']}"
        for case in [*gemm["gemms"], *gemm["products"], *gemm["mlps"]]
        if case["error"] and not out_of_memory(case)
    ]
    return lines + [f"timing: {error}" for error in [*result["errors"], *gemm["errors"]]]


def small_message_parts(message: dict[str, Any]) -> Iterable[tuple[str, dict[str, Any]]]:
    """What of a small message may have failed, in words: all of it, and each step that was timed."""
    yield message["codec"], message
    for step in ("encode", "decode_sum", "message"):
        yield f"{message['codec']}, {step}", message.get(step, {})


def describe_wrong(check: dict[str, Any]) -> str:
    return f"{check['wrong']} values differ, float64 error {check.get('float64_error')}"


def out_of_memory(case: dict[str, Any]) -> bool:
    return "OutOfMemoryError" in case["error"]  # of one contender, named first, or of all


def codecs_named(specs: Iterable[str]) -> list[str]:
    return [kernel_bench.codec_of(spec).name for spec in specs]


def show(result: dict[str, Any]) -> None:
    """Prints what was found, as tables where rich is installed."""
    gemm = result["gemm"]
    checks = [*result["checks"], *gemm["checks"]]
    say(f"{sum(check['passed'] is True for check in checks)} of {len(checks)} checks passed")
    for headings, rows in tables(result["cases"]):
        table(headings, rows)
    small = [
        [
            message["codec"],
            *(shown(message.get(step, {}).get("median_us")) for step in ("encode", "decode_sum", "message")),
        ]
        for message in result["small"]
    ]
    table(("4 KiB message, us in a graph", "encode", "decode_sum of 2", "both"), small)
    verdicts = {True: "met", False: "missed", None: "open"}
    for kind, heading, names, against in (
        ("gemms", "GEMM of one rank", ("int4", "bf16", "bf16_untransposed", "torch_int4"), "bf16"),
        ("products", "encoded partial of one rank", ("one_step", "two_steps"), "two_steps"),
        ("mlps", f"MLP of one rank ({gpu_gemm.NOTE})", ("tp_aware", "replicated", "bf16"), "bf16"),
    ):
        rows = [
            [
                gpu_gemm.where(case),
                *(shown((case["contenders"] or {}).get(name, {}).get("median_us")) for name in names),
                "" if case[f"times_{against}"] is None else f"{case[f'times_{against}']:.2f}",
            ]
            for case in gemm[kind]
        ]
        table((heading, *(f"{name} us" for name in names), f"x {against}"), rows)
    problems = {case["torch_int4_problem"] for case in gemm["gemms"] if case.get("torch_int4_problem")}
    for problem in sorted(problems):
        say(f"PyTorch's int4 GEMM was not timed: {problem}")
    rows = [
        [aim["aim"], verdicts[aim["met"]], shown(aim["worst"]), aim["where"] or ""]
        for aim in [*result["aims"], *gemm["aims"]]
    ]
    table(("aim", "", "worst", "where"), rows)
    skipped = [*result["skipped"], *gemm["skipped"]]
    if skipped:
        say(f"skipped {len(skipped)} measurements for lack of time, listed in the file")


def tables(cases: Sequence[dict[str, Any]]) -> Iterable[tuple[list[str], list[list[str]]]]:
    """Yields (headings, rows): every kernel at the size of the aims, then as a percentage of a copy at every size."""
    kernels: dict[str, dict[int, dict[str, Any]]] = {}
    compiled: dict[str, float | None] = {}
    for case in cases:
        name = where({key: case[key] for key in ("operation", "peers", "codec")})
        if tried_compiled(case):
            compiled[name] = case["times_compiled"]
        else:
            kernels.setdefault(name, {})[round(case["message_bytes"] / kernel_bench.MIB)] = case
    rows = []
    for name, by_size in sorted(kernels.items()):
        if LARGE in by_size:
            case = by_size[LARGE]
            kernel = (case["contenders"] or {}).get("kernel", {})
            figures = [kernel.get(figure) for figure in ("median_us", "min_us", "max_us", "eager_us")]
            figures += [case[figure] for figure in ("gb_per_s", "copy_gb_per_s", "percent_of_copy")]
            rows.append([name, *map(shown, [*figures, compiled.get(name)])])
    headings = ["us", "min", "max", "eager us", "GB/s", "copy GB/s", "% of copy", "x compile"]
    yield [f"{LARGE} MiB", *headings], rows
    sizes = sorted({size for by_size in kernels.values() for size in by_size})
    percents = [
        [name, *(shown(by_size.get(size, {}).get("percent_of_copy")) for size in sizes)]
        for name, by_size in sorted(kernels.items())
    ]
    yield ["% of a copy", *(f"{size} MiB" for size in sizes)], percents


def shown(figure: float | None) -> str:
    return "" if figure is None else f"{figure:.1f}"


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a table."""
    if find_spec("rich") is None:
        widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]
        for row in (headings, *rows):
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        return
    from rich.console import Console
    from rich.table import Table

    grid = Table()
    for number, heading in enumerate(headings):
        grid.add_column(heading, justify="right" if number else "left", overflow="fold")
    for row in rows:
        grid.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 160).print(grid)


def say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
