"""Layer-wise pruning: layers in order, each brought as near to the dense network's outputs as fewer weights allow.

How much goes where is decided first, for the whole network: on calibration data every row of every layer is eliminated
to its end, and what each removal costs the layer's output is weighed by how much the network's outputs react to it. The
cheapest removals of all are made, for each weight, or for each multiply-accumulate where those have a budget. As the
costs of a row never fall, that is the exact frontier of their sum. Blocks of weights are eliminated like weights, in
bands of their rows, and compete by what they cost for each weight. Then which weights those are, and what the others
become, is decided layer by layer on the inputs that the pruned network makes (``reconstruct.sparse``). Layers that
can't be fitted compete by the diagonal of the same curvature.
Source: Frantar, Singh, Alistarh 2022, Optimal Brain Compression (arXiv:2208.11580), for the costs that rows and layers
compete by, here in units of the network's outputs. Cost: a forward and backward pass, six forward ones, and twice
that of ``numerics.elimination``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..apply import apply_plan, assemble, float_module, masks_of, with_values
from ..budget import Budget
from ..context import Context
from ..curvature.network import open_network
from ..curvature.row_traces import OutputGradients, output_gradients, row_traces
from ..data import Data
from ..graph.rewrite import on_device
from ..graph.trace import Graph, Layer
from ..model import Source
from ..numerics.units import kept_of_all, masks_of_most, masks_without
from ..pattern import Pattern, parse_pattern
from ..plan import Plan
from ..reconstruct.side_by_side import fitting_examples
from ..reconstruct.sparse import Cut, prunable_layers, prune_layers, removal_costs
from ..saliencies import saliency_histogram
from ..sensitivity import Sensitivity
from ..task import Calibration
from ..train.distill import divergence_from
from .masks import cut_layers, mask_plan, num_removed, recorded_options, searched_sparsities, units_of, whole_plan
from .removal import Removal, removal_for

NAME = "layerwise"
COSTS, SCORES = "layerwise costs", "layerwise scores"  # in the memo of a job
SALIENCY = "how far a removal moves the network's outputs, in the order in which weights of a row go"
FEW = 16  # examples, with fewer of which a note says what that means
PASSES = 1


@dataclass(frozen=True, slots=True)
class _Surgery:
    """A network on the table.

    Attributes:
        inputs: Calibration examples ``[n, ...]``.
        reactions: Of the dense network's outputs to its layers'.
    """

    source: Source
    graph: Graph
    calibration: Calibration
    inputs: tuple[Tensor, ...]
    reactions: OutputGradients
    options: Mapping[str, Any]
    context: Context


def plan(
    source: Source,
    graph: Graph,
    sensitivities: Mapping[str, Sensitivity],
    calibration: Calibration,
    budget: Budget | None,
    options: Mapping[str, Any],
    context: Context,
) -> tuple[Plan, dict[str, Tensor]]:
    """Choose the weights to zero, and new values for the others and for biases.

    Args:
        budget: ``sparsity``, ``bytes`` of the delivered file, or ``macs``; None means a sparsity of one half.
        options: ``scope`` (``global``: layers compete; ``layer``: each loses the same share), ``pattern``
            (``pattern.FORMS``), ``exclude`` (globs).

    Returns:
        The plan and its sidecar: packed masks, the survivors' values by tensor, and whole biases.

    Raises:
        BudgetError: More is to be removed than may be, or than the pattern leaves.
        UsageError: Nothing to prune, or no pattern.
    """
    recorded = recorded_options(options)
    layers, pattern = cut_layers(source, graph, recorded, budget, context)
    if pattern.quota is None:
        removal = removal_for(source, graph, layers, pattern, budget, recorded["scope"], context)
        if not removal.amount:
            return whole_plan(source, graph, layers, budget, NAME, recorded)
        surgery = _open(source, graph, layers, calibration, recorded, context)
        return _pruned(surgery, _cuts(surgery, layers, pattern, removal), budget)
    n, m = pattern.quota
    surgery = _open(source, graph, layers, calibration, recorded, context)
    scores, units = _scores(surgery, layers, pattern), units_of(layers, pattern)
    cuts = {}
    for layer in layers:
        score, own = scores.get(layer.tensor), {layer.tensor: units[layer.tensor]}
        mask = None if score is None else masks_of_most(own, {layer.tensor: score}, n)[layer.tensor]
        cuts[layer.tensor] = Cut(layer.elements // m * (m - n), mask)
    return _pruned(surgery, cuts, budget)


def candidates(
    source: Source,
    graph: Graph,
    sensitivities: Mapping[str, Sensitivity],
    calibration: Calibration,
    options: Mapping[str, Any],
    context: Context,
) -> Iterator[tuple[Plan, dict[str, Tensor]]]:
    """Plans of growing sparsity, as long as they are asked for."""
    recorded = recorded_options(options)
    layers, pattern = cut_layers(source, graph, recorded, None, context)
    surgery = _open(source, graph, layers, calibration, recorded, context)
    for sparsity in searched_sparsities():
        whole = sum(layer.elements for layer in layers)
        removal = Removal(num_removed(sparsity, whole), whole)
        yield _pruned(surgery, _cuts(surgery, layers, pattern, removal), None)


def refit(
    given: Plan,
    sidecar: Mapping[str, Tensor],
    source: Source,
    graph: Graph,
    calibration: Calibration,
    context: Context,
) -> tuple[Plan, dict[str, Tensor]]:
    """The masks of a plan on another checkpoint of the architecture: the survivors' values are computed anew.

    Raises:
        InputError: The plan is for another architecture.
    """
    masks = masks_of(given, sidecar, source.module.state_dict())
    layers = tuple(layer for layer in graph.layers if layer.tensor in masks)
    surgery = _open(source, graph, layers, calibration, given.options, context)
    cuts = {name: Cut(int((~mask).sum()), mask) for name, mask in masks.items()}
    return _pruned(surgery, cuts, given.budget)


def _open(
    source: Source,
    graph: Graph,
    layers: Sequence[Layer],
    calibration: Calibration,
    options: Mapping[str, Any],
    context: Context,
) -> _Surgery:
    data = fitting_examples(graph, calibration.data)
    if NAME not in context.memo:
        if len(data) < FEW:
            shown = f"{len(data)} calibration example{'s' * (len(data) > 1)}"
            context.notes.append(
                f"what goes and what is fitted was chosen on {shown} alone, and may fit no others; pass a few hundred "
                "with --data"
            )
        context.memo[NAME] = output_gradients(
            open_network(graph, layers=tuple(layers), device=context.device),
            calibration.task,
            data,
            passes=PASSES,
            generator=context.generator,
            progress=context.progress,
        )
    inputs = tuple(x.to(context.device) for x in data.inputs)
    return _Surgery(source, graph, calibration, inputs, context.memo[NAME], options, context)


def _cuts(surgery: _Surgery, layers: Sequence[Layer], pattern: Pattern, removal: Removal) -> dict[str, Cut]:
    """How many weights each layer loses at least; which ones, where a layer can't be fitted."""
    context, scores, units = surgery.context, _scores(surgery, layers, pattern), units_of(layers, pattern)
    if surgery.options["scope"] == "layer":
        counts = [num_removed(removal.share, layer.elements) for layer in layers]
    else:
        if COSTS not in context.memo:
            context.memo[COSTS] = removal_costs(
                surgery.graph,
                surgery.reactions,
                {tensor: own for tensor, own in units.items() if tensor not in scores},
                surgery.inputs,
                device=context.device,
                progress=context.progress,
            )
        costs = context.memo[COSTS] | {tensor: (score, units[tensor].sizes()) for tensor, score in scores.items()}
        each, sizes = ({layer.tensor: costs[layer.tensor][part] for layer in layers} for part in (0, 1))
        kept = kept_of_all(each, sizes, removal.amount, removal.each)
        counts = [int(sizes[tensor][~mask].sum()) for tensor, mask in kept.items()]
        flat, stays = (torch.cat([found[tensor].flatten() for tensor in kept]) for found in (each, kept))
        context.saliencies.append(saliency_histogram(flat, stays, what=SALIENCY, of=pattern.units))
    cuts = {}
    for layer, count in zip(layers, counts, strict=True):
        tensor, mask = layer.tensor, None
        if tensor in scores:
            mask = masks_without({tensor: units[tensor]}, {tensor: scores[tensor]}, count)[tensor]
        cuts[tensor] = Cut(count, mask)
    return cuts


def _scores(surgery: _Surgery, layers: Sequence[Layer], pattern: Pattern) -> dict[str, Tensor]:
    """What each unit costs for each of its weights where a layer can't be fitted, ``[b, n]``; a note names such layers.

    The mean curvature of a weight's row times its square, float64: in the units of the other layers' costs.
    """
    fitted, context = prunable_layers(surgery.graph), surgery.context
    others = tuple(layer for layer in layers if layer.tensor not in fitted)
    if others:
        listed = ", ".join(layer.tensor for layer in others)
        context.notes.append(f"{listed}: pruned, but not fitted: transposed, shared, or with too many inputs")
    if others and SCORES not in context.memo:
        traces = row_traces(
            open_network(surgery.graph, layers=others, device=context.device),
            surgery.calibration.task,
            surgery.calibration.data.first(len(surgery.inputs[0])),
            passes=PASSES,
            generator=context.generator,
            progress=context.progress,
        )
        state = surgery.source.module.state_dict()
        squares = {layer.tensor: state[layer.tensor].detach().double().cpu().flatten(1).square() for layer in others}
        units = units_of(others, pattern)
        context.memo[SCORES] = {
            layer.tensor: units[layer.tensor].means(squares[layer.tensor] * traces[layer.tensor][:, None])
            * (layer.shape[0] / layer.elements)
            for layer in others
        }
    found: dict[str, Tensor] = context.memo.get(SCORES, {})
    return found


def _pruned(surgery: _Surgery, cuts: Mapping[str, Cut], budget: Budget | None) -> tuple[Plan, dict[str, Tensor]]:
    options, context = surgery.options, surgery.context
    found = prune_layers(
        surgery.graph,
        cuts,
        surgery.reactions,
        surgery.inputs,
        pattern=parse_pattern(str(options["pattern"])),
        device=context.device,
        progress=context.progress,
    )
    decided = mask_plan(surgery.source, surgery.graph, found.masks, budget, NAME, options)
    made, sidecar = with_values(*decided, {**found.weights, **found.biases}, found.masks)
    predicted = {**made.predicted, "loss": _moved(surgery, made, sidecar)}
    return replace(made, task_sha256=surgery.calibration.sha256(), predicted=predicted), sidecar


def _moved(surgery: _Surgery, plan: Plan, sidecar: Mapping[str, Tensor]) -> float:
    """How far the outputs are from the dense network's, in units of the loss, on the calibration examples."""
    graph, task, device = surgery.graph, surgery.calibration.task, surgery.context.device
    pruned = assemble(graph, apply_plan(surgery.source.module, graph.tied, plan, sidecar))
    dense, changed = (on_device(network, device) for network in (float_module(graph), pruned))
    return divergence_from(dense, changed, Data(surgery.inputs, None, surgery.calibration.data.name), task, device)
