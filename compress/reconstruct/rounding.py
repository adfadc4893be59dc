"""Layers rounded one after another, each so that it gives what the dense network gives, on the inputs that it now gets.

Two networks run side by side. When a layer is reached, it is first fitted to what it should give by least squares, from
the inputs that the layers before it now make; then its rows are rounded by what that does to its outputs. The mean that
is still missing goes into its bias, or its batch norm's.
Source: Frantar et al. 2022, GPTQ (arXiv:2210.17323); the order and the fit are those of He et al. 2017
(arXiv:1707.06168). Cost: two forward passes, ``k^2`` products a position for a layer of k inputs, and the rounding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, fx

from ..context import Progress
from ..formats.packed import QuantizedTensor
from ..graph.rewrite import Grid, after_norms, on_device, rounded_to, split_reads, unlift
from ..graph.trace import Graph
from ..numerics.elimination import fit_survivors
from ..numerics.output_rounding import round_rows
from ..numerics.rounding import spread_scale
from ..widths import Width
from .layer_moments import Place, add_offset, layer_places, moments_of
from .side_by_side import SideBySide, walk


@dataclass(frozen=True, slots=True)
class Storage:
    """How a weight is stored.

    Attributes:
        bits: In the file.
        levels: Bits of the levels in use.
        group_size: Inputs of a row that share a scale; None where all do.
    """

    bits: Width
    levels: Width
    group_size: int | None = None


@dataclass(frozen=True, slots=True)
class Rounded:
    """What came of it, by state-dict key: weights, and the biases that make up for them."""

    weights: dict[str, QuantizedTensor] = field(default_factory=dict)
    biases: dict[str, Tensor] = field(default_factory=dict)


def round_layers(
    graph: Graph,
    grids: Mapping[str, Storage],
    others: Mapping[str, Tensor],
    activations: Mapping[str, Grid],
    inputs: tuple[Tensor, ...],
    *,
    device: torch.device,
    progress: Progress,
) -> Rounded:
    """Round weights in the order of execution.

    Args:
        grids: Of the weights to round. What is used in several places, transposed, or reads too many inputs for their
            moment is left out of the result.
        others: What those are, and any other tensors that aren't the dense network's.
        activations: Grids of the activations that are rounded, by name; layers are fitted to the inputs that they give.
        inputs: Calibration examples ``[n, ...]``.
    """
    dense, module = (on_device(split_reads(unlift(graph.program, graph.tied)), device) for _ in range(2))
    pair = SideBySide(dense, module)
    places = layer_places(graph, module)
    placed = {place.layer.tensor for place in places.values()}
    stored = {str(node.target): node for node in module.graph.nodes if node.op == "get_attr"}
    for name, value in others.items():
        if name in stored and (name not in grids or name not in placed):
            pair.put(stored[name], value)
    found = Rounded()

    def visit(node: fx.Node) -> None:
        place = places.get(node)
        if place is None or place.layer.tensor not in grids:
            return
        tensor = place.layer.tensor
        rounded, offset = _rounded(pair, place, grids[tensor])
        if rounded is None:
            if tensor in others:
                pair.put(place.weight, others[tensor])
            return
        found.weights[tensor] = rounded
        pair.put(place.weight, rounded.dequantize())
        if place.bias is not None:
            found.biases[str(place.bias.target)] = add_offset(pair, place, offset)

    names = {node.name: node for node in module.graph.nodes}
    rounds = {after_norms(names[name]): partial(rounded_to, grid=grid) for name, grid in activations.items()}
    walk(pair, inputs, visit, rounds=rounds, progress=progress, what="round the layers")
    return found


def _rounded(pair: SideBySide, place: Place, grid: Storage) -> tuple[QuantizedTensor | None, Tensor]:
    """The layer's weight, and what is missing of its outputs' means, ``[c]``; None where it can't be done."""
    weight, axis, nothing = pair.after[place.weight], place.layer.axis, torch.zeros(0)
    if axis not in (0, None):
        return None, nothing
    moments = moments_of(pair, place)
    if moments is None:
        return None, nothing
    start = weight.reshape(*moments.mean_y.shape, -1).double()
    fitted, damped = moments.fitted(start)
    zeros = start == 0
    masked = zeros if bool(zeros.any()) else None
    if masked is not None:  # a pruned weight stays pruned
        moment, kept = moments.positive(damped, place.layer.tensor), ~masked.flatten(0, 1)
        fitted = fit_survivors(fitted.flatten(0, 1), moment, kept).reshape(fitted.shape)
    size, is_shared = grid.group_size, axis is None
    levels, scales = round_rows(fitted, moments.gram, grid.levels, is_shared=is_shared, zeros=masked, group_size=size)
    flat = scales.flatten(0, 1)
    scale = flat[0] if is_shared else flat
    made = QuantizedTensor(levels.reshape(weight.shape).cpu(), grid.bits, scale.cpu().clone(), axis, size)
    step = scales[..., None] if size is None else spread_scale(scales[0], 0, weight.shape, size)
    return made, moments.offset(step.double() * levels.double())
