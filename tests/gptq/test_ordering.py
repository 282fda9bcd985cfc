"""Orders proven against dense matrices in float64: whatever is permuted, split and summed gives X @ W1 ... @ W2."""

from __future__ import annotations

import pytest
import quantized_models as models
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megacomp.gptq import ordering
from megacomp.gptq.ordering import Arrangement
from megacomp.kernels.grouped_weight import GroupedWeight, dequantize

PER_WORD = 8


def _weight(linear: models.Linear, rows: Arrangement, outputs: torch.Tensor) -> GroupedWeight:
    return ordering.group_weight(
        linear.codes.to(torch.uint8)[rows.inputs][:, outputs],
        linear.scales[rows.groups][:, outputs],
        linear.zeros.to(torch.uint8)[rows.groups][:, outputs],
        linear.bits,
        rows,
    )


def _times(x: torch.Tensor, weight: GroupedWeight) -> torch.Tensor:
    inputs = x if weight.input_index is None else x[:, weight.input_index]
    return inputs @ dequantize(weight).double()


def _shard(linear: models.Linear, given_: torch.Tensor, outputs: torch.Tensor) -> GroupedWeight:
    return _weight(linear, ordering.arrange(linear.g_idx, given_, 32 // linear.bits), outputs)


@st.composite
def mlps(draw: st.DrawFn) -> tuple[list[models.Linear], models.Linear, int]:
    """Gate and up (or up alone), down, and a number of ranks that divides the inner features, evenly or not."""
    ranks = draw(st.integers(1, 8))
    bits = draw(st.sampled_from([4, 8]))
    group_size = draw(st.sampled_from([8, 16, 32, 64, -1]))
    inner = ranks * draw(st.integers(1, 6)) * draw(st.sampled_from([4, 8, 16, 32]))
    outer = draw(st.sampled_from([24, 40, 64]))
    ordered, symmetric = draw(st.booleans()), draw(st.booleans())
    seed = draw(st.integers(0, 2**20))
    options = {"bits": bits, "group_size": group_size, "ordered": ordered, "symmetric": symmetric}
    first = models.linear(outer, inner, seed=seed, **options)
    ups = [first, models.linear(outer, inner, seed=seed + 1, g_idx=first.g_idx, **options)]
    return ups[: draw(st.integers(1, 2))], models.linear(inner, outer, seed=seed + 2, **options), ranks


def _activation(parts: list[torch.Tensor]) -> torch.Tensor:
    return torch.nn.functional.silu(parts[0]) * parts[1] if len(parts) == 2 else torch.relu(parts[0])


def _mlp(
    x: torch.Tensor, ups: list[models.Linear], down: models.Linear, ranks: int, order: torch.Tensor | None
) -> torch.Tensor:
    """The sum of what every rank computes, with the inner features in `order`."""
    inner = torch.arange(len(down.g_idx)) if order is None else order
    total = torch.zeros(())
    for rank in range(ranks):
        mine = ordering.share(inner, rank, ranks)
        parts = [_times(x, _shard(up, torch.arange(x.shape[1]), mine)) for up in ups]
        total = total + _times(_activation(parts), _shard(down, mine, torch.arange(x.shape[1])))
    return total


@settings(max_examples=80)
@given(mlps())
def test_mlps_of_any_order_and_size(mlp: tuple[list[models.Linear], models.Linear, int]) -> None:
    ups, down, ranks = mlp
    x = torch.randn(3, len(ups[0].g_idx), dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = _activation([x @ up.dense().double() for up in ups]) @ down.dense().double()
    order = ordering.tp_aware_order(down.g_idx, ranks, 32 // down.bits)
    tolerance = {"atol": 1e-12, "rtol": 1e-10}
    torch.testing.assert_close(_mlp(x, ups, down, ranks, None), expected, **tolerance)
    if order is not None:
        torch.testing.assert_close(_mlp(x, ups, down, ranks, order), expected, **tolerance)
        for rank in range(ranks):
            rows = ordering.arrange(down.g_idx, ordering.share(order, rank, ranks), 32 // down.bits)
            # What the order is for: nothing to gather between the two, nothing to fill up.
            assert rows.input_index is None and not rows.filler.any()


def test_the_order_is_found_wherever_groups_split_in_whole_words() -> None:
    g_idx = models.linear(768, 8, group_size=128).g_idx
    for ranks, found in ((1, True), (2, True), (4, True), (8, True), (5, False), (64, False)):
        assert (ordering.tp_aware_order(g_idx, ranks, PER_WORD) is not None) is found
    # 4 ranks of 192 features: every other boundary falls within a group, whose scales both sides keep.
    order = ordering.tp_aware_order(g_idx, 4, PER_WORD)
    assert order is not None
    rows = [ordering.arrange(g_idx, ordering.share(order, rank, 4), PER_WORD) for rank in range(4)]
    assert [arranged.groups.tolist() for arranged in rows] == [[0, 1], [1, 2], [3, 4], [4, 5]]
    assert all(arranged.word_groups is not None for arranged in rows)


def test_without_the_permutation_the_result_is_wrong() -> None:
    up = models.linear(64, 128, seed=1)
    down = models.linear(128, 64, seed=2)
    x = torch.randn(3, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = torch.relu(x @ up.dense().double()) @ down.dense().double()
    order = ordering.tp_aware_order(down.g_idx, 2, PER_WORD)
    assert order is not None

    def forward(columns: torch.Tensor, sort_inputs: bool) -> torch.Tensor:
        total = torch.zeros(())
        for rank in range(2):
            first = _shard(up, torch.arange(64), ordering.share(columns, rank, 2))
            if not sort_inputs:
                first = GroupedWeight(first.codes, first.scales, first.zeros, first.bits)
            second = _shard(down, ordering.share(order, rank, 2), torch.arange(64))
            total = total + _times(torch.relu(_times(x, first)), second)
        return total

    assert (forward(order, True) - expected).norm() < 1e-12 * expected.norm()
    assert (forward(torch.arange(128), True) - expected).norm() > 0.2 * expected.norm()
    assert (forward(order, False) - expected).norm() > 0.2 * expected.norm()


@settings(max_examples=60)
@given(st.integers(1, 8), st.integers(1, 5), st.sampled_from([8, 32, -1]), st.integers(0, 2**20))
def test_a_share_of_heads_is_sorted_locally(ranks: int, words: int, group_size: int, seed: int) -> None:
    # The output projection: features stay on their rank, in whatever number of groups they are.
    in_features = ranks * words * 5
    one = models.linear(in_features, 16, group_size=group_size, seed=seed)
    x = torch.randn(2, in_features, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    total = torch.zeros(())
    for rank in range(ranks):
        mine = ordering.share(torch.arange(in_features), rank, ranks)
        weight = _shard(one, mine, torch.arange(16))
        assert weight.scales.shape[0] == len(one.g_idx[mine].unique())
        total = total + _times(x[:, mine], weight)
    torch.testing.assert_close(total, x @ one.dense().double(), atol=1e-12, rtol=1e-10)


def test_outputs_side_by_side_and_by_heads() -> None:
    heads, head_dim = 2, 4
    query = models.linear(32, 2 * heads * head_dim, group_size=8, seed=1, symmetric=True)
    key = models.linear(32, heads * head_dim, group_size=8, seed=2, g_idx=query.g_idx)
    weights = [_shard(one, torch.arange(32), torch.arange(one.codes.shape[1])) for one in (query, key)]
    dense = [dequantize(weight) for weight in weights]
    assert weights[0].zeros is None and weights[1].zeros is not None
    assert torch.equal(dequantize(ordering.concatenate_outputs(weights)), torch.cat(dense, 1))
    by_heads = dequantize(ordering.concatenate_outputs(weights, blocks=heads))
    for head in range(heads):
        block = by_heads[:, head * 12 : (head + 1) * 12]
        assert torch.equal(
            block, torch.cat([dense[0][:, head * 8 : head * 8 + 8], dense[1][:, head * 4 : head * 4 + 4]], 1)
        )
    other = _shard(models.linear(32, 8, group_size=8, seed=3), torch.arange(32), torch.arange(8))
    with pytest.raises(ValueError, match="order of rows"):
        ordering.concatenate_outputs([weights[0], other])
