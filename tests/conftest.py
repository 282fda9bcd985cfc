"""Fixtures shared by every test."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# Before anything imports triton: its interpreter then runs the kernels, on the CPU. TRITON_INTERPRET=0 has them
# compiled, where there is a GPU.
os.environ.setdefault("TRITON_INTERPRET", "1")

from rank_pool import RankPool

# An example that compiles, or one on a busy machine, takes as long as it takes.
settings.register_profile("megacomp", deadline=None)
settings.load_profile("megacomp")


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """The session's pool of gloo processes: `ranks.run(function, *args, world_size=2, timeout=120)`."""
    pool = RankPool()
    yield pool
    pool.close()


@pytest.fixture
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment of a process that no launcher started."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user without a home folder, as in a container that runs under a bare user id."""

    def unknown(uid: int) -> None:
        raise KeyError(uid)

    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", unknown)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of development models and texts (MEGACOMP_DATA, or shared/data beside the repository).

    Tests that need it skip where it is absent: it is no part of the product.
    """
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("MEGACOMP_DATA", beside))
    if not folder.is_dir():
        pytest.skip(f"no development data at {folder}")
    return folder
