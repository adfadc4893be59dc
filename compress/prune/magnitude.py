"""Magnitude pruning: zero the smallest weights, one by one or in blocks.

Source: Han et al. 2015 (arXiv:1506.02626); n:m patterns, Mishra et al. 2021 (arXiv:2104.08378); blocks, Narang et al.
2017 (arXiv:1711.02782), who rank them by their largest weight; here by the sum of squares, for each weight that goes.
Cost: one sort of the weights; no data.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..apply import masks_of
from ..budget import Budget
from ..context import Context
from ..graph.trace import Graph
from ..model import Source
from ..numerics.units import masks_of_most
from ..plan import Plan
from ..sensitivity import Sensitivity
from ..task import Calibration
from .masks import DEFAULT_SPARSITY, cut_layers, mask_plan, recorded_options, units_of
from .removal import remaining, removal_for, squares


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
        budget: ``sparsity``, ``bytes`` of the delivered file, or ``macs``; None means a sparsity of one half.
        options: ``scope`` (``global`` or ``layer``), ``pattern`` (``pattern.FORMS``), ``exclude`` (globs).

    Returns:
        The plan and its sidecar: packed masks by tensor.

    Raises:
        BudgetError: The goal is out of reach; gives the feasible limit.
        UsageError: The pattern isn't one, or a sparsity contradicts it.
    """
    recorded = recorded_options(options)
    layers, pattern = cut_layers(source, graph, recorded, budget, context)
    units = units_of(layers, pattern)
    costs = squares(units, source.module.state_dict())
    if pattern.quota is not None:
        return mask_plan(source, graph, masks_of_most(units, costs, pattern.quota[0]), budget, "magnitude", recorded)
    budget = budget or Budget("sparsity", DEFAULT_SPARSITY)
    removal = removal_for(source, graph, layers, pattern, budget, recorded["scope"], context)
    masks = remaining(units, costs, removal, recorded["scope"])
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
