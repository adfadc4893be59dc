"""Predictors of the loss against the network that is really made, and against their own definitions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from compress.context import Context
from compress.data import Data
from compress.graph.trace import trace_graph
from compress.model import Source
from compress.numerics.ranks import spearman
from compress.numerics.rounding import round_weight
from compress.quantize.measured_changes import measure
from compress.quantize.predictors import PARTLY_RUN, SUMMED, compare_predictors
from compress.sensitivity import Estimate, Sensitivity
from compress.task import Calibration, Classification, Regression, Task


class Branches(nn.Module):
    """Its outputs are a sum of what its weights give, so that changes add up exactly."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(6, 4), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.left(x) + self.right(x.tanh())


class Case:
    def __init__(self, module: nn.Module, x: Tensor, task: Task) -> None:
        self.source = Source(Path("net.pt"), "0" * 64, module.eval(), "torch", None, {}, {}, ())
        self.graph = trace_graph(module, (x[:2],))
        self.calibration = Calibration(task, Data((x,), None, "examples"))
        weights = {layer.tensor: module.state_dict()[layer.tensor] for layer in self.graph.layers}
        self.diagonals = {name: torch.rand(weight.shape) for name, weight in weights.items()}
        entries = {(name, ""): Estimate(float(number + 1)) for number, name in enumerate(weights)}
        self.traces = Sensitivity("hessian-trace", "loss per squared weight", "0" * 64, None, entries)

    def context(self) -> Context:
        return Context(torch.Generator().manual_seed(3), torch.device("cpu"), lambda *_: None, lambda _: 0, [])

    def compared(self, count: int) -> dict:
        return compare_predictors(
            *(self.source, self.graph, self.calibration, count, self.context()),
            **{"traces": self.traces, "diagonals": self.diagonals, "by_outputs": False},
        )

    def rounded(self, name: str, bits: int) -> Tensor:
        levels, scale = round_weight(self.source.module.state_dict()[name], bits, axis=0, search="mse")
        return levels * scale.reshape(-1, *[1] * (levels.dim() - 1))

    def drawn(self, count: int) -> list[dict[str, int]]:
        widths = torch.randint(2, 9, (count, len(self.graph.layers)), generator=self.context().generator)
        names = [layer.tensor for layer in self.graph.layers]
        return [dict(zip(names, row, strict=True)) for row in widths.tolist()]

    def outputs(self, configuration: dict[str, int]) -> tuple[Tensor, Tensor]:
        """Of the network and of a copy with these widths."""
        x, module = self.calibration.data.inputs[0], self.source.module
        changed = {name: self.rounded(name, bits) for name, bits in configuration.items()}
        with torch.no_grad():
            return module(x).double(), torch.func.functional_call(module, changed, (x,)).double()


@pytest.fixture(scope="module")
def branches() -> Case:
    torch.manual_seed(0)
    return Case(Branches(), torch.randn(40, 6), Classification())


@pytest.fixture(scope="module")
def conv() -> Case:
    torch.manual_seed(1)
    module = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
    )  # fmt: skip
    return Case(module, torch.randn(48, 3, 8, 8), Classification())


def test_what_is_measured_is_the_divergence_of_the_network_that_is_made(conv: Case) -> None:
    record = conv.compared(4)
    for configuration, measured in zip(conv.drawn(4), record["measured"], strict=True):
        p, q = (torch.log_softmax(logits, -1) for logits in conv.outputs(configuration))
        assert measured == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)
    elements = {layer.tensor: layer.elements for layer in conv.graph.layers}
    bits = [sum(elements[name] * b for name, b in one.items()) / sum(elements.values()) for one in conv.drawn(4)]
    assert record["average_bits"] == pytest.approx(bits)
    assert record["num_examples"] == 48


@pytest.mark.parametrize("name", [SUMMED, PARTLY_RUN])
def test_changes_foretell_a_network_that_is_a_sum_exactly(branches: Case, name: str) -> None:
    record = branches.compared(12)
    (found,) = (entry for entry in record["predictors"] if entry["name"] == name)
    assert found["predicted"] == pytest.approx(record["measured"], rel=1e-4)
    assert found["spearman"] == pytest.approx(1)
    assert found["spread"] == pytest.approx(1, abs=1e-3)
    assert found["ratio"] == pytest.approx(1, abs=1e-3)


def test_the_examples_that_the_network_is_least_sure_of_are_looked_at_and_half_of_them_run() -> None:
    torch.manual_seed(2)
    module = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3))
    with torch.no_grad():
        module[2].weight.mul_(4)
    case = Case(module, torch.randn(300, 6), Classification())
    record = case.compared(3)
    predicted = {entry["name"]: entry["predicted"] for entry in record["predictors"]}
    real, summed = [], []
    for configuration in case.drawn(3):
        dense, made = case.outputs(configuration)
        change = sum(case.outputs({name: bits})[1] - dense for name, bits in configuration.items())
        doubt = 1 - dense.softmax(-1).square().sum(-1)
        few = doubt.argsort(descending=True)[:64]
        p, *moved = (torch.log_softmax(logits[few], -1) for logits in (dense, made, dense + change))
        for found, q in zip((real, summed), moved, strict=True):
            found.append((p.exp() * (p - q)).sum(-1))
    share = doubt.mean() / doubt[few].mean()
    assert predicted[SUMMED] == pytest.approx([float(share * one.mean()) for one in summed], rel=1e-3)
    far = set(torch.stack(summed).mean(0).argsort(descending=True)[:32].tolist())
    runs = torch.tensor([place in far for place in range(64)])
    partly = [torch.where(runs, one, other).mean() for one, other in zip(real, summed, strict=True)]
    assert predicted[PARTLY_RUN] == pytest.approx([float(share * one) for one in partly], rel=1e-3)


def test_omega_and_the_diagonal_are_those_of_the_roundings_that_were_made(branches: Case) -> None:
    record = branches.compared(5)
    state, predicted = branches.source.module.state_dict(), {e["name"]: e for e in record["predictors"]}
    for place, configuration in enumerate(branches.drawn(5)):
        omega = diagonal = 0.0
        for name, bits in configuration.items():
            change = (branches.rounded(name, bits) - state[name]).double()
            trace = branches.traces.entries[name, ""].value
            omega += trace / change.numel() * float(change.square().sum()) / 2
            diagonal += float((branches.diagonals[name] * change.square()).sum()) / 2
        assert predicted["hawq"]["predicted"][place] == pytest.approx(omega, rel=1e-6)
        assert predicted["hessian-diagonal"]["predicted"][place] == pytest.approx(diagonal, rel=1e-6)
    assert predicted["hawq"]["spearman"] == pytest.approx(spearman(predicted["hawq"]["predicted"], record["measured"]))


def test_a_network_that_rounding_leaves_as_it_is_has_no_correlation(branches: Case) -> None:
    module = nn.Sequential(nn.Linear(4, 3, bias=False))
    nn.init.zeros_(module[0].weight)
    record = Case(module, torch.randn(8, 4), Regression()).compared(3)
    assert record["measured"] == [0.0] * 3
    assert all(entry[key] is None for entry in record["predictors"] for key in ("spearman", "spread", "ratio"))


def test_the_measure_is_what_one_weight_alone_costs(branches: Case) -> None:
    case = Case(branches.source.module, torch.randn(40, 6), Regression())
    record, tensors = measure(case.source, case.graph, case.calibration, {"reconstruction": "none"}, case.context())
    assert tensors == {}
    assert record.unit == "squared output"
    assert len(record.entries) == 2 * 7
    for (name, bits), estimate in record.entries.items():
        dense, moved = case.outputs({name: int(bits)})
        assert estimate.value == pytest.approx(float((dense - moved).square().mean()), rel=1e-4)
