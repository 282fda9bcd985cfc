"""The patch tests against every supported version of each framework, each version in an environment of its own.

python tests/compat/matrix.py [--only megatron-core==0.16.1]

An environment is a venv with one framework in it. What is large and the same everywhere (torch above all) is installed
once for each Python, into a base that the others see behind their own packages. They are kept beside this Python's
packages, in the folder compat of its environment: a second run only asks whether there are newer releases.

Writes the table between the markers of docs/compatibility.md, from the last outcome of every version, which is kept
beside the environments. Exit code 1 if one that was run now does not do what is expected.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer
from packaging.version import Version
from rich.console import Console

from megacomp.launch import files

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENTS = Path(sys.prefix) / "compat"
OUTCOMES = ENVIRONMENTS / "outcomes.json"
DOCUMENT = ROOT / "docs" / "compatibility.md"
BEGIN, END = "<!-- written by make compat: begin -->", "<!-- written by make compat: end -->"

PATCH_TESTS = {
    "megatron-core": ("tests/patches/test_patch_megatron.py", "tests/patches/test_patch_transformer_engine.py"),
    "transformer_engine": ("tests/patches/test_patch_transformer_engine.py",),
    "deepspeed": ("tests/patches/test_patch_deepspeed.py", "tests/installation/test_init_inference.py"),
}
QUANTIZED = "tests/gptq/test_install_weights.py"
QUANTIZED_TESTS = {
    framework: (
        f"{QUANTIZED}::test_weights_of_a_model_are_replaced_and_put_back[{engine}-2]",
        f"{QUANTIZED}::test_quantized_layers_reduce_at_the_same_sites_compressed[{engine}]",
    )
    for framework, engine in {"megatron-core": "megatron", "deepspeed": "deepspeed"}.items()
}
REFUSAL_TESTS = ("tests/compat/refused.py",)

INSTALL_SECONDS, TEST_SECONDS = 1800, 900


@dataclass(frozen=True)
class Case:
    """A version of a framework and what is expected of it.

    requirement: as pip takes it; without a version the newest release.
    supported: whether its patch tests are to pass, or installing is to be refused.
    python: the oldest Python it can be installed in.
    beside: what else is installed. Given that, the framework is installed without what it asks for.
    quantized: whether quantized weights are supported with it as well.
    """

    requirement: str
    supported: bool = True
    python: str = "3.10"
    beside: tuple[str, ...] = ()
    quantized: bool = True

    @property
    def framework(self) -> str:
        """The distribution's name."""
        return self.requirement.partition("=")[0]

    @property
    def tests(self) -> tuple[str, ...]:
        """What pytest is to run."""
        if not self.supported:
            return REFUSAL_TESTS
        return PATCH_TESTS[self.framework] + (QUANTIZED_TESTS.get(self.framework, ()) if self.quantized else ())


@dataclass(frozen=True)
class Outcome:
    """What happened to a case: whether it went as expected, in words, and what was run."""

    as_expected: bool
    said: str
    version: str = ""
    python: str = ""
    torch: str = ""


# Its Python code alone: the kernels it asks for need a GPU.
TRANSFORMER_ENGINE_NEEDS = ("onnxscript", "einops")

CASES = (
    Case("megatron-core==0.11.0", supported=False),
    Case("megatron-core==0.12.3", quantized=False),
    Case("megatron-core==0.13.1", quantized=False),
    Case("megatron-core==0.14.0"),
    Case("megatron-core==0.15.3"),
    Case("megatron-core==0.16.1"),
    Case("megatron-core==0.17.*", python="3.12"),
    Case("megatron-core==0.18.*", python="3.12"),
    Case("megatron-core", python="3.12"),
    *(
        Case(f"transformer_engine=={release}", beside=("megatron-core==0.16.1", *TRANSFORMER_ENGINE_NEEDS))
        for release in ("2.4.0", "2.11.0")
    ),
    Case("transformer_engine", python="3.12", beside=("megatron-core", *TRANSFORMER_ENGINE_NEEDS)),
    Case("deepspeed==0.16.*", supported=False),
    Case("deepspeed==0.17.*"),
    Case("deepspeed==0.18.*"),
    Case("deepspeed==0.19.*"),
)


class InstallError(RuntimeError):
    """An environment could not be made; says what failed."""


def interpreter(minimum: str) -> str | None:
    """A Python of at least version `minimum`: the one running, else the oldest on PATH or of pyenv; None if none is."""
    if sys.version_info[:2] >= Version(minimum).release:
        return sys.executable
    installed = (Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions").glob("3.*/bin/python")
    names = [f"python3.{minor}" for minor in range(10, 20)]
    found = {}
    for candidate in (*filter(None, map(shutil.which, names)), *map(str, installed)):
        asked = subprocess.run(
            [candidate, "-c", "import platform; print(platform.python_version())"], capture_output=True, text=True
        )
        # The stubs that version managers put on PATH fail unless a version has been chosen.
        if asked.returncode == 0 and (release := Version(asked.stdout.strip())) >= Version(minimum):
            found[release] = candidate
    return found[min(found)] if found else None


def install(python: str, *arguments: str) -> None:
    """`pip install` for the interpreter `python`. Raises InstallError."""
    done = subprocess.run(
        [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments],
        cwd=ROOT,
        env={**os.environ, "DS_BUILD_OPS": "0"},
        capture_output=True,
        text=True,
        timeout=INSTALL_SECONDS,
    )
    if done.returncode:
        last = next(
            (line for line in reversed(done.stderr.splitlines()) if line.startswith("ERROR")), done.stderr[-200:]
        )
        raise InstallError(last)


def environment(base_python: str, name: str, packages: list[list[str]], behind: Path | None = None) -> Path:
    """The folder of a venv of `base_python` with `packages` (arguments of one `pip install` each).

    behind: another venv of the same Python, whose packages are seen where this one has none of the same name.
    """
    folder = ENVIRONMENTS / f"python{release_of(base_python)}" / name
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([base_python, "-m", "venv", "--clear", folder], check=True, timeout=INSTALL_SECONDS)
        if behind is not None:
            (packages_folder,) = (folder / "lib").glob("python*/site-packages")
            (shared,) = (behind / "lib").glob("python*/site-packages")
            # A plain path would leave out the .pth files of that folder, and with them what is installed editable.
            (packages_folder / "behind.pth").write_text(f"import site; site.addsitedir({str(shared)!r})\n")
    for arguments in packages:
        install(str(python), *arguments)
    return folder


def release_of(python: str) -> str:
    """The version of an interpreter, "3.12"."""
    return said_by(python, "import sys; print('%d.%d' % sys.version_info[:2])")


def said_by(python: str, code: str) -> str:
    """What `code` prints."""
    return subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def run(case: Case) -> Outcome:
    """Install the framework of `case` and run its tests."""
    python = interpreter(case.python)
    if python is None:
        return Outcome(True, f"not run: no Python {case.python} was found")
    # torch by its exact version first, as in the Makefile.
    torch = f"torch=={Version(version('torch')).public}"
    shared = [[torch], [f"triton=={version('triton')}"], ["--editable", ".", "pytest", "transformers>=4.45", "typer"]]
    packages = [["--upgrade", torch, *(case.beside or [case.requirement])]]
    if case.beside:
        packages.append(["--upgrade", "--no-deps", case.requirement])
    try:
        base = environment(python, "base", shared)
        folder = environment(python, case.requirement.replace("==", "-").replace("*", "x"), packages, behind=base)
    except InstallError as error:
        return Outcome(False, f"cannot be installed: {error}")
    inside = str(folder / "bin" / "python")
    names = [case.framework, "torch", *(one.partition("=")[0] for one in case.beside[:1])]
    found, torch, *others = said_by(inside, f"import importlib.metadata as m; print(*map(m.version, {names}))").split()
    if others:
        found = f"{found} with {names[-1]} {others[0]}"
    as_expected, said = tested(inside, folder / "results.xml", case)
    return Outcome(as_expected, said, found, release_of(inside), torch)


def tested(python: str, results: Path, case: Case) -> tuple[bool, str]:
    """Whether the tests of `case` passed, and how many."""
    results.unlink(missing_ok=True)
    with (results.with_suffix(".log")).open("w") as log:
        try:
            subprocess.run(
                [python, "-m", "pytest", "-p", "no:cacheprovider", f"--junitxml={results}", *case.tests],
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1", "MEGACOMP_COMPAT": case.framework},
                stdout=log,
                stderr=subprocess.STDOUT,
                timeout=TEST_SECONDS,
            )
        except subprocess.TimeoutExpired:
            return False, f"did not finish in {TEST_SECONDS} s"
    if not results.exists():
        return False, f"no tests ran, see {log.name}"
    suite = next(ET.parse(results).getroot().iter("testsuite"))
    tests, failures, errors, skipped = (int(suite.attrib[key]) for key in ("tests", "failures", "errors", "skipped"))
    failed = failures + errors
    passed = tests - failed - skipped
    as_expected = passed > 0 and failed == 0
    if not case.supported:
        return as_expected, "refused when installing" if as_expected else "not refused"
    counts = {"passed": passed, "failed": failed, "skipped": skipped}
    return as_expected, ", ".join(f"{count} {word}" for word, count in counts.items() if count)


def table(outcomes: dict[str, Outcome]) -> str:
    """The outcomes, by requirement, in Markdown."""
    lines = ["| framework | version | Python | torch | patch tests |", "|---|---|---|---|---|"]
    for case in CASES:
        outcome = outcomes.get(case.requirement, Outcome(False, f"{case.requirement} was not run"))
        newest = "" if "=" in case.requirement else ", the newest"
        said = outcome.said if outcome.as_expected else f"**{outcome.said}**"
        cells = (case.framework, f"{outcome.version}{newest}", outcome.python, outcome.torch, said)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(
    only: Annotated[str | None, typer.Option(help="Run this requirement alone, as CASES spells it.")] = None,
) -> None:
    """Run the cases and write the table."""
    selected = [case for case in CASES if only in (None, case.requirement)]
    if not selected:
        raise typer.BadParameter(f"{only}; choose from {', '.join(case.requirement for case in CASES)}")
    ENVIRONMENTS.mkdir(exist_ok=True)
    console = Console(width=140)
    kept = json.loads(OUTCOMES.read_text()) if OUTCOMES.exists() else {}
    outcomes = {requirement: Outcome(**outcome) for requirement, outcome in kept.items()}
    for case in selected:
        outcomes[case.requirement] = outcome = run(case)
        console.print(f"{case.requirement}: {outcome.version}, Python {outcome.python}: {outcome.said}")
        files.write_json(OUTCOMES, {requirement: asdict(outcome) for requirement, outcome in outcomes.items()})
    before, _, rest = DOCUMENT.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    with files.replacing(DOCUMENT) as file:
        file.write(f"{before}{BEGIN}\n\n{table(outcomes)}\n\n{END}{after}".encode())
    if not all(outcomes[case.requirement].as_expected for case in selected):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
