"""Layer-wise pruning: layers in order, each brought as near to the dense network's outputs as fewer weights allow.

How much goes where is decided first, for the whole network: on calibration data every row of every layer is eliminated
to its end, and what each removal costs the layer's output is weighed by how much the network's outputs react to it. The
cheapest removals of all are made. As the costs of a row never fall, that is the exact frontier of their sum. Then
which weights those are, and what the others become, is decided layer by layer on the inputs that the pruned network
makes (``reconstruct.sparse``).
Source: Frantar, Singh, Alistarh 2022, Optimal Brain Compression (arXiv:2208.11580), for the costs that rows and layers
compete by, here in units of the network's outputs. Cost: ``PASSES`` forward and backward passes over ``EXAMPLES``
examples, four forward passes over all, and twice that of ``numerics.elimination``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..apply import apply_plan, assemble, float_module, masks_of, values_key, values_sha256
from ..budget import Budget
from ..context import Context
from ..curvature.network import open_network
from ..curvature.row_traces import output_gradients
from ..data import Data
from ..errors import UsageError
from ..graph.rewrite import on_device
from ..graph.trace import Graph, Layer
from ..model import Source
from ..plan import UNSTRUCTURED, MaskWeights, Plan, Replace
from ..reconstruct.side_by_side import fitting_examples
from ..reconstruct.sparse import Cut, Fitted, prunable_layers, prune_layers, removal_costs
from ..sensitivity import Sensitivity
from ..task import Calibration, divergence, has_logits
from ..train.distill import first_tensor
from .magnitude import removed_within
from .masks import mask_plan, num_removed, parse_pattern, patterned_layers, searched_sparsities

NAME = "layerwise"
PASSES = 2
EXAMPLES = 128
BATCH = 64  # examples of a forward pass


@dataclass(frozen=True, slots=True)
class _Costs:
    """What tells rows and layers apart.

    Attributes:
        importance: Of each row, ``[r]``, by tensor.
        removals: What each removal costs the dense network, by tensor: ``[r, k]``, in order.
    """

    importance: Mapping[str, Tensor]
    removals: Mapping[str, Tensor]


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
        budget: ``sparsity``, or ``bytes`` of the delivered file; None means a sparsity of one half.
        options: ``scope`` (``global``: layers compete; ``layer``: each loses the same share), ``pattern``
            (``unstructured`` or ``n:m``), ``exclude`` (globs).

    Returns:
        The plan and its sidecar: packed masks, the survivors' values by tensor, and whole biases.

    Raises:
        BudgetError: More is to be removed than may be, or than the pattern leaves.
        UsageError: Nothing to prune, or no pattern.
    """
    layers = _layers(graph, options, context)
    recorded = _recorded(options)
    if recorded["pattern"] == UNSTRUCTURED:
        removed = removed_within(source, graph, layers, budget, recorded["scope"], context)
        costs = _costs(graph, layers, calibration, context)
        return _pruned(
            source, graph, _counts(layers, removed, costs, recorded), costs, calibration, budget, recorded, context
        )
    n, m = parse_pattern(recorded["pattern"])
    layers = patterned_layers(graph, layers, recorded["pattern"], budget, context)
    cuts = {layer.tensor: Cut(layer.elements // m * (m - n)) for layer in layers}
    return _pruned(source, graph, cuts, _Costs({}, {}), calibration, budget, recorded, context)


def candidates(
    source: Source,
    graph: Graph,
    sensitivities: Mapping[str, Sensitivity],
    calibration: Calibration,
    options: Mapping[str, Any],
    context: Context,
) -> Iterator[tuple[Plan, dict[str, Tensor]]]:
    """Plans of growing sparsity, as long as they are asked for."""
    layers, recorded = _layers(graph, options, context), _recorded(options)
    costs = _costs(graph, layers, calibration, context)
    for sparsity in searched_sparsities():
        removed = num_removed(sparsity, sum(layer.elements for layer in layers))
        cuts = _counts(layers, removed, costs, recorded)
        yield _pruned(source, graph, cuts, costs, calibration, None, recorded, context)


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
    cuts = {name: Cut(int((~mask).sum()), mask) for name, mask in masks.items()}
    return _pruned(source, graph, cuts, _Costs({}, {}), calibration, given.budget, given.options, context)


def _layers(graph: Graph, options: Mapping[str, Any], context: Context) -> tuple[Layer, ...]:
    """The layers that may lose weights; a note names the others that weren't excluded."""
    allowed = graph.compressible(tuple(options.get("exclude") or ()), "prune")
    prunable = prunable_layers(graph)
    layers = tuple(layer for layer in allowed if layer.tensor in prunable)
    others = ", ".join(layer.tensor for layer in allowed if layer.tensor not in prunable)
    if not layers:
        raise UsageError(
            f"{NAME} fits no weight of the network: {others} are transposed, shared, or read too many inputs",
            hint="pass --method magnitude",
        )
    if others:
        context.notes.append(f"{NAME} leaves {others} dense: transposed, shared, or with too many inputs")
    return layers


def _recorded(options: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "exclude": list(options.get("exclude") or ()),
        "pattern": str(options.get("pattern") or UNSTRUCTURED),
        "scope": str(options.get("scope") or "global"),
    }


def _costs(graph: Graph, layers: Sequence[Layer], calibration: Calibration, context: Context) -> _Costs:
    """Measured once a run."""
    if NAME not in context.memo:
        network = open_network(graph, layers=tuple(layers), device=context.device)
        importance = output_gradients(
            network,
            calibration.task,
            calibration.data.first(EXAMPLES),
            passes=PASSES,
            generator=context.generator,
            progress=context.progress,
        )
        importance |= {layer.tensor: torch.zeros(layer.shape[0]) for layer in layers if layer.tensor not in importance}
        inputs = _inputs(graph, calibration, context)
        removals = removal_costs(graph, importance, inputs, device=context.device, progress=context.progress)
        context.memo[NAME] = _Costs(importance, removals)
    found: _Costs = context.memo[NAME]
    return found


def _inputs(graph: Graph, calibration: Calibration, context: Context) -> tuple[Tensor, ...]:
    return tuple(x.to(context.device) for x in fitting_examples(graph, calibration.data).inputs)


def _counts(layers: Sequence[Layer], removed: int, costs: _Costs, options: Mapping[str, Any]) -> dict[str, Cut]:
    """How many weights each layer loses."""
    total = sum(layer.elements for layer in layers)
    if options["scope"] == "layer":
        return {layer.tensor: Cut(num_removed(removed / total, layer.elements)) for layer in layers}
    every = torch.cat([costs.removals[layer.tensor].flatten() for layer in layers])
    owner = torch.arange(len(layers)).repeat_interleave(torch.tensor([layer.elements for layer in layers]))
    counts = torch.bincount(owner[every.argsort(stable=True)[:removed]], minlength=len(layers)).tolist()
    return {layer.tensor: Cut(count) for layer, count in zip(layers, counts, strict=True)}


def _pruned(
    source: Source,
    graph: Graph,
    cuts: Mapping[str, Cut],
    costs: _Costs,
    calibration: Calibration,
    budget: Budget | None,
    options: Mapping[str, Any],
    context: Context,
) -> tuple[Plan, dict[str, Tensor]]:
    inputs = _inputs(graph, calibration, context)
    pattern = None if options["pattern"] == UNSTRUCTURED else parse_pattern(str(options["pattern"]))
    found = prune_layers(
        graph, cuts, costs.importance, inputs, pattern=pattern, device=context.device, progress=context.progress
    )
    made, sidecar = _with_values(*mask_plan(source, graph, found.masks, budget, NAME, options), found)
    loss = _moved(made, sidecar, source, graph, calibration, inputs, context)
    return replace(made, task_sha256=calibration.sha256(), predicted={**made.predicted, "loss": loss}), sidecar


def _with_values(plan: Plan, sidecar: dict[str, Tensor], found: Fitted) -> tuple[Plan, dict[str, Tensor]]:
    decisions: list[MaskWeights | Replace] = []
    for decision in plan.decisions:
        assert isinstance(decision, MaskWeights)
        if decision.tensor in found.weights:
            values = found.weights[decision.tensor][found.masks[decision.tensor]]
            sidecar[values_key(decision.tensor)] = values
            decision = replace(decision, values_sha256=values_sha256(values))
        decisions.append(decision)
    for name, values in sorted(found.biases.items()):
        sidecar[values_key(name)] = values
        decisions.append(Replace(name, values_sha256(values)))
    return replace(plan, decisions=tuple(decisions)), sidecar


def _moved(
    plan: Plan,
    sidecar: Mapping[str, Tensor],
    source: Source,
    graph: Graph,
    calibration: Calibration,
    inputs: tuple[Tensor, ...],
    context: Context,
) -> float:
    """How far the outputs are from the dense network's, in units of the loss, on calibration data."""
    pruned = assemble(graph, apply_plan(source.module, graph.tied, plan, sidecar))
    batches = list(Data(inputs, None, calibration.data.name).batches(BATCH))
    outputs = []
    with torch.no_grad():
        for network in (float_module(graph), pruned):
            module = on_device(network, context.device)
            outputs.append(torch.cat([first_tensor(module(*batch.inputs)).cpu() for batch in batches]))
    return divergence(*outputs, are_logits=has_logits(calibration.task))
