"""OBS pruning by M-FAC: remove the weights that the loss misses least, and move the others to make up for them.

In rounds of growing sparsity: per-sample gradients at the current weights, saliencies ``w^2 / (2 [F^-1]_ii)`` of the
damped Fisher matrix ``F``, of blocks ``Q`` of weights ``w_Q^T ([F^-1]_QQ)^-1 w_Q / 2``, a mask, and the exact joint
update of the survivors. The update's damping is the one that leaves the outputs nearest to the dense network's on the
calibration data, and no update is made where none helps. ``F`` is one matrix, or of blocks on its diagonal.
Source: Frantar, Kurtic, Alistarh 2021, M-FAC (arXiv:2107.03356); Hassibi and Stork 1993, Optimal Brain Surgeon.
Cost: a round takes a pass with per-sample gradients, two products of m^2 d (of m B d in blocks of B), and seven forward
passes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..apply import masks_of, with_values
from ..budget import Budget
from ..context import Context
from ..curvature.network import Network, open_network, predict
from ..curvature.sample_gradients import sample_gradients
from ..graph.trace import Graph, Layer
from ..model import Source
from ..numerics.gradient_scale import Clipping, clipped, scale_rows
from ..numerics.mfac import Gradients, squared_norms
from ..numerics.units import Units, masks_of_most
from ..pattern import parse_pattern
from ..plan import Plan
from ..saliencies import Saliencies, saliency_histogram
from ..sensitivity import Sensitivity
from ..task import Calibration, divergence, has_logits
from .fisher import Fisher, fisher_of, unit_saliencies, updates
from .masks import Masks, cut_layers, mask_plan, recorded_options, searched_sparsities, units_of, whole_plan
from .removal import Removal, remaining, removal_for

NAME = "obs"
MANY_LEFT = 0.6  # of the weights: while more are left, every second example has a gradient
FEW_LEFT = 0.8  # over the share of the weights that is left: gradients of an example
MOST_DRAWS = 4
Dampings = tuple[float, ...]
DENSE = "obs at the dense weights"  # in the memo of a job
SALIENCY = "w^2 / (2 [F^-1]_ii), the rise of the loss: in the round in which a weight went, or in the last"
DAMPINGS: Dampings = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # of the mean curvature
LEAST_ROWS = 256  # calibration examples: of fewer, all have gradients from the first round on
NEIGHBOURS = 1  # dampings on each side of a round's best that the next round tries
SEARCH_SHARE = 2  # of the calibration examples, one in so many picks the damping; in the last round, all do
STEP = 1e-2  # of the whole move, to both sides, for its derivative
CLIPPED = "gradients were clipped"
RECORDED = ("rounds", "fisher", "fisher_batch", "clip_gradients", "block_size")
Costs = dict[str, Tensor]  # of a weight of each unit, by tensor [b, n]
Choose = Callable[[Costs], Masks]


@dataclass(frozen=True, slots=True)
class _Surgery:
    """A network on the table.

    Attributes:
        network: Its weights change from round to round.
        start: Its weights before the first, ``[d]``.
        dense: Its outputs before the first.
        units: What goes together, by tensor in the network's order.
        protected: Weights that stay, ``[d]``.
        options: As recorded in the plan.
    """

    source: Source
    graph: Graph
    network: Network
    calibration: Calibration
    start: Tensor
    dense: Tensor
    units: Mapping[str, Units]
    protected: Tensor
    options: Mapping[str, Any]
    context: Context


@dataclass(frozen=True, slots=True)
class _Cut:
    """What is left of a network after some rounds.

    Attributes:
        keep: The survivors, ``[d]``.
        ranked: Saliency of a weight of each unit in the last round that the unit began.
        clipping: Of the last round's gradients; None where none was asked for.
    """

    keep: Tensor
    ranked: Costs
    clipping: Clipping | None = None


@dataclass(frozen=True, slots=True)
class _Curvature:
    """Of the network as it is.

    Attributes:
        fisher: Of the weights that are left.
        costs: Saliencies, as for ``_costs``.
        generator: Its state after them.
        clipping: Of the gradients.
    """

    fisher: Fisher
    costs: Costs
    generator: Tensor
    clipping: Clipping | None = None


def plan(
    source: Source,
    graph: Graph,
    sensitivities: Mapping[str, Sensitivity],
    calibration: Calibration,
    budget: Budget | None,
    options: Mapping[str, Any],
    context: Context,
) -> tuple[Plan, dict[str, Tensor]]:
    """Choose the weights to zero, and new values for the others.

    Args:
        budget: ``sparsity``, ``bytes`` of the delivered file, or ``macs``; None means a sparsity of one half.
        options: ``rounds``, ``scope`` (``global`` or ``layer``), ``pattern`` (``pattern.FORMS``), ``exclude``
            (globs), ``fisher``, ``fisher_batch``, ``clip_gradients``, ``block_size``.

    Returns:
        The plan and its sidecar: packed masks and the survivors' values by tensor.

    Raises:
        BudgetError: More is to be removed than ``exclude`` or the pattern leaves.
        UsageError: Nothing to prune, or no pattern.
        DiskError: The gradients fit neither in ``context.memory`` nor on the disk.
    """
    recorded, rounds = recorded_options(options), int(options["rounds"])
    layers, pattern = cut_layers(source, graph, recorded, budget, context)
    units = units_of(layers, pattern)
    choosers: list[Choose]
    if pattern.quota is None:
        removal = removal_for(source, graph, layers, pattern, budget, recorded["scope"], context)
        if not removal.amount:
            return whole_plan(source, graph, layers, budget, NAME, _recorded(options))
        choosers = _shares(units, removal, rounds, recorded["scope"])
    else:
        choosers = _groups(units, *pattern.quota, rounds)
    surgery = _open(source, graph, layers, units, calibration, options, context)
    *_, cut = _rounds(surgery, choosers)
    return _finished(surgery, cut, budget)


def candidates(
    source: Source,
    graph: Graph,
    sensitivities: Mapping[str, Sensitivity],
    calibration: Calibration,
    options: Mapping[str, Any],
    context: Context,
) -> Iterator[tuple[Plan, dict[str, Tensor]]]:
    """Plans of growing sparsity, a round each, as long as they are asked for."""
    recorded = recorded_options(options)
    layers, pattern = cut_layers(source, graph, recorded, None, context)
    units = units_of(layers, pattern)
    surgery = _open(source, graph, layers, units, calibration, options, context)
    d = surgery.network.num_weights
    removals = [Removal(round(sparsity * d), d) for sparsity in searched_sparsities()]
    choosers = [_chooser(units, removal, recorded["scope"]) for removal in removals]
    for cut in _rounds(surgery, choosers, share=1):
        yield _finished(surgery, cut, None)


def refit(
    given: Plan,
    sidecar: Mapping[str, Tensor],
    source: Source,
    graph: Graph,
    calibration: Calibration,
    context: Context,
) -> tuple[Plan, dict[str, Tensor]]:
    """The masks of a plan on another checkpoint of the architecture: the survivors' values are computed anew.

    Args:
        sidecar: The plan's, with its masks.

    Raises:
        InputError: The plan is for another architecture.
    """
    masks = masks_of(given, sidecar, source.module.state_dict())
    layers = tuple(layer for layer in graph.layers if layer.tensor in masks)
    protected = torch.cat([masks[layer.tensor].flatten() for layer in layers])
    if protected.all():
        return whole_plan(source, graph, layers, given.budget, NAME, given.options)
    # What isn't protected goes, in the order of its saliency: the mask is the plan's in the end.
    units = units_of(layers, replace(parse_pattern(recorded_options(given.options)["pattern"]), quota=None))
    surgery = replace(_open(source, graph, layers, units, calibration, given.options, context), protected=protected)
    removal = Removal(int((~protected).sum()), len(protected))
    choosers = _shares(units, removal, int(given.options["rounds"]), "global")
    *_, cut = _rounds(surgery, choosers)
    return _finished(surgery, cut, given.budget)


def _shares(units: Mapping[str, Units], removal: Removal, rounds: int, scope: str) -> list[Choose]:
    """An exponential schedule: each round leaves the same share of what is left."""
    left = [(1 - removal.share) ** (number / rounds) for number in range(1, rounds + 1)]
    amounts = [round((1 - share) * removal.whole) for share in left]
    return [_chooser(units, replace(removal, amount=amount), scope) for amount in amounts]


def _chooser(units: Mapping[str, Units], removal: Removal, scope: str) -> Choose:
    """Removes the least salient units, of the network or of each layer."""
    return lambda costs: remaining(units, costs, removal, scope)


def _groups(units: Mapping[str, Units], n: int, m: int, rounds: int) -> list[Choose]:
    """Ever fewer weights of each m, down to n, where the rounds are enough one by one."""
    counts = sorted(
        {max(n, round(m - (m - n) * number / rounds)) for number in range(1, rounds + 1)} - {m}, reverse=True
    )

    def chooser(kept: int) -> Choose:
        return lambda costs: masks_of_most(units, costs, kept)

    return [chooser(kept) for kept in counts]


def _open(
    source: Source,
    graph: Graph,
    layers: Sequence[Layer],
    units: Mapping[str, Units],
    calibration: Calibration,
    options: Mapping[str, Any],
    context: Context,
) -> _Surgery:
    network = open_network(graph, layers=tuple(layers), device=context.device)
    dense = predict(network, calibration.data)
    protected = torch.zeros(network.num_weights, dtype=torch.bool)
    start = network.flat().cpu()
    return _Surgery(source, graph, network, calibration, start, dense, units, protected, _recorded(options), context)


def _recorded(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: options.get(name) for name in RECORDED} | recorded_options(options)


def _finished(surgery: _Surgery, cut: _Cut, budget: Budget | None) -> tuple[Plan, dict[str, Tensor]]:
    """The plan of the network as it is now."""
    network = surgery.network
    masks = network.split(cut.keep)
    if not surgery.protected.any():  # a mask that was given is chosen by no saliency
        surgery.context.saliencies.append(_histogram(surgery.units, masks, cut.ranked))
    decided, sidecar = mask_plan(surgery.source, surgery.graph, masks, budget, NAME, surgery.options)
    values = {name: network.weights[name].detach().cpu() for name in masks}
    decided, sidecar = with_values(decided, sidecar, values, masks)
    figures = {**decided.predicted, "loss": _expected_loss(surgery)}
    if cut.clipping is not None:
        figures |= {f"clipped_{name}": float(value) for name, value in asdict(cut.clipping).items()}
        notes = surgery.context.notes
        notes[:] = [note for note in notes if not note.startswith(CLIPPED)]  # of the candidate before
        notes.append(
            f"{CLIPPED}: in the last round {cut.clipping.rows} of them, at the norm "
            f"{cut.clipping.norm:.3g}, which took {cut.clipping.share:.0%} of the Fisher matrix's trace"
        )
    task_sha256 = surgery.calibration.sha256()
    return replace(decided, task_sha256=task_sha256, predicted=figures), sidecar


def _histogram(units: Mapping[str, Units], masks: Masks, ranked: Costs) -> Saliencies:
    """Of the units, by what they cost when they were looked at last."""
    kept = torch.cat([own.blocks(masks[tensor]).any(3).any(2).flatten() for tensor, own in units.items()])
    costs = torch.cat([ranked[tensor].flatten() for tensor in units])
    name = next(iter(units.values())).pattern.units
    return saliency_histogram(costs, kept, what=SALIENCY, unit="loss", of=name)


def _expected_loss(surgery: _Surgery) -> float:
    """``dw^T H dw / 2`` of the whole move ``dw`` from the dense weights, with their Gauss-Newton matrix ``H``.

    The outputs' derivative along ``dw`` is a central difference; the divergence of a small step of it is quadratic.
    """
    network, data = surgery.network, surgery.calibration.data
    end, sides = network.flat().cpu(), []
    for step in (STEP, -STEP):
        network.set_flat(surgery.start + step * (end - surgery.start))
        sides.append(predict(network, data).double())
    network.set_flat(end)
    dense = surgery.dense.double()
    moved = divergence(dense, dense + (sides[0] - sides[1]) / 2, are_logits=has_logits(surgery.calibration.task))
    return max(moved, 0.0) / STEP**2  # rounding may put a divergence of zero below it


def _rounds(surgery: _Surgery, choosers: Sequence[Choose], *, share: int = SEARCH_SHARE) -> Iterator[_Cut]:
    """What is left after each round; all but the last search their damping on one example in ``share``."""
    keep, dampings = torch.ones(surgery.network.num_weights, dtype=torch.bool), DAMPINGS
    clipping: Clipping | None = None
    ranked = {tensor: torch.zeros(own.sizes().shape, dtype=torch.float64) for tensor, own in surgery.units.items()}
    for number, choose in enumerate(choosers, start=1):
        if keep.any():
            step = 1 if number == len(choosers) else share
            found = _dense_curvature(surgery, keep) if number == 1 else _curvature(surgery, keep)
            ranked = {
                tensor: torch.where(found.costs[tensor] < 0, ranked[tensor], found.costs[tensor]) for tensor in ranked
            }
            keep, dampings = _round(surgery, keep, found, choose, dampings, step)
            clipping = found.clipping
            del found  # the next round's gradients take as much again
        yield _Cut(keep, ranked, clipping)


def _dense_curvature(surgery: _Surgery, keep: Tensor) -> _Curvature:
    """That of the first round, which is the same for each point of a sweep: measured once, and kept."""
    memo, generator = surgery.context.memo, surgery.context.generator
    if surgery.context.is_swept and DENSE in memo:
        found: _Curvature = memo[DENSE]
        generator.set_state(found.generator)  # as if they had been drawn
        return found
    found = _curvature(surgery, keep)
    if surgery.context.is_swept:
        memo[DENSE] = found
    return found


def _curvature(surgery: _Surgery, keep: Tensor) -> _Curvature:
    """Gradients of the weights that are left, and all saliencies."""
    network, data, task = surgery.network, surgery.calibration.data, surgery.calibration.task
    stride, draws = _num_gradients(surgery, keep)
    gradients = sample_gradients(
        network,
        task,
        data,
        mode=str(surgery.options["fisher"]),
        generator=surgery.context.generator,
        progress=surgery.context.progress,
        keep=keep,
        draws=draws,
        group=_batch(surgery),
        step=stride,
        memory=_memory_left(surgery),
    )
    surgery.context.progress("saliencies and update", 0, None)
    clipping = _weigh(surgery, gradients, len(data.every(stride)), draws)
    fisher = fisher_of(gradients, surgery.options["block_size"] or None)
    costs = _costs(surgery, fisher, network.flat().cpu(), keep)
    return _Curvature(fisher, costs, surgery.context.generator.get_state(), clipping)


def _batch(surgery: _Surgery) -> int:
    return int(surgery.options["fisher_batch"] or 1)


def _weigh(surgery: _Surgery, gradients: Gradients, n: int, draws: int) -> Clipping | None:
    """Scale the gradients to count for as much as they are to; what was clipped of them.

    A sum over b examples is divided by the root of b: independent draws then give the same matrix in the mean as single
    examples do.
    """
    size, quantile = _batch(surgery), surgery.options["clip_gradients"]
    if size > 1:
        sizes = torch.tensor([min(size, n - start) for start in range(0, n, size)], dtype=torch.float64)
        scale_rows(gradients, sizes.repeat_interleave(draws).rsqrt())
    if quantile is None or float(quantile) == 1:
        return None
    factors, clipping = clipped(squared_norms(gradients), float(quantile))
    scale_rows(gradients, factors)
    return clipping


def _memory_left(surgery: _Surgery) -> int:
    """Bytes that gradients may take, less those that are kept for the points of a sweep."""
    kept: _Curvature | None = surgery.context.memo.get(DENSE)
    if kept is None or not isinstance(kept.fisher.gradients, Tensor):
        return surgery.context.memory
    return surgery.context.memory - kept.fisher.gradients.nbytes


def _round(
    surgery: _Surgery, keep: Tensor, found: _Curvature, choose: Choose, dampings: Dampings, step: int
) -> tuple[Tensor, Dampings]:
    """Remove weights and update the others in place.

    Args:
        found: At the weights as they are.
        dampings: Of which the best is searched, on every ``step``-th example.

    Returns:
        The new mask ``[d]``, and the dampings to try in the next round.
    """
    network, data, task = surgery.network, surgery.calibration.data, surgery.calibration.task
    searched, reference = data.every(step), surgery.dense[::step]
    weights = network.flat().cpu()
    masks = choose(found.costs)
    chosen = torch.cat([masks[tensor].flatten() for tensor in surgery.units])
    best, least, used = torch.where(chosen, weights, 0.0), float("inf"), None
    for damping, candidate in _candidates(found.fisher, weights, keep, chosen, dampings):
        network.set_flat(candidate)
        moved = divergence(reference, predict(network, searched), are_logits=has_logits(task))
        if moved < least:
            best, least, used = candidate, moved, damping
    network.set_flat(best)
    return chosen, _near(used)


def _num_gradients(surgery: _Surgery, keep: Tensor) -> tuple[int, int]:
    """One example in how many has gradients, and how many: more of them as fewer weights are left.

    What is cut late costs most, and early cuts need few. Labels give one gradient, and k outputs no more than k that
    differ. With blocks there are as many as a block has weights at least, where that can be; but for that, all of them
    never take more memory than one an example and weight.
    """
    n, density = len(surgery.calibration.data), int(keep.sum()) / keep.numel()
    most = 1 if surgery.options["fisher"] == "labels" else min(MOST_DRAWS, surgery.dense[0].numel())
    wanted = (surgery.options["block_size"] or 0) * _batch(surgery) / n  # of each example
    wanted = wanted if wanted <= most else 0
    if density > MANY_LEFT and n > LEAST_ROWS and wanted <= 1 / 2:
        return 2, 1
    return 1, max(1, min(most, int(FEW_LEFT / density)), math.ceil(wanted))


def _near(damping: float | None) -> Dampings:
    """The best damping and its neighbours; all of them where none was better than the bare cut."""
    if damping is None:
        return DAMPINGS
    place = DAMPINGS.index(damping)
    return DAMPINGS[max(0, place - NEIGHBOURS) : place + NEIGHBOURS + 1]


def _costs(surgery: _Surgery, fisher: Fisher, weights: Tensor, keep: Tensor) -> Costs:
    """What each unit costs for each of its weights: below zero where it is gone, infinite where it is protected."""
    places = _places(surgery, keep)
    counts = {tensor: own.sizes() for tensor, own in surgery.units.items()}
    sizes, is_there = torch.cat([own.flatten() for own in counts.values()]), places[:, 0] >= 0
    costs = torch.full((len(places),), -1.0, dtype=torch.float64)
    costs[is_there] = unit_saliencies(fisher, weights[keep], places[is_there]) / sizes[is_there]
    is_protected = torch.where(places < 0, False, surgery.protected[keep][places]).any(1)
    costs[is_protected] = float("inf")
    parts = torch.split(costs, [own.numel() for own in counts.values()])
    return {tensor: part.reshape(own.shape) for (tensor, own), part in zip(counts.items(), parts, strict=True)}


def _places(surgery: _Surgery, keep: Tensor) -> Tensor:
    """Of each unit, which of the weights that are left it has, int64 ``[u, s]``; -1 where it has fewer, or is gone."""
    numbers = surgery.network.split(torch.where(keep, keep.cumsum(0) - 1, -1))
    parts = [own.blocks(numbers[tensor], -1).flatten(0, 1).flatten(1) for tensor, own in surgery.units.items()]
    most = max(part.shape[1] for part in parts)
    return torch.cat([torch.nn.functional.pad(part, (0, most - part.shape[1]), value=-1) for part in parts])


def _candidates(
    fisher: Fisher, weights: Tensor, keep: Tensor, chosen: Tensor, dampings: Dampings
) -> Iterator[tuple[float | None, Tensor]]:
    """The weights after the cut alone (None), then after the joint update at each damping."""
    yield None, torch.where(chosen, weights, 0.0)
    if fisher.mean <= 0:
        return
    changes = updates(fisher, weights[keep], chosen[keep], dampings)
    for damping, change in zip(dampings, changes, strict=True):
        moved = weights.clone()
        moved[keep] += change
        yield damping, torch.where(chosen, moved, 0.0)
