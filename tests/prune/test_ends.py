"""Both ends of pruning, and layers that have nothing to give: by every method that zeroes weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compress.apply import apply_plan
from compress.budget import Budget
from compress.context import Context
from compress.data import Data
from compress.graph.trace import Graph, trace_graph
from compress.model import Source
from compress.plan import Plan
from compress.prune import gradual, layerwise, magnitude, obs
from compress.task import Calibration, Classification
from compress.train.recipe import Recipe, Training

METHODS: dict[str, Any] = {"magnitude": magnitude, "obs": obs, "layerwise": layerwise, "gradual": gradual}
OPTIONS = {"rounds": 2, "scope": "global", "fisher": "ggn", "exclude": ()}
State = dict[str, Tensor]
every_method = pytest.mark.parametrize("method", METHODS)
patterns = pytest.mark.parametrize("pattern", ["unstructured", "4x1"])
Prune = Callable[..., tuple[Plan, dict[str, Tensor], State, Context]]


class Odd(nn.Module):
    """A layer of one weight, one of zeros, a channel that is always zero, and a batch norm."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.conv, self.norm = nn.Conv2d(1, 1, 1), nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8)
        self.next, self.zero, self.head = nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 1), nn.Linear(32, 4)
        nn.init.zeros_(self.zero.weight)
        nn.init.constant_(self.norm.bias[2:3], -100.0)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.next(torch.relu(self.norm(self.conv(self.one(x))))))
        y: Tensor = self.head((x + self.zero(x)).flatten(1))
        return y


@pytest.fixture(scope="module")
def odd() -> tuple[nn.Module, Graph]:
    module = Odd().eval().requires_grad_(False)
    return module, trace_graph(module, (torch.zeros(2, 1, 6, 6),))


@pytest.fixture
def prune(odd: tuple[nn.Module, Graph]) -> Prune:
    module, graph = odd

    def prune(method: str, sparsity: float, *, n: int = 24, **options: Any) -> Any:
        x = torch.randn(n, 1, 6, 6, generator=torch.Generator().manual_seed(1))
        data = Data((x,), None, "examples")
        context = Context(torch.Generator().manual_seed(0), torch.device("cpu"), lambda *_: None, lambda _: 0, [])
        context = replace(context, training=Training(data, Recipe(12, optimizer="sgd", lr=1e-3, batch_size=8), 0))
        source = Source(Path("net.pt"), "0" * 64, module, "torch", None, {}, {}, ())
        given = (Calibration(Classification(), data), Budget("sparsity", sparsity), {**OPTIONS, **options}, context)
        plan, sidecar = METHODS[method].plan(source, graph, {}, *given)
        return plan, sidecar, apply_plan(module, graph.tied, plan, sidecar).state(), context

    return prune


@patterns
@every_method
def test_nothing_removed_leaves_every_bit(
    method: str, pattern: str, prune: Prune, odd: tuple[nn.Module, Graph]
) -> None:
    plan, sidecar, state, context = prune(method, 0.0, pattern=pattern)
    for key, value in odd[0].state_dict().items():
        one, other = (x.reshape(-1).view(torch.uint8) for x in (value, state[key]))
        assert torch.equal(one, other), key
    assert all(mask.kept == mask.total for mask in plan.masks().values())
    assert sidecar.keys() == plan.masks().keys(), "no value is new"
    assert context.notes == (["gradual: nothing has to go, so that nothing was trained"] * (method == "gradual"))


@patterns
@pytest.mark.parametrize("scope", ["global", pytest.param("layer", marks=pytest.mark.slow)])
@every_method
def test_everything_can_go(method: str, scope: str, pattern: str, prune: Prune, odd: tuple[nn.Module, Graph]) -> None:
    plan, _, state, _ = prune(method, 1.0, pattern=pattern, scope=scope)
    assert all(mask.kept == 0 for mask in plan.masks().values())
    assert all(bool((state[layer.tensor] == 0).all()) for layer in odd[1].layers)
    assert all(bool(torch.isfinite(value).all()) for value in state.values())
    assert plan.predicted["sparsity"] == 1.0


@patterns
@pytest.mark.parametrize(("sparsity", "n"), [pytest.param(0.3, 24, marks=pytest.mark.slow), (0.8, 24), (0.5, 1)])
@every_method
def test_dead_and_empty_layers_and_one_example_give_the_sparsity(
    method: str, sparsity: float, n: int, pattern: str, prune: Prune, odd: tuple[nn.Module, Graph]
) -> None:
    _, graph = odd
    plan, _, state, _ = prune(method, sparsity, n=n, pattern=pattern)
    assert all(bool(torch.isfinite(value).all()) for value in state.values())
    assert plan.predicted["sparsity"] >= sparsity
    zeros = sum(int((state[layer.tensor] == 0).sum()) for layer in graph.layers)
    assert zeros >= sparsity * sum(layer.elements for layer in graph.layers)
    # What costs nothing goes first: weights of zeros, where no training gives them a value.
    assert method == "gradual" or bool((state["zero.weight"] == 0).all())


@pytest.mark.parametrize("method", METHODS)
def test_n_of_m_holds_on_layers_of_zeros(method: str, prune: Prune) -> None:
    _, _, state, context = prune(method, 0.2, pattern="2:4")
    for name in ("next.weight", "zero.weight"):
        assert bool((state[name].movedim(1, -1).reshape(-1, 4).count_nonzero(1) <= 2).all())
    assert "2:4 leaves one.weight, conv.weight dense: the input dimension isn't a multiple of 4" in context.notes
