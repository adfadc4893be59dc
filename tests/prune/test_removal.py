"""Budgets of MACs for single weights: least cost by enumeration of thresholds, in every method, and what is refused."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from compress.apply import apply_plan
from compress.budget import Budget
from compress.context import Context
from compress.data import Data
from compress.errors import BudgetError
from compress.graph.trace import Graph, trace_graph
from compress.model import Source
from compress.numerics.units import Units
from compress.pattern import Pattern
from compress.plan import Plan
from compress.prune import gradual, layerwise, magnitude, obs
from compress.prune.removal import Removal, remaining
from compress.task import Calibration, Classification
from compress.train.recipe import Recipe, Training

METHODS: dict[str, Any] = {"magnitude": magnitude, "obs": obs, "layerwise": layerwise, "gradual": gradual}
OPTIONS = {"rounds": 2, "scope": "global", "fisher": "ggn", "exclude": ()}
SHAPES = ((3, 2), (2, 4), (1, 5))
every_method = pytest.mark.parametrize("method", METHODS)


# -- the least cost


@given(
    values=st.lists(st.integers(0, 9), min_size=19, max_size=19),
    each=st.tuples(*[st.integers(1, 6)] * 3),
    share=st.floats(0, 1),
)
def test_no_other_thresholds_save_as_much_for_less(values: list[int], each: tuple[int, int, int], share: float) -> None:
    """All choices of a threshold for each layer: whichever saves as much costs as much, and the last one was needed."""
    units = {f"l{i}": Units(shape, 0, 1, Pattern()) for i, shape in enumerate(SHAPES)}
    parts = torch.tensor(values, dtype=torch.float64).split([math.prod(shape) for shape in SHAPES])
    costs = {name: part.reshape(own.shape) for (name, own), part in zip(units.items(), parts, strict=True)}
    macs = dict(zip(units, each, strict=True))
    whole = sum(macs[name] * cost.numel() for name, cost in costs.items())
    amount = math.ceil(share * whole)
    gone = {n: ~m for n, m in remaining(units, costs, Removal(amount, whole, macs), "global").items()}
    cost, saved = (
        sum(float(of(name)) for name in units)
        for of in (lambda n: costs[n][gone[n]].sum(), lambda n: macs[n] * gone[n].sum())
    )
    assert saved >= amount
    assert saved - amount < max(each) or amount == 0
    sums = {name: [0.0, *cost.flatten().sort().values.cumsum(0).tolist()] for name, cost in costs.items()}
    choices = itertools.product(*(range(len(sums[name])) for name in units))
    found = [
        (sum(map(lambda n, k: sums[n][k], units, c)), sum(map(lambda n, k: macs[n] * k, units, c))) for c in choices
    ]
    assert cost == min(other for other, of in found if of >= saved)


def test_without_macs_the_cheapest_weights_go() -> None:
    units = {name: Units((1, 4), 0, 1, Pattern()) for name in "ab"}
    costs = {"a": torch.tensor([[1.0, 2, 3, 4]]), "b": torch.tensor([[1.5, 2.5, 5, 6]])}
    alike = remaining(units, costs, Removal(3, 8), "global")
    assert [mask.int().tolist() for mask in alike.values()] == [[[0, 0, 1, 1]], [[0, 1, 1, 1]]]
    heavy = remaining(units, costs, Removal(30, 44, {"a": 1.0, "b": 10.0}), "global")
    assert [mask.int().tolist() for mask in heavy.values()] == [[[1, 1, 1, 1]], [[0, 0, 0, 1]]]


# -- methods


class Net(nn.Module):
    """Weights of the first convolution make 36 MACs each, of the second 16, of the head 1; and there is attention."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.next, self.head = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(128, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.next(torch.relu(self.stem(x)))).flatten(2)
        y: Tensor = self.head((torch.softmax(x @ x.transpose(1, 2), -1) @ x).flatten(1))
        return y


@pytest.fixture(scope="module")
def net() -> tuple[nn.Module, Graph]:
    module = Net().eval().requires_grad_(False)
    return module, trace_graph(module, (torch.zeros(2, 1, 8, 8),))


def planned(
    net: tuple[nn.Module, Graph], method: str, budget: Budget, **options: Any
) -> tuple[Plan, dict[str, Tensor], dict[str, Tensor]]:
    """The plan, its sidecar, and the state that they make."""
    (module, graph), x = net, torch.randn(24, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    data = Data((x,), None, "examples")
    context = Context(torch.Generator().manual_seed(0), torch.device("cpu"), lambda *_: None, lambda _: 0, [])
    if method == "gradual":
        context = replace(context, training=Training(data, Recipe(12, optimizer="sgd", lr=1e-3, batch_size=8), 0))
    source = Source(Path("net.pt"), "0" * 64, module, "torch", None, {}, {}, ())
    calibration = Calibration(Classification(), data)
    plan, sidecar = METHODS[method].plan(source, graph, {}, calibration, budget, {**OPTIONS, **options}, context)
    return plan, sidecar, apply_plan(module, graph.tied, plan, sidecar).state()


def macs_of(graph: Graph, state: Mapping[str, Tensor]) -> int:
    """By definition: a MAC for each use of a weight that isn't zero, and all that have no weight."""
    uses = {layer.tensor: layer.macs // layer.elements for layer in graph.layers}
    assert list(uses.values()) == [36, 16, 1]
    rest = graph.macs - sum(layer.macs for layer in graph.layers)
    assert rest == 2 * 8 * 8 * 16
    return rest + sum(each * int((state[tensor] != 0).sum()) for tensor, each in uses.items())


@every_method
@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("pattern", ["unstructured", "4x1"])
def test_the_macs_that_are_left_are_within_the_budget(
    method: str, scope: str, pattern: str, net: tuple[nn.Module, Graph]
) -> None:
    plan, _, state = planned(net, method, Budget("macs", 0.4, "dense"), scope=scope, pattern=pattern)
    left, limit = macs_of(net[1], state), 0.4 * net[1].macs
    slack = {"unstructured": 36, "4x1": 4 * 36}[pattern]
    assert limit - slack - (scope == "layer") * slack <= left <= limit
    assert plan.predicted["macs"] == left


@every_method
def test_macs_move_removals_to_weights_that_make_more_of_them(method: str, net: tuple[nn.Module, Graph]) -> None:
    plan, _, state = planned(net, method, Budget("macs", 0.6, "dense"))
    assert "macs" in plan.predicted
    as_sparse, _, other = planned(net, method, Budget("sparsity", plan.predicted["sparsity"]))
    assert "macs" not in as_sparse.predicted
    assert macs_of(net[1], state) < macs_of(net[1], other), "as many weights, of fewer MACs"
    heads = [int((found["head.weight"] != 0).sum()) for found in (state, other)]
    assert heads[0] > heads[1]


def test_magnitude_takes_the_least_squares_for_each_mac(net: tuple[nn.Module, Graph]) -> None:
    _, _, state = planned(net, "magnitude", Budget("macs", 0.5, "dense"))
    dense, each = net[0].state_dict(), {layer.tensor: layer.macs / layer.elements for layer in net[1].layers}
    gone = [dense[name][state[name] == 0].square() / uses for name, uses in each.items()]
    kept = [dense[name][state[name] != 0].square() / uses for name, uses in each.items()]
    assert float(torch.cat(gone).max()) < float(torch.cat(kept).min())


def test_layerwise_takes_the_least_sum_of_row_costs(
    net: tuple[nn.Module, Graph], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    real = layerwise.removal_costs
    monkeypatch.setattr(layerwise, "removal_costs", lambda *a, **k: seen.update(real(*a, **k)) or dict(seen))
    plan, _, _ = planned(net, "layerwise", Budget("macs", 0.5, "dense"))
    gone = {name: mask.total - mask.kept for name, mask in plan.masks().items()}
    each = {layer.tensor: layer.macs / layer.elements for layer in net[1].layers}
    sums = {name: [0.0, *costs.flatten().sort().values.cumsum(0).tolist()] for name, (costs, _) in seen.items()}
    cost, saved = sum(sums[n][gone[n]] for n in gone), sum(each[n] * gone[n] for n in gone)
    # For each number of weights of the two convolutions, as many of the head as are needed.
    for first, second in itertools.product(range(len(sums["stem.weight"])), range(len(sums["next.weight"]))):
        missing = saved - each["stem.weight"] * first - each["next.weight"] * second
        if missing <= 128 * 4:
            head = max(0, math.ceil(missing))
            other = sums["stem.weight"][first] + sums["next.weight"][second] + sums["head.weight"][head]
            assert other >= cost * (1 - 1e-9)


@every_method
def test_excluded_layers_count_as_they_are(method: str) -> None:
    module = Net().eval().requires_grad_(False)
    module.next.weight[:4] = 0  # 4 * 8 * 9 weights of 16 MACs
    graph = trace_graph(module, (torch.zeros(2, 1, 8, 8),))
    share = 0.85 if method == "gradual" else 0.55
    plan, _, state = planned((module, graph), method, Budget("macs", share, "dense"), exclude=("next.*",))
    left, limit = macs_of(graph, state), share * graph.macs
    if method == "gradual":  # its training fills what was zero
        assert bool((state["next.weight"][:4] != 0).any()) and left <= limit
    else:
        assert torch.equal(state["next.weight"], module.next.weight)
        assert limit - 36 <= left <= limit and left == plan.predicted["macs"]


@every_method
def test_what_is_within_the_budget_stays_as_it_is(method: str, net: tuple[nn.Module, Graph]) -> None:
    plan, _, state = planned(net, method, Budget("macs", 1.0, "dense"))
    assert all(torch.equal(value, state[key]) for key, value in net[0].state_dict().items())
    assert plan.predicted == {"sparsity": 0.0, "macs": net[1].macs}


# -- what can't be


@every_method
def test_a_budget_out_of_reach_gives_the_least(method: str, net: tuple[nn.Module, Graph]) -> None:
    macs = net[1].macs
    least = 2 * 8 * 8 * 16 + 36 * 72
    with pytest.raises(
        BudgetError, match=rf"macs=20% is out of reach: .* {least:,} MACs of {macs:,} are left"
    ) as caught:
        planned(net, method, Budget("macs", 0.2, "dense"), exclude=("stem.*",))
    assert caught.value.least == least
    share = math.ceil(1e3 * least / macs) / 10
    assert caught.value.hint == f"raise --budget to macs={share:g}%, or exclude less"
    plan, _, _ = planned(net, method, Budget("macs", share / 100, "dense"), exclude=("stem.*",))
    assert plan.predicted["macs"] <= share / 100 * macs


@every_method
def test_n_of_m_makes_its_own_share_of_macs(method: str, net: tuple[nn.Module, Graph]) -> None:
    graph = net[1]
    left = graph.macs - sum(layer.macs // 2 for layer in graph.layers[1:])
    with pytest.raises(
        BudgetError, match=f"pattern 2:4 leaves {left:,} MACs of {graph.macs:,}, more than macs=50%"
    ) as no:
        planned(net, method, Budget("macs", 0.5, "dense"), pattern="2:4")
    assert "2:4 leaves stem.weight dense" in str(no.value.hint)
    plan, _, state = planned(net, method, Budget("macs", float(left)), pattern="2:4")
    assert plan.predicted["macs"] == macs_of(graph, state) == left


def test_zeros_of_the_source_count_towards_a_pattern() -> None:
    module = Net().eval().requires_grad_(False)
    module.next.weight[:4] = 0
    graph = trace_graph(module, (torch.zeros(2, 1, 8, 8),))
    left = graph.macs - 16 * 8 * 8 * 9 * 3 // 4 - 4 * 128 // 2
    _, _, state = planned((module, graph), "magnitude", Budget("macs", float(left)), pattern="2:4")
    assert macs_of(graph, state) == left
