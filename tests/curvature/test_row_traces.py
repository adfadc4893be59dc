"""Row traces against the Jacobian of the outputs, formed one example at a time."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from compress.curvature.network import open_network
from compress.curvature.row_traces import output_gradients, row_traces
from compress.data import Data
from compress.graph.trace import trace_graph
from compress.task import Classification, Regression, Task


def quiet(stage: str, done: int, total: int | None) -> None:
    """Progress of a test."""


@pytest.mark.parametrize("task", [Classification(), Regression()], ids=["logits", "values"])
def test_they_are_the_squares_of_the_outputs_jacobian(task: Task) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(3 * 16, 4)).eval()
    x = torch.randn(40, 2, 6, 6)
    graph = trace_graph(module, (x[:2],))
    network = open_network(graph, device=torch.device("cpu"))
    found = row_traces(
        network, task, Data((x,), torch.zeros(40, dtype=torch.long), "x"), passes=300,
        generator=torch.Generator().manual_seed(0), progress=quiet,
    )  # fmt: skip
    for name, weight in (("0.weight", module[0].weight), ("3.weight", module[3].weight)):
        expected = torch.zeros(len(weight), dtype=torch.float64)
        for example in x:
            outputs = module(example[None])[0]
            outputs = outputs - outputs.mean() if isinstance(task, Classification) else outputs * (2 / 4) ** 0.5
            for output in outputs:
                (gradient,) = torch.autograd.grad(output, weight, retain_graph=True)
                expected += gradient.double().flatten(1).square().sum(1) / len(x)
        assert torch.allclose(found[name], expected, rtol=0.15), (found[name], expected)


def test_output_gradients_are_those_of_each_channel_and_position() -> None:
    """Of one output, the square of a sign times the gradient is the gradient's."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(3 * 16, 1)).eval()
    x = torch.randn(40, 2, 6, 6)
    network = open_network(trace_graph(module, (x[:2],)), device=torch.device("cpu"))
    found = output_gradients(
        network, Regression(), Data((x,), torch.zeros(40, 1), "x"), passes=2,
        generator=torch.Generator().manual_seed(0), progress=quiet,
    )  # fmt: skip
    given = module[0](x).requires_grad_(True)
    (gradient,) = torch.autograd.grad(module[1:](given).sum(), given)
    squares = 2 * gradient.square()  # the second derivative of a squared error
    assert torch.allclose(found.positions["0.weight"], squares.sum(1), rtol=1e-4)
    assert torch.allclose(found.channels["0.weight"], squares.double().sum((0, 2, 3)) / 40, rtol=1e-4)
    assert torch.allclose(found.positions["3.weight"], torch.full((40,), 2.0))
    assert found.channels["3.weight"].tolist() == pytest.approx([2.0])
