"""What every pruning method shares: which weights may go, in which units, and the plan that a set of masks makes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..apply import mask_sha256, pack_mask
from ..budget import Budget
from ..context import Context
from ..errors import BudgetError, UsageError
from ..graph.trace import Graph, Layer
from ..model import Source
from ..numerics.units import Units
from ..pattern import UNSTRUCTURED, Pattern, parse_pattern
from ..plan import MaskWeights, Plan

DEFAULT_SPARSITY = 0.5
FIRST_SPARSITY = 0.3  # of a search; a step then leaves this share of what is left
SEARCH_DENSITY = 0.88
MOST_REMOVED = 0.98
SHARE_ERROR = 1e-9  # what a share that is meant to be whole may be off by, as 0.1 * 30 is
Masks = dict[str, Tensor]


def removed_weights(graph: Graph, layers: Sequence[Layer], sparsity: float) -> int:
    """How many weights a sparsity of the whole network removes from ``layers``.

    Raises:
        BudgetError: More than they have.
    """
    total = sum(layer.elements for layer in graph.layers)
    available = sum(layer.elements for layer in layers)
    removed = num_removed(sparsity, total)
    if removed > available:
        most = math.floor(1e4 * available / total) / 1e4
        raise BudgetError(
            f"sparsity {sparsity:g} is out of reach: --exclude leaves at most {most:.4f}",
            hint="exclude less, or lower --sparsity",
        )
    return removed


def num_removed(share: float, total: int) -> int:
    """How many of ``total`` weights a share of them is, rounded up: what was asked for is reached."""
    return min(total, math.ceil(share * total - SHARE_ERROR * total))


def searched_sparsities() -> list[float]:
    """Those that a search for the sparsest network within the gates tries, growing."""
    found, density = [], 1 - FIRST_SPARSITY
    while density > 1 - MOST_REMOVED:
        found.append(1 - density)
        density *= SEARCH_DENSITY
    return found


def recorded_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """What says where weights are removed, as a plan records it."""
    return {
        "exclude": list(options.get("exclude") or ()),
        "pattern": str(options.get("pattern") or UNSTRUCTURED),
        "scope": str(options.get("scope") or "global"),
    }


def mask_plan(
    source: Source,
    graph: Graph,
    masks: Mapping[str, Tensor],
    budget: Budget | None,
    method: str,
    options: Mapping[str, Any],
) -> tuple[Plan, dict[str, Tensor]]:
    """The plan that zeroes what ``masks`` don't keep, and its sidecar of packed masks.

    Args:
        options: Recorded in the plan; ``pattern`` goes to every decision.
    """
    sidecar = {name: pack_mask(mask) for name, mask in masks.items()}
    decisions = tuple(
        MaskWeights(name, int(mask.sum()), mask.numel(), str(options["pattern"]), mask_sha256(sidecar[name]))
        for name, mask in masks.items()
    )
    state = source.module.state_dict()
    total = sum(layer.elements for layer in graph.layers)
    kept = {
        layer.tensor: int(torch.count_nonzero(masks.get(layer.tensor, state[layer.tensor]))) for layer in graph.layers
    }
    predicted = {"sparsity": (total - sum(kept.values())) / total}
    if budget is not None and budget.quantity == "macs":
        predicted["macs"] = float(graph.nonzero_macs(kept))
    return Plan(method, dict(options), 0, source.sha256, None, budget, decisions, predicted), sidecar


def units_of(layers: Sequence[Layer], pattern: Pattern) -> dict[str, Units]:
    """The units of removal of each layer's weight, by tensor."""
    return {layer.tensor: Units(layer.shape, 1 - layer.input_axis, layer.input_axis, pattern) for layer in layers}


def cut_layers(
    source: Source, graph: Graph, recorded: Mapping[str, Any], budget: Budget | None, context: Context
) -> tuple[tuple[Layer, ...], Pattern]:
    """The layers that weights go from, as the recorded options say it, and the pattern in which they do.

    Raises:
        BudgetError: The budget of sparsity or MACs asks for more zeros than the pattern makes.
        UsageError: It is no pattern, or there is nothing to prune.
    """
    pattern = parse_pattern(str(recorded["pattern"]))
    layers = graph.compressible(tuple(recorded["exclude"]), "prune")
    if pattern.quota is not None:
        layers = patterned_layers(source, graph, layers, pattern.quota, budget, context)
    return layers, pattern


def whole_plan(
    source: Source,
    graph: Graph,
    layers: Sequence[Layer],
    budget: Budget | None,
    method: str,
    options: Mapping[str, Any],
) -> tuple[Plan, dict[str, Tensor]]:
    """The plan that removes nothing, where nothing has to go: every weight stays as it is, bit for bit."""
    masks = {layer.tensor: torch.ones(layer.shape, dtype=torch.bool) for layer in layers}
    return mask_plan(source, graph, masks, budget, method, options)


def patterned_layers(
    source: Source,
    graph: Graph,
    layers: Sequence[Layer],
    quota: tuple[int, int],
    budget: Budget | None,
    context: Context,
) -> tuple[Layer, ...]:
    """The layers that an n:m pattern fits; the others are named in a note.

    Raises:
        BudgetError: The budget of sparsity or MACs asks for more zeros than the pattern makes.
        UsageError: It fits no layer.
    """
    (n, m), pattern = quota, f"{quota[0]}:{quota[1]}"
    fitting = tuple(layer for layer in layers if layer.shape[layer.input_axis] % m == 0)
    if not fitting:
        raise UsageError(
            f"--pattern {pattern} fits no weight: no input dimension is a multiple of {m}",
            hint="choose another m, or --pattern unstructured",
        )
    skipped = [layer.tensor for layer in layers if layer not in fitting]
    dense = f"{pattern} leaves {', '.join(skipped)} dense: the input dimension isn't a multiple of {m}"
    if skipped:
        context.notes.append(dense)
    zeros = sum(layer.elements // m * (m - n) for layer in fitting)
    reached = zeros / sum(layer.elements for layer in graph.layers)
    hint = f"{dense if skipped else 'the pattern fixes it'}; choose a sparser pattern, or --pattern unstructured"
    if budget is not None and budget.quantity == "sparsity" and budget.limit > reached + 0.005:
        raise BudgetError(f"pattern {pattern} gives sparsity {reached:.4f}, less than {budget.limit:g}", hint=hint)
    if budget is not None and budget.quantity == "macs":
        macs = graph.nonzero_macs(_patterned(source, graph, fitting, quota, context))
        if macs > budget.absolute(graph.macs):
            raise BudgetError(
                f"pattern {pattern} leaves {macs:,} MACs of {graph.macs:,}, more than {budget}", hint=hint, least=macs
            )
    return fitting


def nonzero_of_others(source: Source, graph: Graph, layers: Sequence[Layer], context: Context) -> dict[str, int]:
    """How many weights of all but ``layers`` aren't zero, by tensor; none is known where a training moves them."""
    if context.training is not None:
        return {}
    state, chosen = source.module.state_dict(), {layer.tensor for layer in layers}
    others = (layer.tensor for layer in graph.layers if layer.tensor not in chosen)
    return {name: int(torch.count_nonzero(state[name])) for name in others}


def _patterned(
    source: Source, graph: Graph, fitting: Sequence[Layer], quota: tuple[int, int], context: Context
) -> dict[str, int]:
    """The most weights that aren't zero, by tensor, once ``fitting`` layers have the pattern: zeros go first."""
    state, (n, m) = source.module.state_dict(), quota
    kept = nonzero_of_others(source, graph, fitting, context)
    for name, own in units_of(fitting, Pattern(quota=quota)).items():
        is_there = state[name].cpu() != 0 if context.training is None else torch.ones(own.shape, dtype=torch.bool)
        kept[name] = int(own.blocks(is_there).reshape(-1, m).sum(1).clamp(max=n).sum())
    return kept
