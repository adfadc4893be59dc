"""Points of a frontier as plans: what each choice costs, the record of all points, and the plan at one of them.

Shared by the methods that give each weight a width of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..budget import Budget, rounded_up
from ..context import Context, Storage
from ..errors import BudgetError, InputError, UsageError
from ..frontier import FLOAT_BITS, FrontierRecord, Item, Read
from ..graph.trace import Graph, Layer
from ..model import Source
from ..numerics.pareto import Fork, Frontier, Way, pareto_frontier
from ..plan import Decision, Plan, Quantize, weight_scheme
from ..task import Calibration, has_logits
from ..widths import mean_bits
from .calibrate import activation_decisions
from .reads import Reads

WIDTHS = range(2, 9)
NANOSECONDS = 1e-6  # of a millisecond: latencies are counted in whole ones


@dataclass(frozen=True, slots=True)
class Costs:
    """What storing each tensor at each width costs, in an integer unit; ``scale * (fixed + sum)`` is the quantity."""

    entries: Mapping[tuple[str, int], int]
    fixed: int
    scale: float
    dense_amount: float
    quantity: str


def first_plan(
    method: str,
    items: Sequence[Item],
    costs: Costs,
    rounded: Mapping[str, tuple[float, float]],
    reads: Sequence[Read],
    source: Source,
    graph: Graph,
    calibration: Calibration,
    budget: Budget | None,
    recorded: Mapping[str, Any],
    context: Context,
) -> tuple[Plan, dict[str, Tensor]]:
    """The plan at the point with the least expected loss within the budget.

    Args:
        rounded: Ranges of the activations, by name.
        reads: Activations whose widths are chosen as well.
        recorded: Options, as the plan holds them.

    Raises:
        BudgetError: No point is within the budget; gives the feasible minimum. Where none meets a budget of bytes or of
            latency, the smallest plan is returned: what its file takes is the feasible minimum.
    """
    goal = budget or Budget("bytes", float("inf"))
    frontier = _frontier(items, reads)
    record = FrontierRecord(
        method=method,
        quantity=goal.quantity,
        scale=costs.scale,
        fixed=costs.fixed,
        dense_amount=costs.dense_amount,
        loss_unit="nats" if has_logits(calibration.task) else "loss",
        items=tuple(items),
        costs=tuple(frontier.costs.tolist()),
        losses=tuple(frontier.values.tolist()),
        index=0,
        chosen=frontier.choice(0),
        activations=rounded,
        reads=tuple(reads),
    )
    index = record.within(goal.absolute(record.dense_amount))
    if index is None and goal.quantity not in ("bytes", "latency"):
        least = Budget(goal.quantity, rounded_up(record.amount(record.costs[0])))
        raise BudgetError(f"{goal} is out of reach: {method} goes down to {least}", hint=f"raise --budget to {least}")
    start = Plan(method, dict(recorded), 0, source.sha256, calibration.sha256(), budget, (), {})
    return at_point(start, graph, record, index or 0, context), {}


def at_point(given: Plan, graph: Graph, record: FrontierRecord, index: int, context: Context) -> Plan:
    """The plan at another point of a frontier, without measuring again; the record goes to ``context.frontiers``.

    Raises:
        InputError: The record's points aren't those of its items, or the graph lacks one of its tensors.
    """
    frontier = _frontier(record.items, record.reads)
    if tuple(frontier.costs.tolist()) != record.costs or not 0 <= index < len(frontier):
        raise InputError("frontier.json: the points aren't those of its choices", hint="make the run again")
    return of_choices(given, graph, record.at(index, frontier.choice(index)), context)


def of_choices(given: Plan, graph: Graph, moved: FrontierRecord, context: Context) -> Plan:
    """The plan of the record's choices."""
    axes = {layer.tensor: layer.axis for layer in graph.layers}
    group_sizes = group_sizes_of(graph.layers, given.options)
    weights: list[Decision] = []
    for item, choice in zip(moved.items, moved.chosen_choices(), strict=True):
        for tensor, search in zip(item.tensors, choice.ranges, strict=choice.bits != FLOAT_BITS):
            if tensor not in axes:
                raise InputError(
                    f"frontier.json: {tensor} is no weight of the network",
                    hint="the frontier is another architecture's",
                )
            scheme = weight_scheme(choice.bits, with_integers=bool(moved.activations))
            groups = group_sizes.get(tensor)
            weights.append(Quantize(tensor, "weight", choice.bits, scheme, axes[tensor], search, group_size=groups))
    context.frontiers.append(moved)
    elements = {layer.tensor: layer.elements for layer in graph.layers}
    bits = {decision.tensor: decision.bits for decision in weights if isinstance(decision, Quantize)}
    used = {tensor: mean_bits(bits[tensor]) if tensor in bits else FLOAT_BITS for tensor in elements}
    average = sum(elements[tensor] * used[tensor] for tensor in elements) / sum(elements.values())
    predicted = {"average_bits": average, "loss": moved.chosen_loss()}
    chosen = {
        name: (choice.bits, ends)
        for read, choice in zip(moved.reads, moved.chosen_reads(), strict=True)
        for name, ends in zip(read.activations, choice.ranges, strict=True)
    }
    activations = str(given.options.get("activations"))
    rounded = activation_decisions(graph, moved.activations, bits.keys(), activations, chosen)
    return replace(given, decisions=(*weights, *rounded), predicted=predicted)


def group_sizes_of(layers: Sequence[Layer], options: Mapping[str, Any]) -> dict[str, int]:
    """The weights whose rows have a scale for each group of so many inputs: those of linear layers, where asked for."""
    size = options.get("group_size")
    return {} if size is None else {layer.tensor: int(size) for layer in layers if layer.op == "linear"}


def _frontier(items: Sequence[Item], reads: Sequence[Read]) -> Frontier:
    return pareto_frontier(
        [[choice.cost for choice in item.choices] for item in items],
        [[choice.loss for choice in item.choices] for item in items],
        [Fork(read.items, tuple(Way(c.bits, c.bits * read.cost, c.loss) for c in read.choices)) for read in reads],
    )


def costs_of(
    source: Source, graph: Graph, layers: Sequence[Layer], budget: Budget, reads: Reads, context: Context
) -> Costs:
    """What each of ``layers`` costs at each whole width, in the budget's quantity.

    Args:
        reads: What layers read, for bit operations.
    """
    every = (*WIDTHS, FLOAT_BITS)
    chosen = {layer.tensor for layer in layers}
    others = [layer for layer in graph.layers if layer.tensor not in chosen]
    if budget.quantity == "bits":
        total = sum(layer.elements for layer in graph.layers)
        entries = {(layer.tensor, bits): layer.elements * bits for layer in layers for bits in every}
        return Costs(
            entries, sum(layer.elements * FLOAT_BITS for layer in others), 1 / total, float(FLOAT_BITS), "bits"
        )
    if budget.quantity == "bops":
        entries = {(layer.tensor, bits): reads.cost(layer.tensor) * bits for layer in layers for bits in every}
        dense = float(sum(layer.macs * FLOAT_BITS**2 for layer in graph.layers))
        free = {name for one in reads.shared for name in one.activations}
        left = [use for use in reads.uses if use.tensor not in chosen and use.activation not in free]
        return Costs(entries, sum(use.macs * FLOAT_BITS * use.bits for use in left), 1.0, dense, "bops")
    if budget.quantity == "latency":
        table = context.costs["latency"]
        times = {key: round(value / NANOSECONDS) for key, value in table.entries.items()}
        entries = {(layer.tensor, bits): times[layer.tensor, str(bits)] for layer in layers for bits in every}
        fixed = round(table.fixed / NANOSECONDS)
        whole = sum(cost for (_, bits), cost in entries.items() if bits == FLOAT_BITS)
        return Costs(entries, fixed, NANOSECONDS, NANOSECONDS * (fixed + whole), "latency")
    state = source.module.state_dict()
    kept = {layer.tensor: int(torch.count_nonzero(state[layer.tensor])) for layer in layers}
    now = {tensor: Storage(count, FLOAT_BITS) for tensor, count in kept.items()}
    whole = context.model_bytes(now)
    entries = {
        (layer.tensor, bits): context.model_bytes({**now, layer.tensor: Storage(kept[layer.tensor], bits)})
        - whole
        + 4 * layer.elements
        for layer in layers
        for bits in every
    }
    return Costs(
        entries, whole - sum(4 * layer.elements for layer in layers), 1.0, float(context.model_bytes({})), "bytes"
    )


def widths_of(
    graph: Graph, layers: Sequence[Layer], keep: Sequence[str], *, may_stay_float: bool
) -> dict[str, tuple[int, ...]]:
    """The widths that each tensor may get; of several ``keep`` that match, the last counts."""
    every = (*WIDTHS, FLOAT_BITS) if may_stay_float else tuple(WIDTHS)
    widths = {layer.tensor: every for layer in layers}
    for entry in keep:
        glob, equals, text = entry.rpartition("=")
        bits = FLOAT_BITS if text == "float" else int(text) if text.isdecimal() else 0
        if not equals or (bits not in WIDTHS and bits != FLOAT_BITS):
            raise UsageError(f"--keep {entry!r} is not understood", hint="GLOB=BITS with 2 to 8 bits, or GLOB=float")
        widths |= {layer.tensor: (bits,) for layer in graph.matching(glob, "--keep") if layer.tensor in widths}
    return widths


def groups_of(
    graph: Graph, layers: Sequence[Layer], tie: Sequence[str], widths: Mapping[str, Sequence[int]]
) -> Iterator[tuple[tuple[Layer, ...], list[int]]]:
    """Layers that get one width, and the widths that all of them may get, ascending.

    They are those that a glob of ``tie`` matches, and the others one by one.

    Raises:
        UsageError: Layers that are bound have no width in common.
    """
    groups: dict[str, list[Layer]] = {}
    leader = {layer.tensor: layer.tensor for layer in layers}
    for glob in tie:
        names = [layer.tensor for layer in graph.matching(glob, "--tie") if layer.tensor in leader]
        bound = {leader[name] for name in names}
        for tensor, first in leader.items():
            if first in bound:
                leader[tensor] = leader[names[0]]
    for layer in layers:
        groups.setdefault(leader[layer.tensor], []).append(layer)
    for group in groups.values():
        shared = sorted(set.intersection(*(set(widths[layer.tensor]) for layer in group)))
        if not shared:
            listed = ", ".join(layer.tensor for layer in group)
            raise UsageError(f"--keep leaves no width to {listed}, which --tie binds", hint="keep them at one width")
        yield tuple(group), shared
