"""What all methods that cut channels share: the budget in terms of channels, and the plan of a cut."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, fx

from ..apply import values_key, values_sha256
from ..budget import Budget
from ..context import Context
from ..errors import BudgetError
from ..graph.channel_cost import ChannelCosts, Term, total
from ..graph.cut import sliced_tensor
from ..graph.groups import Channels
from ..graph.rewrite import tensor_at
from ..graph.trace import Graph, unused_parameters
from ..model import Source
from ..plan import Decision, Plan, Replace
from ..pruned import prune_decisions
from ..task import Calibration
from .selection import listed

FLOAT_BYTES = 4
LEAST = 0.1  # of a group's channels stays in any case
UNCUT = "nothing is cut: the network is within the budget as it is"
Options = Mapping[str, Any]
T = TypeVar("T")


def movable_channels(channels: Channels, graph: Graph, exclude: Sequence[str]) -> Tensor:
    """bool over all channels: those of no group that a weight matching one of the globs has a part in.

    Raises:
        UsageError: A glob matches no weight.
    """
    held = {layer.tensor for glob in exclude for layer in graph.matching(glob, "--exclude")}
    movable = torch.ones(channels.count, dtype=torch.bool)
    for group, part in channels.split(movable):
        part[:] = not any(member.tensor in held for member in group.members)
    return movable


def terms_of(budget: Budget, costs: ChannelCosts, context: Context) -> tuple[Sequence[Term], float]:
    """The terms that a budget limits, and the limit.

    Raises:
        UsageError: Its quantity isn't one of channels.
    """
    terms = costs.of(budget.quantity)
    whole = sum(term.amount for term in terms)
    if budget.quantity == "bytes":  # a file loses four with each parameter
        return terms, whole - (context.model_bytes({}) + context.overhead - budget.limit) / FLOAT_BYTES
    return terms, (1 - budget.limit) * whole if budget.quantity == "sparsity" else budget.absolute(whole)


def within_reach(
    budget: Budget, decide: Callable[[float], T], limit: float, *, graph: Graph, channels: Channels, options: Options
) -> T:
    """What ``decide`` gives for the limit; of bytes the least there is, whose written file then says what is feasible.

    Raises:
        BudgetError: Another quantity is out of reach: says what stays in any case. Or nothing can be cut.
    """
    try:
        return decide(limit)
    except BudgetError as error:
        if error.least is None:
            raise
        if budget.quantity != "bytes":
            stays = "; ".join(_stays(budget, graph, channels, options))
            raise BudgetError(f"{error.message}; {stays}", hint=error.hint, least=error.least) from None
        return decide(error.least)


def _stays(budget: Budget, graph: Graph, channels: Channels, options: Options) -> Iterator[str]:
    """What no budget cuts, in words."""
    yield f"{LEAST:.0%} of each group's channels stay in any case"
    held = ~movable_channels(channels, graph, tuple(options.get("exclude") or ()))
    names = [group.name for group, part in channels.split(held) if bool(part.any())]
    if names:
        yield f"--exclude holds those of {listed(names)}"
    if (options.get("multiple_of") or 1) > 1:
        yield f"--multiple-of {options['multiple_of']} holds more"
    unused = unused_parameters(graph.program)
    if budget.quantity == "params" and unused:
        yield f"{unused:,} parameters, which the forward pass never uses, count too"


def channel_plan(
    method: str,
    source: Source,
    channels: Channels,
    kept: Tensor,
    module: fx.GraphModule,
    changed: Iterable[str],
    *,
    calibration: Calibration,
    budget: Budget | None,
    options: Mapping[str, Any],
    predicted: Mapping[str, float],
) -> tuple[Plan, dict[str, Tensor]]:
    """The plan of a cut, and its sidecar.

    Args:
        module: Of the whole shape; holds the new values.
        changed: Tensors that have any.
    """
    state = source.module.state_dict()
    values = {
        name: sliced_tensor(channels, kept, name, tensor_at(module, name)).clone()
        for name in sorted(set(changed) & state.keys())
    }
    decisions: tuple[Decision, ...] = (
        *prune_decisions(channels, kept),
        *(Replace(name, values_sha256(value)) for name, value in values.items()),
    )
    made = Plan(method, dict(options), 0, source.sha256, calibration.sha256(), budget, decisions, dict(predicted), None)
    return made, {values_key(name): value for name, value in values.items()}


def cost_figures(costs: ChannelCosts, kept: Tensor) -> dict[str, float]:
    """What a plan predicts: exact, as tracing the smaller network would give."""
    return {"macs": float(total(costs.macs, kept)), "params": float(total(costs.params, kept))}
