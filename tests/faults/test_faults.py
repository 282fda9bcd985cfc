"""A rank dies, stalls, runs out of memory or does something else than the others: every rank ends with an error."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from models import megatron_gpt, megatron_logits, tokens
from rank_pool import RankError, RankPool

import megacomp
from megacomp.codecs import BlockCodec
from megacomp.config import load
from megacomp.door import Door
from megacomp.policy import Site

pytest.importorskip("megatron.core")

RANKS = 4
VICTIM = 2
TIMEOUT = 6.0
"""Of the process groups, in seconds: longer than a busy machine keeps a healthy rank waiting."""
SLACK = 10.0
"""A machine that is busy with four ranks on two cores: an error comes within the timeout and so much more."""

SITE = "layers.1.mlp"


def _section(algorithm: str) -> dict[str, Any]:
    settings = {"codec": "int8", "min_bytes": 0, "algorithm": algorithm}
    return {"megacomp": {"communication": settings, "backend": "reference"}}


def _killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _stalled() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def _out_of_memory() -> None:
    raise torch.OutOfMemoryError("Tried to allocate 20.00 GiB")


def _out_of_host_memory() -> None:
    raise MemoryError("cannot allocate 20 GiB")


@contextmanager
def _at_the_site(model: torch.nn.Module, fault: Callable[[], None]) -> Iterator[None]:
    """On the victim, `fault` happens in the middle of a forward: when the message of SITE is to be encoded."""
    if dist.get_rank() != VICTIM:
        yield
        return
    encode = BlockCodec.encode
    inside = False

    def enter(*_: Any) -> None:
        nonlocal inside
        inside = True

    def encoding(*arguments: Any, **more: Any) -> Any:
        if inside:
            fault()
        return encode(*arguments, **more)

    handle = model.decoder.layers[1].mlp.linear_fc2.register_forward_pre_hook(enter)
    with mock.patch.object(BlockCodec, "encode", encoding):
        yield
    handle.remove()


@contextmanager
def _other_shape(model: torch.nn.Module) -> Iterator[None]:
    """On the victim, SITE reduces one row less."""
    if dist.get_rank() != VICTIM:
        yield
        return
    layer = model.decoder.layers[1].mlp.linear_fc2
    handle = layer.register_forward_pre_hook(lambda _, inputs: (inputs[0][:-1], *inputs[1:]))
    yield
    handle.remove()


@contextmanager
def _model() -> Iterator[torch.nn.Module]:
    """The model over groups with a short timeout, which imports that take longer on one rank would use up."""

    dist.barrier()
    with megatron_gpt(timeout=timedelta(seconds=TIMEOUT)) as model:
        yield model


def _serve(algorithm: str, fault: Callable[[], None] | None) -> dict[str, Any]:
    """A forward that goes well and one with a fault; how this rank fares, if it comes so far."""
    with _model() as model, torch.no_grad():
        original = _patched_function()
        exact = model.decoder.layers[1].mlp.linear_fc2
        with megacomp.install(_section(algorithm), model=model) as installation:
            megatron_logits(model, tokens())
            calls = installation.report().calls
            dist.barrier()
            started = time.monotonic()
            happening = _other_shape(model) if fault is None else _at_the_site(model, fault)
            with happening, pytest.raises(megacomp.CollectiveError) as caught:
                megatron_logits(model, tokens())
            seconds = time.monotonic() - started
            # The others are still there for as long as anyone waits for them; this group is another one.
            dist.barrier()
            counted = installation.report().calls - calls
        assert model.decoder.layers[1].mlp.linear_fc2 is exact
        return {
            "error": str(caught.value),
            "cause": type(caught.value.__cause__).__name__,
            "seconds": seconds,
            "counted": counted,
            "restored": _patched_function() is original,
        }


def _patched_function() -> Any:
    from megatron.core.tensor_parallel.layers import RowParallelLinear

    return RowParallelLinear.forward


def _assert_ended(results: list[dict[str, Any]]) -> None:
    """Each rank said where and who, in time, and is as it was before the installation."""
    for rank, result in enumerate(results):
        assert result["error"].startswith(f"all_reduce at {SITE} failed on rank {rank}: "), result
        assert result["restored"]
        assert result["counted"] == 3, "the sites before, and none after"
        if rank != VICTIM:
            assert result["seconds"] < TIMEOUT + SLACK


def test_a_rank_out_of_memory_in_encode(ranks: RankPool) -> None:
    results = ranks.run(_serve, "one_shot", _out_of_memory, world_size=RANKS)
    _assert_ended(results)
    for rank in {0, 1, 3}:
        assert f"came from rank {VICTIM}: " in results[rank]["error"]
    assert results[VICTIM]["cause"] == "OutOfMemoryError"
    assert "OutOfMemoryError: Tried to allocate 20.00 GiB" in results[VICTIM]["error"]


def test_a_rank_with_another_message_shape(ranks: RankPool) -> None:
    results = ranks.run(_serve, "two_shot", None, world_size=RANKS)
    _assert_ended(results)
    for rank in {0, 1, 3}:
        assert f"nothing of the shape expected came from rank {VICTIM}: " in results[rank]["error"]
    assert "nothing of the shape expected came from rank " in results[VICTIM]["error"]


def _tries_again() -> list[str]:
    """What one rank is told that ran out of memory and goes on at once, as if nothing were in flight."""
    group = dist.new_group(timeout=timedelta(seconds=TIMEOUT))
    door = Door(load(_section("one_shot"))[0])
    layer = torch.nn.Identity()
    door.learn({layer: Site("here")})
    door.agree(group)
    said = []
    failing = mock.patch.object(BlockCodec, "encode", lambda *_, **__: _out_of_host_memory())
    with torch.no_grad(), failing if dist.get_rank() == 0 else nullcontext():
        for _ in range(2):
            with pytest.raises(megacomp.CollectiveError) as caught:
                door.inside(layer, lambda _: door("all_reduce", torch.ones(4, 64), group))
            said.append(str(caught.value))
    dist.barrier()
    return said


def test_after_a_failure_the_group_is_of_no_further_use(ranks: RankPool) -> None:
    for rank, (first, again) in enumerate(ranks.run(_tries_again)):
        assert first.startswith(f"all_reduce at here failed on rank {rank}: ")
        assert "this process group has failed before" in again and first in again
        if rank == 0:
            assert "MemoryError: cannot allocate 20 GiB" in first


def _installs_alone(how: str) -> str | None:
    """Installing where the other rank has another version, or never comes."""
    group = dist.new_group(timeout=timedelta(seconds=TIMEOUT))
    version = "0.0.1" if how == "version" and dist.get_rank() == 1 else megacomp.__version__
    try:
        if how == "version" or dist.get_rank() == 0:
            with mock.patch("megacomp.agreement.__version__", version):
                megacomp.install(_section("auto"), group=group).uninstall()
        return None
    except megacomp.AgreementError as error:
        return str(error)
    finally:
        dist.barrier()


def test_a_rank_with_another_version(ranks: RankPool) -> None:
    for error in ranks.run(_installs_alone, "version"):
        assert error is not None
        assert f"version of megacomp: {megacomp.__version__} on rank 0; 0.0.1 on rank 1" in error


def test_a_rank_that_never_installs(ranks: RankPool) -> None:
    error, _ = ranks.run(_installs_alone, "absent")
    assert error is not None
    assert "rank 0 cannot compare its configuration of megacomp with those on ranks 0, 1: " in error


def _serve_until_the_end(fault: Callable[[], None]) -> None:
    with (
        _model() as model,
        torch.no_grad(),
        megacomp.install(_section("two_shot"), model=model),
        _at_the_site(model, fault),
    ):
        megatron_logits(model, tokens())


@pytest.mark.parametrize("fault", [_killed, _stalled])
def test_a_rank_killed_or_stalled_in_the_middle_of_a_forward(ranks: RankPool, fault: Callable[[], None]) -> None:
    with pytest.raises((RankError, megacomp.CollectiveError)) as caught:
        ranks.run(_serve_until_the_end, fault, world_size=RANKS, timeout=60)
    error = caught.value
    said = str(error if isinstance(error, RankError) else error.__cause__)
    assert ("exit code -9" if fault is _killed else "still waiting for the others") in said
    for rank in {0, 1, 3}:
        assert (
            f"all_reduce at {SITE} failed on rank {rank}: nothing of the shape expected came from rank {VICTIM}" in said
        )
