"""Magnitude masks against a sort in numpy."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from zoo import named

from compress.apply import unpack_mask
from compress.budget import Budget
from compress.context import Context
from compress.errors import BudgetError, UsageError
from compress.graph.trace import trace_graph
from compress.model import Source
from compress.plan import Plan
from compress.prune import magnitude


def context(notes: list[str] | None = None) -> Context:
    def model_bytes(choices: Any) -> int:
        return 500 + 4 * sum(storage.kept for storage in choices.values())

    generator = torch.Generator().manual_seed(0)
    return Context(generator, torch.device("cpu"), lambda *_: None, model_bytes, [] if notes is None else notes)


def plan_for(
    module: nn.Module, inputs: tuple[Tensor, ...], budget: Budget | None, notes: list[str] | None = None, **options: Any
) -> tuple[Plan, dict[str, Tensor]]:
    source = Source(Path("model.pt"), "0" * 64, module, "torch", None, {}, {}, ())
    plan, sidecar = magnitude.plan(source, trace_graph(module, inputs), {}, None, budget, options, context(notes))
    state = module.state_dict()
    return plan, {n: unpack_mask(sidecar[n], d, state[n].shape) for n, d in plan.masks().items()}


def plan_zoo(name: str, budget: Budget | None, **options: Any) -> tuple[Plan, dict[str, Tensor], nn.Module]:
    network = named(name)
    module = network.make()
    plan, masks = plan_for(module, network.inputs(2), budget, **options)
    return plan, masks, module


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.77, 0.99])
def test_global_pruning_zeroes_the_smallest_of_all_weights(sparsity: float) -> None:
    plan, masks, module = plan_zoo("plain_cnn", Budget("sparsity", sparsity))
    state = module.state_dict()
    magnitudes = np.abs(np.concatenate([state[name].numpy().ravel() for name in masks]))
    removed = math.ceil(sparsity * magnitudes.size - 1e-6)
    expected = np.ones(magnitudes.size, bool)
    expected[np.argsort(magnitudes, kind="stable")[:removed]] = False
    found = np.concatenate([mask.numpy().ravel() for mask in masks.values()])
    assert np.array_equal(found, expected)
    assert plan.predicted["sparsity"] == removed / magnitudes.size


def test_layer_pruning_zeroes_the_same_share_of_each_layer() -> None:
    _, masks, module = plan_zoo("plain_cnn", Budget("sparsity", 0.3), scope="layer")
    for name, mask in masks.items():
        weight = np.abs(module.state_dict()[name].numpy().ravel())
        expected = np.ones(weight.size, bool)
        expected[np.argsort(weight, kind="stable")[: math.ceil(0.3 * weight.size - 1e-6)]] = False
        assert np.array_equal(mask.numpy().ravel(), expected)


def test_of_equal_magnitudes_those_that_come_first_are_zeroed() -> None:
    layer = nn.Linear(4, 2, bias=False).requires_grad_(False)
    layer.weight.fill_(0.5)
    _, masks = plan_for(layer.eval(), (torch.randn(2, 4),), Budget("sparsity", 0.375))
    assert masks["weight"].int().tolist() == [[0, 0, 0, 1], [1, 1, 1, 1]]


@pytest.mark.parametrize(
    ("pattern", "name"), [("2:4", "grouped"), ("1:2", "spatial_flatten"), ("2:4", "transposed_2d")]
)
def test_patterns_run_along_the_input_dimension(pattern: str, name: str) -> None:
    n, m = map(int, pattern.split(":"))
    _, masks, module = plan_zoo(name, None, pattern=pattern)
    assert masks
    for key, mask in masks.items():
        axis = 0 if name == "transposed_2d" and key != "6.weight" else 1
        weight = np.moveaxis(np.abs(module.state_dict()[key].numpy()), axis, -1).reshape(-1, m)
        kept = np.moveaxis(mask.numpy(), axis, -1).reshape(-1, m)
        assert (kept.sum(1) == n).all()
        assert (np.where(kept, weight, np.inf).min(1) >= np.where(kept, -np.inf, weight).max(1)).all()


def test_a_layer_that_a_pattern_does_not_fit_stays_dense_with_a_note() -> None:
    notes: list[str] = []
    network = named("plain_cnn")
    _, masks = plan_for(network.make(), network.inputs(2), None, notes, pattern="2:4")
    assert "0.0.weight" not in masks
    assert notes == ["2:4 leaves 0.0.weight dense: the input dimension isn't a multiple of 4"]


def test_excluded_layers_are_left_alone_and_the_rest_makes_up_for_them() -> None:
    _, masks, module = plan_zoo("plain_cnn", Budget("sparsity", 0.5), exclude=["0.*"])
    assert "0.0.weight" not in masks
    total = sum(module.state_dict()[name].numel() for name in ("0.0.weight", "1.0.weight", "2.2.weight"))
    assert sum(int((~mask).sum()) for mask in masks.values()) == round(0.5 * total)


@pytest.mark.parametrize(("limit", "kept"), [(10.0, 0), (500.0 + 4 * 100, 100), (1e6, 1140)])
def test_a_byte_budget_cuts_as_little_as_fits(limit: float, kept: int) -> None:
    _, masks, _ = plan_zoo("plain_cnn", Budget("bytes", limit))
    assert sum(int(mask.sum()) for mask in masks.values()) == kept


@pytest.mark.parametrize(
    ("budget", "options", "error", "words"),
    [
        (Budget("sparsity", 0.9), {"exclude": ["1.*"]}, BudgetError, "sparsity 0.9 is out of reach"),
        (Budget("sparsity", 0.7), {"pattern": "2:4"}, BudgetError, "pattern 2:4 gives sparsity"),
        (None, {"exclude": ["*"]}, UsageError, "no float weight to prune"),
        (None, {"pattern": "4:2"}, UsageError, "keeps 4 of 2"),
        (None, {"pattern": "half"}, UsageError, "is not a pattern"),
    ],
)
def test_what_cannot_be_done_is_said(
    budget: Budget | None, options: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        plan_zoo("plain_cnn", budget, **options)
