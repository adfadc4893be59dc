"""What a network is cut down to: the budget as the limit of a cost, and the channels that go for a share of the way.

A cost that is measured, as a latency is, follows the MACs: bisection finds those that bring it to the limit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..budget import Budget
from ..errors import BudgetError, UsageError
from ..graph.channel_cost import Term, channel_costs, total
from ..graph.cut import Keep
from ..graph.groups import Channels
from ..graph.trace import Graph
from .channel_plan import FLOAT_BYTES
from .selection import NEAR, aligned_multiples, budget_of, choose, require_prunable

CLOSE = 0.01  # below the limit: where a measured cost is near enough
TRIES = 12  # of a measured cost, in one bisection

Cost = Callable[[Keep], float]


class CutTarget:
    """The budget of a cut.

    Args:
        budget: ``macs``, ``params``, ``bytes`` of the parameters or ``sparsity`` (share of all channels that goes); any
            quantity where ``cost`` is given.
        movable: bool ``[c]``: channels that may go.
        multiple_of: What a group that loses channels keeps is a multiple of this; None for what runtimes compute in
            one go.
        least: Share of each group that stays in any case.
        cost: The budget's quantity for the channels that stay, by group.
        itemsize: Bytes of a parameter.

    Attributes:
        dense: Cost of the whole network.
        limit: Largest cost of what stays.

    Raises:
        BudgetError: The limit is out of reach, or no channel may go.
        UsageError: The quantity isn't one of channels.
    """

    def __init__(
        self,
        channels: Channels,
        graph: Graph,
        budget: Budget,
        movable: Tensor,
        *,
        multiple_of: int | None,
        least: float,
        cost: Cost | None,
        itemsize: float = FLOAT_BYTES,
    ) -> None:
        if not 0 <= least <= 1 or (multiple_of is not None and multiple_of < 1):
            raise UsageError(
                f"least={least:g} and multiple_of={multiple_of}", hint="a share from 0 to 1, and a number above 0"
            )
        require_prunable(channels, is_any=bool(movable.any()))
        self.channels, self.budget, self.least, self.cost = channels, budget, least, cost
        costs = channel_costs(channels, len(graph.example_inputs[0]))
        terms = costs.macs if cost is not None else costs.of(budget.quantity)
        unit = itemsize if cost is None and budget.quantity == "bytes" else 1
        self.terms = [Term(unit * term.amount, term.factors) for term in terms]
        whole = torch.ones(len(movable), dtype=torch.bool)
        self.dense = self.cost_of(whole)
        is_share = budget.quantity == "sparsity"
        self.limit = (1 - budget.limit) * self.dense if is_share else budget.absolute(self.dense)
        self._dense_terms = float(total(self.terms, whole))
        self._final: float | None = None  # limit of the terms that the measured cost comes to its own with
        self.multiples = [multiple_of or 1] * len(channels.groups)
        flat = torch.ones(len(movable), dtype=torch.float64)
        self._may_be_finer = False
        self.choose(flat, 1.0, movable)  # raises where that can't be
        if multiple_of is None:
            self._may_be_finer = True
            reached = self.limit if self._final is None else self._final
            self.multiples = aligned_multiples(channels, flat, self.terms, reached, least=least, movable=movable)

    def cost_of(self, kept: Tensor) -> float:
        """What the channels that stay, bool ``[c]``, cost; their number for a sparsity."""
        return float(total(self.terms, kept)) if self.cost is None else float(self.cost(keep_of(self.channels, kept)))

    def choose(self, scores: Tensor, share: float, movable: Tensor, gone: Tensor | None = None) -> Tensor:
        """The channels that stay, bool ``[c]``, after a share of the way from the whole network to the limit.

        Args:
            scores: Saliencies; those of zero go first.
            movable: Channels that may go.
            gone: Those of them that are away already.

        Raises:
            BudgetError: The limit is out of reach; gives the least that is left.
        """
        end = self.limit
        if self.cost is not None:
            if self._final is None or share == 1:
                self._final = self._measured(scores, movable, gone)
            end = self._final
        kept = self._picked(scores, share, end, movable, gone)
        # What has gone stays gone: a block that goes below the limit, at whichever pick, gives way to finer ones.
        while self._may_be_finer and total(self.terms, kept) < NEAR * end and max(self.multiples) > 1:
            self.multiples = [max(1, multiple // 2) for multiple in self.multiples]
            kept = self._picked(scores, share, end, movable, gone)
        return kept

    def _picked(self, scores: Tensor, share: float, end: float, movable: Tensor, gone: Tensor | None) -> Tensor:
        """The channels that stay with the multiples of now."""
        kept = self._chosen(scores, end, movable, gone)
        if share == 1 or bool(kept.all()):
            return kept
        # Of what would go in the end, or the last steps might be too coarse to come near the limit.
        return self._chosen(scores, self._dense_terms - share * (self._dense_terms - end), movable & ~kept, gone)

    def _chosen(self, scores: Tensor, limit: float, movable: Tensor, gone: Tensor | None) -> Tensor:
        quantity = self.budget.quantity if self.cost is None else "macs"
        with budget_of(quantity, self.terms):
            return choose(
                self.channels,
                scores,
                self.terms,
                limit,
                multiple_of=self.multiples,
                in_blocks=self._may_be_finer,
                least=self.least,
                movable=movable,
                gone=gone,
            )

    def _measured(self, scores: Tensor, movable: Tensor, gone: Tensor | None) -> float:
        """The MACs whose cut comes to the limit."""
        low, high = 0.0, 1.0
        best: float | None = None
        least = math.inf
        for _ in range(TRIES):
            middle = (low + high) / 2
            try:
                found = self.cost_of(self._chosen(scores, middle * self._dense_terms, movable, gone))
            except BudgetError:
                low = middle
                continue
            least = min(least, found)
            if found > self.limit:
                high = middle
            else:
                low, best = middle, middle * self._dense_terms
                if found >= (1 - CLOSE) * self.limit:
                    break
        if best is None:
            raise BudgetError(
                f"the budget {self.budget} is out of reach: with all that may be cut, {least:g} are left",
                hint=f"raise the budget to {least:g} or more",
            )
        return best

    def state_dict(self) -> dict[str, Any]:
        return {"final": self._final, "multiples": list(self.multiples)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._final, self.multiples = state["final"], [int(multiple) for multiple in state["multiples"]]


def keep_of(channels: Channels, kept: Tensor) -> dict[str, list[int]]:
    """The channels of each group that stay, as ``cut.kept_channels`` reads them."""
    return {group.name: chosen.nonzero().reshape(-1).tolist() for group, chosen in channels.split(kept)}
