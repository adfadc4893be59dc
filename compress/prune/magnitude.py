"""Magnitude pruning: zero the smallest weights.

Source: Han et al. 2015 (arXiv:1506.02626); n:m patterns, Mishra et al. 2021 (arXiv:2104.08378).
Cost: one sort of the weights; no data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..apply import masks_of
from ..budget import Budget
from ..context import Context, Storage
from ..graph.trace import Graph, Layer
from ..model import Source
from ..plan import UNSTRUCTURED, Plan
from ..sensitivity import Sensitivity
from ..task import Calibration
from .masks import (
    DEFAULT_SPARSITY,
    Masks,
    mask_plan,
    n_of_m_mask,
    num_removed,
    parse_pattern,
    patterned_layers,
    recorded_options,
    removed_weights,
)


def plan(
    source: Source,
    graph: Graph,
    sensitivities: Mapping[str, Sensitivity],
    calibration: Calibration | None,
    budget: Budget | None,
    options: Mapping[str, Any],
    context: Context,
) -> tuple[Plan, dict[str, Tensor]]:
    """Choose the weights to zero.

    Args:
        budget: ``sparsity``, or ``bytes`` of the delivered file.
        options: ``scope`` (``global`` or ``layer``), ``pattern`` (``unstructured`` or ``n:m``), ``exclude`` (globs).

    Returns:
        The plan and its sidecar: packed masks by tensor.

    Raises:
        BudgetError: The goal is out of reach; gives the feasible limit.
        UsageError: The pattern isn't one, or a sparsity contradicts it.
    """
    state = source.module.state_dict()
    recorded = recorded_options(options)
    layers = graph.compressible(tuple(recorded["exclude"]), "prune")
    pattern, scope = recorded["pattern"], recorded["scope"]
    if pattern == UNSTRUCTURED:
        budget = budget or Budget("sparsity", DEFAULT_SPARSITY)
        weights = {layer.tensor: state[layer.tensor].detach().float() for layer in layers}
        masks = _unstructured(graph, layers, weights, budget, scope, context)
    else:
        n, m = parse_pattern(pattern)
        masks = {
            layer.tensor: n_of_m_mask(state[layer.tensor].detach().float().abs(), n, m, layer.input_axis)
            for layer in patterned_layers(graph, layers, pattern, budget, context)
        }
    return mask_plan(source, graph, masks, budget, "magnitude", recorded)


def refit(
    given: Plan,
    sidecar: Mapping[str, Tensor],
    source: Source,
    graph: Graph,
    calibration: Calibration,
    context: Context,
) -> tuple[Plan, dict[str, Tensor]]:
    """The masks of a plan on another checkpoint, whose survivors keep its own values."""
    masks = masks_of(given, sidecar, source.module.state_dict())
    return mask_plan(source, graph, masks, given.budget, given.method, given.options)


def _unstructured(
    graph: Graph,
    layers: Sequence[Layer],
    weights: Mapping[str, Tensor],
    budget: Budget,
    scope: str,
    context: Context,
) -> Masks:
    available = sum(weight.numel() for weight in weights.values())
    if budget.quantity == "sparsity":
        return smallest(weights, removed_weights(graph, layers, budget.limit) / available, scope)
    return smallest_cut(weights, available, budget, scope, context)


def smallest(weights: Mapping[str, Tensor], share: float, scope: str) -> Masks:
    """Masks that zero the smallest ``share`` of all weights, or where ``scope`` is ``layer`` of each one."""
    return _global_masks(weights, share) if scope == "global" else _layer_masks(weights, share)


def removed_within(
    source: Source, graph: Graph, layers: Sequence[Layer], budget: Budget | None, scope: str, context: Context
) -> int:
    """How many weights of ``layers`` a budget of sparsity or bytes removes; None means the default sparsity.

    Raises:
        BudgetError: More than they have.
    """
    budget = budget or Budget("sparsity", DEFAULT_SPARSITY)
    if budget.quantity == "sparsity":
        return removed_weights(graph, layers, budget.limit)
    # The bytes of a file depend on how many weights are left, and hardly on which.
    state = source.module.state_dict()
    weights = {layer.tensor: state[layer.tensor].detach().float() for layer in layers}
    masks = smallest_cut(weights, sum(layer.elements for layer in layers), budget, scope, context)
    return sum(int((~mask).sum()) for mask in masks.values())


def smallest_cut(weights: Mapping[str, Tensor], available: int, budget: Budget, scope: str, context: Context) -> Masks:
    """Bisect for the least sparsity whose file fits; everything is cut where none does."""

    def size_at(removed: int) -> int:
        masks = smallest(weights, removed / available, scope)
        return context.model_bytes({name: Storage(int(mask.sum()), 32) for name, mask in masks.items()})

    limit = budget.absolute(context.model_bytes({}))
    low, high = 0, available
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if size_at(middle) <= limit else (middle + 1, high)
    return smallest(weights, low / available, scope)


def _global_masks(weights: Mapping[str, Tensor], share: float) -> Masks:
    """Zero the smallest ``share`` of all magnitudes; of equal ones, those that come first."""
    flat = torch.cat([weight.abs().flatten() for weight in weights.values()])
    keep = _keep_largest(flat, share)
    pieces = torch.split(keep, [weight.numel() for weight in weights.values()])
    return {name: piece.reshape(weights[name].shape) for name, piece in zip(weights, pieces, strict=True)}


def _layer_masks(weights: Mapping[str, Tensor], share: float) -> Masks:
    return {name: _keep_largest(w.abs().flatten(), share).reshape(w.shape) for name, w in weights.items()}


def _keep_largest(magnitudes: Tensor, share: float) -> Tensor:
    keep = torch.ones(len(magnitudes), dtype=torch.bool)
    order = torch.argsort(magnitudes, stable=True)
    keep[order[: num_removed(share, len(magnitudes))]] = False
    return keep
