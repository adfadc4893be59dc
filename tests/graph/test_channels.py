"""Cutting channels out of every network of the zoo changes no output: the rest computes what it did beside zeros."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import zoo
import zoo_families
from torch import Tensor, nn
from torch.nn import functional as F
from zoo import Network
from zoo_sequences import SEQUENCES
from zoo_traps import TRAPS, UNTRACEABLE

from compress.errors import InputError, UsageError
from compress.graph.channel_cost import channel_costs, num_parameters, total
from compress.graph.cut import cut, kept_channels, masked, worst_difference
from compress.graph.groups import Channels, find_channels
from compress.graph.labels import Axis, Labels, matched_dims, reshaped
from compress.graph.trace import trace_graph

TOLERANCE = 1e-9  # of the largest output, in float64
HAND_WRITTEN = [*TRAPS, *SEQUENCES]
OTHERS = [*zoo.NETWORKS, *(n for n in zoo_families.FAMILIES if {"timm", "transformers"} & n.traits)]


def channels_of(network: Network) -> Channels:
    return _channels_of(network.name)


@functools.cache
def _channels_of(name: str) -> Channels:
    network = next(n for n in [*HAND_WRITTEN, *OTHERS] if n.name == name)
    return find_channels(trace_graph(network.make(), network.inputs(2)))


def drawn(channels: Channels, seed: int, share: float) -> torch.Tensor:
    """A random share of the channels of each group, one of each at least."""
    generator = torch.Generator().manual_seed(seed)
    keep = {}
    for group in channels.groups:
        count = max(1, round(group.size * share))
        keep[group.name] = torch.randperm(group.size, generator=generator)[:count].sort().values.tolist()
    return kept_channels(channels, keep)


def assert_cuts_are_right(network: Network) -> None:
    channels = channels_of(network)
    for seed, share in enumerate((0.5, 0.25)):
        kept = drawn(channels, seed, share)
        assert worst_difference(channels, kept, network.inputs(3), seed=seed) <= TOLERANCE


@pytest.mark.parametrize("case", [n for n in HAND_WRITTEN if UNTRACEABLE not in n.traits], ids=lambda n: n.name)
def test_what_is_left_computes_what_it_did(case: Network) -> None:
    assert_cuts_are_right(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", OTHERS, ids=lambda n: n.name)
def test_what_is_left_of_plain_and_of_other_packages_networks_computes_what_it_did(case: Network) -> None:
    for package in ("timm", "transformers"):
        if package in case.traits:
            pytest.importorskip(package, reason="pip install '.[zoo]'", exc_type=ImportError)
    assert_cuts_are_right(case)


@pytest.mark.parametrize("case", [n for n in TRAPS if UNTRACEABLE not in n.traits], ids=lambda n: n.name)
def test_costs_are_those_of_the_smaller_network(case: Network) -> None:
    channels = channels_of(case)
    costs = channel_costs(channels, 2)
    kept = drawn(channels, 3, 0.5)
    small = cut(channels, channels.module, kept)
    assert total(costs.params, kept) == num_parameters(small)
    again = trace_graph(small, case.inputs(2))
    assert total(costs.macs, kept) == again.macs


def test_a_residual_stream_and_its_padded_shortcuts_are_cut_channel_by_channel() -> None:
    channels = channels_of(zoo_families_named("cifar_resnet"))
    streams = [group for group in channels.groups if len(group.members) > 6]
    assert [(group.size, len(group.members)) for group in streams] == [(6, 42), (6, 24), (12, 12)]


def zoo_families_named(name: str) -> Network:
    return next(network for network in zoo_families.FAMILIES if network.name == name)


def test_heads_go_whole_with_their_queries_keys_and_values() -> None:
    channels = channels_of(zoo.named("transformer_encoder"))
    heads = [group for group in channels.groups if "in_proj_weight" in group.name]
    assert [group.size for group in heads] == [3, 3]
    assert {(m.tensor, m.dim): m.indices.shape for m in heads[0].members} == {
        ("layers.0.self_attn.in_proj_weight", 0): (3, 12),
        ("layers.0.self_attn.in_proj_bias", 0): (3, 12),
        ("layers.0.self_attn.out_proj.weight", 1): (3, 4),
    }


def test_what_stays_has_its_reason_and_its_line() -> None:
    held = [f for f in channels_of(zoo.named("Recurrent")).frozen if f.reason == "lstm keeps its state and inputs"]
    assert held
    assert all(f.node.startswith("lstm") and f.source.startswith("zoo.py:") for f in held)
    outputs = [f for f in channels_of(zoo.named("plain_cnn")).frozen if f.reason == "the network's output"]
    assert {(f.tensor, f.dim) for f in outputs} == {("2.2.weight", 0), ("2.2.bias", 0)}


def test_an_operator_without_a_rule_freezes_what_reaches_it_and_is_named() -> None:
    class Odd(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = torch.nn.Linear(6, 8), torch.nn.Linear(8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            row = self.first(x).unsqueeze(1)
            return self.second(torch.linalg.matrix_power(row.mT @ row, 2)[:, 0])

    channels = find_channels(trace_graph(Odd().eval(), (torch.randn(2, 6),)))
    assert channels.groups == ()
    assert any("matrix_power has no channel rule" in f.reason for f in channels.frozen)


def test_a_group_may_not_be_emptied_nor_asked_for_channels_that_it_lacks() -> None:
    channels = channels_of(zoo.named("plain_cnn"))
    name = channels.groups[0].name
    with pytest.raises(UsageError, match="would keep nothing along dimension 0"):
        kept_channels(channels, {name: []})
    with pytest.raises(UsageError, match=r"has channels 0 to 7, not \[8\]"):
        kept_channels(channels, {name: [8]})
    with pytest.raises(UsageError, match="has no channel group 'nothing'"):
        kept_channels(channels, {"nothing": [0]})


def test_a_wrong_cut_is_found() -> None:
    """A check that couldn't fail would be none: a channel is kept in one place and cut in another."""
    channels = channels_of(zoo.named("plain_cnn"))
    kept = kept_channels(channels, {channels.groups[0].name: [0, 1, 2, 3]})
    other = kept_channels(channels, {channels.groups[0].name: [0, 1, 2, 4]})
    network = zoo.named("plain_cnn")
    with torch.no_grad():
        whole = masked(channels, channels.module, kept)(*network.inputs(3))
        small = cut(channels, channels.module, other)(*network.inputs(3))
    assert float((whole - small).abs().max()) > 1e-3 * float(whole.abs().max())


def test_data_dependent_control_flow_is_refused_by_name() -> None:
    (network,) = [n for n in TRAPS if UNTRACEABLE in n.traits]
    with pytest.raises(InputError, match=r"torch\.export can't trace the network"):
        trace_graph(network.make(), network.inputs(2))


def test_bound_labels_share_the_smallest() -> None:
    labels = Labels()
    a, b, c = (labels.fresh(4) for _ in range(3))
    labels.bind(a, b.flip(0))
    labels.bind(b[1:], c[:3])
    assert labels.roots().tolist() == [0, 1, 2, 3, 3, 2, 1, 0, 2, 1, 0, 11]


@pytest.mark.parametrize(
    ("before", "after", "groups"),
    [
        ((2, 12, 5), (2, 3, 4, 5), [([0], [0]), ([1], [1, 2]), ([2], [3])]),
        ((2, 3, 4, 5), (6, 20), [([0, 1], [0]), ([2, 3], [1])]),
        ((7, 2, 12), (7, 6, 4), [([0], [0]), ([1, 2], [1, 2])]),
        ((2, 8, 1, 1), (2, 8), [([0], [0]), ([1], [1]), ([2], []), ([3], [])]),
    ],
)
def test_a_reshape_makes_runs_of_dimensions_from_runs(before: object, after: object, groups: object) -> None:
    assert matched_dims(before, after) == groups  # type: ignore[arg-type]


def test_labels_are_reshaped_as_the_activation_is() -> None:
    labels = Labels()
    axis = Axis(labels.fresh(6).reshape(1, 6, 1, 1), True)
    flat = reshaped(labels, axis, (2, 6, 2, 2), (2, 24))
    assert flat is not None
    assert flat.labels.tolist() == [[i // 4 for i in range(24)]]
    back = reshaped(labels, flat, (2, 24), (2, 6, 4))
    assert back is not None
    assert back.labels.shape == (1, 6, 1)


# -- what is pruned isn't always zero --------------------------------------------------------------------------------


class Written(nn.Module):
    """``first`` makes channels, ``forward`` does something with them, and ``last`` reads what comes of it."""

    def __init__(self, code: Callable[..., Tensor], width: int = 1) -> None:
        super().__init__()
        self.code, self.first, self.last = code, nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(width, 4, 3)
        self.one, self.weight = nn.Conv2d(1, 1, 3, padding=1), nn.Parameter(torch.randn(6, 8, 3, 3))
        self.kernel, self.rows = nn.Parameter(torch.ones(1, 1, 3, 3)), nn.Embedding(2, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.code(self, self.first(x)))


def written(y: Tensor, write: Callable[[Tensor], Any]) -> Tensor:
    y = y.relu().clone()
    write(y)
    return y.sum(1, keepdim=True)


# By what the rules have to see.
NOT_ZERO: dict[str, tuple[Callable[..., Tensor], int]] = {
    "a bias in the batch": (lambda s, y: s.one(y.reshape(-1, 1, 8, 8)).reshape(-1, 8, 8, 8).sum(1, keepdim=True), 1),
    "sigmoid_ of a view": (lambda s, y: written(y, lambda y: y[:, :4].sigmoid_()), 1),
    "fill_ of a view": (lambda s, y: written(y, lambda y: y[:, :3].fill_(1.0)), 1),
    "add_ beside the graph": (lambda s, y: written(y, lambda y: y.detach().add_(1.0)), 1),
    "a weight that is made": (lambda s, y: F.conv2d(y.sigmoid(), F.softplus(s.weight), padding=1), 6),
    "padding that isn't zero": (lambda s, y: F.pad(y, (1, 1, 1, 1), value=1.0).sum(1, keepdim=True), 1),
    "hardtanh above zero": (lambda s, y: F.hardtanh(y, 0.1, 1.0).sum(1, keepdim=True), 1),
    "hardtanh": (lambda s, y: F.hardtanh(y).sum(1, keepdim=True), 1),
    "a norm without weights": (lambda s, y: F.group_norm(y + 1, 4).sum(1, keepdim=True), 1),
    "rows by a threshold": (lambda s, y: s.rows((y.mean((2, 3)) > 0).long()).reshape(-1, 1, 8, 4), 1),
    "a division by its maximum": (lambda s, y: y / y.abs().amax((2, 3), keepdim=True), 8),
    "a logarithm": (lambda s, y: y.square().log(), 8),
    "noise of its own": (lambda s, y: y + torch.randn_like(y), 8),
    "noise for all": (lambda s, y: y + torch.randn(y.shape[0], 1, 8, 8), 8),
    "dropout at all times": (lambda s, y: F.dropout(y, 0.5), 8),
    "a kernel for all channels": (lambda s, y: F.conv2d(y, s.kernel.expand(8, 1, 3, 3), padding=1, groups=8), 8),
    "the same, repeated": (lambda s, y: F.conv2d(y, s.kernel.repeat(8, 1, 1, 1), padding=1, groups=8), 8),
    "a length": (lambda s, y: torch.linalg.vector_norm(y, dim=1, keepdim=True), 1),
    "one taken alone": (lambda s, y: torch.cat([y[:, 1:2], y[:, :1], y[:, 2:]], 1), 8),
    "pooled and put back": (lambda s, y: F.max_unpool2d(*F.max_pool2d(y, 2, return_indices=True), 2), 8),
}
# Those whose first channels can be cut all the same.
CUT = {
    "hardtanh", "a length", "noise for all", "one taken alone", "pooled and put back", "a kernel for all channels",
    "the same, repeated",
}  # fmt: skip


@pytest.mark.parametrize("what", NOT_ZERO)
def test_what_is_not_zero_when_it_is_pruned_is_seen(what: str) -> None:
    code, width = NOT_ZERO[what]
    module = Written(code, width).eval().requires_grad_(False)
    channels = find_channels(trace_graph(module, (torch.randn(2, 3, 8, 8),)))
    keep = {group.name: range(0, group.size, 2) for group in channels.groups}
    assert worst_difference(channels, kept_channels(channels, keep), (torch.randn(3, 3, 8, 8),)) <= 1e-9
    assert ("first.weight" in keep) is (what in CUT)


def test_a_part_that_is_named_as_a_graphs_own_is_refused_by_name() -> None:
    module = nn.Module()
    module.graph = nn.Linear(3, 3)
    with pytest.raises(InputError, match="'graph', which torch's graphs keep"):
        trace_graph(module, (torch.randn(2, 3),))


def test_cells_filters_of_frequencies_and_complex_constants_are_cut() -> None:
    sizes = {
        name: {g.name: g.size for g in channels_of(zoo_families_named(name)).groups}
        for name in ("Cells", "Frequencies", "ComplexRotary")
    }
    assert sizes["Cells"] == {"first.weight": 8, "gru.weight_ih": 10, "lstm.weight_ih": 8}
    assert sizes["Frequencies"] == {"filter": 8, "out.weight": 8}
    assert sizes["ComplexRotary"] == {"query.weight": 4}


def test_query_heads_go_with_the_keys_that_they_share_and_copies_with_their_channels() -> None:
    sizes = {
        name: {g.name: g.size for g in channels_of(zoo_families_named(name)).groups}
        for name in ("BroadcastKeys", "GroupedQueries", "Retention", "SharedKernels", "OuterProducts")
    }
    # Half a head is turned, and one key head is all queries' own: a head of either goes whole.
    assert sizes["BroadcastKeys"] == {"q.weight": 2, "queries.weight": 6, "angles": 9, "angles#2": 1}
    assert sizes["GroupedQueries"] == {"q.weight": 3}
    assert sizes["Retention"] == {"qkv.weight": 3}
    assert sizes["SharedKernels"] == {"stem.0.weight": 8}
    assert sizes["OuterProducts"] == {"outputs": 20, "inputs": 16}


def test_a_mean_over_channels_keeps_its_divisor_and_a_norms_mean_its_channels() -> None:
    groups = {group.name: group.size for group in channels_of(zoo_families_named("MeansOverChannels")).groups}
    assert groups == {"stem.0.weight": 8, "gamma": 16, "narrow.weight": 8}

    class Norm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            return self.second(x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))

    channels = find_channels(trace_graph(Norm().eval(), (torch.randn(2, 6),)))
    assert any("mean runs over it" in f.reason for f in channels.frozen)
