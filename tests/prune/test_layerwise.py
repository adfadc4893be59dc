"""Layer-wise pruning on small networks of every kind of layer: exact counts, no harm, and what stays as it is."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compress.apply import apply_plan, masks_of
from compress.budget import Budget
from compress.context import Context
from compress.data import Data
from compress.errors import BudgetError
from compress.graph.trace import Graph, trace_graph
from compress.model import Source
from compress.plan import Plan
from compress.prune import layerwise, magnitude
from compress.prune.masks import FIRST_SPARSITY, SEARCH_DENSITY
from compress.task import Calibration, Classification, divergence

OPTIONS = {"scope": "global", "pattern": "unstructured", "exclude": ()}
State = dict[str, Tensor]


class Residual(nn.Module):
    """Convolutions with batch norms, one of them grouped and strided, and a stream that they are added to."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm0 = nn.Conv2d(2, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.inner, self.norm1 = nn.Conv2d(8, 8, 3, padding=1, groups=2, bias=False), nn.BatchNorm2d(8)
        self.down = nn.Conv2d(8, 12, 3, stride=2, groups=4)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm0(self.stem(x)))
        x = torch.relu(x + self.norm1(self.inner(x)))
        y: Tensor = self.head(torch.relu(self.down(x)).mean((2, 3)))
        return y


class Attention(nn.Module):
    """Projections around attention."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(12, 12) for _ in range(4))
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (3, 4)).transpose(1, 2) for p in (self.q, self.k, self.v))
        mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        y: Tensor = self.head((x + self.o(mixed)).mean(1))
        return y


def convolutional(dims: int) -> nn.Module:
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    return nn.Sequential(
        conv(2, 8, 3, padding=1), nn.ReLU(), conv(8, 8, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 2**dims, 5)
    )


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv1d": (lambda: convolutional(1), (2, 6)),
    "conv2d": (lambda: convolutional(2), (2, 6, 6)),
    "conv3d": (lambda: convolutional(3), (2, 6, 6, 6)),
    "residual": (Residual, (2, 6, 6)),
    "attention": (Attention, (7, 12)),
}


@functools.cache
def network(kind: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    module = NETWORKS[kind][0]()
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.uniform_(part.running_var, 0.5, 2)
            nn.init.normal_(part.running_mean)
            nn.init.uniform_(part.weight, 0.5, 2)
    return module.eval().requires_grad_(False)


def examples(kind: str, n: int = 64) -> Tensor:
    return torch.randn(n, *NETWORKS[kind][1], generator=torch.Generator().manual_seed(1))


@functools.cache
def traced(module: nn.Module, shape: torch.Size) -> Graph:
    return trace_graph(module, (torch.zeros(2, *shape),))


def source_of(module: nn.Module) -> Source:
    return Source(Path("net.pt"), "0" * 64, module, "torch", None, {}, {}, ())


def context() -> Context:
    def quiet(stage: str, done: int, total: int | None) -> None:
        """Progress of a test."""

    return Context(torch.Generator().manual_seed(0), torch.device("cpu"), quiet, lambda choices: 0, [])


def prune(
    module: nn.Module, x: Tensor, sparsity: float | None, *, within: Context | None = None, **options: Any
) -> tuple[Graph, Plan, State, State]:
    """The graph, the plan, its sidecar, and the state that they make."""
    graph = traced(module, x.shape[1:])
    calibration = Calibration(Classification(), Data((x,), None, "examples"))
    budget = None if sparsity is None else Budget("sparsity", sparsity)
    given = (source_of(module), graph, {}, calibration, budget, {**OPTIONS, **options}, within or context())
    plan, sidecar = layerwise.plan(*given)
    return graph, plan, sidecar, apply_plan(module, graph.tied, plan, sidecar).state()


def moved(module: nn.Module, state: State, x: Tensor) -> float:
    return divergence(module(x), torch.func.functional_call(module, state, (x,)), are_logits=True)


@pytest.mark.parametrize("kind", NETWORKS)
def test_outputs_are_much_nearer_than_by_magnitude(kind: str) -> None:
    module, x = network(kind), examples(kind)
    graph, plan, _, state = prune(module, x, 0.6)
    decided, masks = magnitude.plan(
        source_of(module), graph, {}, None, Budget("sparsity", 0.6), {"scope": "layer"}, context()
    )
    smallest = apply_plan(module, graph.tied, decided, masks).state()
    assert moved(module, state, x) < 0.5 * moved(module, smallest, x)
    assert plan.predicted["loss"] == pytest.approx(moved(module, state, x), rel=1e-3)


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_as_many_weights_are_zero_as_asked(sparsity: float, scope: str) -> None:
    graph, plan, _, state = prune(network("residual"), examples("residual"), sparsity, scope=scope)
    zeros = {layer.tensor: int((state[layer.tensor] == 0).sum()) for layer in graph.layers}
    total = sum(layer.elements for layer in graph.layers)
    assert sum(zeros.values()) == pytest.approx(sparsity * total, abs=len(graph.layers))
    assert plan.predicted["sparsity"] == sum(zeros.values()) / total
    if scope == "layer":
        for layer in graph.layers:
            assert zeros[layer.tensor] == pytest.approx(sparsity * layer.elements, abs=1)


def test_layers_that_compete_lose_less() -> None:
    module, x = network("residual"), examples("residual")
    shared, alike = (prune(module, x, 0.5, scope=scope)[1].predicted["loss"] for scope in ("global", "layer"))
    assert shared < alike


def test_nothing_removed_leaves_every_weight_bit_for_bit() -> None:
    module, x = network("residual"), examples("residual")
    _, plan, sidecar, state = prune(module, x, 0.0)
    assert all(torch.equal(value, state[key]) for key, value in module.state_dict().items())
    assert all(mask.kept == mask.total for mask in plan.masks().values())
    assert sidecar.keys() == plan.masks().keys(), "no value is new"


def test_the_source_is_left_as_it_was_and_one_seed_gives_one_plan() -> None:
    module, x = network("residual"), examples("residual")
    before = {key: value.clone() for key, value in module.state_dict().items()}
    assert prune(module, x, 0.7)[1] == prune(module, x, 0.7)[1]
    assert all(torch.equal(before[key], value) for key, value in module.state_dict().items())


def test_what_is_excluded_stays_bit_for_bit_and_bounds_the_sparsity() -> None:
    module, x = network("residual"), examples("residual")
    _, plan, _, state = prune(module, x, 0.3, exclude=("down*", "head*"))
    assert plan.masks().keys() == {"stem.weight", "inner.weight"}
    for name in ("down.weight", "down.bias", "head.weight", "head.bias"):
        assert torch.equal(state[name], module.state_dict()[name])
    with pytest.raises(BudgetError, match="--exclude leaves at most"):
        prune(module, x, 0.9, exclude=("down*", "head*"))


@pytest.mark.parametrize("sparsity", [0.97, 1 - 1e-9])
def test_next_to_nothing_may_be_left(sparsity: float) -> None:
    _, _, _, state = prune(network("residual"), examples("residual"), sparsity)
    assert all(bool(torch.isfinite(value).all()) for value in state.values())


def test_one_example_is_enough() -> None:
    _, _, _, state = prune(network("residual"), examples("residual", n=1), 0.5)
    assert all(bool(torch.isfinite(value).all()) for value in state.values())


@pytest.mark.parametrize("sparsity", [0.3, 0.8])
def test_layers_of_zeros_dead_channels_and_single_weights(sparsity: float) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(1, 1, 1), nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.Flatten())
    module.append(nn.Linear(24, 4)).eval().requires_grad_(False)
    module[1].bias[2] = -100.0  # type: ignore[index,operator]
    module[1].weight[3] = 0.0  # type: ignore[index,operator]
    x = torch.randn(32, 1, 6, 6)
    graph, _, _, state = prune(module, x, sparsity)
    assert int((state["1.weight"][3] != 0).sum()) == 0
    assert moved(module, state, x) < moved(module, {**module.state_dict(), "5.weight": torch.zeros(4, 24)}, x)
    module[3].weight.zero_()  # type: ignore[operator]
    _, _, _, state = prune(module, x, sparsity)
    assert bool((state["3.weight"] == 0).all())
    zeros = sum(int((state[layer.tensor] == 0).sum()) for layer in graph.layers)
    assert zeros >= sparsity * sum(layer.elements for layer in graph.layers)


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "1:2"])
def test_every_m_inputs_hold_n(pattern: str) -> None:
    n, m = map(int, pattern.split(":"))
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 12, 3, groups=2), nn.Flatten())
    module.append(nn.Linear(192, 5)).eval().requires_grad_(False)
    x = torch.randn(48, 4, 6, 6)
    graph, plan, _, state = prune(module, x, None, pattern=pattern)
    for name, decision in plan.masks().items():
        assert bool((state[name].movedim(1, -1).reshape(-1, m).count_nonzero(1) == n).all())
        assert (decision.pattern, decision.kept) == (pattern, decision.total // m * n)
    decided, masks = magnitude.plan(source_of(module), graph, {}, None, None, {"pattern": pattern}, context())
    assert moved(module, state, x) < 0.7 * moved(module, apply_plan(module, graph.tied, decided, masks).state(), x)


class Odd(nn.Module):
    """One weight under two names, and a transposed convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Conv1d(8, 8, 1), nn.Conv1d(8, 8, 1), nn.Linear(8, 3)
        self.b.weight = self.a.weight
        self.up = nn.ConvTranspose1d(8, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.out(torch.relu(self.up(torch.relu(self.b(torch.relu(self.a(x)))))).mean(2))
        return y


@pytest.mark.parametrize("options", [{}, {"scope": "layer"}, {"pattern": "2:4"}])
def test_what_cannot_be_fitted_is_pruned_once_and_named(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    module, x, surroundings = Odd().eval().requires_grad_(False), torch.randn(24, 8, 5), context()
    graph, plan, _sidecar, state = prune(module, x, None, within=surroundings, **options)
    assert plan.masks().keys() == {"a.weight", "up.weight", "out.weight"}
    assert torch.equal(state["a.weight"], state["b.weight"])
    zeros = sum(int((state[layer.tensor] == 0).sum()) for layer in graph.layers)
    assert zeros == pytest.approx(0.5 * sum(layer.elements for layer in graph.layers), abs=2)
    for name in ("a.weight", "up.weight"):
        assert torch.equal(state[name], torch.where(state[name] != 0, module.state_dict()[name], 0.0))
    (note,) = surroundings.notes
    assert note.startswith("a.weight, up.weight: pruned, but not fitted: ")


@pytest.mark.parametrize(
    ("count", "said"), [(1, ["1 calibration example alone"]), (15, ["15 calibration examples alone"]), (16, [])]
)
def test_few_examples_are_said(count: int, said: list[str]) -> None:
    surroundings = context()
    prune(network("conv2d"), examples("conv2d", count), 0.5, within=surroundings)
    assert [note.split(",")[0].partition("chosen on ")[2] for note in surroundings.notes] == said


def test_another_checkpoint_keeps_the_masks_and_gets_values_of_its_own() -> None:
    x = examples("residual")
    _, plan, sidecar, _ = prune(network("residual"), x, 0.6)
    other = network("residual", seed=7)
    graph = traced(other, x.shape[1:])
    calibration = Calibration(Classification(), Data((x,), None, "examples"))
    again, tensors = layerwise.refit(plan, sidecar, source_of(other), graph, calibration, context())
    assert {n: m.mask_sha256 for n, m in again.masks().items()} == {n: m.mask_sha256 for n, m in plan.masks().items()}
    assert (again.options, again.budget) == (plan.options, plan.budget)
    masks = masks_of(plan, sidecar, other.state_dict())
    bare = {key: torch.where(masks[key], v, 0.0) if key in masks else v for key, v in other.state_dict().items()}
    state = apply_plan(other, graph.tied, again, tensors).state()
    assert moved(other, state, x) < 0.5 * moved(other, bare, x)


def found_candidates(module: nn.Module, x: Tensor) -> Iterator[tuple[Plan, State]]:
    calibration = Calibration(Classification(), Data((x,), None, "examples"))
    graph = traced(module, x.shape[1:])
    return layerwise.candidates(source_of(module), graph, {}, calibration, OPTIONS, context())


def test_candidates_grow_in_sparsity_and_the_loss_with_them() -> None:
    found = found_candidates(network("residual"), examples("residual"))
    plans = [next(found)[0] for _ in range(4)]
    kept = [sum(mask.kept for mask in plan.masks().values()) for plan in plans]
    total = sum(mask.total for mask in plans[0].masks().values())
    assert kept == pytest.approx([(1 - FIRST_SPARSITY) * SEARCH_DENSITY**n * total for n in range(4)], abs=1)
    losses = [plan.predicted["loss"] for plan in plans]
    assert losses == sorted(losses)


def test_zeros_of_a_sparser_network_stay_zero() -> None:
    torch.manual_seed(0)
    module, x = (
        nn.Sequential(nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 4)).eval().requires_grad_(False),
        torch.randn(64, 24),
    )
    for layer in (module[0], module[2]):
        layer.weight.mul_(torch.rand_like(layer.weight) > 0.6)  # type: ignore[operator,arg-type]
    for sparsity in (0.01, 0.3, 0.7):
        _, _, _, state = prune(module, x, sparsity)
        assert all(
            bool((state[key] == 0)[value == 0].all()) for key, value in module.state_dict().items() if value.dim() > 1
        )


class InPlace(nn.Module):
    """It writes into its input; its first output is no float."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.b(torch.relu(self.a(x.mul_(2).sub_(0.3))))
        return y.argmax(1), y


def test_a_forward_may_write_into_its_input() -> None:
    torch.manual_seed(0)
    module, x = InPlace().eval().requires_grad_(False), torch.randn(64, 8)
    before = x.clone()
    _, plan, _, _ = prune(module, x, 0.4)
    assert torch.equal(x, before)
    assert plan.predicted["loss"] < 0.01
