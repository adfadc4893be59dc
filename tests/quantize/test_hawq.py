"""HAWQ-V2: the budget kept, the best of all assignments chosen, widths fixed and tied, and odd networks survived."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from zoo import named

from compress import canonical
from compress.apply import apply_plan
from compress.budget import Budget, parse_budget
from compress.context import Context, Storage
from compress.curvature.moments import input_moments
from compress.curvature.network import open_network
from compress.data import Data
from compress.errors import BudgetError, InputError, NumericsError, UsageError
from compress.formats.packed import QuantizedTensor
from compress.frontier import FrontierRecord
from compress.graph.trace import Graph, trace_graph
from compress.measure import hessian_trace
from compress.model import Source
from compress.numerics.rounding import broadcast_scale, round_weight
from compress.plan import Plan
from compress.quantize import hawq
from compress.sensitivity import CostTable, Estimate, Sensitivity
from compress.task import Calibration, Classification, Regression, Task

OPTIONS: dict[str, Any] = {
    "activations": "float",
    "activation_range": "auto",
    "range": "mse",
    "reconstruction": "none",
    "bias_correction": "on",
    "exclude": (),
    "keep": (),
    "tie": (),
}


def quiet(stage: str, done: int, total: int | None) -> None:
    """Progress of a test."""


def model_bytes(choices: Mapping[str, Storage]) -> int:
    return 5000 + sum(storage.kept * (storage.bits - 32) // 8 for storage in choices.values())


def fresh_context(**changes: Any) -> Context:
    return Context(torch.Generator().manual_seed(0), torch.device("cpu"), quiet, model_bytes, [], **changes)


def four_layers(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    widths = [3, 5, 9, 6, 4]
    parts = [part for a, b in itertools.pairwise(widths) for part in (nn.Linear(a, b), nn.Tanh())]
    return nn.Sequential(*parts[:-1])


def examples(n: int = 16, *shape: int) -> Tensor:
    return torch.randn(n, *(shape or (3,)), generator=torch.Generator().manual_seed(1))


class Planned:
    """A network with its traces, ready to be planned at any budget."""

    def __init__(self, module: nn.Module, x: Tensor, *, task: Task | None = None) -> None:
        module.eval().requires_grad_(False)
        self.source = Source(Path("net.pt"), "0" * 64, module, "torch", None, {}, {}, ())
        self.graph: Graph = trace_graph(module, (torch.cat([x, x])[:2],))
        self.calibration = Calibration(task or Regression(), Data((x,), None, "examples"))
        given = {"trace": "ggn", "rtol": 0.05, "passes": 4}
        context = fresh_context()
        self.traces, _ = hessian_trace.measure(self.source, self.graph, self.calibration, given, context)

    def plan(self, budget: str | Budget | None, **options: Any) -> tuple[Plan, FrontierRecord]:
        costs = options.pop("costs", {})
        budget = parse_budget(budget) if isinstance(budget, str) else budget
        context = fresh_context(costs=costs)
        plan, sidecar = hawq.plan(
            self.source,
            self.graph,
            {"hessian-trace": self.traces},
            self.calibration,
            budget,
            {**OPTIONS, **options},
            context,
        )
        assert sidecar == {}
        (frontier,) = context.frontiers
        return plan, frontier

    def moments(self) -> dict[str, Tensor]:
        """``E[x x^T]`` of what each layer reads."""
        network = open_network(self.graph, device=torch.device("cpu"))
        return input_moments(network, self.calibration.data, progress=quiet)

    def expected_loss(self, plan: Plan) -> float:
        """Traces times the squared changes of the weights as the plan is applied, in the norm of the ranges' search."""
        state, layers = self.source.module.state_dict(), self.graph.layers
        applied = apply_plan(self.source.module, self.graph.tied, plan, {}).tensors
        moments = self.moments()
        total = 0.0
        for layer in layers:
            value, moment = applied[layer.tensor], moments[layer.tensor]
            if isinstance(value, QuantizedTensor):
                value = value.levels * broadcast_scale(value.scale, value.axis, value.levels.dim())
            change = value.double() - state[layer.tensor].double()
            moved = float(((change @ moment) * change).sum() / moment.diagonal().mean())
            total += self.traces.entries[layer.tensor, ""].value / layer.elements * moved / 2
        return total


@pytest.fixture(scope="module")
def small() -> Planned:
    return Planned(four_layers(), examples())


def widths(plan: Plan) -> dict[str, int]:
    return {name: decision.bits for name, decision in plan.quantized("weight").items()}


def average(planned: Planned, plan: Plan) -> float:
    bits, layers = widths(plan), planned.graph.layers
    return sum(la.elements * bits.get(la.tensor, 32) for la in layers) / sum(la.elements for la in layers)


def test_the_average_never_exceeds_its_budget_nor_the_loss_that_of_a_smaller_one(small: Planned) -> None:
    before = float("inf")
    for budget in torch.linspace(2, 8.5, 20).tolist():
        plan, frontier = small.plan(Budget("bits", budget))
        assert average(small, plan) <= budget + 1e-9
        assert average(small, plan) == pytest.approx(plan.predicted["average_bits"])
        assert plan.predicted["loss"] <= before
        assert plan.predicted["loss"] == frontier.losses[frontier.index]
        before = plan.predicted["loss"]


@pytest.mark.parametrize("budget", ["2.5bit", "4bit", "6.1bit", "bops=12K", "bops=15%", "4920B"])
def test_no_assignment_within_the_budget_is_expected_to_lose_less(small: Planned, budget: str) -> None:
    goal, layers, state = parse_budget(budget), small.graph.layers, small.source.module.state_dict()
    table, moments = [], small.moments()
    for layer in layers:
        moment = moments[layer.tensor]
        weight, trace = state[layer.tensor], small.traces.entries[layer.tensor, ""].value
        table.append([])
        for bits in range(2, 9):
            levels, scale = round_weight(weight, bits, axis=0, search="mse")
            change = (levels * scale[:, None] - weight).double()
            cost = {
                "bits": layer.elements * bits / sum(la.elements for la in layers),
                "bops": layer.macs * bits * 32,
                "bytes": model_bytes({layer.tensor: Storage(layer.elements, bits)}) - model_bytes({}),
            }[goal.quantity]
            moved = float(((change @ moment) * change).sum() / moment.diagonal().mean())
            table[-1].append((cost, trace / layer.elements * moved / 2))
    limit = goal.absolute(sum(layer.macs for layer in layers) * 32**2)
    limit -= model_bytes({}) if goal.quantity == "bytes" else 0
    sums = [[sum(column) for column in zip(*chosen, strict=True)] for chosen in itertools.product(*table)]
    best = min(loss for cost, loss in sums if cost <= limit + 1e-9)
    plan, frontier = small.plan(budget)
    assert len(frontier.items) == 4
    assert plan.predicted["loss"] == pytest.approx(best, rel=1e-5)


@pytest.mark.parametrize("search", ["auto", "minmax", "mse"])
def test_the_expected_loss_is_the_trace_times_the_change_of_the_applied_weights(small: Planned, search: str) -> None:
    plan, _ = small.plan("3.5bit", range=search)
    assert plan.options["range"] == search
    assert plan.predicted["loss"] == pytest.approx(small.expected_loss(plan), rel=1e-5)


@pytest.mark.parametrize("quantity", ["bits", "bops", "bytes"])
def test_every_point_of_a_frontier_has_the_cost_and_the_loss_that_it_says(small: Planned, quantity: str) -> None:
    start, frontier = small.plan(Budget(quantity, 1e9), keep=("2.*=4", "4.*=3"))
    layers = small.graph.layers
    for index in range(len(frontier.costs)):
        context = fresh_context()
        plan = hawq.at_point(start, small.graph, frontier, index, context)
        assert context.frontiers == [frontier.at(index, context.frontiers[0].chosen)]
        assert context.frontiers[0].index == index
        amounts = {
            "bits": average(small, plan),
            "bops": float(sum(layer.macs * widths(plan)[layer.tensor] * 32 for layer in layers)),
            "bytes": float(model_bytes({la.tensor: Storage(la.elements, widths(plan)[la.tensor]) for la in layers})),
        }
        slack = len(layers) if quantity == "bytes" else 0  # of rounding each weight's bytes
        assert frontier.amount(frontier.costs[index]) == pytest.approx(amounts[quantity], abs=slack, rel=1e-12)
        assert plan.predicted["loss"] == frontier.losses[index]
        assert plan.predicted["loss"] == pytest.approx(small.expected_loss(plan), rel=1e-5, abs=1e-12)


def test_no_budget_gives_the_most_precise_plan(small: Planned) -> None:
    plan, frontier = small.plan(None)
    assert frontier.index == len(frontier.costs) - 1
    assert widths(plan) == dict.fromkeys(("0.weight", "2.weight", "4.weight", "6.weight"), 8)


def test_beside_eight_bit_activations_the_eighth_bit_buys_nothing(small: Planned) -> None:
    plan, frontier = small.plan(None, activations="8", keep=("0.*=8",))
    assert widths(plan) == {"0.weight": 8, "2.weight": 7, "4.weight": 7, "6.weight": 7}
    schemes = {name: decision.scheme for name, decision in plan.quantized("weight").items()}
    assert schemes == {name: "symmetric_reduced" if name == "0.weight" else "symmetric" for name in schemes}
    assert plan.predicted["loss"] == pytest.approx(small.expected_loss(plan), rel=1e-5)
    assert {choice.bits for choice in frontier.items[1].choices} == set(range(2, 9))


def test_a_plan_depends_on_nothing_but_its_inputs(small: Planned) -> None:
    again = Planned(four_layers(), examples())
    for budget in ("3.3bit", "bops=10%"):
        first, second = (p.plan(budget, range="auto", activations="8") for p in (small, again))
        assert canonical.dumps(first[0]) == canonical.dumps(second[0])
        assert canonical.dumps(first[1]) == canonical.dumps(second[1])


def test_the_source_is_left_as_it_was(small: Planned) -> None:
    before = copy.deepcopy(small.source.module.state_dict())
    small.plan("3bit", range="auto")
    assert all(torch.equal(before[key], value) for key, value in small.source.module.state_dict().items())


def test_ranges_by_channel_are_recorded_and_applied(small: Planned) -> None:
    plan, _ = small.plan("3bit", range="auto")
    assert any(str(decision.range).startswith("channels:") for decision in plan.quantized("weight").values())
    apply_plan(small.source.module, small.graph.tied, plan, {})


# -- what a user fixes -----------------------------------------------------------------------------------------------


def test_kept_widths_are_kept_and_later_entries_win(small: Planned) -> None:
    plan, _ = small.plan("8bit", keep=("*=4", "2.*=8", "0.*=7", "0.*=2"))
    assert widths(plan) == {"0.weight": 2, "2.weight": 8, "4.weight": 4, "6.weight": 4}
    assert plan.options["keep"] == ["*=4", "2.*=8", "0.*=7", "0.*=2"]


def test_what_is_kept_as_float_or_excluded_counts_with_32_bits(small: Planned) -> None:
    for options in ({"keep": ("4.*=float",)}, {"exclude": ("4.*",)}, {"keep": ("4.*=32",)}):
        plan, frontier = small.plan("20bit", **options)
        assert set(widths(plan)) == {"0.weight", "2.weight", "6.weight"}
        assert frontier.amount(frontier.costs[frontier.index]) == pytest.approx(average(small, plan))
        assert average(small, plan) > 8


@pytest.mark.parametrize("entry", ["0.*=1", "0.*=9", "0.*", "0.*=", "0.*=x", "0.*=-4", "0.*=2.5", "4"])
def test_a_width_that_is_none_is_refused(small: Planned, entry: str) -> None:
    with pytest.raises(UsageError, match=r"--keep .* is not understood") as caught:
        small.plan("4bit", keep=(entry,))
    assert repr(entry) in caught.value.message
    assert "GLOB=BITS" in caught.value.hint


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"keep": ("zonk=4",)}, "--keep 'zonk' matches no weight"),
        ({"tie": ("zonk",)}, "--tie 'zonk' matches no weight"),
        ({"exclude": ("zonk",)}, "--exclude 'zonk' matches no weight"),
        ({"exclude": ("*",)}, "the network has no float weight to quantize"),
        ({"tie": ("*",), "keep": ("0.*=2", "2.*=3")}, "--keep leaves no width to .*, which --tie binds"),
    ],
)
def test_what_cannot_be_done_is_said(small: Planned, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        small.plan("4bit", **options)


def test_tied_weights_get_one_width(small: Planned) -> None:
    free, _ = small.plan("4bit")
    plan, frontier = small.plan("4bit", tie=("0.*", "[26].*"))
    assert len(frontier.items) == 3
    assert widths(plan)["2.weight"] == widths(plan)["6.weight"]
    assert average(small, plan) <= 4
    assert plan.predicted["loss"] >= free.predicted["loss"] * (1 - 1e-12)  # sums of the same terms in other orders
    assert plan.predicted["loss"] == pytest.approx(small.expected_loss(plan), rel=1e-5)


def test_overlapping_ties_bind_all_of_them(small: Planned) -> None:
    plan, frontier = small.plan("4bit", tie=("[02].*", "[46].*", "[24].*"))
    assert len(frontier.items) == 1
    assert set(widths(plan).values()) == {4}


def test_a_tie_to_a_kept_width_has_that_width(small: Planned) -> None:
    plan, _ = small.plan("7bit", tie=("[02].*",), keep=("2.*=3",))
    assert (widths(plan)["0.weight"], widths(plan)["2.weight"]) == (3, 3)


class Shared(nn.Module):
    """One weight under two names, and used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.relu(self.b(F.relu(self.a(x)))))


def test_a_weight_with_two_names_is_one_item() -> None:
    torch.manual_seed(0)
    planned = Planned(Shared(), examples(16, 6))
    plan, frontier = planned.plan("3bit", range="auto")
    assert [item.tensors for item in frontier.items] == [("a.weight",), ("out.weight",)]
    assert list(widths(plan)) == ["a.weight", "out.weight"]
    applied = apply_plan(planned.source.module, planned.graph.tied, plan, {}).tensors
    assert applied["a.weight"] is applied["b.weight"]


# -- budgets out of reach --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("budget", "options"),
    [
        ("1.9bit", {}),
        ("3bit", {"keep": ("4.*=float",)}),
        ("5bit", {"exclude": ("0.*",)}),
        ("bops=1", {}),
        ("bops=1", {"exclude": ("0.*",), "activations": "8"}),
        ("bops=0.1%", {}),
    ],
)
def test_a_budget_out_of_reach_names_the_minimum_which_is_within_reach(
    small: Planned, budget: str, options: dict[str, Any]
) -> None:
    with pytest.raises(BudgetError, match="is out of reach: hawq goes down to") as caught:
        small.plan(budget, **options)
    minimum = caught.value.hint.removeprefix("raise --budget to ")
    assert minimum in caught.value.message
    plan, frontier = small.plan(minimum, **options)
    assert frontier.index == 0
    assert plan.decisions


def test_the_minimum_of_a_large_network_reads_as_a_budget() -> None:
    module = nn.Sequential(nn.Conv2d(3, 7, 3), nn.ReLU(), nn.Conv2d(7, 11, 3))
    planned = Planned(module, examples(2, 3, 40, 40))
    with pytest.raises(BudgetError) as caught:
        planned.plan("bops=1")
    minimum = parse_budget(caught.value.hint.removeprefix("raise --budget to "))
    assert minimum.limit > 1e7
    assert planned.plan(minimum)[1].index == 0


def test_bytes_out_of_reach_give_the_smallest_plan(small: Planned) -> None:
    plan, frontier = small.plan("10B")
    assert frontier.index == 0
    assert set(widths(plan).values()) == {2}


def test_a_latency_budget_may_leave_floats(small: Planned) -> None:
    """Where integers are slower than floats, floats are chosen."""
    entries = {
        (layer.tensor, str(bits)): float(bits) if bits < 32 else 0.5
        for layer in small.graph.layers
        for bits in (*range(2, 9), 32)
    }
    table = CostTable("latency", entries, 1.0)
    plan, frontier = small.plan("latency=3ms", costs={"latency": table}, keep=("0.*=2",))
    assert frontier.quantity == "latency"
    assert frontier.dense_amount == pytest.approx(3.0)
    assert frontier.amount(frontier.costs[0]) == pytest.approx(1 + 2 + 3 * 0.5)
    assert widths(plan) == {"0.weight": 2}


# -- odd networks ----------------------------------------------------------------------------------------------------


class Frozen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 3)
        self.a.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)))


def zero_channel() -> nn.Module:
    module = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 3), nn.Flatten())
    with torch.no_grad():
        module[0].weight[1] = 0  # type: ignore[operator,index]
        module[2].weight[:, 2] = 0  # type: ignore[operator,index]
    return module


def all_zeros() -> nn.Module:
    module = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    nn.init.zeros_(module[0].weight)  # type: ignore[arg-type]
    return module


def norms() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(4, 3, 3), nn.Flatten()
    )


ODD = {
    "a channel of zeros": (zero_channel, (2, 6, 6), 8),
    "a layer of zeros": (all_zeros, (4,), 8),
    "a layer with one weight": (lambda: nn.Sequential(nn.Linear(1, 1), nn.Tanh(), nn.Linear(1, 4)), (1,), 8),
    "one calibration image": (lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten()), (2, 6, 6), 1),
    "batch norm and dropout": (norms, (2, 6, 6), 8),
    "a frozen layer": (Frozen, (4,), 8),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2), (4, 3, 3), 8),
    "inputs of zeros": (lambda: nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)), (4,), 0),
}


@pytest.mark.parametrize("case", ODD)
def test_odd_networks_get_a_finite_plan(case: str) -> None:
    torch.manual_seed(0)
    make, shape, count = ODD[case]
    x = examples(count, *shape) if count else torch.zeros(4, *shape)
    planned = Planned(make(), x)
    plan, frontier = planned.plan("3bit", range="auto", activations="8")
    canonical.dumps(plan)
    canonical.dumps(frontier)
    assert min(frontier.losses) >= 0
    apply_plan(planned.source.module, planned.graph.tied, plan, {})


def test_running_statistics_are_used_and_left_alone() -> None:
    torch.manual_seed(0)
    module = norms()
    planned = Planned(module, examples(8, 2, 6, 6))
    before = {key: value.clone() for key, value in module.state_dict().items()}
    first = planned.plan("3bit", range="auto")
    assert first == planned.plan("3bit", range="auto")
    assert all(torch.equal(before[key], value) for key, value in module.state_dict().items())


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_names_its_example(broken: float) -> None:
    x = examples(40)
    x[33, 1] = broken
    with pytest.raises(NumericsError, match="isn't finite on example 33 of examples"):
        Planned(four_layers(), x)


def test_a_trace_that_is_not_finite_is_refused(small: Planned) -> None:
    planned = copy.copy(small)
    entries = {**small.traces.entries, ("2.weight", ""): Estimate(float("nan"))}
    planned.traces = Sensitivity("hessian-trace", "u", "0", None, entries)
    with pytest.raises(NumericsError, match="the predicted loss of item 1 is nan"):
        planned.plan("4bit")


@pytest.mark.parametrize("name", ["transposed_2d", "VisionTransformer"])
def test_networks_of_the_zoo_are_planned_and_applied(name: str) -> None:
    network = named(name)
    module, inputs = network.make(), network.inputs(8)
    graph = trace_graph(module, network.inputs(2))
    source = Source(Path("net.pt"), "0" * 64, module, "torch", None, {}, {}, ())
    calibration = Calibration(Classification(), Data(inputs, None, "zoo"))
    given = {"trace": "ggn", "rtol": 0.5, "passes": 2}
    traces, _ = hessian_trace.measure(source, graph, calibration, given, fresh_context())
    context = fresh_context()
    options = {**OPTIONS, "range": "auto", "activations": "8" if "conv" in network.traits else "float"}
    plan, _ = hawq.plan(source, graph, {"hessian-trace": traces}, calibration, Budget("bits", 4), options, context)
    assert plan.predicted["average_bits"] <= 4
    apply_plan(module, graph.tied, plan, {})


def test_a_logits_task_counts_in_nats(small: Planned) -> None:
    assert small.plan("4bit")[1].loss_unit == "loss"
    assert Planned(four_layers(), examples(), task=Classification()).plan("4bit")[1].loss_unit == "nats"


# -- another point ---------------------------------------------------------------------------------------------------


def test_a_point_that_is_none_is_refused(small: Planned) -> None:
    plan, frontier = small.plan("4bit")
    for index in (-1, len(frontier.costs)):
        with pytest.raises(InputError, match="the points aren't those of its choices"):
            hawq.at_point(plan, small.graph, frontier, index, fresh_context())
    other = Planned(nn.Sequential(nn.Linear(3, 5)), examples())
    with pytest.raises(InputError, match=r"2.weight is no weight of the network"):
        hawq.at_point(plan, other.graph, frontier, 0, fresh_context())


def test_moving_there_and_back_changes_nothing(small: Planned) -> None:
    plan, frontier = small.plan("4bit", activations="8", range="auto")
    context = fresh_context()
    away = hawq.at_point(plan, small.graph, frontier, 0, context)
    assert away.decisions != plan.decisions
    back = hawq.at_point(away, small.graph, context.frontiers[-1], frontier.index, context)
    assert back == plan
    assert context.frontiers[-1] == frontier
