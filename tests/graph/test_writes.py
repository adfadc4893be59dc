"""Operators in place are replaced where nothing can tell, and stay where something could."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compress.graph.rewrite import unlift, writes_in_place
from compress.graph.trace import trace_module


class Usual(nn.Module):
    """What libraries of networks do in place: activations, sums, gates."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.norm(self.a(x)), inplace=True)
        y = F.hardswish(self.b(x), inplace=True)
        y += x
        y *= torch.sigmoid(y.mean((2, 3), keepdim=True))
        return F.leaky_relu_(y).mean((2, 3))


class ThroughView(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        y.view(-1, 2, 3).relu_()
        return y * 2


class ReadThroughView(ThroughView):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        view = y.t()
        y.relu_()
        return y * 2 + view.t()


class Input(ThroughView):
    def forward(self, x: Tensor) -> Tensor:
        return self.a(x.add_(1.0)) + x


class OtherDtype(ThroughView):
    """A sum in place keeps float32; one out of place would be float64."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        y += torch.ones(6, dtype=torch.float64)
        return y


def test_what_is_in_place_in_usual_networks_is_replaced() -> None:
    torch.manual_seed(0)
    module, x = Usual().eval(), torch.randn(3, 3, 8, 8)
    graph = unlift(trace_module(module, (x,)))
    assert not writes_in_place(graph.graph)
    assert {"relu6_", "hardswish_", "add_", "mul_"} <= {node.name for node in graph.graph.nodes}
    torch.testing.assert_close(graph(x), module(x), rtol=0, atol=0)


@pytest.mark.parametrize("make", [ThroughView, ReadThroughView, Input, OtherDtype])
def test_a_write_that_something_else_could_see_stays(make: type[nn.Module]) -> None:
    torch.manual_seed(0)
    module, x = make().eval(), torch.randn(3, 6)
    graph = unlift(trace_module(module, (x.clone(),)))
    assert writes_in_place(graph.graph)
    torch.testing.assert_close(graph(x.clone()), module(x.clone()), rtol=0, atol=0)
