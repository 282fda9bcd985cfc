"""Observers see every partial and its sum, of real ranks as of simulated ones, and change nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from engines import tiny_models
from models import HIDDEN, LAYERS, megatron_gpt, megatron_logits, tokens
from rank_pool import RankPool

import megacomp
from megacomp.config import Config
from megacomp.door import Door
from megacomp.installation import observe
from megacomp.launch import engines
from megacomp.policy import Site

SITES = [f"layers.{layer}.{module}" for layer in range(LAYERS) for module in ("attention", "mlp")]


class Recorder:
    """Keeps what it sees, in order: (site, rank, world_size, partial) and (site, total)."""

    def __init__(self) -> None:
        self.seen: list[tuple[Any, ...]] = []

    def partial(self, site: Site, rank: int, world_size: int, x: torch.Tensor) -> None:
        assert not x.requires_grad
        self.seen.append((site.name, rank, world_size, x.clone()))

    def total(self, site: Site, x: torch.Tensor) -> None:
        assert x.dtype == torch.float32
        self.seen.append((site.name, x.clone()))


def _megatron(sequence_parallel: bool) -> list[tuple[Any, ...]]:
    """What this rank's observer sees of one forward, whose result it does not change."""
    recorder = Recorder()
    with megatron_gpt(sequence_parallel=sequence_parallel) as model, torch.no_grad():
        expected = megatron_logits(model, tokens())
        with observe(model, recorder) as installation:
            assert torch.equal(megatron_logits(model, tokens()), expected)
        report = installation.report()
        assert {name: site.declined for name, site in report.sites.items()} == {name: {"observed": 1} for name in SITES}
        megatron_logits(model, tokens())
    return recorder.seen


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_each_rank_shows_its_partials_and_the_sum(ranks: RankPool, sequence_parallel: bool) -> None:
    pytest.importorskip("megatron.core")
    by_rank = ranks.run(_megatron, sequence_parallel)
    for rank, seen in enumerate(by_rank):
        assert [entry[0] for entry in seen] == [site for site in SITES for _ in range(2)]
        assert [entry[1:3] for entry in seen[::2]] == [(rank, 2)] * len(SITES)
    for (*_, first), (*_, second), (_, total) in zip(by_rank[0][::2], by_rank[1][::2], by_rank[0][1::2], strict=True):
        assert first.shape == (tokens().numel(), HIDDEN)
        assert torch.equal(first + second, total)


def _engine(folder: Path, name: str, dtype: torch.dtype) -> list[tuple[Any, ...]]:
    recorder = Recorder()
    simulate = dist.get_world_size() == 1
    with engines.build(folder, name, tp=4, dtype=dtype, simulate=simulate) as built:
        ids = torch.randint(90, (2, 7), generator=torch.Generator().manual_seed(7))
        with observe(built.module, recorder):
            observed = built.logits(ids)
        assert torch.equal(built.logits(ids), observed)
    return recorder.seen


@pytest.mark.parametrize("name", engines.ENGINES)
def test_simulated_ranks_show_what_real_ones_do(ranks: RankPool, tmp_path: Path, name: str) -> None:
    tiny_models.save("llama", tmp_path)
    real = ranks.run(_engine, tmp_path, name, torch.bfloat16, world_size=4)
    (simulated,) = ranks.run(_engine, tmp_path, name, torch.bfloat16, world_size=1)
    # For each message the four partials, by rank, then the sum.
    expected = [
        entry
        for message in zip(*(zip(seen[::2], seen[1::2], strict=True) for seen in real), strict=True)
        for entry in (*(partial for partial, _ in message), message[0][1])
    ]
    assert len(simulated) == len(expected) == 5 * 4
    for got, wanted in zip(simulated, expected, strict=True):
        assert got[:-1] == wanted[:-1] and got[-1].dtype == wanted[-1].dtype
        assert torch.equal(got[-1], wanted[-1])


def _through_the_door() -> list[tuple[Any, ...]]:
    """The messages that are observed of all that may come, each from a site of its own."""
    recorder = Recorder()
    door = Door(Config(), recorder)
    alone = dist.new_subgroups(1)[0]
    both = dist.group.WORLD

    def send(name: str, tensor: torch.Tensor, *, collective: Any = "all_reduce", group: Any = both) -> None:
        layer = torch.nn.Identity()
        door.learn({layer: Site(name)})
        assert door.inside(layer, lambda _: door(collective, tensor, group)) is None

    with torch.no_grad():
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            send(str(dtype), torch.ones(2, 3, 4, dtype=dtype))
        send("transposed", torch.arange(6.0).view(2, 3).T)
        send("one dimension", torch.ones(5))
        send("reduce_scatter", torch.ones(4, 3), collective="reduce_scatter")
        send("all_gather", torch.ones(4, 3), collective="all_gather")
        send("integers", torch.ones(4, 3, dtype=torch.int64))
        send("double", torch.ones(4, 3, dtype=torch.float64))
        send("empty", torch.ones(0, 3))
        send("alone", torch.ones(4, 3), group=alone)
        assert door("all_reduce", torch.ones(4, 3), both) is None
    send("gradients", torch.ones(4, 3))
    door.close()
    with torch.no_grad():
        send("closed", torch.ones(4, 3))
    return recorder.seen


def test_what_a_codec_could_never_take_is_not_shown(ranks: RankPool) -> None:
    for rank, seen in enumerate(ranks.run(_through_the_door)):
        shown = list(dict.fromkeys(entry[0] for entry in seen))
        floats = [str(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)]
        assert shown == [*floats, "transposed", "one dimension", "reduce_scatter"]
        assert [entry[1:3] for entry in seen[::2]] == [(rank, 2)] * len(shown)
        assert [tuple(entry[-1].shape) for entry in seen[::2]] == [(6, 4)] * 3 + [(3, 2), (1, 5), (4, 3)]
        for (*_, partial), (_, total) in zip(seen[::2], seen[1::2], strict=True):
            assert torch.equal(total, 2 * partial.float())


def test_observing_and_compressing_exclude_each_other() -> None:
    model, recorder = torch.nn.Identity(), Recorder()
    with observe(model, recorder):
        for config in (Config(), {"megacomp": {"communication": {"codec": "int8"}}}):
            with pytest.raises(megacomp.ConfigError, match="an observer is installed; uninstall it first"):
                megacomp.install(config)
        with pytest.raises(megacomp.ConfigError, match="an observer is installed"):
            observe(model, Recorder())
        observe(model, recorder).uninstall()
    with megacomp.install(Config()), pytest.raises(megacomp.ConfigError, match="a configuration is installed"):
        observe(model, recorder)
    assert recorder.seen == []


def _one_observes() -> str:
    with pytest.raises(megacomp.AgreementError) as error:
        if dist.get_rank() == 0:
            observe(torch.nn.Identity(), Recorder())
        else:
            megacomp.install(Config())
    return str(error.value)


def test_all_ranks_must_observe(ranks: RankPool) -> None:
    for error in ranks.run(_one_observes):
        assert "observer: Recorder on rank 0; absent on rank 1" in error
