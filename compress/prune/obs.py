"""OBS pruning by M-FAC: remove the weights that the loss misses least, and move the others to make up for them.

In rounds of growing sparsity: per-sample gradients at the current weights, saliencies ``w^2 / (2 [F^-1]_ii)`` of the
damped Fisher matrix ``F``, a mask, and the exact joint update of the survivors. The update's damping is the one that
leaves the outputs nearest to the dense network's on the calibration data, and no update is made where none helps.
Source: Frantar, Kurtic, Alistarh 2021, M-FAC (arXiv:2107.03356); Hassibi and Stork 1993, Optimal Brain Surgeon.
Cost: a round takes a pass with per-sample gradients, two products of m^2 d, and seven forward passes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..apply import values_key, values_sha256
from ..budget import Budget
from ..context import Context
from ..curvature.network import Network, open_network, predict
from ..curvature.sample_gradients import sample_gradients
from ..errors import BudgetError, OutOfMemoryError, UsageError
from ..graph.trace import Graph
from ..model import Source
from ..numerics.mfac import gram_matrix, inverse_fisher, joint_update, saliency
from ..plan import MaskWeights, Plan
from ..sensitivity import Sensitivity
from ..task import Calibration, divergence, has_logits
from .magnitude import DEFAULT_SPARSITY, mask_plan, smallest_cut

DRAWS = 2  # gradients of an example; ResNet-20 at sparsity 0.8: one gives 74.5 to 77.4 %, two 78.1, three 80.1
SALIENCY_DAMPING = 1e-3  # of the mean curvature, as are the next
DAMPINGS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
MEMORY_LIMIT = 8 * 2**30  # bytes of gradients


def plan(
    source: Source,
    graph: Graph,
    sensitivities: Mapping[str, Sensitivity],
    calibration: Calibration | None,
    budget: Budget | None,
    options: Mapping[str, Any],
    context: Context,
) -> tuple[Plan, dict[str, Tensor]]:
    """Choose the weights to zero, and new values for the others.

    Args:
        budget: ``sparsity``, or ``bytes`` of the delivered file; None means a sparsity of one half.
        options: ``rounds``, ``scope`` (``global`` or ``layer``), ``exclude`` (globs), ``fisher``.

    Returns:
        The plan and its sidecar: packed masks and the survivors' values by tensor.

    Raises:
        BudgetError: More is to be removed than ``exclude`` leaves.
        UsageError: Nothing to prune, or a pattern.
        OutOfMemoryError: The gradients would not fit; names the way out.
    """
    if str(options.get("pattern") or "unstructured") != "unstructured":
        raise UsageError(
            f"method obs has no pattern {options['pattern']}", hint="pass --method magnitude, or leave --pattern out"
        )
    exclude = tuple(options.get("exclude") or ())
    layers = graph.without(exclude)
    if not layers:
        hint = "check --exclude" if exclude else "is it quantized already? hcompress inspect lists its layers"
        raise UsageError("the network has no float weight to prune", hint=hint)
    total = sum(layer.elements for layer in graph.layers)
    available = sum(layer.elements for layer in layers)
    budget = budget or Budget("sparsity", DEFAULT_SPARSITY)
    if budget.quantity == "bytes":
        state = source.module.state_dict()
        weights = {layer.tensor: state[layer.tensor].detach().float() for layer in layers}
        masks = smallest_cut(weights, available, budget, str(options["scope"]), context)
        removed = sum(int((~mask).sum()) for mask in masks.values())  # bytes depend on counts, hardly on where
    else:
        removed = round(budget.limit * total)
    if removed > available:
        raise BudgetError(
            f"sparsity {removed / total:g} is out of reach: --exclude leaves at most {available / total:.4f}",
            hint="exclude less, or lower --sparsity",
        )
    network = open_network(graph, layers=layers, device=context.device)
    recorded = {**{name: options[name] for name in ("rounds", "scope", "fisher")}, "exclude": list(exclude)}
    protected = torch.zeros(available, dtype=torch.bool)
    return _prune(source, graph, network, protected, removed, calibration, budget, recorded, context)


def refit(
    given: Plan, source: Source, graph: Graph, masks: Mapping[str, Tensor], calibration: Calibration, context: Context
) -> tuple[Plan, dict[str, Tensor]]:
    """The masks of a plan on another checkpoint of the architecture: the survivors' values are computed anew.

    Args:
        masks: Those of the plan, by tensor.
    """
    layers = tuple(layer for layer in graph.layers if layer.tensor in masks)
    network = open_network(graph, layers=layers, device=context.device)
    protected = torch.cat([masks[layer.tensor].flatten() for layer in layers])
    removed = int((~protected).sum())
    options = {**given.options, "scope": "global"}
    plan, sidecar = _prune(source, graph, network, protected, removed, calibration, given.budget, options, context)
    return replace(plan, options=given.options), sidecar


def _prune(
    source: Source,
    graph: Graph,
    network: Network,
    protected: Tensor,
    removed: int,
    calibration: Calibration | None,
    budget: Budget | None,
    options: Mapping[str, Any],
    context: Context,
) -> tuple[Plan, dict[str, Tensor]]:
    """All rounds; weights where ``protected`` ``[d]`` is true are kept."""
    assert calibration is not None  # the registry says that the method needs data
    d = network.num_weights
    _require_memory(calibration, d)
    dense = predict(network, calibration.data)
    keep = torch.ones(d, dtype=torch.bool)
    rounds = int(options["rounds"])
    for number in range(1, rounds + 1):
        share = 1 - (1 - removed / d) ** (number / rounds)
        if keep.any():
            keep = _round(network, calibration, dense, keep, protected, round(share * d), options, context)
    masks = network.split(keep)
    decided, sidecar = mask_plan(source, graph, masks, budget, dict(options), "unstructured", method="obs")
    values = {name: network.weights[name].detach().cpu()[mask] for name, mask in masks.items()}
    decisions = tuple(
        replace(decision, values_sha256=values_sha256(values[decision.tensor]))
        for decision in decided.decisions
        if isinstance(decision, MaskWeights)
    )
    sidecar.update({values_key(name): value for name, value in values.items()})
    return replace(decided, decisions=decisions, task_sha256=calibration.sha256()), sidecar


def _require_memory(calibration: Calibration, d: int) -> None:
    m = DRAWS * len(calibration.data)
    if 4 * m * d > MEMORY_LIMIT:
        raise OutOfMemoryError(
            f"{m} gradients of {d} weights take {4 * m * d / 1e9:.1f} GB",
            hint=f"pass --num-calibration {max(1, MEMORY_LIMIT // (4 * d * DRAWS))} or fewer, or --method magnitude",
        )


def _round(
    network: Network,
    calibration: Calibration,
    dense: Tensor,
    keep: Tensor,
    protected: Tensor,
    removed: int,
    options: Mapping[str, Any],
    context: Context,
) -> Tensor:
    """Remove weights until ``removed`` are gone, and update the others in place; the new mask ``[d]``."""
    gradients = sample_gradients(
        network,
        calibration.task,
        calibration.data,
        mode=str(options["fisher"]),
        generator=context.generator,
        progress=context.progress,
        keep=keep,
        draws=DRAWS,
    )
    context.progress("saliencies and update", 0, None)
    weights = network.flat().cpu()
    alive = weights[keep]
    gram = gram_matrix(gradients)
    scale = float(gram.diagonal().sum()) / gradients.numel()
    scores = alive.double().square()
    if scale > 0:
        inverse = inverse_fisher(gradients, SALIENCY_DAMPING * scale, gram=gram)
        scores = saliency(alive, inverse.diagonal()).double()
    scores[protected[keep]] = float("inf")
    chosen = _survivors(network, keep, scores, removed, str(options["scope"]))

    best, least = torch.where(chosen, weights, 0.0), float("inf")
    for candidate in _candidates(gradients, gram, weights, keep, chosen):
        network.set_flat(candidate)
        moved = divergence(dense, predict(network, calibration.data), are_logits=has_logits(calibration.task))
        if moved < least:
            best, least = candidate, moved
    network.set_flat(best)
    return chosen


def _survivors(network: Network, keep: Tensor, scores: Tensor, removed: int, scope: str) -> Tensor:
    """The mask ``[d]`` without the least salient weights, over the network or within each layer."""
    every = torch.full(keep.shape, -1.0, dtype=torch.float64)
    every[keep] = scores
    parts = [every] if scope == "global" else [p.flatten() for p in network.split(every).values()]
    masks = []
    for part in parts:
        mask = torch.ones(len(part), dtype=torch.bool)
        mask[torch.argsort(part, stable=True)[: round(removed * len(part) / len(every))]] = False
        masks.append(mask)
    return torch.cat(masks)


def _candidates(gradients: Tensor, gram: Tensor, weights: Tensor, keep: Tensor, chosen: Tensor) -> Iterator[Tensor]:
    """The weights after the cut alone, then after the joint update at each damping."""
    yield torch.where(chosen, weights, 0.0)
    scale = float(gram.diagonal().sum()) / gradients.numel()
    if scale <= 0:
        return
    update = joint_update(gradients, weights[keep], chosen[keep], gram=gram)
    for change in update.solve_each([damping * scale for damping in DAMPINGS], refinements=1):
        moved = weights.clone()
        moved[keep] += change
        yield torch.where(chosen, moved, 0.0)
