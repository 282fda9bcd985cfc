"""The wheel: every package under one top-level name, importable without the repository."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("megacomp", "kernels", "patches", "launch")


def test_the_wheel_carries_every_package_under_megacomp(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in SOURCES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    # As measurements of a GPU would ship; there may be none yet.
    (source / "kernels" / "measured").mkdir(exist_ok=True)
    (source / "kernels" / "measured" / "some-gpu.json").write_text("{}")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(source)]
    subprocess.run(pip, check=True, timeout=120)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        installed = {name for name in archive.namelist() if ".dist-info/" not in name}
    expected = {
        (path.relative_to(source) if name == "megacomp" else "megacomp" / path.relative_to(source)).as_posix()
        for name in SOURCES
        for pattern in ("*.py", "*.json", "py.typed")
        for path in (source / name).rglob(pattern)
    }
    assert {"megacomp/py.typed", "megacomp/kernels/measured/some-gpu.json"} < expected
    assert installed == expected
    # -S leaves out the editable install of this environment; its dependencies are added back behind the wheel.
    path = os.pathsep.join([str(wheel), *(entry for entry in sys.path if entry.endswith("site-packages"))])
    code = "import megacomp.kernels, megacomp.patches, megacomp.launch; print(megacomp.kernels.__file__)"
    command = [sys.executable, "-S", "-c", code]
    result = subprocess.run(
        command, check=True, timeout=120, capture_output=True, text=True, cwd=tmp_path, env={"PYTHONPATH": path}
    )
    assert result.stdout.startswith(str(wheel))
