"""OBS pruning on a small network: exact counts, no harm by the update, and plans on another checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compress.apply import apply_plan
from compress.budget import Budget
from compress.context import Context
from compress.data import Data
from compress.errors import BudgetError, OutOfMemoryError, UsageError
from compress.graph.trace import Graph, trace_graph
from compress.model import Source
from compress.plan import Plan
from compress.prune import obs
from compress.task import Calibration, Classification, divergence

OPTIONS = {"rounds": 2, "scope": "global", "fisher": "ggn", "exclude": ()}


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(96, 12), nn.ReLU(), nn.Linear(12, 5))


def source_of(module: nn.Module) -> Source:
    module.eval().requires_grad_(False)
    return Source(Path("net.pt"), "0" * 64, module, "torch", None, {}, {}, ())


def examples(n: int) -> Tensor:
    return torch.randn(n, 2, 6, 6, generator=torch.Generator().manual_seed(1))


def context() -> Context:
    def quiet(stage: str, done: int, total: int | None) -> None:
        """Progress of a test."""

    return Context(torch.Generator().manual_seed(0), torch.device("cpu"), quiet, lambda choices: 0, [])


def prune(module: nn.Module, sparsity: float, *, n: int = 24, **options: Any) -> tuple[Graph, Plan, dict[str, Tensor]]:
    graph = trace_graph(module, (examples(2),))
    calibration = Calibration(Classification(), Data((examples(n),), None, "examples"))
    plan, sidecar = obs.plan(
        source_of(module), graph, {}, calibration, Budget("sparsity", sparsity), {**OPTIONS, **options}, context()
    )
    return graph, plan, sidecar


def outputs(module: nn.Module, state: dict[str, Tensor], x: Tensor) -> Tensor:
    result: Tensor = torch.func.functional_call(module, state, (x,))
    return result


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_as_many_weights_are_zero_as_asked(sparsity: float, scope: str) -> None:
    module = network()
    graph, plan, sidecar = prune(module, sparsity, scope=scope)
    state = apply_plan(module, graph.tied, plan, sidecar).state()
    zeros = sum(int((state[layer.tensor] == 0).sum()) for layer in graph.layers)
    total = sum(layer.elements for layer in graph.layers)
    assert zeros == pytest.approx(sparsity * total, abs=len(graph.layers))


@pytest.mark.parametrize("sparsity", [0.3, 0.6, 0.9])
def test_one_round_is_never_worse_than_its_bare_cut(sparsity: float) -> None:
    module, x = network(), examples(24)
    graph, plan, sidecar = prune(module, sparsity, rounds=1)
    moved = apply_plan(module, graph.tied, plan, sidecar).state()
    cut = {key: torch.where(moved[key] == 0, torch.zeros(()), value) for key, value in module.state_dict().items()}
    cut = {key: value if key in plan.masks() else moved[key] for key, value in cut.items()}
    dense = module(x)
    after, before = (divergence(dense, outputs(module, state, x), are_logits=True) for state in (moved, cut))
    assert after < 0.95 * before


def test_the_source_is_left_as_it_was() -> None:
    module = network()
    before = {key: value.clone() for key, value in module.state_dict().items()}
    prune(module, 0.5)
    assert all(torch.equal(before[key], value) for key, value in module.state_dict().items())
    assert all(parameter.grad is None for parameter in module.parameters())


def test_one_seed_gives_one_plan() -> None:
    assert prune(network(), 0.5)[1] == prune(network(), 0.5)[1]


def test_everything_can_be_cut() -> None:
    _, plan, _ = prune(network(), 1 - 1e-9)
    assert sum(mask.kept for mask in plan.masks().values()) == 0


def test_one_example_is_enough_to_run() -> None:
    assert prune(network(), 0.5, n=1)[1].masks()


def test_a_network_without_curvature_is_cut_by_magnitude() -> None:
    module = network()
    with torch.no_grad():
        module[5].weight.zero_()  # type: ignore[index]
    graph, plan, sidecar = prune(module, 0.5)
    state = apply_plan(module, graph.tied, plan, sidecar).state()
    kept = torch.cat([state[layer.tensor].flatten() for layer in graph.layers])
    assert bool(torch.isfinite(kept).all())


def test_another_checkpoint_keeps_the_masks_and_gets_values_of_its_own() -> None:
    graph, plan, sidecar = prune(network(), 0.6)
    other = network(seed=7)
    calibration = Calibration(Classification(), Data((examples(24),), None, "examples"))
    masks = {name: apply_plan(network(), graph.tied, plan, sidecar).state()[name] != 0 for name in plan.masks()}
    again, tensors = obs.refit(
        plan, source_of(other), trace_graph(other, (examples(2),)), masks, calibration, context()
    )
    state = apply_plan(other, graph.tied, again, tensors).state()
    assert {n: m.mask_sha256 for n, m in again.masks().items()} == {n: m.mask_sha256 for n, m in plan.masks().items()}
    assert again.options == plan.options
    cut = {
        key: torch.where(masks[key], value, 0.0) if key in masks else value for key, value in other.state_dict().items()
    }
    x = examples(24)
    moved, bare = (divergence(other(x), outputs(other, s, x), are_logits=True) for s in (state, cut))
    assert moved < bare


def test_what_is_excluded_stays_and_bounds_the_sparsity() -> None:
    _, plan, _ = prune(network(), 0.05, exclude=("3.*",))
    assert "3.weight" not in plan.masks()
    with pytest.raises(BudgetError, match="--exclude leaves at most"):
        prune(network(), 0.9, exclude=("3.*",))


def test_a_pattern_is_refused() -> None:
    with pytest.raises(UsageError, match="has no pattern 2:4"):
        prune(network(), 0.5, pattern="2:4")


def test_gradients_beyond_memory_name_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(obs, "MEMORY_LIMIT", 100_000)
    with pytest.raises(OutOfMemoryError) as caught:
        prune(network(), 0.5)
    assert "--num-calibration" in str(caught.value.hint)
