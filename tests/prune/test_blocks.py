"""Blocks of weights that go together, by every method: whole blocks, exact counts, and the best block by definition."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from compress.apply import apply_plan, masks_of
from compress.budget import Budget
from compress.context import Context
from compress.data import Data
from compress.graph.trace import Graph, trace_graph
from compress.model import Source
from compress.pattern import parse_pattern
from compress.plan import Plan
from compress.prune import gradual, layerwise, magnitude, obs
from compress.prune.masks import mask_plan, units_of
from compress.task import Calibration, Classification, Regression, Task
from compress.train.recipe import Recipe, Training

METHODS: dict[str, Any] = {"magnitude": magnitude, "obs": obs, "layerwise": layerwise, "gradual": gradual}
OPTIONS = {"rounds": 2, "scope": "global", "fisher": "ggn", "exclude": ()}
PATTERNS = ["1x4", "4x1", "16x1", "2x3"]
MOST = {"1x4": 4, "4x1": 4, "16x1": 16, "2x3": 6}


class Mixed(nn.Module):
    """Convolutions of one to three dimensions, grouped and transposed ones, a weight with two names, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.volume, self.image = nn.Conv3d(3, 8, (1, 3, 3), padding=(0, 1, 1)), nn.Conv2d(8, 12, 3, padding=1)
        self.grouped, self.depthwise = nn.Conv2d(12, 24, 3, groups=4), nn.Conv2d(24, 24, 2, groups=24)
        self.line, self.again = nn.Conv1d(24, 24, 1), nn.Conv1d(24, 24, 1)
        self.again.weight = self.line.weight
        self.up, self.head = nn.ConvTranspose1d(24, 10, 2), nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.image(torch.relu(self.volume(x[:, :, None])[:, :, 0])))
        x = torch.relu(self.depthwise(torch.relu(self.grouped(x)))).flatten(2)
        x = torch.relu(self.again(torch.relu(self.line(x))))
        y: Tensor = self.head(torch.relu(self.up(x)).mean(2))
        return y


@pytest.fixture(scope="module")
def mixed() -> tuple[nn.Module, Tensor, Graph]:
    torch.manual_seed(0)
    module, x = Mixed().eval().requires_grad_(False), torch.randn(32, 3, 6, 6)
    return module, x, trace_graph(module, (x[:2],))


def quiet(stage: str, done: int, total: int | None) -> None:
    """Progress of a test."""


def prune(
    method: str, module: nn.Module, graph: Graph, x: Tensor, budget: Budget | None, task: Task, **options: Any
) -> tuple[Plan, dict[str, Tensor], dict[str, Tensor]]:
    """The plan, its masks, and the state that they make."""

    def model_bytes(choices: Any) -> int:
        return 500 + 4 * sum(storage.kept for storage in choices.values())

    source = Source(Path("net.pt"), "0" * 64, module, "torch", None, {}, {}, ())
    data = Data((x,), None, "examples")
    training = Training(data, Recipe(16, optimizer="sgd", lr=1e-3, batch_size=8), 0)
    context = Context(torch.Generator().manual_seed(0), torch.device("cpu"), quiet, model_bytes, [], training=training)
    given = (source, graph, {}, Calibration(task, data), budget, {**OPTIONS, **options}, context)
    plan, sidecar = METHODS[method].plan(*given)
    return plan, masks_of(plan, sidecar, module.state_dict()), apply_plan(module, graph.tied, plan, sidecar).state()


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("method", METHODS)
def test_whole_blocks_go_and_no_more_of_them_than_asked(
    method: str, pattern: str, mixed: tuple[nn.Module, Tensor, Graph]
) -> None:
    module, x, graph = mixed
    plan, masks, state = prune(
        method, module, graph, x, Budget("sparsity", 0.55), Classification(), pattern=pattern, exclude=("image*",)
    )
    units = units_of([layer for layer in graph.layers if layer.tensor in masks], parse_pattern(pattern))
    assert masks.keys() == {
        "volume.weight",
        "grouped.weight",
        "depthwise.weight",
        "line.weight",
        "up.weight",
        "head.weight",
    }
    for name, mask in masks.items():
        own = units[name]
        assert torch.equal(own.blocks(mask.int()).sum((2, 3)) % own.sizes(), torch.zeros_like(own.sizes()))
        assert bool((state[name][~mask] == 0).all())
        assert plan.masks()[name].pattern == pattern
    assert torch.equal(state["line.weight"], state["again.weight"])
    assert torch.equal(state["image.weight"], module.state_dict()["image.weight"]) or method == "gradual"
    removed = sum(int((~mask).sum()) for mask in masks.values())
    wanted = 0.55 * sum(layer.elements for layer in graph.layers)
    # The last block may be more than was missing: of each layer, where layers are cut one by one.
    slack = MOST[pattern] * (len(masks) if method == "layerwise" else 1)
    assert wanted <= removed < wanted + slack + 1


@pytest.mark.parametrize("method", ["magnitude", "obs", "layerwise"])
def test_each_layer_loses_its_share_of_blocks(method: str, mixed: tuple[nn.Module, Tensor, Graph]) -> None:
    module, x, graph = mixed
    _, masks, _ = prune(
        method, module, graph, x, Budget("sparsity", 0.4), Classification(), pattern="4x1", scope="layer"
    )
    for mask in masks.values():
        assert 0.4 * mask.numel() <= int((~mask).sum()) < 0.4 * mask.numel() + 5


@pytest.mark.parametrize("method", METHODS)
def test_bytes_are_met_with_blocks(method: str, mixed: tuple[nn.Module, Tensor, Graph]) -> None:
    module, x, graph = mixed
    limit = 500 + 4 * 2000
    _, masks, _ = prune(method, module, graph, x, Budget("bytes", limit), Classification(), pattern="1x4")
    kept = sum(int(mask.sum()) for mask in masks.values())
    assert 2000 - 4 * len(masks) < kept <= 2000


def blocks_of(shape: tuple[int, int], rows: int, columns: int) -> list[tuple[slice, slice]]:
    return [
        (slice(r, r + rows), slice(c, c + columns))
        for r, c in itertools.product(range(0, shape[0], rows), range(0, shape[1], columns))
    ]


def test_magnitude_removes_the_blocks_of_the_least_squares() -> None:
    """Ragged blocks compete by the mean of their squares."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(10, 6, bias=False)).eval().requires_grad_(False)
    x, weight = torch.randn(4, 10), module[0].weight.double()
    graph = trace_graph(module, (x[:2],))
    _, masks, _ = prune("magnitude", module, graph, x, Budget("sparsity", 0.5), Regression(), pattern="4x3")
    expected, left = np.ones((6, 10), bool), 30
    for block in sorted(blocks_of((6, 10), 4, 3), key=lambda block: float(weight[block].square().mean())):
        if left > 0:
            left -= weight[block].numel()
            expected[block] = False
    assert np.array_equal(masks["0.weight"].numpy(), expected)


def regression(rows: int, columns: int) -> tuple[nn.Module, Tensor, Callable[[Tensor], float]]:
    """A linear layer on correlated inputs, and how far a mask with the best weights moves its outputs."""
    generator = torch.Generator().manual_seed(3)
    module = nn.Sequential(nn.Linear(columns, rows, bias=False)).eval().requires_grad_(False)
    module[0].weight.copy_(torch.randn(rows, columns, generator=generator))  # type: ignore[operator]
    x = torch.randn(400, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    weight, inputs = module[0].weight.double(), x.double()  # type: ignore[operator]

    def error(mask: Tensor) -> float:
        total = 0.0
        for row, keep in zip(weight, mask, strict=True):
            wanted = inputs @ row
            found = torch.linalg.lstsq(inputs[:, keep], wanted[:, None]).solution[:, 0] if keep.any() else keep.double()
            total += float((wanted - inputs[:, keep] @ found[: int(keep.sum())]).square().mean())
        return total

    return module, x, error


@pytest.mark.parametrize("method", ["obs", "layerwise"])
@pytest.mark.parametrize("pattern", ["1x4", "4x1", "2x2"])
def test_the_block_goes_whose_loss_the_others_make_up_for_best(method: str, pattern: str) -> None:
    """The loss of a linear network with squared errors is a parabola: its curvature is exact."""
    module, x, error = regression(4, 8)
    graph, p = trace_graph(module, (x[:2],)), parse_pattern(pattern)
    _, masks, state = prune(
        method, module, graph, x, Budget("sparsity", 4 / 32), Regression(), pattern=pattern, rounds=1
    )
    errors = {}
    for block in blocks_of((4, 8), p.rows, p.columns):
        mask = torch.ones(4, 8, dtype=torch.bool)
        mask[block] = False
        errors[error(mask)] = mask
    assert torch.equal(masks["0.weight"], errors[min(errors)])
    alone = torch.where(masks["0.weight"], module[0].weight, 0.0)  # type: ignore[index]
    made = x.double() @ (state["0.weight"] - module[0].weight).double().T  # type: ignore[index]
    bare = x.double() @ (alone - module[0].weight).double().T  # type: ignore[index]
    least = float(made.square().sum(1).mean())
    assert least > (1 - 1e-6) * min(errors), "nothing is nearer than least squares"
    assert least < 0.9 * float(bare.square().sum(1).mean())


@pytest.mark.parametrize("method", ["obs", "layerwise"])
def test_candidates_grow_block_by_block(method: str, mixed: tuple[nn.Module, Tensor, Graph]) -> None:
    module, x, graph = mixed
    source = Source(Path("net.pt"), "0" * 64, module, "torch", None, {}, {}, ())
    context = Context(torch.Generator().manual_seed(0), torch.device("cpu"), quiet, lambda choices: 0, [])
    calibration = Calibration(Classification(), Data((x,), None, "examples"))
    options = {**OPTIONS, "pattern": "4x1"}
    found = METHODS[method].candidates(source, graph, {}, calibration, options, context)
    sparsities = [next(found)[0].predicted["sparsity"] for _ in range(3)]
    assert sparsities == sorted(sparsities)
    total = sum(layer.elements for layer in graph.layers)
    assert sparsities == pytest.approx([0.3, 1 - 0.7 * 0.88, 1 - 0.7 * 0.88**2], abs=4 * len(graph.layers) / total)


@pytest.mark.parametrize("method", ["obs", "layerwise"])
def test_another_checkpoint_keeps_the_blocks(method: str, mixed: tuple[nn.Module, Tensor, Graph]) -> None:
    module, x, graph = mixed
    plan, masks, _ = prune(method, module, graph, x, Budget("sparsity", 0.5), Classification(), pattern="4x1")
    torch.manual_seed(7)
    other = Mixed().eval().requires_grad_(False)
    source = Source(Path("net.pt"), "1" * 64, other, "torch", None, {}, {}, ())
    context = Context(torch.Generator().manual_seed(0), torch.device("cpu"), quiet, lambda choices: 0, [])
    calibration = Calibration(Classification(), Data((x,), None, "examples"))
    _, sidecar = mask_plan(source, graph, masks, None, method, plan.options)
    again, found = METHODS[method].refit(plan, sidecar, source, trace_graph(other, (x[:2],)), calibration, context)
    refitted = masks_of(again, found, other.state_dict())
    assert all(torch.equal(refitted[name], mask) for name, mask in masks.items())
