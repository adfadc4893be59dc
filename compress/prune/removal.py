"""How much goes for a budget, and the masks that leave it out: the same for every method that zeroes single weights.

Layers compete by what a removal costs for each thing that is counted: weights for a sparsity and for bytes, and the
multiply-accumulates that a weight makes for ``macs``. Cheapest first, that is the least sum of costs for what goes:
one price, the multiplier of the budget, holds for all layers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from ..budget import Budget
from ..context import Context, Storage
from ..errors import BudgetError
from ..graph.trace import Graph, Layer
from ..model import Source
from ..numerics.units import Units, masks_without
from ..pattern import Pattern
from .masks import DEFAULT_SPARSITY, Masks, nonzero_of_others, num_removed, removed_weights, units_of


@dataclass(frozen=True, slots=True)
class Removal:
    """What goes.

    Attributes:
        amount: Weights that go at least, or their multiply-accumulates.
        whole: Those of all weights that may go.
        each: By tensor, the multiply-accumulates that a weight makes; None where weights are counted.
    """

    amount: int
    whole: int
    each: Mapping[str, float] | None = None

    @property
    def share(self) -> float:
        """Of what may go."""
        return self.amount / max(1, self.whole)


def removal_for(
    source: Source,
    graph: Graph,
    layers: Sequence[Layer],
    pattern: Pattern,
    budget: Budget | None,
    scope: str,
    context: Context,
) -> Removal:
    """What a budget of sparsity, bytes or MACs takes from ``layers``; None means the default sparsity.

    Raises:
        BudgetError: More than they have; gives the feasible limit.
    """
    budget = budget or Budget("sparsity", DEFAULT_SPARSITY)
    whole = sum(layer.elements for layer in layers)
    if budget.quantity == "sparsity":
        return Removal(removed_weights(graph, layers, budget.limit), whole)
    if budget.quantity == "macs":
        left = dict.fromkeys((layer.tensor for layer in layers), 0)
        least = graph.nonzero_macs(left | nonzero_of_others(source, graph, layers, context))
        return _of_macs(graph, layers, budget, least)
    # The bytes of a file depend on how many weights are left, and hardly on which: bisect with the smallest ones. All
    # are cut where no file fits.
    units = units_of(layers, pattern)
    costs = squares(units, source.module.state_dict())

    def size_at(amount: int) -> int:
        masks = remaining(units, costs, Removal(amount, whole), scope)
        return context.model_bytes({name: Storage(int(mask.sum()), 32) for name, mask in masks.items()})

    limit = budget.absolute(context.model_bytes({}))
    low, high = 0, whole
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if size_at(middle) <= limit else (middle + 1, high)
    masks = remaining(units, costs, Removal(low, whole), scope)
    return Removal(sum(int((~mask).sum()) for mask in masks.values()), whole)


def _of_macs(graph: Graph, layers: Sequence[Layer], budget: Budget, least: int) -> Removal:
    """The multiply-accumulates beyond the budget; ``least`` are those that no weight of ``layers`` makes."""
    whole = sum(layer.macs for layer in layers)
    amount = max(0, math.ceil(least + whole - budget.absolute(graph.macs)))
    if amount > whole:
        share = math.ceil(1e3 * least / graph.macs) / 10
        excluded = ", or exclude less" if len(layers) < len(graph.layers) else ""
        raise BudgetError(
            f"{budget} is out of reach: without all weights that may go, {least:,} MACs of {graph.macs:,} are left",
            hint=f"raise --budget to macs={share:g}%{excluded}",
            least=least,
        )
    return Removal(amount, whole, {layer.tensor: layer.macs / layer.elements for layer in layers})


def remaining(units: Mapping[str, Units], costs: Mapping[str, Tensor], removal: Removal, scope: str) -> Masks:
    """Masks without the cheapest units: as many as the removal takes, or a few more.

    Args:
        costs: Of a weight of each unit, by tensor ``[b, n]``.
        scope: ``global`` where all layers compete; ``layer`` where each loses the same share.
    """
    if scope == "global":
        return masks_without(units, costs, removal.amount, each=removal.each)
    counts = {name: num_removed(removal.share, math.prod(own.shape)) for name, own in units.items()}
    return masks_without(units, costs, counts)


def squares(units: Mapping[str, Units], values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The mean square of each unit's weights: what leaving it out costs for each weight that goes, ``[b, n]``."""
    return {name: own.means(values[name].detach().double().square()) for name, own in units.items()}
