"""What every pruning method shares: which weights may go, n:m patterns, and the plan that a set of masks makes."""

from __future__ import annotations

import math
import re
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
from ..plan import UNSTRUCTURED, MaskWeights, Plan

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
    zeros = sum(
        int((~masks[layer.tensor] if layer.tensor in masks else state[layer.tensor] == 0).sum())
        for layer in graph.layers
    )
    predicted = {"sparsity": zeros / total}
    return Plan(method, dict(options), 0, source.sha256, None, budget, decisions, predicted), sidecar


def parse_pattern(pattern: str) -> tuple[int, int]:
    """``n`` and ``m`` of an n:m pattern.

    Raises:
        UsageError: It is none.
    """
    match = re.fullmatch(r"(\d+):(\d+)", pattern)
    if match is None:
        raise UsageError(f"--pattern {pattern!r} is not a pattern", hint="unstructured, or n:m such as 2:4")
    n, m = int(match.group(1)), int(match.group(2))
    if not 0 < n < m:
        raise UsageError(f"--pattern {pattern}: keeps {n} of {m}", hint="n lies between 1 and m - 1")
    return n, m


def patterned_layers(
    graph: Graph, layers: Sequence[Layer], pattern: str, budget: Budget | None, context: Context
) -> tuple[Layer, ...]:
    """The layers that an n:m pattern fits; the others are named in a note.

    Raises:
        BudgetError: The budget asks for more zeros than the pattern makes.
        UsageError: It is no pattern, or fits no layer.
    """
    n, m = parse_pattern(pattern)
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
    if budget is not None and budget.quantity == "sparsity" and budget.limit > reached + 0.005:
        raise BudgetError(
            f"pattern {pattern} gives sparsity {reached:.4f}, less than {budget.limit:g}",
            hint=f"{dense if skipped else 'the pattern fixes it'}; choose a sparser pattern, or --pattern unstructured",
        )
    return fitting


def n_of_m_mask(scores: Tensor, n: int, m: int, axis: int) -> Tensor:
    """True at the n largest of every m consecutive scores along ``axis``; of equal ones, the first."""
    moved = scores.movedim(axis, -1)
    groups = moved.reshape(-1, m)
    order = torch.argsort(groups, dim=1, descending=True, stable=True)
    keep = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, order[:, :n], True)
    return keep.reshape(moved.shape).movedim(-1, axis).contiguous()
