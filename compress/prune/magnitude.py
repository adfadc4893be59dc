"""Magnitude pruning: zero the smallest weights, one by one or in blocks.

Source: Han et al. 2015 (arXiv:1506.02626); n:m patterns, Mishra et al. 2021 (arXiv:2104.08378); blocks, Narang et al.
2017 (arXiv:1711.02782), who rank them by their largest weight; here by the sum of squares, for each weight that goes.
Cost: one sort of the weights; no data.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..apply import masks_of
from ..budget import Budget
from ..context import Context, Storage
from ..graph.trace import Graph, Layer
from ..model import Source
from ..numerics.units import Units, masks_of_most, masks_without
from ..pattern import Pattern
from ..plan import Plan
from ..sensitivity import Sensitivity
from ..task import Calibration
from .masks import (
    DEFAULT_SPARSITY,
    Masks,
    cut_layers,
    mask_plan,
    num_removed,
    recorded_options,
    removed_weights,
    units_of,
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
        options: ``scope`` (``global`` or ``layer``), ``pattern`` (``pattern.FORMS``), ``exclude`` (globs).

    Returns:
        The plan and its sidecar: packed masks by tensor.

    Raises:
        BudgetError: The goal is out of reach; gives the feasible limit.
        UsageError: The pattern isn't one, or a sparsity contradicts it.
    """
    recorded = recorded_options(options)
    layers, pattern = cut_layers(graph, recorded, budget, context)
    units = units_of(layers, pattern)
    costs = squares(units, source.module.state_dict())
    if pattern.quota is not None:
        return mask_plan(source, graph, masks_of_most(units, costs, pattern.quota[0]), budget, "magnitude", recorded)
    budget = budget or Budget("sparsity", DEFAULT_SPARSITY)
    removed = removed_within(source, graph, layers, pattern, budget, recorded["scope"], context)
    masks = smallest(units, costs, removed, recorded["scope"])
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


def squares(units: Mapping[str, Units], values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The mean square of each unit's weights: what leaving it out costs for each weight that goes, ``[b, n]``."""
    return {name: own.means(values[name].detach().double().square()) for name, own in units.items()}


def smallest(units: Mapping[str, Units], costs: Mapping[str, Tensor], removed: int, scope: str) -> Masks:
    """Masks without the cheapest units, ``removed`` weights or a few more.

    Args:
        scope: ``global`` where all layers compete; ``layer`` where each loses the same share.
    """
    if scope == "global":
        return masks_without(units, costs, removed)
    elements = {name: math.prod(own.shape) for name, own in units.items()}
    share = removed / max(1, sum(elements.values()))
    return masks_without(units, costs, {name: num_removed(share, count) for name, count in elements.items()})


def removed_within(
    source: Source,
    graph: Graph,
    layers: Sequence[Layer],
    pattern: Pattern,
    budget: Budget | None,
    scope: str,
    context: Context,
) -> int:
    """How many weights of ``layers`` a budget of sparsity or bytes removes; None means the default sparsity.

    Raises:
        BudgetError: More than they have.
    """
    budget = budget or Budget("sparsity", DEFAULT_SPARSITY)
    if budget.quantity == "sparsity":
        return removed_weights(graph, layers, budget.limit)
    # The bytes of a file depend on how many weights are left, and hardly on which: bisect with the smallest ones. All
    # are cut where no file fits.
    units = units_of(layers, pattern)
    costs = squares(units, source.module.state_dict())

    def size_at(removed: int) -> int:
        masks = smallest(units, costs, removed, scope)
        return context.model_bytes({name: Storage(int(mask.sum()), 32) for name, mask in masks.items()})

    limit = budget.absolute(context.model_bytes({}))
    low, high = 0, sum(layer.elements for layer in layers)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if size_at(middle) <= limit else (middle + 1, high)
    return sum(int((~mask).sum()) for mask in smallest(units, costs, low, scope).values())
