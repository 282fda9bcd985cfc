"""Measurements, each beside its baseline in one run, written to JSON with versions and machine. Not installed.

Each is a program: `python -m benchmarks.NAME`, from the root of the repository.
"""

from importlib.util import find_spec
from pathlib import Path

import megacomp

# On a host where nothing is installed: the rooms lie side by side in the source tree, and the root serves as another
# folder of the package, in which `megacomp.kernels` is `kernels/`.
if find_spec("megacomp.kernels") is None:
    megacomp.__path__.append(str(Path(__file__).resolve().parents[1]))
