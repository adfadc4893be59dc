"""Eigenvalues of a small network's Hessian against the dense matrix of float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, hessian
from torch.nn import functional as F

from compress.context import Context
from compress.data import Data
from compress.errors import UsageError
from compress.graph.trace import trace_graph
from compress.measure.hessian_eigenvalues import measure
from compress.model import Source
from compress.sensitivity import TOGETHER, Sensitivity
from compress.task import Calibration, Classification


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def case() -> tuple[Net, Data]:
    torch.manual_seed(0)
    return Net().eval(), Data((torch.randn(40, 6),), torch.randint(3, (40,)), "data")


def measured(module: nn.Module, data: Data, **options: float) -> tuple[Sensitivity, list[str]]:
    graph, notes = trace_graph(module, (data.inputs[0][:2],)), list[str]()
    generator, cpu = torch.Generator().manual_seed(0), torch.device("cpu")
    context = Context(generator, cpu, lambda *_: None, lambda _: 0, notes)
    source = Source.__new__(Source)
    object.__setattr__(source, "sha256", "0" * 64)
    chosen = {"eigenvalues": 2, "passes": 20, "rtol": 0.05} | options
    record, tensors = measure(source, graph, Calibration(Classification(), data), chosen, context)
    assert tensors == {}
    return record, notes


def blocks(module: nn.Module, data: Data) -> dict[str, Tensor]:
    """The dense Hessians of both weights, and of both together."""
    names = ("first.weight", "second.weight")
    state = {name: value.detach().double() for name, value in module.named_parameters()}
    x, y = data.inputs[0].double(), data.targets

    def loss(vector: Tensor) -> Tensor:
        parts = vector.split([state[name].numel() for name in names])
        weights = {name: part.view_as(state[name]) for name, part in zip(names, parts, strict=True)}
        return F.cross_entropy(functional_call(module.double(), {**state, **weights}, (x,)), y)

    whole = hessian(loss)(torch.cat([state[name].flatten() for name in names]))
    return {names[0]: whole[:30, :30], names[1]: whole[30:, 30:], TOGETHER: whole}


def test_every_block_has_its_own_and_so_has_the_network() -> None:
    module, data = case()
    record, notes = measured(module, data)
    assert notes == []
    for block, matrix in blocks(module, data).items():
        exact = torch.linalg.eigvalsh(matrix).flip(0)[:2].tolist()
        for place, value in enumerate(exact, 1):
            estimate = record.entries[block, f"eigenvalue {place}"]
            assert abs(estimate.value - value) <= max(1e-5 * value, estimate.stderr)
    assert len(record.entries) == 6


def test_too_few_products_are_refused_and_unsure_ones_are_noted() -> None:
    module, data = case()
    with pytest.raises(UsageError, match=r"^2 eigenvalues need 4 products or more, and --passes is 3\n"):
        measured(module, data, passes=3)
    _, notes = measured(module, data, passes=4, rtol=1e-9)
    assert len(notes) == 1 and "raise --passes for closer ones" in notes[0]
