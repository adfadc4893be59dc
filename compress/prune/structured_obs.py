"""One-shot structured pruning: channels ranked by curvature, the layers around them fitted again. No training.

A channel's saliency is half its entry in the Gauss-Newton matrix of gates on all channels: what the loss gains when it
is cut. Channels go in the order of saliency for what they save. Then every layer that lost inputs is solved by least
squares for the weights that bring its output nearest to the dense network's on calibration data, one after another.
Source: Hassibi and Stork 1993, OBS, for saliency and update; He et al. 2017 (arXiv:1707.06168) for the fit.
Cost: ten passes over the data and back, two forward passes, and for a layer with k inputs k^2 a position.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..budget import Budget
from ..context import Context
from ..curvature.gates import gate_curvatures
from ..graph.channel_cost import channel_costs
from ..graph.cut import masked
from ..graph.groups import Channels, find_channels
from ..graph.trace import Graph
from ..model import Source
from ..plan import Plan
from ..pruned import kept_of
from ..reconstruct.least_squares import refit_layers
from ..reconstruct.side_by_side import fitting_examples
from ..saliencies import saliency_histogram
from ..sensitivity import Sensitivity
from ..task import Calibration
from .channel_plan import LEAST, UNCUT, channel_plan, cost_figures, movable_channels, terms_of, within_reach
from .selection import budget_of, choose, require_prunable

NAME = "structured-obs"
SALIENCY = "rise of the loss when a channel alone is cut, to second order"
PROBES = 10
DEFAULT = Budget("macs", 0.5, "dense")


def plan(
    source: Source,
    graph: Graph,
    sensitivities: Mapping[str, Sensitivity],
    calibration: Calibration,
    budget: Budget | None,
    options: Mapping[str, Any],
    context: Context,
) -> tuple[Plan, dict[str, Tensor]]:
    """Choose the channels to cut, and new values for the layers around them.

    Args:
        budget: ``macs``, ``params``, ``bytes`` of the delivered file or ``sparsity``, the share of all channels that
            goes; None means half the MACs.
        options: ``multiple_of``, ``exclude`` (globs of weights whose channels stay).

    Returns:
        The plan and its sidecar: the new values by tensor.

    Raises:
        BudgetError: More is to be removed than can be cut, or nothing can; gives the feasible minimum.
        UsageError: A glob matches no weight.
    """
    channels = find_channels(graph)
    exclude, multiple_of = tuple(options.get("exclude") or ()), options.get("multiple_of")
    costs = channel_costs(channels, len(graph.example_inputs[0]))
    budget = budget or DEFAULT
    terms, limit = terms_of(budget, costs, context)
    movable = movable_channels(channels, graph, exclude)
    require_prunable(channels, is_any=bool(movable.any()), held="--exclude")

    def chosen(limit: float, scores: Tensor) -> Tensor:
        with budget_of(budget.quantity, terms):
            return choose(channels, scores, terms, limit, multiple_of=multiple_of, least=LEAST, movable=movable)

    def within(scores: Tensor) -> Tensor:
        decide = partial(chosen, scores=scores)
        return within_reach(budget, decide, limit, graph=graph, channels=channels, options=options)

    if NAME not in context.memo:
        within(torch.ones(channels.count))  # whether a limit is in reach doesn't depend on saliencies, which take long
        context.memo[NAME] = saliencies(channels, calibration, context)
    scores = context.memo[NAME]
    kept = within(scores)
    context.saliencies.append(saliency_histogram(scores, kept, what=SALIENCY, unit="loss", of="channels"))
    recorded = {"exclude": list(exclude), "multiple_of": multiple_of}
    if bool(kept.all()):
        context.notes.append(UNCUT)
    predicted = {**cost_figures(costs, kept), "loss": float(scores[~kept].sum())}
    return _fitted(NAME, source, graph, channels, kept, calibration, budget, recorded, predicted, context)


def refit(
    given: Plan,
    sidecar: Mapping[str, Tensor],
    source: Source,
    graph: Graph,
    calibration: Calibration,
    context: Context,
) -> tuple[Plan, dict[str, Tensor]]:
    """The channels of a plan cut out of another checkpoint of the architecture: the layers are fitted anew.

    What that costs the loss isn't predicted.
    """
    channels = find_channels(graph)
    kept = kept_of(channels, given.channels())
    predicted = {name: value for name, value in given.predicted.items() if name != "loss"}
    return _fitted(
        given.method, source, graph, channels, kept, calibration, given.budget, given.options, predicted, context
    )


def saliencies(channels: Channels, calibration: Calibration, context: Context) -> Tensor:
    """What the loss gains when a channel alone is cut, to second order, float64 ``[c]``; in units of the loss."""
    curvatures = gate_curvatures(
        channels,
        channels.module,
        calibration.task,
        calibration.data,
        probes=PROBES,
        seed=int(context.generator.initial_seed()),
        progress=context.progress,
    )
    return curvatures / 2


def _fitted(
    method: str,
    source: Source,
    graph: Graph,
    channels: Channels,
    kept: Tensor,
    calibration: Calibration,
    budget: Budget | None,
    options: Mapping[str, Any],
    predicted: Mapping[str, float],
    context: Context,
) -> tuple[Plan, dict[str, Tensor]]:
    module = masked(channels, channels.module, kept)
    data = fitting_examples(graph, calibration.data)
    changed: Iterable[str] = ()
    if not bool(kept.all()):  # else there is nothing to make up for
        changed = refit_layers(channels, kept, module, data.inputs, progress=context.progress)
    return channel_plan(
        method,
        source,
        channels,
        kept,
        module,
        changed,
        calibration=calibration,
        budget=budget,
        options=options,
        predicted=predicted,
    )
