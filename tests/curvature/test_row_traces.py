"""Row traces against the Jacobian of the outputs, formed one example at a time."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from compress.curvature.network import open_network
from compress.curvature.row_traces import row_traces
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
