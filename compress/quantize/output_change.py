"""Widths by what rounding does to the outputs, down to single channels.

Every weight is rounded at every width, from none to 8 bits, by what that does to its outputs. Its channels share a
number of bits so that the outputs react least (``channel_widths``): a weight has mixtures of 1.25 to 7 bits to choose
from, beside the whole widths. What a choice costs the network is measured: how far the outputs are from the dense
network's when this weight alone is rounded, on calibration data, at ``MEASURED`` widths, and in between in proportion
to what its rows are expected to cost. Logits are compared at a temperature of ``TEMPERATURE``: of examples that the
network was trained on it is all too sure, and what is left of the others would decide. The sums over all weights are
what the exact frontier trades for bits. Where activations have widths of their own, what each alone costs at each
width is measured in the same way, and traded as well. The network at the point that is chosen is then made, and so is
one of the whole width of the same budget: the nearer one is taken.
Source: the frontier is that of Dong et al. 2020, HAWQ-V2 (arXiv:1911.03852). Cost: ``curvature.moments``, ``PASSES`` of
``curvature.row_traces``, one rounding of each row at nine widths, and for each weight and measured width a partial
forward pass over ``EXAMPLES`` examples, which are drawn by how far rounding all weights moves them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from ..budget import Budget
from ..context import Context
from ..curvature.moments import input_moments
from ..curvature.network import open_network
from ..curvature.row_traces import row_traces
from ..frontier import FLOAT_BITS, Choice, FrontierRecord, Item
from ..graph.trace import Graph, Layer
from ..model import Source
from ..plan import Plan
from ..sensitivity import Sensitivity
from ..task import Calibration
from ..widths import CHANNEL_BYTES, Width, is_mixed
from . import correct as correction
from .calibrate import AUTO, calibrated
from .changes import TEMPERATURE, loss_changes, telling_examples
from .channel_widths import Rows, mixtures, rounded_rows
from .points import Costs, costs_of, first_plan, group_sizes_of, groups_of, of_choices, widths_of
from .points import at_point as at_point
from .reads import Ranges, find_reads, grids_of, read_ranges, read_records

NAME = "output-change"
TARGETS = (*(eighths / 8 for eighths in range(10, 37)), 5, 5.5, 6, 7)  # bits of mixtures
MEASURED = (2, 3, 4)  # whole widths at which each weight's loss is measured
USUAL = 3  # bits at which examples are told apart by how far their outputs move
EXAMPLES = 128
PASSES = 2
CLEARLY = 0.85  # of what is left: a rival that is no nearer than that on calibration data isn't taken
MUCH_WORSE = 2.0  # times the loss that is expected: such a rival isn't tried


def plan(
    source: Source,
    graph: Graph,
    sensitivities: Mapping[str, Sensitivity],
    calibration: Calibration,
    budget: Budget | None,
    options: Mapping[str, Any],
    context: Context,
) -> tuple[Plan, dict[str, Tensor]]:
    """Choose the point of the frontier with the least expected loss within the budget.

    Args:
        sensitivities: None is read.
        budget: ``bits`` (the average), ``bytes`` of the delivered file, ``bops`` or ``latency``; None for 8 bits.
        options: ``activations`` (``8``, ``6``, ``4``, ``float``, or ``mixed``: each has its own), ``activation_range``
            (for ``calibrate.calibrated``), ``channel_widths``
            (``mixed``, or ``equal``: one width for all channels of a weight), ``group_size`` (of the weights of linear
            layers, which then have one width each; or None), ``reconstruction`` (``gptq`` or ``none``) and
            ``bias_correction`` (``on`` or ``off``; both for ``correct``), ``exclude`` and ``tie`` (globs: the weights
            that one of ``tie`` matches get one width), ``keep`` (``GLOB=BITS``, or ``GLOB=float``).

    Raises:
        BudgetError: No point is within the budget; gives the feasible minimum.
        UsageError: Nothing to quantize, or a glob or width that isn't one.
    """
    exclude, tie, keep = (tuple(options.get(name) or ()) for name in ("exclude", "tie", "keep"))
    layers = graph.compressible(exclude, "quantize")
    goal = budget or Budget("bytes", float("inf"))
    activations = str(options["activations"])
    widths = widths_of(graph, layers, keep, may_stay_float=goal.quantity == "latency")
    groups = list(groups_of(graph, layers, tie, widths))
    reads = find_reads(graph, groups, activations)
    ranges = calibrated(graph, calibration, options, context)
    if NAME not in context.memo:
        found = _rows(source, graph, layers, calibration, options, context, with_integers=bool(ranges))
        own = read_ranges(graph, reads, ranges, calibration, str(options.get("activation_range", AUTO)), context)
        context.memo[NAME] = (found, own, *_measured(graph, found, own, calibration, context))
    rows, own, losses, lost = context.memo[NAME]
    costs = costs_of(source, graph, layers, goal, reads, context)
    items = []
    for group, shared in groups:
        choices = [_choice(group, width, float(width), costs, losses) for width in shared]
        first = rows[group[0].tensor]
        if options["channel_widths"] == "mixed" and len(group) == 1 and len(shared) > 1 and first.may_mix():
            mixed = {bits: width for bits, width in mixtures(first, TARGETS).items() if is_mixed(width)}
            choices += [_choice(group, width, bits, costs, losses) for bits, width in mixed.items()]
        items.append(Item(tuple(layer.tensor for layer in group), tuple(sorted(choices, key=lambda c: c.cost))))
    recorded = {
        "activation_range": options.get("activation_range", AUTO),
        "activations": activations,
        "bias_correction": options["bias_correction"],
        "channel_widths": options["channel_widths"],
        "exclude": list(exclude),
        "group_size": options.get("group_size"),
        "keep": list(keep),
        "reconstruction": options["reconstruction"],
        "tie": list(tie),
    }
    chosen = read_records(reads, own, lost)
    return first_plan(NAME, items, costs, ranges, chosen, source, graph, calibration, budget, recorded, context)


def _rows(
    source: Source,
    graph: Graph,
    layers: Sequence[Layer],
    calibration: Calibration,
    options: Mapping[str, Any],
    context: Context,
    *,
    with_integers: bool,
) -> dict[str, Rows]:
    network = open_network(graph, layers=tuple(layers), device=context.device)
    task, data = calibration.task, calibration.data
    moments = input_moments(network, data, progress=context.progress)
    traces = row_traces(network, task, data, passes=PASSES, generator=context.generator, progress=context.progress)
    state, group_sizes = source.module.state_dict(), group_sizes_of(layers, options)
    found = {}
    for done, layer in enumerate(layers):
        context.progress("round at every width", done, len(layers))
        found[layer.tensor] = rounded_rows(
            layer,
            state[layer.tensor].detach().float().cpu(),
            moments.get(layer.tensor),
            traces[layer.tensor],
            with_integers=with_integers,
            by_outputs=options["reconstruction"] == "gptq",
            group_size=group_sizes.get(layer.tensor),
        )
    context.progress("round at every width", len(layers), len(layers))
    return found


class _Losses:
    """What each weight alone costs the network at any width: measured at some, in proportion to its rows in between."""

    def __init__(self, rows: Mapping[str, Rows], measured: Mapping[str, Sequence[float]]) -> None:
        self.rows = rows
        self.points = {
            tensor: sorted(
                (math.log(max(rows[tensor].cost(width), 1e-300)), math.log(max(loss, 1e-300)))
                for width, loss in zip(MEASURED, found, strict=True)
            )
            for tensor, found in measured.items()
        }

    def __call__(self, tensor: str, width: Width) -> float:
        if width == FLOAT_BITS:
            return 0.0
        x, points = math.log(max(self.rows[tensor].cost(width), 1e-300)), self.points[tensor]
        if x <= points[0][0] or x >= points[-1][0]:  # beyond what was measured, in proportion
            end = points[0] if x <= points[0][0] else points[-1]
            return math.exp(end[1] + x - end[0])
        for (left, low), (right, high) in itertools.pairwise(points):
            if left <= x <= right:
                share = (x - left) / (right - left) if right > left else 0.0
                return math.exp(low + share * (high - low))
        raise AssertionError(x)


def _measured(
    graph: Graph, rows: Mapping[str, Rows], ranges: Ranges, calibration: Calibration, context: Context
) -> tuple[_Losses, dict[str, list[float]]]:
    """What weights cost, and activations at each of their widths."""
    variants = {tensor: [found.at(width) for width in MEASURED] for tensor, found in rows.items()}
    task, usual = calibration.task, {tensor: found.at(USUAL) for tensor, found in rows.items()}
    data, counts = telling_examples(graph, usual, calibration.data, EXAMPLES, task, context, temperature=TEMPERATURE)
    weights, activations = loss_changes(
        graph, variants, grids_of(ranges), data, task, context, counts=counts, temperature=TEMPERATURE
    )
    return _Losses(rows, weights), activations


def _choice(group: Sequence[Layer], width: Width, bits: float, costs: Costs, losses: _Losses) -> Choice:
    """The group at a width of so many bits."""
    cost = sum(_cost(layer, width, bits, costs) for layer in group)
    ranges = ("mse",) * len(group) if width != FLOAT_BITS else ()
    return Choice(width, cost, sum(losses(layer.tensor, width) for layer in group), ranges)


def _cost(layer: Layer, width: Width, bits: float, costs: Costs) -> int:
    """In the frontier's unit: between those of the whole widths, and what a channel's own width takes beside."""
    if not is_mixed(width):
        return costs.entries[layer.tensor, int(bits)]
    below = min(max(math.floor(bits), 2), 7)
    low, high = (costs.entries[layer.tensor, whole] for whole in (below, below + 1))
    own = CHANNEL_BYTES * layer.shape[0] if costs.quantity == "bytes" else 0
    return math.ceil(low + (bits - below) * (high - low)) + own


def correct(
    plan: Plan, source: Source, graph: Graph, calibration: Calibration | None, context: Context
) -> tuple[Plan, dict[str, Tensor]]:
    """What makes up for rounding, at the widths that were chosen or at the whole width of the same budget.

    The one whose outputs are nearer to the dense network's, on the calibration data, is taken.
    """
    record = context.frontiers[-1] if context.frontiers else None
    rival = None if record is None or calibration is None or plan.budget is None else _rival(plan, record)
    if rival is None or record is None:
        return correction.correct(plan, source, graph, calibration, context)
    made = correction.corrected(plan, source, graph, calibration, context)
    other = of_choices(plan, graph, rival, replace(context, frontiers=[]))
    whole = correction.corrected(other, source, graph, calibration, context)
    if whole.moved >= CLEARLY * made.moved:
        return made.plan, made.sidecar
    context.frontiers[-1] = rival
    context.notes.append(
        f"one width for all weights was nearer to the dense network than widths of their own, and is taken: "
        f"{whole.moved:.3g} against {made.moved:.3g}"
    )
    return whole.plan, whole.sidecar


def _rival(plan: Plan, record: FrontierRecord) -> FrontierRecord | None:
    """The same frontier at the best of one width for all within the plan's budget; None where that is much worse."""
    assert plan.budget is not None
    limit = plan.budget.absolute(record.dense_amount)
    # Where activations are rounded, 8 bits have the levels of 7: of equal losses the first is the narrower one.
    within = [
        rival
        for rival in record.uniform().values()
        if record.amount(rival.chosen_cost()) <= limit * (1 + 1e-9)
        and all(choice.bits != FLOAT_BITS for choice in rival.chosen_choices())
    ]
    best = min(within, key=lambda rival: rival.chosen_loss(), default=None)
    if best is None or best.chosen == record.chosen or best.chosen_loss() > MUCH_WORSE * record.chosen_loss():
        return None
    return best
