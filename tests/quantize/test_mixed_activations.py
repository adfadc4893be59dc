"""Activations with widths of their own: traces and losses by definition, and the frontier by enumeration."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from compress import canonical
from compress.apply import activation_grids, apply_plan, assemble, float_module, grid_of
from compress.budget import Budget, parse_budget
from compress.context import Context
from compress.curvature.activation_traces import activation_traces
from compress.data import Data
from compress.errors import UsageError
from compress.frontier import Choice, FrontierRecord, Item, Read, ReadChoice, read_frontier
from compress.graph.rewrite import Grid
from compress.graph.trace import trace_graph
from compress.measure import activation_trace, hessian_trace
from compress.model import Source
from compress.plan import Plan
from compress.planning import require_counted_activations
from compress.quantize import hawq, output_change
from compress.quantize.changes import loss_changes
from compress.quantize.points import at_point
from compress.registry import find_method
from compress.settings import resolve
from compress.task import Calibration, Classification, divergence

CPU = torch.device("cpu")
OPTIONS: dict[str, Any] = {
    **{
        "activations": "mixed",
        "activation_range": "auto",
        "reconstruction": "none",
        "bias_correction": "on",
        "channel_widths": "equal",
    },
    **{"range": "mse", "exclude": (), "keep": (), "tie": ()},
}


class Branches(nn.Module):
    """``trunk`` is read by two layers; ``twice`` reads two activations."""

    def __init__(self, activation: type[nn.Module] = nn.ReLU) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.left, self.right = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1)
        self.twice = nn.Conv2d(4, 4, 1)
        self.head = nn.Linear(4, 3)
        self.act = activation()

    def forward(self, x: Tensor) -> Tensor:
        trunk = self.act(self.norm(self.first(x)))
        h = self.act(self.left(trunk) + self.right(trunk))
        h = self.act(self.twice(self.act(self.twice(h))))
        return self.head(h.mean((2, 3)))


class Planned:
    def __init__(self, module: nn.Module | None = None) -> None:
        torch.manual_seed(0)
        self.module = (module or Branches()).eval().requires_grad_(False)
        for norm in (m for m in self.module.modules() if isinstance(m, nn.BatchNorm2d)):
            nn.init.uniform_(norm.running_mean, -0.3, 0.3)
            nn.init.uniform_(norm.running_var, 0.5, 2.0)
        self.x = torch.randn(24, 2, 6, 6, generator=torch.Generator().manual_seed(1))
        self.source = Source(Path("net.pt"), "0" * 64, self.module, "torch", None, {}, {}, ())
        self.graph = trace_graph(self.module, (self.x[:2],))
        self.calibration = Calibration(Classification(), Data((self.x,), None, "examples"))
        given = {"trace": "ggn", "rtol": 0.0, "passes": 3}
        parts = (self.source, self.graph, self.calibration, given)
        self.sensitivities = {
            "hessian-trace": hessian_trace.measure(*parts, context())[0],
            "activation-trace": activation_trace.measure(*parts, context())[0],
        }

    def plan(self, method: Any, budget: str | Budget, **options: Any) -> tuple[Plan, FrontierRecord]:
        given, goal = context(), parse_budget(budget) if isinstance(budget, str) else budget
        own = {**OPTIONS, **options}
        plan, _ = method.plan(self.source, self.graph, self.sensitivities, self.calibration, goal, own, given)
        return plan, given.frontiers[-1]

    def bops(self, plan: Plan) -> int:
        """Multiply-accumulates, counted from hooks on the modules, times the bits of the plan's decisions."""
        weights = {name: decision.bits for name, decision in plan.quantized("weight").items()}
        bits = {name: decision.bits for name, decision in plan.quantized("activation").items()}
        reads = {"first": ["x"], "left": ["relu"], "right": ["relu"], "twice": ["relu_1", "relu_2"], "head": ["mean"]}
        total = 0
        for layer in self.graph.layers:
            name = layer.tensor.removesuffix(".weight")
            macs = layer.elements * (1 if name == "head" else 36)
            total += sum(macs * weights.get(layer.tensor, 32) * bits.get(read, 32) for read in reads[name])
        return total


def context() -> Context:
    return Context(torch.Generator().manual_seed(0), CPU, lambda *_: None, lambda _: 0, [])


@pytest.fixture(scope="module")
def planned() -> Planned:
    return Planned()


def values_of(planned: Planned, name: str) -> Tensor:
    """An activation of the folded network on all examples."""
    found: dict[str, Tensor] = {}

    class Run(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            if n.name == name:
                found[name] = value
            return value

    Run(float_module(planned.graph)).run(planned.x)
    return found[name]


def rounded(value: Tensor, grid: Grid) -> Tensor:
    levels = torch.clamp(torch.round(value / grid.scale) + grid.zero_point, 0, 2**grid.bits - 1)
    return (levels - grid.zero_point) * grid.scale


# -- traces ------------------------------------------------------------------------------------------------------------


def test_a_trace_is_that_of_the_examples_own_gauss_newton_block() -> None:
    """All probes of three classes are complete: nothing is left to chance."""
    planned = Planned()
    head, hidden = planned.module.head, values_of(planned, "mean")
    weight, bias = head.weight.double(), head.bias.double()
    p = torch.softmax(hidden.double() @ weight.T + bias, -1)
    blocks = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    wanted = torch.einsum("ki,nkj,ji->n", weight, blocks, weight).mean()
    found = activation_traces(
        float_module(planned.graph), ["mean", "relu"], Classification(), planned.calibration.data,
        rtol=0.0, max_passes=3, generator=torch.Generator().manual_seed(0), progress=lambda *_: None, device=CPU,
    )  # fmt: skip
    assert list(found) == ["relu", "mean"]
    assert found["mean"].mean == pytest.approx(float(wanted), rel=1e-5)
    assert found["mean"].stderr == pytest.approx(0, abs=1e-9)


def test_a_trace_through_layers_is_that_of_the_jacobian() -> None:
    planned = Planned()
    relu = values_of(planned, "relu").double()
    network = planned.module.double()

    def rest(trunk: Tensor) -> Tensor:
        h = F.relu(network.left(trunk) + network.right(trunk))
        h = F.relu(network.twice(F.relu(network.twice(h))))
        return network.head(h.mean((2, 3)))

    total = 0.0
    for example in relu:
        jacobian = torch.autograd.functional.jacobian(rest, example[None]).reshape(3, -1)
        p = torch.softmax(rest(example[None])[0], -1)
        total += float(((torch.diag(p) - torch.outer(p, p)) @ jacobian @ jacobian.T).trace())
    network.float()
    assert planned.sensitivities["activation-trace"].entries["relu", ""].value == pytest.approx(total / 24, rel=1e-4)


def test_the_input_and_what_no_layer_reads_have_no_trace(planned: Planned) -> None:
    record = planned.sensitivities["activation-trace"]
    assert [name for name, _ in record.entries] == ["relu", "relu_1", "relu_2", "mean"]
    assert record.unit == "loss per squared activation"


def test_an_operator_in_place_changes_no_trace() -> None:
    found = []
    for inplace in (False, True):
        torch.manual_seed(0)
        found.append(Planned(nn.Sequential(
            nn.Conv2d(2, 3, 3), nn.ReLU(inplace), nn.Conv2d(3, 3, 3), nn.ReLU(inplace), nn.Flatten(), nn.Linear(12, 3)
        )).sensitivities["activation-trace"].entries)  # fmt: skip
    assert [e.value for e in found[0].values()] == pytest.approx([e.value for e in found[1].values()], rel=1e-5)


# -- losses ------------------------------------------------------------------------------------------------------------


def test_hawq_expects_the_mean_curvature_times_the_squared_change(planned: Planned) -> None:
    _, record = planned.plan(hawq, "bops=5%")
    traces = planned.sensitivities["activation-trace"].entries
    for read in record.reads:
        for choice in read.choices:
            wanted = 0.0
            for name, ends in zip(read.activations, choice.ranges, strict=True):
                value = values_of(planned, name)
                change = (
                    (rounded(value, grid_of(*ends, choice.bits)) - value).double().flatten(1).square().sum(1).mean()
                )
                wanted += traces[name, ""].value / value[0].numel() * float(change) / 2
            assert choice.loss == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("activation", [nn.ReLU, lambda: nn.ReLU(inplace=True)], ids=["new", "in place"])
def test_what_one_activation_costs_is_the_divergence_with_it_alone_rounded(activation: Any) -> None:
    planned = Planned(Branches(activation))
    name = [n for n, _ in planned.sensitivities["activation-trace"].entries][1]
    grids = {name: [Grid(0.1, 0, 4), Grid(0.02, 3, 6)]}
    _, found = loss_changes(planned.graph, {}, grids, planned.calibration.data, Classification(), context())
    network, dense = planned.module, planned.module(planned.x)
    trunk = F.relu(network.norm(network.first(planned.x)))
    hidden = F.relu(network.left(trunk) + network.right(trunk))
    for grid, loss in zip(grids[name], found[name], strict=True):
        h = F.relu(network.twice(F.relu(network.twice(rounded(hidden, grid)))))
        moved = network.head(h.mean((2, 3)))
        assert loss == pytest.approx(divergence(dense, moved, are_logits=True), rel=1e-3)


# -- the frontier ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [hawq, output_change])
def test_the_frontier_is_the_best_of_all_assignments(planned: Planned, method: Any) -> None:
    keep = ("first.*=8", "left.*=3", "twice.*=5", "head.*=4")
    start, record = planned.plan(method, Budget("bops", 1e12), keep=keep)
    points: dict[int, float] = {}
    counts = [len(item.choices) for item in record.items] + [len(read.choices) for read in record.reads]
    for chosen in itertools.product(*map(range, counts)):
        one = record.at(0, chosen)
        points[one.chosen_cost()] = min(one.chosen_loss(), points.get(one.chosen_cost(), float("inf")))
    best = [(c, x) for c, x in sorted(points.items()) if all(other > x for cost, other in points.items() if cost < c)]
    assert list(record.costs) == [cost for cost, _ in best]
    assert list(record.losses) == pytest.approx([loss for _, loss in best])
    for index in range(0, len(record.costs), 3):
        plan = at_point(start, planned.graph, record, index, context())
        assert planned.bops(plan) == record.amount(record.costs[index])


def test_shared_activations_and_inputs_have_the_widths_that_they_must(planned: Planned) -> None:
    plan, record = planned.plan(hawq, "bops=1.2%")
    assert [read.activations for read in record.reads] == [("relu",), ("relu_1", "relu_2"), ("mean",)]
    bits = {name: decision.bits for name, decision in plan.quantized("activation").items()}
    assert bits["x"] == 8 and bits["relu_1"] == bits["relu_2"]
    assert set(bits.values()) > {4}
    tied, record = planned.plan(hawq, "bops=2%", tie=("*",))
    assert record.reads == ()  # one weight of the width reads the input
    assert {decision.bits for decision in tied.quantized("activation").values()} == {8}


@pytest.mark.parametrize("activations", ["mixed", "8", "6", "4", "float"])
@pytest.mark.parametrize("options", [{}, {"exclude": ("right.*",)}, {"keep": ("left.*=float",)}], ids=str)
def test_bit_operations_are_those_of_the_plan(planned: Planned, activations: str, options: dict[str, Any]) -> None:
    plan, record = planned.plan(hawq, Budget("bops", 0.9, "dense"), activations=activations, **options)
    amount = record.amount(record.costs[record.index])
    assert amount == planned.bops(plan) <= 0.9 * record.dense_amount


def test_more_bit_operations_lose_less_than_one_width_for_all(planned: Planned) -> None:
    for budget in ("bops=1.5%", "bops=2.5%", "bops=4%"):
        plan, record = planned.plan(hawq, budget)
        losses = [loss for cost, loss in record.rivals().values() if cost <= record.costs[record.index]]
        assert plan.predicted["loss"] <= min(losses)
        assert plan.predicted["loss"] == pytest.approx(record.losses[record.index])
    widths = planned.plan(hawq, "bops=2.5%")[0].quantized("activation")
    assert len({decision.bits for decision in widths.values()}) > 1


def test_a_plan_of_mixed_widths_is_applied_on_their_grids(planned: Planned) -> None:
    plan, _ = planned.plan(output_change, "bops=2%")
    grids = activation_grids(plan.quantized("activation"))
    assert len({grid.bits for grid in grids.values()}) > 1
    module = assemble(planned.graph, apply_plan(planned.module, planned.graph.tied, plan, {}))
    clamps = [n.args[2] for n in module.graph.nodes if n.target is torch.ops.aten.clamp.default and n.args[1] == 0]
    narrow = sorted(2**grid.bits - 1 for grid in grids.values() if grid.bits < 8)
    assert sorted(top for top in clamps if isinstance(top, int)) == narrow


def test_the_same_inputs_give_the_same_bytes(planned: Planned) -> None:
    first, second = (p.plan(output_change, "bops=2%") for p in (planned, Planned()))
    assert canonical.dumps(first[0]) == canonical.dumps(second[0])
    assert canonical.dumps(first[1]) == canonical.dumps(second[1])


def test_the_record_is_read_as_it_was_written_and_checked(planned: Planned, tmp_path: Path) -> None:
    _, record = planned.plan(hawq, "bops=2%")
    path = tmp_path / "frontier.json"
    path.write_text(canonical.dumps(record))
    assert read_frontier(path) == record
    path.write_text(canonical.dumps(record).replace('"bits": 6', '"bits": 1'))
    with pytest.raises(Exception, match="choices of activation relu have bits other than 2 to 8"):
        read_frontier(path)


def test_rivals_of_both_widths_are_those_that_no_other_beats() -> None:
    items = (Item(("a.weight",), tuple(Choice(b, b, 1 / b, ("mse",)) for b in (2, 4, 8))),)
    reads = (Read(("x",), (0,), 0, tuple(ReadChoice(b, 3 / b, ((0.0, 1.0),)) for b in (4, 8))),)
    record = FrontierRecord("hawq", "bops", 1.0, 0, 1.0, "nats", items, (8,), (1.25,), 0, (0, 0), {}, reads)
    assert record.chosen_cost() == 8 and record.chosen_loss() == 0.5 + 0.75
    assert record.rivals() == {
        "2 bits, activations 4": (8, 1.25),
        "2 bits, activations 8": (16, 0.875),
        "4 bits, activations 8": (32, 0.625),
        "8 bits, activations 8": (64, 0.5),
    }


# -- what is asked for -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "budget", "words", "hint"),
    [
        ("hawq", "4bit", "for the budget 4bit the bits of activations cost nothing", "--budget bops="),
        ("output-change", "25%", "for the budget 25% the bits", "--activations 8, 6 or 4"),
        ("output-change", None, "without a budget the bits of activations cost nothing", "--budget bops="),
        ("uniform", "4bit", "method uniform has one width for all activations", "--method output-change or hawq"),
    ],
)
def test_where_nothing_is_to_choose_the_way_out_is_said(method: str, budget: str | None, words: str, hint: str) -> None:
    settings = resolve({"activations": "mixed"}, environment={}, folder=None)
    goal = None if budget is None else parse_budget(budget)
    with pytest.raises(UsageError, match=words) as caught:
        require_counted_activations(find_method("quantize", method), goal, settings)
    assert hint in caught.value.hint
    require_counted_activations(find_method("quantize", "hawq"), parse_budget("bops=5%"), settings)
    require_counted_activations(find_method("prune", "obs"), goal, settings)
