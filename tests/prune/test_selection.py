"""Channels under a budget: the least salient for what they save, exact costs, whole blocks."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from zoo import named

from compress.budget import Budget
from compress.demo.network import fashion_net
from compress.errors import BudgetError
from compress.graph.channel_cost import ChannelCosts, channel_costs, total
from compress.graph.cut import cut
from compress.graph.groups import Channels, find_channels
from compress.graph.trace import trace_graph
from compress.prune.cut_target import CutTarget
from compress.prune.selection import aligned_multiples, budget_of, choose


def opened(*widths: int) -> tuple[Channels, ChannelCosts]:
    layers: list[nn.Module] = []
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b), nn.ReLU()]
    graph = trace_graph(nn.Sequential(*layers[:-1]).eval(), (torch.randn(2, widths[0]),))
    channels = find_channels(graph)
    return channels, channel_costs(channels, 2)


def drawn(channels: Channels, seed: int = 0) -> Tensor:
    count = sum(group.size for group in channels.groups)
    return torch.rand(count, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("share", [0.95, 0.7, 0.5, 0.3])
@pytest.mark.parametrize("seed", range(3))
def test_the_cost_is_just_below_the_limit_and_that_of_the_cut(share: float, seed: int) -> None:
    channels, costs = opened(16, 96, 64, 8)
    dense = total(costs.params, torch.ones(160, dtype=torch.bool))
    kept = choose(channels, drawn(channels, seed), costs.params, share * dense)
    left = sum(p.numel() for p in cut(channels, channels.module, kept).parameters())
    assert left == total(costs.params, kept)
    assert 0.98 * share * dense <= left <= share * dense


def test_in_a_group_the_least_salient_go() -> None:
    channels, costs = opened(4, 12, 3)
    scores = drawn(channels)
    kept = choose(channels, scores, costs.macs, 0.5 * total(costs.macs, torch.ones(12, dtype=torch.bool)))
    assert kept.sum() == 6
    assert scores[kept].min() > scores[~kept].max()


def test_groups_that_save_more_for_the_same_score_go_first() -> None:
    channels, costs = opened(40, 8, 8, 2)
    ones = torch.ones(16)
    without_two = torch.arange(16) >= 2
    kept = choose(channels, ones, costs.macs, total(costs.macs, without_two))
    assert int(kept[:8].sum()) == 6
    assert bool(kept[8:].all())


def test_a_coarse_step_that_misses_by_far_gives_way_to_finer_ones() -> None:
    channels, costs = opened(40, 4, 64, 2)  # a channel of the first group saves a quarter
    scores = torch.cat([torch.ones(4), torch.full((64,), 0.9)])
    limit = 0.95 * total(costs.macs, torch.ones(68, dtype=torch.bool))
    kept = choose(channels, scores, costs.macs, limit)
    assert bool(kept[:4].all())
    assert 0.98 * limit <= total(costs.macs, kept) <= limit


def test_what_has_no_score_goes_before_all_else_and_stays_gone() -> None:
    channels, costs = opened(16, 32, 32, 4)
    scores = drawn(channels) + 0.1
    dense = total(costs.macs, torch.ones(64, dtype=torch.bool))
    gone = torch.zeros(64, dtype=torch.bool)
    for share in (0.9, 0.7, 0.5):
        kept = choose(channels, torch.where(gone, 0.0, scores.flip(0)), costs.macs, share * dense)
        assert not kept[gone].any()
        gone = ~kept


def test_what_is_gone_goes_before_dead_channels() -> None:
    """Both have a score of zero: of two picks alike nothing more goes."""
    channels, costs = opened(16, 32, 32, 4)
    dense = total(costs.macs, torch.ones(64, dtype=torch.bool))
    gone = ~choose(channels, drawn(channels) + 0.1, costs.macs, 0.7 * dense, multiple_of=4)
    again = choose(channels, torch.zeros(64), costs.macs, 0.7 * dense, multiple_of=4, gone=gone)
    assert torch.equal(~again, gone)


@pytest.mark.parametrize("multiple", [2, 3, 8])
def test_what_stays_of_a_group_is_a_multiple(multiple: int) -> None:
    channels, costs = opened(8, 32, 30, 4)
    kept = choose(channels, drawn(channels), costs.params, 700, multiple_of=multiple)
    for part, size in ((kept[:32], 32), (kept[32:], 30)):
        assert int(part.sum()) in (size, *range(multiple, size, multiple))


def test_a_group_may_have_a_multiple_of_its_own() -> None:
    channels, costs = opened(8, 32, 30, 4)
    kept = choose(channels, drawn(channels), costs.params, 700, multiple_of=[8, 5])
    assert int(kept[:32].sum()) % 8 == 0
    assert int(kept[32:].sum()) % 5 == 0


def test_the_coarsest_blocks_that_come_near_are_taken() -> None:
    channels, costs = opened(64, 256, 256, 16)
    scores = drawn(channels)
    dense = total(costs.macs, torch.ones(512, dtype=torch.bool))
    assert aligned_multiples(channels, scores, costs.macs, 0.5 * dense) == [8, 8]
    kept = choose(channels, scores, costs.macs, 0.5 * dense, multiple_of=None)
    assert int(kept[:256].sum()) % 8 == 0
    assert int(kept[256:].sum()) % 8 == 0
    small, few = opened(4, 6, 3)
    assert aligned_multiples(small, drawn(small), few.macs, 28) in ([1], [2])


def test_channels_that_may_not_go_stay_and_so_does_a_least_share() -> None:
    channels, costs = opened(8, 16, 16, 4)
    movable = torch.ones(32, dtype=torch.bool)
    movable[:16] = False
    kept = choose(channels, drawn(channels), costs.macs, 350, movable=movable, least=0.5)
    assert bool(kept[:16].all())
    assert int(kept[16:].sum()) >= 8
    with pytest.raises(BudgetError, match="out of reach"):
        choose(channels, drawn(channels), costs.macs, 200, movable=movable, least=0.5)


def test_out_of_reach_says_the_least_that_is_left() -> None:
    channels, costs = opened(8, 16, 16, 4)
    words = r"with all that may be cut, 13 MACs of 448 are left"
    with pytest.raises(BudgetError, match=words) as caught, budget_of("macs", costs.macs):
        choose(channels, drawn(channels), costs.macs, 5)
    assert caught.value.hint == "raise the budget to macs=3%"
    with budget_of("macs", costs.macs):
        choose(channels, drawn(channels), costs.macs, 0.03 * 448)


def test_out_of_reach_says_how_many_channels_may_go() -> None:
    channels, costs = opened(8, 16, 16, 4)
    words = "at most 93.75% of the channels may go"
    with pytest.raises(BudgetError, match=words) as caught, budget_of("sparsity", costs.channels):
        choose(channels, drawn(channels), costs.channels, 0)
    assert caught.value.hint == "lower the budget to sparsity=0.9375"


def test_where_nothing_may_go_the_reasons_are_listed() -> None:
    case = named("Recurrent")
    channels = find_channels(trace_graph(case.make(), case.inputs(2)))
    with pytest.raises(BudgetError, match="lstm keeps its state and inputs"):
        choose(channels, torch.zeros(0), (), 0)


@pytest.mark.parametrize("seed", [13, 32])  # of forty seeds those where a block of an inner pick went below the limit
def test_no_pick_goes_below_the_limit_of_the_last(seed: int) -> None:
    graph = trace_graph(fashion_net().eval(), (torch.zeros(2, 1, 28, 28),))
    channels = find_channels(graph)
    everywhere = torch.ones(channels.count, dtype=torch.bool)
    target = CutTarget(
        channels, graph, Budget("macs", 0.5, "dense"), everywhere, multiple_of=None, least=0.1, cost=None
    )
    generator = torch.Generator().manual_seed(seed)
    base = torch.rand(channels.count, generator=generator) ** 3
    gone = ~everywhere
    for period in range(10):
        scores = base * (0.5 + torch.rand(channels.count, generator=generator))
        gone |= ~target.choose(torch.where(gone, 0.0, scores), (period + 1) / 10, everywhere, gone)
    assert 0.98 <= target.cost_of(~gone) / target.limit <= 1


def test_channels_go_first_with_which_a_whole_block_goes() -> None:
    channels, costs = opened(16, 64, 64, 64, 16)
    scores = torch.rand(192, generator=torch.Generator().manual_seed(2))
    limit = 0.6 * total(costs.macs, torch.ones(192, dtype=torch.bool))
    counts = [
        [int(left.sum()) for _, left in channels.split(kept)]
        for kept in (
            choose(channels, scores, costs.macs, limit, multiple_of=8, in_blocks=flag) for flag in (False, True)
        )
    ]
    assert counts == [[56, 48, 40], [48, 48, 48]]
