"""HAWQ-V2: a bit width for each weight, on the exact Pareto frontier of cost and expected loss.

Rounding a weight ``W`` of ``n`` elements by ``dW`` is expected to raise the loss by ``Omega / 2``, where
``Omega = (tr H / n) |dW|^2`` and ``H`` is the weight's block of the loss's curvature; the sums over all layers are
what the frontier trades for cost. The range of each channel is the one that moves the layer's outputs least on the
calibration data, and ``|dW|^2`` is then measured by the same: ``sum dW A dW^T``, ``A`` the second moment of the inputs
in units of their mean power.
Source: Dong et al. 2020, HAWQ-V2 (arXiv:1911.03852), sections 3.1 and 3.2; Yao et al. 2021, HAWQ-V3 (arXiv:2011.10680),
for bit operations. Cost: the traces, a forward pass for the inputs' second moments, 32 roundings a layer and bit width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..budget import Budget, rounded_up
from ..context import Context, Storage
from ..curvature.moments import input_moments
from ..curvature.network import open_network
from ..errors import BudgetError, InputError, UsageError
from ..frontier import FLOAT_BITS, Choice, FrontierRecord, Item
from ..graph.trace import Graph, Layer
from ..model import Source
from ..numerics.pareto import pareto_frontier
from ..numerics.rounding import choose_ranges
from ..plan import RANGES, Decision, Plan, Quantize, grid_bits, weight_scheme
from ..sensitivity import Sensitivity
from ..task import Calibration, has_logits
from .calibrate import activation_decisions, calibrated
from .correct import correct as correct

WIDTHS = range(2, 9)
NANOSECONDS = 1e-6  # of a millisecond: latencies are counted in whole ones


@dataclass(frozen=True, slots=True)
class _Costs:
    """What storing each tensor at each width costs, in an integer unit; ``scale * (fixed + sum)`` is the quantity."""

    entries: Mapping[tuple[str, int], int]
    fixed: int
    scale: float


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
        sensitivities: ``hessian-trace``.
        budget: ``bits`` (the average), ``bytes`` of the delivered file, ``bops`` or ``latency``; None for 8 bits.
        options: ``activations`` (``8``, ``6``, ``4`` or ``float``), ``range`` (``auto``: chosen for each channel;
            ``minmax``, ``mse``), ``reconstruction`` (``gptq`` or ``none``) and ``bias_correction`` (``on`` or ``off``;
            both for ``correct``), ``exclude`` and ``tie`` (globs: the weights that one of ``tie`` matches get one
            width), ``keep`` (``GLOB=BITS``, or ``GLOB=float``).

    Returns:
        The plan, without a sidecar; its frontier is appended to ``context.frontiers``.

    Raises:
        BudgetError: No point is within the budget; gives the feasible minimum. Where none meets a budget of bytes or of
            latency, the smallest plan is returned: what its file takes is the feasible minimum.
        UsageError: Nothing to quantize, or a glob or width that isn't one.
    """
    exclude, tie, keep = (tuple(options.get(name) or ()) for name in ("exclude", "tie", "keep"))
    layers = graph.compressible(exclude, "quantize")
    goal = budget or Budget("bytes", float("inf"))
    activations, search = str(options["activations"]), str(options["range"])
    widths = _widths(graph, layers, keep, may_stay_float=goal.quantity == "latency")
    rounded = calibrated(graph, calibration.data, activations, context)
    found = _changes(source, graph, layers, widths, search, calibration, context, with_integers=bool(rounded))
    traces = sensitivities["hessian-trace"].entries
    costs = _costs(source, graph, layers, goal, activations, context)
    items = []
    for group in _groups(graph, layers, tie):
        shared = sorted(set.intersection(*(set(widths[layer.tensor]) for layer in group)))
        if not shared:
            names = ", ".join(layer.tensor for layer in group)
            raise UsageError(f"--keep leaves no width to {names}, which --tie binds", hint="keep them at one width")
        choices = []
        for bits in shared:
            losses = [
                traces[layer.tensor, ""].value / layer.elements * found[layer.tensor, bits][1] / 2 for layer in group
            ]
            ranges = tuple(found[layer.tensor, bits][0] for layer in group) if bits < FLOAT_BITS else ()
            choices.append(Choice(bits, sum(costs.entries[la.tensor, bits] for la in group), sum(losses), ranges))
        items.append(Item(tuple(layer.tensor for layer in group), tuple(choices)))
    frontier = pareto_frontier(*_tables(items))
    record = FrontierRecord(
        method="hawq",
        quantity=goal.quantity,
        scale=costs.scale,
        fixed=costs.fixed,
        dense_amount=_dense_amount(graph, costs, goal, context),
        loss_unit="nats" if has_logits(calibration.task) else "loss",
        items=tuple(items),
        costs=tuple(frontier.costs.tolist()),
        losses=tuple(frontier.values.tolist()),
        index=0,
        chosen=frontier.choice(0),
        activations=rounded,
    )
    index = record.within(goal.absolute(record.dense_amount))
    if index is None and goal.quantity not in ("bytes", "latency"):
        least = Budget(goal.quantity, rounded_up(record.amount(record.costs[0])))
        raise BudgetError(f"{goal} is out of reach: hawq goes down to {least}", hint=f"raise --budget to {least}")
    recorded = {
        "activations": activations,
        "bias_correction": options["bias_correction"],
        "exclude": list(exclude),
        "keep": list(keep),
        "range": search,
        "reconstruction": options["reconstruction"],
        "tie": list(tie),
    }
    start = Plan("hawq", recorded, 0, source.sha256, calibration.sha256(), budget, (), {})
    return at_point(start, graph, record, index or 0, context), {}


def at_point(given: Plan, graph: Graph, record: FrontierRecord, index: int, context: Context) -> Plan:
    """The plan at another point of a frontier, without measuring again; the record goes to ``context.frontiers``.

    Raises:
        InputError: The record's points aren't those of its items, or the graph lacks one of its tensors.
    """
    frontier = pareto_frontier(*_tables(record.items))
    if tuple(frontier.costs.tolist()) != record.costs or not 0 <= index < len(frontier):
        raise InputError("frontier.json: the points aren't those of its choices", hint="make the run again")
    moved = record.at(index, frontier.choice(index))
    axes = {layer.tensor: layer.axis for layer in graph.layers}
    weights: list[Decision] = []
    for item, choice in zip(moved.items, moved.chosen_choices(), strict=True):
        for tensor, search in zip(item.tensors, choice.ranges, strict=choice.bits < FLOAT_BITS):
            if tensor not in axes:
                raise InputError(
                    f"frontier.json: {tensor} is no weight of the network",
                    hint="the frontier is another architecture's",
                )
            scheme = weight_scheme(choice.bits, with_integers=bool(record.activations))
            weights.append(Quantize(tensor, "weight", choice.bits, scheme, axes[tensor], search))
    context.frontiers.append(moved)
    elements = {layer.tensor: layer.elements for layer in graph.layers}
    bits = {decision.tensor: decision.bits for decision in weights if isinstance(decision, Quantize)}
    average = sum(count * bits.get(tensor, FLOAT_BITS) for tensor, count in elements.items()) / sum(elements.values())
    predicted = {"average_bits": average, "loss": moved.losses[index]}
    rounded = activation_decisions(graph, moved.activations, bits.keys(), str(given.options.get("activations")))
    return replace(given, decisions=(*weights, *rounded), predicted=predicted)


def _tables(items: Sequence[Item]) -> tuple[list[list[int]], list[list[float]]]:
    return (
        [[choice.cost for choice in item.choices] for item in items],
        [[choice.loss for choice in item.choices] for item in items],
    )


def _widths(
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


def _groups(graph: Graph, layers: Sequence[Layer], tie: Sequence[str]) -> list[tuple[Layer, ...]]:
    """Layers that get one width: those that a glob of ``tie`` matches, and the others one by one."""
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
    return [tuple(group) for group in groups.values()]


def _changes(
    source: Source,
    graph: Graph,
    layers: Sequence[Layer],
    widths: Mapping[str, Sequence[int]],
    search: str,
    calibration: Calibration,
    context: Context,
    *,
    with_integers: bool,
) -> dict[tuple[str, int], tuple[str, float]]:
    """The range of each tensor at each width, and the squared change of the weight.

    Ranges are chosen by what they do to the outputs, and so is the change measured: in the norm of the inputs' second
    moment, in units of their mean power.
    """
    network = open_network(graph, layers=tuple(layers), device=context.device)
    moments = input_moments(network, calibration.data, progress=context.progress)
    among = tuple(RANGES) if search == "auto" else (search,)
    state = source.module.state_dict()
    found = {}
    for done, layer in enumerate(layers):
        context.progress("weight ranges", done, len(layers))
        weight = state[layer.tensor].detach().float()
        for bits in widths[layer.tensor]:
            if bits == FLOAT_BITS:
                found[layer.tensor, bits] = ("", 0.0)
                continue
            grid = grid_bits(bits, weight_scheme(bits, with_integers=with_integers))
            moment = moments.get(layer.tensor)
            chosen, moved = choose_ranges(weight, grid, moment, axis=layer.axis, among=among)
            found[layer.tensor, bits] = (chosen, moved / _mean_power(moment))
    context.progress("weight ranges", len(layers), len(layers))
    return found


def _mean_power(moment: Tensor | None) -> float:
    return 1.0 if moment is None else float(moment.diagonal(dim1=-2, dim2=-1).mean()) or 1.0


def _costs(
    source: Source, graph: Graph, layers: Sequence[Layer], budget: Budget, activations: str, context: Context
) -> _Costs:
    every = (*WIDTHS, FLOAT_BITS)
    chosen = {layer.tensor for layer in layers}
    others = [layer for layer in graph.layers if layer.tensor not in chosen]
    if budget.quantity == "bits":
        total = sum(layer.elements for layer in graph.layers)
        entries = {(layer.tensor, bits): layer.elements * bits for layer in layers for bits in every}
        return _Costs(entries, sum(layer.elements * FLOAT_BITS for layer in others), 1 / total)
    if budget.quantity == "bops":
        read = FLOAT_BITS if activations == "float" else int(activations)
        entries = {(layer.tensor, bits): layer.macs * bits * read for layer in layers for bits in every}
        return _Costs(entries, sum(layer.macs * FLOAT_BITS * read for layer in others), 1.0)
    if budget.quantity == "latency":
        table = context.costs["latency"]
        times = {key: round(value / NANOSECONDS) for key, value in table.entries.items()}
        entries = {(layer.tensor, bits): times[layer.tensor, str(bits)] for layer in layers for bits in every}
        return _Costs(entries, round(table.fixed / NANOSECONDS), NANOSECONDS)
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
    return _Costs(entries, whole - sum(4 * layer.elements for layer in layers), 1.0)


def _dense_amount(graph: Graph, costs: _Costs, budget: Budget, context: Context) -> float:
    """The dense network's figure, of which a relative budget is a share."""
    if budget.quantity == "bits":
        return float(FLOAT_BITS)
    if budget.quantity == "bops":
        return float(sum(layer.macs * FLOAT_BITS**2 for layer in graph.layers))
    if budget.quantity == "latency":
        whole = sum(cost for (_, bits), cost in costs.entries.items() if bits == FLOAT_BITS)
        return costs.scale * (costs.fixed + whole)
    return float(context.model_bytes({}))
