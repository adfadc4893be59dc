"""Structured pruning in one shot: scores against cutting, fits against a dense solver, budgets, and exact cuts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zoo import Network, named

from compress.apply import apply_plan, assemble
from compress.budget import Budget, parse_budget
from compress.context import Context
from compress.curvature.gates import gate_curvatures
from compress.data import Data
from compress.errors import BudgetError
from compress.graph.channel_cost import channel_costs, total
from compress.graph.cut import kept_channels, masked
from compress.graph.groups import find_channels
from compress.graph.trace import Graph, trace_graph
from compress.model import Source
from compress.prune import structured_obs
from compress.pruned import check_cut, prune
from compress.reconstruct.least_squares import refit_layers
from compress.task import Calibration, load_task

CUT = ["plain_cnn", "padded_residual", "depthwise", "SqueezeExcite", "mlp", "Gpt", "ChannelShuffle", "UNet"]


def silent(*_: Any) -> None:
    pass


def context() -> Context:
    generator = torch.Generator().manual_seed(0)
    return Context(generator, torch.device("cpu"), silent, lambda choices: 10_000, [])


def opened(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Source, Graph, Calibration]:
    module.eval()
    source = Source(Path("model.pt"), "0" * 64, module, "torch", None, {}, {}, ())
    data = Data(inputs, None, "random")
    return source, trace_graph(module, tuple(x[:2] for x in inputs)), Calibration(load_task("regression", None), data)


def opened_case(name: str, examples: int = 48) -> tuple[Source, Graph, Calibration]:
    network: Network = named(name)
    torch.manual_seed(0)
    return opened(network.make(), network.inputs(examples))


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 4, 3, stride=2, dilation=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu())


def test_a_gate_s_curvature_is_the_second_derivative_of_the_loss_along_it() -> None:
    torch.manual_seed(0)
    module, x = TwoLayers().double(), torch.randn(4, 3, 7, 7, dtype=torch.float64)
    _, graph, calibration = opened(module.float(), (x.float(),))
    channels = find_channels(graph)
    found = gate_curvatures(
        channels, channels.module, calibration.task, calibration.data, probes=10_000, seed=0, progress=silent
    )
    module.double()

    def outputs(gates: Tensor) -> Tensor:
        return module.second(module.first(x).relu() * gates[:, None, None])

    jacobian = torch.autograd.functional.jacobian(outputs, torch.ones(6, dtype=torch.float64))
    flat = jacobian.reshape(-1, 6)  # the loss is the mean square: its Hessian is 2/k, over k outputs of an example
    wanted = 2 * flat.square().sum(0) / flat.shape[0]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


def test_a_layer_is_fitted_as_a_dense_solver_does() -> None:
    torch.manual_seed(0)
    source, graph, calibration = opened(TwoLayers(), (torch.randn(32, 3, 9, 9),))
    channels = find_channels(graph)
    kept = kept_channels(channels, {channels.groups[0].name: [0, 2, 3]})
    cut = masked(channels, channels.module, kept)
    x = calibration.data.inputs[0]
    changed = refit_layers(channels, kept, cut, (x,), damping=1e-12, progress=silent)
    assert changed == {"second.weight", "second.bias"}
    module = source.module
    hidden = module.first(x).relu()[:, [0, 2, 3]].double()
    columns = torch.nn.functional.unfold(hidden, 3, stride=2).movedim(1, 2).flatten(0, 1)
    design = torch.cat([columns, torch.ones(len(columns), 1, dtype=torch.float64)], 1)
    goal = module.second(module.first(x).relu()).double().movedim(1, -1).reshape(len(columns), -1)
    wanted = torch.linalg.lstsq(design, goal).solution
    weight = cut.second.weight.detach()
    torch.testing.assert_close(weight[:, [0, 2, 3]].flatten(1).double(), wanted[:-1].T, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(cut.second.bias.detach().double(), wanted[-1], rtol=1e-3, atol=1e-4)
    assert not weight[:, [1, 4, 5]].any()


def test_what_a_linear_network_can_make_up_for_costs_nothing() -> None:
    """Channels that are sums of others: least squares puts their part on those that stay."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(5, 8), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)).eval()
    with torch.no_grad():
        module[2].running_mean.normal_()
        module[2].running_var.uniform_(0.5, 2)
    x = torch.randn(64, 5)
    _, graph, _ = opened(module, (x,))
    channels = find_channels(graph)
    first = next(group for group in channels.groups if group.name == "0.weight")
    kept = kept_channels(channels, {first.name: [0, 1, 3, 4, 6, 7]})  # 6 channels of a 5-dimensional input
    cut = masked(channels, channels.module, kept)
    refit_layers(channels, kept, cut, (x,), damping=1e-10, progress=silent)
    torch.testing.assert_close(cut(x), module(x), rtol=1e-3, atol=1e-4)
    # Statistics are those of what now goes in.
    hidden = cut.get_submodule("1")
    now = torch.nn.functional.linear(
        torch.nn.functional.linear(x, cut.get_submodule("0").weight, cut.get_submodule("0").bias),
        hidden.weight, hidden.bias,
    )  # fmt: skip
    torch.testing.assert_close(cut.get_submodule("2").running_mean, now.mean(0), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("case", CUT)
def test_a_plan_is_an_exact_cut_within_its_budget(case: str) -> None:
    source, graph, calibration = opened_case(case)
    plan, sidecar = structured_obs.plan(
        source, graph, {}, calibration, Budget("macs", 0.7, "dense"), {"multiple_of": 1}, context()
    )
    made = prune(graph, plan)
    assert made is not None
    assert check_cut(graph, made.channels, made.kept, seed=0) <= 1e-9
    costs = channel_costs(made.channels, len(graph.example_inputs[0]))
    whole = total(costs.macs, torch.ones_like(made.kept))
    assert 0.45 * whole <= total(costs.macs, made.kept) <= 0.7 * whole
    assert plan.predicted["macs"] == total(costs.macs, made.kept)
    compressed = apply_plan(source.module, graph.tied, plan, sidecar, made)
    small = assemble(made.graph, compressed)
    with torch.no_grad():
        dense, outputs = source.module(*calibration.data.inputs), small(*calibration.data.inputs)
    dense, outputs = (x[0] if isinstance(x, tuple) else x for x in (dense, outputs))
    assert outputs.shape == dense.shape
    assert torch.isfinite(outputs).all()


def test_fitting_brings_the_outputs_nearer_than_cutting_alone() -> None:
    source, graph, calibration = opened_case("padded_residual", 64)
    plan, sidecar = structured_obs.plan(
        source, graph, {}, calibration, Budget("macs", 0.6, "dense"), {"multiple_of": 1}, context()
    )
    made = prune(graph, plan)
    assert made is not None
    inputs = calibration.data.inputs
    with torch.no_grad():
        dense = source.module(*inputs)
        bare = masked(made.channels, made.channels.module, made.kept)(*inputs)
        fitted = assemble(made.graph, apply_plan(source.module, graph.tied, plan, sidecar, made))(*inputs)
    assert (fitted - dense).square().mean() < 0.5 * (bare - dense).square().mean()


def test_the_same_plan_twice_and_from_its_decisions() -> None:
    source, graph, calibration = opened_case("plain_cnn")
    budget, options = Budget("params", 0.6, "dense"), {"multiple_of": 2}
    plan, sidecar = structured_obs.plan(source, graph, {}, calibration, budget, options, context())
    again, other = structured_obs.plan(source, graph, {}, calibration, budget, options, context())
    assert plan == again
    assert all(torch.equal(sidecar[name], other[name]) for name in sidecar)
    refitted, values = structured_obs.refit(plan, sidecar, source, graph, calibration, context())
    assert refitted.channels() == plan.channels()
    assert all(torch.equal(sidecar[name], values[name]) for name in sidecar)
    assert all(len(d.keep) % 2 == 0 for d in plan.channels().values())


def test_a_budget_beyond_what_can_be_cut_gives_the_least() -> None:
    source, graph, calibration = opened_case("plain_cnn")
    with pytest.raises(BudgetError, match=r"out of reach: with all that may be cut, [0-9,]+ MACs of [0-9,]+ are left"):
        structured_obs.plan(source, graph, {}, calibration, Budget("macs", 0.001, "dense"), {}, context())


def test_a_network_of_frozen_channels_lists_the_reasons() -> None:
    source, graph, calibration = opened(nn.Linear(4, 3), (torch.randn(8, 4),))
    with pytest.raises(BudgetError, match=r"can be cut: the network's output: weight") as raised:
        structured_obs.plan(source, graph, {}, calibration, None, {}, context())
    assert raised.value.exit_code == 5


def test_excluded_weights_keep_their_channels() -> None:
    source, graph, calibration = opened_case("plain_cnn")
    names = [layer.tensor for layer in graph.layers]
    options = {"multiple_of": 1, "exclude": (names[0],)}
    plan, _ = structured_obs.plan(source, graph, {}, calibration, Budget("macs", 0.8, "dense"), options, context())
    made = prune(graph, plan)
    assert made is not None
    before, after = (dict(zip(names, (la.shape for la in g.layers), strict=True)) for g in (graph, made.graph))
    assert after[names[0]] == before[names[0]]
    assert after != before


@pytest.mark.parametrize(
    ("options", "budget", "words", "hint"),
    [
        ({"exclude": ("*",)}, "macs=50%", "--exclude holds all that could be, those of ", "exclude less"),
        ({"multiple_of": 64}, "macs=50%", "--multiple-of 64 holds all that could be", "use --multiple-of 4 or less"),
        ({}, "macs=1%", "10% of each group's channels stay in any case$", "raise the budget to macs="),
        ({"exclude": ("0.*",)}, "macs=10%", "--exclude holds those of 0.weight$", "raise the budget to macs="),
        ({"multiple_of": 4}, "macs=1%", "--multiple-of 4 holds more$", "raise the budget to macs="),
        ({}, "params=1%", "56 parameters, which the forward pass never uses, count too$", "raise the budget to"),
    ],
)  # fmt: skip
def test_what_holds_channels_is_named_before_any_curvature_is_taken(
    options: dict[str, Any], budget: str, words: str, hint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    network[1].unused = nn.Parameter(torch.zeros(7, 8))
    source, graph, calibration = opened(network, (torch.randn(8, 4),))
    monkeypatch.setattr(structured_obs, "saliencies", lambda *given: pytest.fail("took the curvature"))
    with pytest.raises(BudgetError, match=f"(?m){words}") as caught:
        structured_obs.plan(source, graph, {}, calibration, parse_budget(budget), options, context())
    assert caught.value.hint.startswith(hint)
