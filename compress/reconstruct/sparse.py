"""Layers pruned one after another, each so that it gives what the dense network gives, on the inputs that it now gets.

Two networks run side by side. When a layer is reached, it is fitted to what it should give by least squares, from the
inputs that the layers before it now make; positions count by how much the network's outputs react to them. Then its
weights go, row by row or in blocks, in the order of what that does to its outputs; which row loses how many follows
from how much the network's outputs react to each of them. The survivors are solved for anew, and the mean that is still
missing goes into the layer's bias, or its batch norm's.
Source: Frantar and Alistarh 2023, SparseGPT (arXiv:2301.00774), for layers one by one; He et al. 2017
(arXiv:1707.06168), for the fit to the dense outputs. Cost: two forward passes, ``k^2`` products a position for a layer
of k inputs, and those of ``numerics.elimination``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, fx

from ..context import Progress
from ..curvature.moments import LARGEST_MOMENT
from ..curvature.row_traces import OutputGradients
from ..graph.rewrite import on_device, tensor_at, unlift
from ..graph.trace import Graph, Layer
from ..numerics.elimination import Elimination, eliminate, fit_survivors
from ..numerics.units import Units, cheapest
from ..pattern import Pattern
from .layer_moments import Moments, Place, add_offset, layer_places, moments_of
from .side_by_side import SideBySide, walk

EVEN = 0.05  # of the mean position: what each counts at least


@dataclass(frozen=True, slots=True)
class Cut:
    """What a layer loses: so many weights, or those beyond a mask.

    Attributes:
        removed: Weights that go.
        mask: bool, of the weight's shape: those that stay; None where it is to be found.
    """

    removed: int
    mask: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Fitted:
    """What came of it, by state-dict key: masks, whole weights, and the biases that make up for them."""

    masks: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
    biases: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Rows:
    """A layer's rows as they are pruned, in float64.

    Attributes:
        weight: ``[r, k]``, nearest to the wanted outputs.
        moment: ``[g, k, k]``, one for each group of outputs.
        units: What goes together.
        importance: How much the network's outputs react to each row's, ``[r]``.
        moments: That they come from.
        zeros: bool ``[r, k]``: weights that were zero before; they cost nothing, and stay zero.
    """

    weight: Tensor
    moment: Tensor
    units: Units
    importance: Tensor
    moments: Moments
    zeros: Tensor

    def eliminated(self, steps: int) -> Elimination:
        """The order in which the units of each band go, and what that costs the network's outputs."""
        unit = self.moment.diagonal(dim1=-2, dim2=-1).mean(-1)  # squares of small inputs are no floats
        per_row = unit.repeat_interleave(len(self.weight) // len(unit))
        counts = _in_bands(self.importance * per_row, self.units.rows)
        mean = counts.mean(1, keepdim=True)
        shares = torch.where(mean > 0, counts / mean, 1.0).sqrt().flatten()[: len(self.weight), None]
        moment = (self.moment / unit[:, None, None]).float()
        found = eliminate((self.weight * shares).float(), moment, steps, units=self.units)
        return replace(found, costs=found.costs.double() * mean)


def _in_bands(values: Tensor, rows: int) -> Tensor:
    """Values ``[r]`` of rows as ``[b, rows]``, with zeros for those that the last band lacks."""
    return torch.nn.functional.pad(values, (0, -len(values) % rows)).reshape(-1, rows)


def prunable_layers(graph: Graph) -> dict[str, Layer]:
    """The layers that can be pruned so, by tensor: nothing else reads their weight, and they aren't transposed."""
    places = layer_places(graph, unlift(graph.program, graph.tied)).values()
    layers = (place.layer for place in places)
    return {
        layer.tensor: layer
        for layer in layers
        if layer.axis == 0 and layer.elements // layer.shape[0] <= LARGEST_MOMENT
    }


def removal_costs(
    graph: Graph,
    reactions: OutputGradients,
    units: Mapping[str, Units],
    inputs: tuple[Tensor, ...],
    *,
    device: torch.device,
    progress: Progress,
) -> dict[str, tuple[Tensor, Tensor]]:
    """What each removal costs in each band of the dense network, in the order in which they come.

    Args:
        reactions: Of the network's outputs to each row and position, on these inputs.
        units: Of the layers that are looked at, by tensor.

    Returns:
        By tensor: what it costs for each of the weights that go, ``[b, n]``, and how many those are, ``[b, n]``.
    """
    dense = on_device(unlift(graph.program, graph.tied), device)
    pair = SideBySide(dense, on_device(unlift(graph.program, graph.tied), device))
    places, found = layer_places(graph, pair.module), {}

    def visit(node: fx.Node) -> None:
        place = places.get(node)
        if place is not None and place.layer.tensor in units:
            own = units[place.layer.tensor]
            done = _rows_of(pair, place, reactions, own).eliminated(own.sizes().shape[1])
            found[place.layer.tensor] = done.costs.cpu(), done.sizes.cpu()

    walk(pair, inputs, visit, progress=progress, what="what weights cost")
    return found


def prune_layers(
    graph: Graph,
    cuts: Mapping[str, Cut],
    reactions: OutputGradients,
    inputs: tuple[Tensor, ...],
    *,
    pattern: Pattern,
    device: torch.device,
    progress: Progress,
) -> Fitted:
    """Prune weights in the order of execution.

    Args:
        cuts: By tensor; what loses nothing is fitted, where its inputs aren't the dense ones. Of layers that aren't
            among ``prunable_layers``, with a mask: it is applied before all else.
        reactions: As for ``removal_costs``.
        inputs: Calibration examples ``[n, ...]``.
        pattern: In which weights go.
    """
    dense = on_device(unlift(graph.program, graph.tied), device)
    pair = SideBySide(dense, on_device(unlift(graph.program, graph.tied), device))
    places, found, fitted = layer_places(graph, pair.module), Fitted(), prunable_layers(graph)
    for stored in pair.module.graph.nodes:
        cut = cuts.get(str(stored.target)) if stored.op == "get_attr" and str(stored.target) not in fitted else None
        if cut is not None and cut.mask is not None:
            weight = tensor_at(pair.module, str(stored.target))
            pair.put(stored, torch.where(cut.mask.to(weight.device), weight, 0.0))
            found.masks[str(stored.target)] = cut.mask

    def visit(node: fx.Node) -> None:
        place = places.get(node)
        if place is None or place.layer.tensor not in cuts or place.layer.tensor not in fitted:
            return
        tensor, cut, weight = place.layer.tensor, cuts[place.layer.tensor], pair.after[place.weight]
        x_node = place.node.args[0]
        assert isinstance(x_node, fx.Node)
        if cut.removed == 0 and torch.equal(pair.before[x_node], pair.after[x_node]):
            found.masks[tensor] = torch.ones(weight.shape, dtype=torch.bool)
            return
        rows = _rows_of(pair, place, reactions, Units(place.layer.shape, 0, 1, pattern))
        kept = _kept(rows, cut).to(weight.device).reshape(rows.weight.shape)
        if cut.mask is None:
            kept &= ~rows.zeros
        fresh, mask = (values.reshape(weight.shape) for values in (fit_survivors(rows.weight, rows.moment, kept), kept))
        pair.put(place.weight, fresh)
        found.masks[tensor], found.weights[tensor] = mask.cpu(), pair.after[place.weight].cpu()
        if place.bias is not None:
            offset = rows.moments.offset(pair.after[place.weight].reshape(*rows.moments.mean_y.shape, -1))
            found.biases[str(place.bias.target)] = add_offset(pair, place, offset)

    walk(pair, inputs, visit, progress=progress, what="prune the layers")
    return found


def _kept(rows: _Rows, cut: Cut) -> Tensor:
    """What a layer keeps, bool of its weight's shape: what was decided, or all but the cheapest units of its bands."""
    units, quota = rows.units, rows.units.pattern.quota
    if cut.mask is not None:
        return cut.mask
    bands, n = units.sizes().shape
    if cut.removed == 0:
        return torch.ones(units.shape, dtype=torch.bool)
    if quota is not None:
        steps = n // quota[1] * (quota[1] - quota[0])
        return units.spread(rows.eliminated(steps).place >= steps)
    done = rows.eliminated(n)
    first = cheapest(done.costs.flatten(), done.sizes.flatten(), cut.removed)
    return units.spread(done.kept(torch.bincount(first // n, minlength=bands)))


def _rows_of(pair: SideBySide, place: Place, reactions: OutputGradients, units: Units) -> _Rows:
    """A layer's rows, fitted."""
    moments = moments_of(pair, place, _counts(pair, place, reactions))
    assert moments is not None, "of prunable layers there are moments"
    weight = pair.after[place.weight]
    (groups, c), k = moments.mean_y.shape, moments.mean_x.shape[1]
    fitted, damped = moments.fitted(weight.reshape(groups, c, k).double())
    moment = moments.positive(damped, place.layer.tensor)
    rows, zeros = (values.reshape(groups * c, k) for values in (fitted, weight == 0))
    if bool(zeros.any()):
        rows = fit_survivors(rows, moment, ~zeros)
    importance = reactions.channels[place.layer.tensor].to(rows)
    return _Rows(rows, moment, units, importance, moments, zeros)


def _counts(pair: SideBySide, place: Place, reactions: OutputGradients) -> Tensor | None:
    """What each position of a layer counts: how much the network's outputs react to it, and a little of all alike."""
    found = reactions.positions.get(place.layer.tensor)
    mean = 0.0 if found is None else float(found.mean(dtype=torch.float64))
    if found is None or mean == 0.0:
        return None
    counts = found / mean + EVEN
    return counts.to(pair.after[place.weight])
