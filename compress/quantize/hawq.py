"""HAWQ-V2: a bit width for each weight, on the exact Pareto frontier of cost and expected loss.

Rounding a weight ``W`` of ``n`` elements by ``dW`` is expected to raise the loss by ``Omega / 2``, where
``Omega = (tr H / n) |dW|^2`` and ``H`` is the weight's block of the loss's curvature; the sums over all layers are
what the frontier trades for cost. The range of each channel is the one that moves the layer's outputs least on the
calibration data, and ``|dW|^2`` is then measured by the same: ``sum dW A dW^T``, ``A`` the second moment of the inputs
in units of their mean power. Where activations have widths of their own, rounding one of ``n`` elements by ``dx``
costs ``(tr H / n) |dx|^2 / 2`` as well, ``H`` the curvature of an example's loss in it, and multiplies the bit
operations of what reads it.
Source: Dong et al. 2020, HAWQ-V2 (arXiv:1911.03852), sections 3.1 to 3.3; Yao et al. 2021, HAWQ-V3 (arXiv:2011.10680),
for bit operations. Cost: the traces, a forward pass for the inputs' second moments, 32 roundings a layer and bit width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..apply import float_module
from ..budget import Budget
from ..context import Context
from ..curvature.moments import input_moments
from ..curvature.network import open_network
from ..frontier import FLOAT_BITS, Choice, Item
from ..graph.channel_rules import shape_of
from ..graph.trace import Graph, Layer
from ..model import Source
from ..numerics.rounding import choose_ranges
from ..plan import RANGES, Plan, grid_bits, weight_scheme
from ..sensitivity import Sensitivity
from ..task import Calibration
from .calibrate import AUTO, calibrated, squared_changes
from .correct import correct as correct
from .points import at_point as at_point
from .points import costs_of, first_plan, group_sizes_of, groups_of, widths_of
from .reads import Ranges, find_reads, grids_of, read_ranges, read_records


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
        sensitivities: ``hessian-trace``, and ``activation-trace`` where activations are mixed.
        budget: ``bits`` (the average), ``bytes`` of the delivered file, ``bops`` or ``latency``; None for 8 bits.
        options: ``activations`` (``8``, ``6``, ``4``, ``float``, or ``mixed``: each has its own), ``range`` (``auto``:
            chosen for each channel; ``minmax``, ``mse``), ``group_size`` (of the weights of linear layers, or None),
            ``reconstruction`` (``gptq`` or ``none``) and ``bias_correction`` (``on`` or ``off``; both for ``correct``),
            ``exclude`` and ``tie`` (globs: the weights that one of ``tie`` matches get one width), ``keep``
            (``GLOB=BITS``, or ``GLOB=float``).

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
    widths = widths_of(graph, layers, keep, may_stay_float=goal.quantity == "latency")
    groups = list(groups_of(graph, layers, tie, widths))
    reads = find_reads(graph, groups, activations)
    rounded = calibrated(graph, calibration, options, context)
    group_sizes = group_sizes_of(layers, options)
    found = _changes(
        source, graph, layers, widths, search, group_sizes, calibration, context, with_integers=bool(rounded)
    )
    traces = sensitivities["hessian-trace"].entries
    costs = costs_of(source, graph, layers, goal, reads, context)
    items = []
    for group, shared in groups:
        choices = []
        for bits in shared:
            losses = [
                traces[layer.tensor, ""].value / layer.elements * found[layer.tensor, bits][1] / 2 for layer in group
            ]
            ranges = tuple(found[layer.tensor, bits][0] for layer in group) if bits < FLOAT_BITS else ()
            choices.append(Choice(bits, sum(costs.entries[la.tensor, bits] for la in group), sum(losses), ranges))
        items.append(Item(tuple(layer.tensor for layer in group), tuple(choices)))
    read = read_ranges(graph, reads, rounded, calibration, str(options.get("activation_range", AUTO)), context)
    chosen = read_records(reads, read, _activation_losses(graph, read, sensitivities, calibration, context))
    recorded = {
        "activation_range": options.get("activation_range", AUTO),
        "activations": activations,
        "bias_correction": options["bias_correction"],
        "exclude": list(exclude),
        "group_size": options.get("group_size"),
        "keep": list(keep),
        "range": search,
        "reconstruction": options["reconstruction"],
        "tie": list(tie),
    }
    return first_plan("hawq", items, costs, rounded, chosen, source, graph, calibration, budget, recorded, context)


def _changes(
    source: Source,
    graph: Graph,
    layers: Sequence[Layer],
    widths: Mapping[str, Sequence[int]],
    search: str,
    group_sizes: Mapping[str, int],
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
            groups = group_sizes.get(layer.tensor)
            chosen, moved = choose_ranges(weight, grid, moment, axis=layer.axis, among=among, group_size=groups)
            found[layer.tensor, bits] = (chosen, moved / _mean_power(moment))
    context.progress("weight ranges", len(layers), len(layers))
    return found


def _activation_losses(
    graph: Graph,
    ranges: Ranges,
    sensitivities: Mapping[str, Sensitivity],
    calibration: Calibration,
    context: Context,
) -> dict[str, list[float]]:
    """Half of each activation's mean curvature, times the squared change that each width makes."""
    if not ranges:
        return {}
    module, traces = float_module(graph), sensitivities["activation-trace"].entries
    grids = grids_of(ranges)
    moved = squared_changes(module, grids, calibration.data, context.progress, device=context.device)
    sizes = {
        node.name: math.prod(shape_of(node)) // len(graph.example_inputs[0])
        for node in module.graph.nodes
        if node.name in grids
    }
    return {name: [traces[name, ""].value / sizes[name] * change / 2 for change in moved[name]] for name in grids}


def _mean_power(moment: Tensor | None) -> float:
    return 1.0 if moment is None else float(moment.diagonal(dim1=-2, dim2=-1).mean()) or 1.0
