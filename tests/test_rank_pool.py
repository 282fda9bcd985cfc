"""The pool of ranks keeps what its docstring promises."""

from __future__ import annotations

import os
import time
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from rank_pool import RankError, RankPool, RankTimeout


def _rank_and_sum(value: float) -> tuple[int, int, float, int]:
    total = torch.tensor([value + dist.get_rank()])
    dist.all_reduce(total)
    return dist.get_rank(), dist.get_world_size(), total.item(), os.getpid()


def _fail_in_rank(bad: int) -> None:
    if dist.get_rank() == bad:
        raise KeyError("the missing site")
    dist.barrier()


def _die(bad: int) -> None:
    if dist.get_rank() == bad:
        os._exit(7)
    dist.barrier()


def _sleep_in_rank_1() -> None:
    if dist.get_rank() == 1:
        time.sleep(60)


def _leave_megatron_state() -> None:
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)


def _megatron_state_left() -> bool:
    from megatron.core import parallel_state

    return parallel_state.model_parallel_is_initialized()


def _leave_deepspeed_state() -> None:
    import deepspeed
    from deepspeed.utils import groups

    with mock.patch.dict(deepspeed.ops.__compatible_ops__, deepspeed_shm_comm=False):
        deepspeed.init_distributed("gloo", verbose=False)
        groups._init_tp_mesh_device(tensor_model_parallel_size=2)


def _deepspeed_state_left() -> bool:
    from deepspeed.comm import comm
    from deepspeed.utils import groups

    return any(left is not None for left in (comm.cdb, groups.mesh_device, groups._TENSOR_MODEL_PARALLEL_GROUP))


def test_world_sizes_change_between_calls_and_processes_stay(ranks: RankPool) -> None:
    seen = {}
    for world in (2, 3, 1, 2):
        results = ranks.run(_rank_and_sum, 1.0, world_size=world)
        expected = sum(1.0 + rank for rank in range(world))
        assert [result[:3] for result in results] == [(rank, world, expected) for rank in range(world)]
        for rank, *_, process in results:
            assert seen.setdefault(rank, process) == process


def test_failures_name_the_rank_and_the_pool_recovers(ranks: RankPool) -> None:
    with pytest.raises(KeyError, match="the missing site") as caught:
        ranks.run(_fail_in_rank, 1)
    assert "--- rank 1 ---" in str(caught.value.__cause__)
    assert "_fail_in_rank" in str(caught.value.__cause__)
    with pytest.raises(RankError, match="exit code 7"):
        ranks.run(_die, 0)
    with pytest.raises(RankTimeout, match="_sleep_in_rank_1"):
        ranks.run(_sleep_in_rank_1, timeout=5)
    assert len(ranks.run(_rank_and_sum, 0.0)) == 2


def test_megatron_state_does_not_reach_the_next_task(ranks: RankPool) -> None:
    pytest.importorskip("megatron.core")
    ranks.run(_leave_megatron_state)
    assert ranks.run(_megatron_state_left) == [False, False]


def test_deepspeed_state_does_not_reach_the_next_task(ranks: RankPool) -> None:
    pytest.importorskip("deepspeed")
    ranks.run(_leave_deepspeed_state)
    assert ranks.run(_deepspeed_state_left) == [False, False]
    ranks.run(_leave_deepspeed_state)


def test_bad_world_size(ranks: RankPool) -> None:
    with pytest.raises(ValueError, match=r"world_size must be 1\.\.8, not 9"):
        ranks.run(_rank_and_sum, 0.0, world_size=9)
