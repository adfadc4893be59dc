"""Predictors of what rounding costs, compared on random widths.

A configuration gives each weight a width of its own, 2 to 8 bits, drawn at random. The network is run with it on
calibration data, and how far its outputs are from the dense network's is what is to be foretold. The predictors are

- ``hawq``: half the sum of ``(tr H / n) |dW|^2``, the metric of HAWQ-V2;
- ``hessian-diagonal``: half the sum of ``h dW^2`` over all weights, ``h`` the Hessian's diagonal;
- ``output-change``: the sum of what each weight costs if it alone is rounded;
- ``summed changes``: what each weight alone does to the outputs is added up, and the cost is that of the sum;
- ``partly run``: the same, but on one in ``PARTLY`` of these examples, those that sums move furthest, the network runs
  with all weights rounded.

The first three are sums over weights, as an exact frontier needs them. ``summed changes`` knows that changes may point
the same way, or cancel out. The last three look at the ``FEW`` examples that the dense network is least sure of, which
are those whose outputs move; what they cost is put in proportion to all by ``1 - sum p^2``, the trace of what turns
changes of logits into divergence.
Source: Dong et al. 2020, HAWQ-V2 (arXiv:1911.03852), for the first. Cost: one rounding of each weight at seven widths,
a partial forward pass over ``FEW`` examples for each, and a forward pass over all examples a configuration.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..context import Context
from ..graph.trace import Graph
from ..model import Source
from ..numerics.ranks import ratio_spread, spearman
from ..sensitivity import Sensitivity
from ..task import Calibration, divergences, has_logits
from .changes import PREDICTIONS, passes
from .measured_changes import at_every_width
from .output_change import NAME
from .points import WIDTHS

SUMMED, PARTLY_RUN = "summed changes", "partly run"
FEW = 64  # examples on which the changes of outputs are measured
PARTLY = 2
MOST_ELEMENTS = 2**27  # of the changes that are held for a batch: of longer outputs, the first rows are compared
Configuration = Mapping[str, int]


def compare_predictors(
    source: Source,
    graph: Graph,
    calibration: Calibration,
    count: int,
    context: Context,
    *,
    traces: Sensitivity,
    diagonals: Mapping[str, Tensor],
    by_outputs: bool,
) -> dict[str, Any]:
    """Each predictor's rank correlation and spread, as report.json holds them.

    Args:
        count: Configurations, 2 or more, drawn from the context's generator.
        traces: Of ``hessian-trace``.
        diagonals: Of ``hessian-diagonal``, by tensor; empty where it can't be had.
        by_outputs: Levels are chosen by the layers' outputs, rather than the nearest.
    """
    rounded = at_every_width(source, graph, graph.layers, calibration, by_outputs=by_outputs, context=context)
    drawn = torch.randint(WIDTHS[0], WIDTHS[-1] + 1, (count, len(rounded)), generator=context.generator).tolist()
    chosen = [dict(zip(rounded, widths, strict=True)) for widths in drawn]
    moved, unsure = _run(graph, rounded, chosen, calibration, context)
    few = unsure.argsort(descending=True, stable=True)[:FEW]
    share = float(unsure.mean() / unsure[few].mean()) if float(unsure[few].sum()) else 1.0
    alone, summed = _changes(graph, rounded, chosen, few, calibration, context)
    far = summed.mean(0).argsort(descending=True, stable=True)[: max(1, len(few) // PARTLY)]
    partly = summed.clone()
    partly[:, far] = moved[:, few[far]]
    costs = {"hawq": _omega(source, graph, rounded, traces)}
    if diagonals:
        costs["hessian-diagonal"] = _by_diagonal(source, rounded, diagonals)
    costs[NAME] = {key: share * loss for key, loss in alone.items()}
    predicted = {name: [_added(cost, one) for one in chosen] for name, cost in costs.items()}
    predicted |= {name: (share * found.mean(1)).tolist() for name, found in ((SUMMED, summed), (PARTLY_RUN, partly))}
    measured = moved.mean(1).tolist()
    elements = {layer.tensor: layer.elements for layer in graph.layers}
    total = sum(elements.values())
    return {
        "num_configurations": count,
        "num_examples": moved.shape[1],
        "levels": "chosen by the layers' outputs" if by_outputs else "the nearest",
        "unit": "nats" if has_logits(calibration.task) else "squared output",
        "average_bits": [sum(elements[t] * bits for t, bits in one.items()) / total for one in chosen],
        "measured": measured,
        "predictors": [
            {"name": name, **_agreement(values, measured), "predicted": values} for name, values in predicted.items()
        ],
    }


def _agreement(predicted: Sequence[float], measured: Sequence[float]) -> dict[str, float | None]:
    """Rank correlation, spread and median of the ratio; None where there is none, as without any loss."""
    found = {"spearman": spearman(predicted, measured), "spread": math.inf, "ratio": math.inf}
    if min(measured) > 0:
        found["spread"] = ratio_spread(predicted, measured)
        found["ratio"] = statistics.median(p / m for p, m in zip(predicted, measured, strict=True))
    return {name: value if math.isfinite(value) else None for name, value in found.items()}


def _run(
    graph: Graph,
    rounded: Mapping[str, Mapping[int, Tensor]],
    chosen: Sequence[Configuration],
    calibration: Calibration,
    context: Context,
) -> tuple[Tensor, Tensor]:
    """How far each example's outputs move in each configuration, ``[k, n]``, and how unsure of it the network is."""
    are_logits, data = has_logits(calibration.task), calibration.data
    moved: list[Tensor] = []
    unsure: list[Tensor] = []
    for one in passes(graph, data, context):
        context.progress("random configurations", sum(map(len, unsure)), len(data))
        reference = _rows(one.reference)
        found = [one.outputs({tensor: rounded[tensor][bits] for tensor, bits in c.items()}) for c in chosen]
        moved.append(torch.stack([_divergences(reference, _rows(outputs), are_logits=are_logits) for outputs in found]))
        unsure.append(_unsure(reference, are_logits=are_logits))
        if sum(map(len, unsure)) * reference.shape[1] >= PREDICTIONS:
            break
    context.progress("random configurations", len(data), len(data))
    return torch.cat(moved, 1), torch.cat(unsure)


def _changes(
    graph: Graph,
    rounded: Mapping[str, Mapping[int, Tensor]],
    chosen: Sequence[Configuration],
    few: Tensor,
    calibration: Calibration,
    context: Context,
) -> tuple[dict[tuple[str, int], float], Tensor]:
    """What each weight costs alone at each width, and what each configuration's summed changes cost, ``[k, n]``.

    Args:
        few: Examples to look at.
    """
    are_logits, data = has_logits(calibration.task), calibration.data.at(few)
    alone: dict[tuple[str, int], list[Tensor]] = {(name, bits): [] for name, every in rounded.items() for bits in every}
    summed: list[Tensor] = []
    for one in passes(graph, data, context):
        context.progress("output changes", sum(found.shape[1] for found in summed), len(data))
        reference = _rows(one.reference)
        reference = reference[:, : max(1, MOST_ELEMENTS * reference.shape[1] // (len(alone) * reference.numel()))]
        changes = {}
        for (tensor, bits), losses in alone.items():
            outputs = _rows(one.outputs({tensor: rounded[tensor][bits]}))[:, : reference.shape[1]]
            losses.append(_divergences(reference, outputs, are_logits=are_logits))
            changes[tensor, bits] = outputs - reference
        totals = (reference + torch.stack([changes[key] for key in one.items()]).sum(0) for one in chosen)
        summed.append(torch.stack([_divergences(reference, total, are_logits=are_logits) for total in totals]))
    context.progress("output changes", len(data), len(data))
    return {key: float(torch.cat(losses).mean()) for key, losses in alone.items()}, torch.cat(summed, 1)


def _rows(outputs: Sequence[Tensor]) -> Tensor:
    """``[n, r, c]``: the rows of logits, or of other values, of each example; of several outputs, of the first."""
    first = outputs[0]
    return first.reshape(len(first), -1, first.shape[-1] if first.dim() > 1 else 1).cpu()


def _divergences(reference: Tensor, outputs: Tensor, *, are_logits: bool) -> Tensor:
    """The mean of each example, float64 ``[n]``."""
    return divergences(reference, outputs, are_logits=are_logits).reshape(len(reference), -1).mean(1)


def _unsure(reference: Tensor, *, are_logits: bool) -> Tensor:
    """``1 - sum p^2`` of each example, float64 ``[n]``; the same for all where outputs are no logits."""
    if not are_logits or reference.shape[-1] < 2:
        return torch.ones(len(reference), dtype=torch.float64)
    return (1 - torch.softmax(reference.double(), -1).square().sum(-1)).mean(1)


def _added(costs: Mapping[tuple[str, int], float], configuration: Configuration) -> float:
    return sum(costs[key] for key in configuration.items())


def _omega(
    source: Source, graph: Graph, rounded: Mapping[str, Mapping[int, Tensor]], traces: Sensitivity
) -> dict[tuple[str, int], float]:
    state, elements = source.module.state_dict(), {layer.tensor: layer.elements for layer in graph.layers}
    return {
        (tensor, bits): traces.entries[tensor, ""].value / elements[tensor] / 2 * _squares(value, state[tensor], 1.0)
        for tensor, values in rounded.items()
        for bits, value in values.items()
    }


def _by_diagonal(
    source: Source, rounded: Mapping[str, Mapping[int, Tensor]], diagonals: Mapping[str, Tensor]
) -> dict[tuple[str, int], float]:
    state = source.module.state_dict()
    return {
        (tensor, bits): _squares(value, state[tensor], diagonals[tensor]) / 2
        for tensor, values in rounded.items()
        for bits, value in values.items()
    }


def _squares(value: Tensor, weight: Tensor, factor: Tensor | float) -> float:
    return float(((value.double() - weight.detach().cpu().double()).square() * factor).sum())
