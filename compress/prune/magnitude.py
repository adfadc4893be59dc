"""Magnitude pruning: zero the smallest weights.

Source: Han et al. 2015 (arXiv:1506.02626); n:m patterns, Mishra et al. 2021 (arXiv:2104.08378).
Cost: one sort of the weights; no data.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..apply import mask_sha256, pack_mask
from ..budget import Budget
from ..context import Context, Storage
from ..errors import BudgetError, UsageError
from ..graph.trace import Graph, Layer
from ..model import Source
from ..plan import MaskWeights, Plan
from ..sensitivity import Sensitivity
from ..task import Calibration

DEFAULT_SPARSITY = 0.5
Masks = dict[str, Tensor]


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
    exclude = tuple(options.get("exclude") or ())
    layers = graph.without(exclude)
    if not layers:
        hint = "check --exclude" if exclude else "is it quantized already? hcompress inspect lists its layers"
        raise UsageError("the network has no float weight to prune", hint=hint)
    weights = {layer.tensor: state[layer.tensor].detach().float() for layer in layers}
    total = sum(layer.elements for layer in graph.layers)
    pattern = str(options.get("pattern") or "unstructured")
    scope = str(options.get("scope") or "global")

    if pattern == "unstructured":
        masks = _unstructured(weights, total, budget, scope, context)
    else:
        masks = _patterned(layers, weights, pattern, budget, total, context)
    return mask_plan(
        source, graph, masks, budget, {"exclude": list(exclude), "pattern": pattern, "scope": scope}, pattern
    )


def mask_plan(
    source: Source,
    graph: Graph,
    masks: Masks,
    budget: Budget | None,
    options: dict[str, Any],
    pattern: str,
    *,
    method: str = "magnitude",
) -> tuple[Plan, dict[str, Tensor]]:
    """The plan that zeroes what ``masks`` don't keep, and its sidecar of packed masks."""
    sidecar = {name: pack_mask(mask) for name, mask in masks.items()}
    decisions = tuple(
        MaskWeights(name, int(mask.sum()), mask.numel(), pattern, mask_sha256(sidecar[name]))
        for name, mask in masks.items()
    )
    state = source.module.state_dict()
    total = sum(layer.elements for layer in graph.layers)
    zeros = sum(
        int((~masks[layer.tensor] if layer.tensor in masks else state[layer.tensor] == 0).sum())
        for layer in graph.layers
    )
    predicted = {"sparsity": zeros / total}
    return Plan(method, options, 0, source.sha256, None, budget, decisions, predicted), sidecar


def _unstructured(
    weights: Mapping[str, Tensor], total: int, budget: Budget | None, scope: str, context: Context
) -> Masks:
    budget = budget or Budget("sparsity", DEFAULT_SPARSITY)
    available = sum(weight.numel() for weight in weights.values())
    if budget.quantity == "sparsity":
        removed = round(budget.limit * total)
        if removed > available:
            raise BudgetError(
                f"sparsity {budget.limit:g} is out of reach: --exclude leaves at most {available / total:.4f}",
                hint="exclude less, or lower --sparsity",
            )
        return _chooser(scope)(weights, removed / available)
    return smallest_cut(weights, available, budget, scope, context)


def _chooser(scope: str) -> Callable[[Mapping[str, Tensor], float], Masks]:
    return _global_masks if scope == "global" else _layer_masks


def smallest_cut(weights: Mapping[str, Tensor], available: int, budget: Budget, scope: str, context: Context) -> Masks:
    """Bisect for the least sparsity whose file fits; everything is cut where none does."""
    choose = _chooser(scope)

    def size_at(removed: int) -> int:
        masks = choose(weights, removed / available)
        return context.model_bytes({name: Storage(int(mask.sum()), 32) for name, mask in masks.items()})

    limit = budget.absolute(context.model_bytes({}))
    low, high = 0, available
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if size_at(middle) <= limit else (middle + 1, high)
    return choose(weights, low / available)


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
    keep[order[: round(share * len(magnitudes))]] = False
    return keep


def _patterned(
    layers: Sequence[Layer],
    weights: Mapping[str, Tensor],
    pattern: str,
    budget: Budget | None,
    total: int,
    context: Context,
) -> Masks:
    """Keep the n largest of every m consecutive weights along the input dimension."""
    match = re.fullmatch(r"(\d+):(\d+)", pattern)
    if match is None:
        raise UsageError(f"--pattern {pattern!r} is not a pattern", hint="unstructured, or n:m such as 2:4")
    n, m = int(match.group(1)), int(match.group(2))
    if not 0 < n < m:
        raise UsageError(f"--pattern {pattern}: keeps {n} of {m}", hint="n lies between 1 and m - 1")
    masks = {}
    skipped = []
    for layer in layers:
        if layer.shape[layer.input_axis] % m:
            skipped.append(layer.tensor)
            continue
        masks[layer.tensor] = n_of_m_mask(weights[layer.tensor], n, m, layer.input_axis)
    dense = f"{pattern} leaves {', '.join(skipped)} dense: the input dimension isn't a multiple of {m}"
    if skipped:
        context.notes.append(dense)
    _check_pattern_budget(pattern, masks, budget, total, dense if skipped else "")
    return masks


def n_of_m_mask(weight: Tensor, n: int, m: int, axis: int) -> Tensor:
    """True at the n largest magnitudes of every m consecutive weights along ``axis``; of equal ones, the first."""
    moved = weight.abs().movedim(axis, -1)
    groups = moved.reshape(-1, m)
    order = torch.argsort(groups, dim=1, descending=True, stable=True)
    keep = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, order[:, :n], True)
    return keep.reshape(moved.shape).movedim(-1, axis).contiguous()


def _check_pattern_budget(pattern: str, masks: Masks, budget: Budget | None, total: int, dense: str) -> None:
    """A pattern fixes the sparsity: a budget that asks for more can't be met."""
    reached = sum(int((~mask).sum()) for mask in masks.values()) / total
    if budget is None:
        return
    if budget.quantity == "sparsity" and budget.limit > reached + 0.005:
        raise BudgetError(
            f"pattern {pattern} gives sparsity {reached:.4f}, less than {budget.limit:g}",
            hint=f"{dense or 'the pattern fixes it'}; choose a sparser pattern, or --pattern unstructured",
        )
