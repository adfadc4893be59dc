"""Mixtures of widths against all of them, rows against their costs, and output changes against whole runs."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from compress.context import Context
from compress.data import Data
from compress.graph.trace import trace_graph
from compress.quantize.changes import loss_changes, telling_examples
from compress.quantize.channel_widths import Rows, mixtures, rounded_rows
from compress.task import Classification, divergence
from compress.widths import WIDTHS, by_channel, counts, is_width, letters_of, mean_bits, shown

CONTEXT = Context(torch.Generator(), torch.device("cpu"), lambda *_: None, lambda _: 0, [])


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 999), count=st.integers(2, 5), target=st.sampled_from([1.25, 2.0, 2.75, 4.0]))
def test_a_mixture_keeps_its_target_and_hardly_loses_more_than_the_best_one(
    seed: int, count: int, target: float
) -> None:
    random = torch.Generator().manual_seed(seed)
    letters = "0abceh"
    bits = torch.tensor([WIDTHS[letter].bits for letter in letters], dtype=torch.float64)
    costs = (4**-bits)[None] * torch.rand(count, 1, generator=random, dtype=torch.float64).pow(4)
    costs = costs * (0.5 + torch.rand(costs.shape, generator=random, dtype=torch.float64))
    room = max(target * count, 5) + 1e-9
    found = mixtures(Rows(letters, {}, costs), [room / count])
    every = {
        places: float(costs[range(count), list(places)].sum())
        for places in itertools.product(range(len(letters)), repeat=count)
        if float(bits[list(places)].sum()) <= room
    }
    for width in found.values():
        chosen = (letters_of(width) * count)[:count] if len(letters_of(width)) == 1 else letters_of(width)
        assert mean_bits(width) * count <= room + 1e-9
        lost = sum(float(costs[row, letters.index(letter)]) for row, letter in enumerate(chosen))
        assert lost >= min(every.values()) - 1e-12
        # What a price for a bit can't reach is less than one row's way to the widest width.
        assert (
            lost <= min(loss for places, loss in every.items() if float(bits[list(places)].sum()) <= room - 5) + 1e-12
        )
        for row, letter in enumerate(chosen):
            more = bits - WIDTHS[letter].bits
            fits = (more > 0) & (float(bits[[letters.index(own) for own in chosen]].sum()) + more <= room)
            assert not bool((costs[row, fits] < costs[row, letters.index(letter)]).any())


def layer_rows(weight: torch.Tensor, *, with_integers: bool = False, by_outputs: bool = True) -> Rows:
    module = nn.Linear(weight.shape[1], weight.shape[0], bias=False).eval()
    with torch.no_grad():
        module.weight.copy_(weight)
    graph = trace_graph(module, (torch.randn(2, weight.shape[1]),))
    x = torch.randn(200, weight.shape[1], generator=torch.Generator().manual_seed(3))
    moment = (x.T @ x / len(x)).double()
    return rounded_rows(
        graph.layers[0], weight, moment, torch.ones(len(weight)).double(),
        with_integers=with_integers, by_outputs=by_outputs,
    )  # fmt: skip


@pytest.mark.parametrize("by_outputs", [True, False])
def test_more_levels_cost_less_and_none_costs_the_whole_row(by_outputs: bool) -> None:
    weight = torch.randn(6, 20, generator=torch.Generator().manual_seed(0))
    weight[2] = 0
    rows = layer_rows(weight, by_outputs=by_outputs)
    assert rows.letters == "0abcdefghijklm2345678" and rows.may_mix()
    for letters in ("02345678", "0aegikm"):
        costs = rows.costs[:, [rows.letters.index(letter) for letter in letters]]
        assert bool((costs[[0, 1, 3, 4, 5]].diff(dim=1) < 0).all()) and bool((costs[2] == 0).all())
    assert torch.equal(rows.at("channels:000000"), torch.zeros_like(weight))
    mixed = rows.at("channels:0ad34k")
    for place, letter in enumerate("0ad34k"):
        assert torch.equal(mixed[place], rows.rounded[letter][place])
        assert len(mixed[place].unique()) <= WIDTHS[letter].count()
    assert rows.cost("channels:0ad34k") == pytest.approx(
        sum(float(rows.costs[place, rows.letters.index(letter)]) for place, letter in enumerate("0ad34k"))
    )
    assert rows.cost(3) == pytest.approx(float(rows.costs[:, rows.letters.index("3")].sum()))


def test_with_integers_eight_bits_are_seven_and_channels_do_not_have_them() -> None:
    assert layer_rows(torch.randn(4, 8), with_integers=True).letters == "0abcdefghijklm234567"
    assert layer_rows(torch.randn(1, 8)).letters == "2345678"


def test_a_weight_of_zeros_has_no_mixture_without_levels() -> None:
    rows = layer_rows(torch.zeros(3, 8))
    assert all(is_width(width) for width in mixtures(rows, (1.25, 2, 4)).values())


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        y += 1
        z = torch.relu_(self.second(y)) + y
        return z.mean((2, 3))


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 1), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.first(x))
        return self.third((torch.relu(self.second(y)) + y).mean((2, 3)))


@pytest.mark.parametrize("kind", [InPlace, Branches])
def test_output_changes_are_those_of_whole_runs(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    module = kind().eval()
    x = torch.randn(10, 2, 6, 6)
    graph = trace_graph(module, (x[:2],))
    state = {name: value.clone() for name, value in module.state_dict().items()}
    variants = {layer.tensor: [state[layer.tensor] * factor for factor in (0.5, 1.0, 1.1)] for layer in graph.layers}
    found, _ = loss_changes(graph, variants, {}, Data((x,), None, "x"), Classification(), CONTEXT)
    with torch.no_grad():
        dense = module(x)
        for name, values in variants.items():
            for value, loss in zip(values, found[name], strict=True):
                module.load_state_dict({**state, name: value})
                assert loss == pytest.approx(divergence(dense, module(x), are_logits=True), rel=1e-4, abs=1e-9)


def test_a_few_telling_examples_stand_for_all_of_them() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 64), nn.ReLU(), nn.Linear(64, 5)).eval()
    x = torch.randn(400, 6) * torch.logspace(-1.5, 0.5, 400)[torch.randperm(400)][:, None]
    data, task, graph = Data((x,), None, "x"), Classification(), trace_graph(module, (x[:2],))
    state = module.state_dict()
    variants = {
        layer.tensor: [state[layer.tensor] * (1 + 0.1 * torch.randn(state[layer.tensor].shape)) for _ in range(8)]
        for layer in graph.layers
    }
    usual = {name: values[0] for name, values in variants.items()}
    few, stands = telling_examples(graph, usual, data, 40, task, CONTEXT)
    assert len(few) == len(stands) <= 40 and float(stands.sum()) == pytest.approx(400, rel=0.25)

    def losses(data: Data, stands: torch.Tensor | None = None) -> torch.Tensor:
        found, _ = loss_changes(graph, variants, {}, data, task, CONTEXT, counts=stands)
        return torch.tensor([loss for values in found.values() for loss in values])

    of_all = losses(data)
    drawn, first = ((losses(*some) / of_all - 1).abs().mean() for some in ((few, stands), (data.first(40),)))
    assert drawn < 0.3 and drawn < first / 2
    assert telling_examples(graph, usual, data, 400, task, CONTEXT)[0] is data


def test_few_examples_are_drawn_of_sequences() -> None:
    module = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7)).eval()
    x = torch.randint(0, 7, (20, 1000), generator=torch.Generator().manual_seed(0))
    graph = trace_graph(module, (x[:2],))
    usual = {layer.tensor: module.state_dict()[layer.tensor] * 0.9 for layer in graph.layers}
    few, _ = telling_examples(graph, usual, Data((x,), None, "x"), 128, Classification(), CONTEXT)
    assert len(few) <= 4


def test_widths_in_words() -> None:
    width = by_channel(list("00t3344"))
    assert width == "channels:00t3344" and by_channel(["3", "3"]) == 3 and by_channel(["t", "t"]) == "channels:tt"
    assert counts(width) == "2 without levels, 1 of 3 levels, 2 of 3 bits, 2 of 4 bits"
    assert shown(width) == "2.229 bits by channel" and shown(4) == "4 bits"
    assert not is_width("channels:" + "0" * 64) and is_width("channels:" + "0" * 63 + "2") and not is_width(1)
