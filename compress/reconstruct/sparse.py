"""Layers pruned one after another, each so that it gives what the dense network gives, on the inputs that it now gets.

Two networks run side by side. When a layer is reached, it is fitted to what it should give by least squares, from the
inputs that the layers before it now make; positions count by how much the network's outputs react to them. Then its
weights go, row by row, in the order of what that does to its outputs; which row loses how many follows from how much
the network's outputs react to each of them. The survivors are solved for anew, and the mean that is still missing goes
into the layer's bias, or its batch norm's.
Source: Frantar and Alistarh 2023, SparseGPT (arXiv:2301.00774), for layers one by one; He et al. 2017
(arXiv:1707.06168), for the fit to the dense outputs. Cost: two forward passes, ``k^2`` products a position for a layer
of k inputs, and those of ``numerics.elimination``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, fx

from ..context import Progress
from ..curvature.moments import LARGEST_MOMENT
from ..curvature.row_traces import OutputGradients
from ..errors import NumericsError
from ..graph.rewrite import on_device, tensor_at, unlift
from ..graph.trace import Graph, Layer
from ..numerics.elimination import Elimination, eliminate, fit_survivors
from .layer_moments import SMALLEST_RIDGE, Moments, Place, add_offset, layer_places, moments_of
from .side_by_side import SideBySide, walk

RIDGES = (0.0, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # of the mean squared input
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
        moment: ``[k, k]``, or ``[r, k, k]`` where groups have inputs of their own.
        order: int64 ``[k]``: columns of the layer's weight in the order of ``weight``.
        moments: That they come from.
        zeros: bool ``[r, k]``: weights that were zero before; they cost nothing, and stay zero.
    """

    weight: Tensor
    moment: Tensor
    order: Tensor
    moments: Moments
    zeros: Tensor

    def back(self, rows: Tensor, shape: torch.Size) -> Tensor:
        """Values ``[r, k]`` in the weight's own shape."""
        return torch.empty_like(rows).scatter_(1, self.order.expand_as(rows), rows).reshape(shape)

    def eliminated(self, steps: int, pattern: tuple[int, int] | None) -> Elimination:
        unit = self.moment.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None]  # squares of small inputs are no floats
        found = eliminate(self.weight.float(), (self.moment / unit[..., None]).float(), steps, pattern=pattern)
        return replace(found, costs=found.costs.double() * unit)


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
    tensors: Collection[str],
    inputs: tuple[Tensor, ...],
    *,
    device: torch.device,
    progress: Progress,
) -> dict[str, Tensor]:
    """What each removal costs in each row of the dense network, ``[r, k]`` in the order in which they come.

    Args:
        reactions: Of the network's outputs to each row and position, on these inputs.
        tensors: Of the layers that are looked at.
    """
    dense = on_device(unlift(graph.program, graph.tied), device)
    pair = SideBySide(dense, on_device(unlift(graph.program, graph.tied), device))
    places, found = layer_places(graph, pair.module), {}

    def visit(node: fx.Node) -> None:
        place = places.get(node)
        if place is not None and place.layer.tensor in tensors:
            rows = _rows_of(pair, place, reactions, None)
            costs = rows.eliminated(rows.weight.shape[1], None).costs.cpu()
            found[place.layer.tensor] = costs * reactions.channels[place.layer.tensor][:, None]

    walk(pair, inputs, visit, progress=progress, what="what weights cost")
    return found


def prune_layers(
    graph: Graph,
    cuts: Mapping[str, Cut],
    reactions: OutputGradients,
    inputs: tuple[Tensor, ...],
    *,
    pattern: tuple[int, int] | None = None,
    device: torch.device,
    progress: Progress,
) -> Fitted:
    """Prune weights in the order of execution.

    Args:
        cuts: By tensor; what loses nothing is fitted, where its inputs aren't the dense ones. Of layers that aren't
            among ``prunable_layers``, with a mask: it is applied before all else.
        reactions: As for ``removal_costs``.
        inputs: Calibration examples ``[n, ...]``.
        pattern: ``n`` and ``m``: of ``m`` neighbours along the inputs, ``n`` stay in each layer that loses any.
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
        rows = _rows_of(pair, place, reactions, pattern)
        if cut.mask is not None:
            kept = cut.mask.to(weight.device).flatten(1)[:, rows.order]
        elif pattern is not None:
            steps = cut.removed // len(rows.weight)
            kept = (rows.eliminated(steps, pattern).place >= steps) & ~rows.zeros
        elif cut.removed == 0:
            kept = ~rows.zeros
        else:
            kept = _kept(rows, cut.removed, reactions.channels[tensor].to(weight.device)) & ~rows.zeros
        solved = fit_survivors(rows.weight, rows.moment, kept)
        fresh, mask = rows.back(solved, weight.shape), rows.back(kept, weight.shape)
        pair.put(place.weight, fresh)
        found.masks[tensor], found.weights[tensor] = mask.cpu(), pair.after[place.weight].cpu()
        if place.bias is not None:
            offset = rows.moments.offset(pair.after[place.weight].reshape(*rows.moments.mean_y.shape, -1))
            found.biases[str(place.bias.target)] = add_offset(pair, place, offset)

    walk(pair, inputs, visit, progress=progress, what="prune the layers")
    return found


def _kept(rows: _Rows, removed: int, importance: Tensor) -> Tensor:
    """bool ``[r, k]``: what is left where the cheapest of all rows go first."""
    r, k = rows.weight.shape
    elimination = rows.eliminated(k, None)
    costs = elimination.costs * importance[:, None].to(elimination.costs)
    first = costs.flatten().argsort(stable=True)[:removed]
    return elimination.kept(torch.bincount(first // k, minlength=r))


def _rows_of(pair: SideBySide, place: Place, reactions: OutputGradients, pattern: tuple[int, int] | None) -> _Rows:
    """A layer's rows, fitted; with a pattern, its columns in the order in which ``m`` neighbours are inputs."""
    moments = moments_of(pair, place, _counts(pair, place, reactions))
    assert moments is not None, "of prunable layers there are moments"
    weight = pair.after[place.weight]
    (groups, c), k = moments.mean_y.shape, moments.mean_x.shape[1]
    fitted, damped = moments.fitted(weight.reshape(groups, c, k).double())
    damped = _positive(damped, moments.power, place)
    order = torch.arange(k, device=weight.device)
    if pattern is not None:
        order = order.reshape(weight.shape[1], -1).T.flatten()
    moment = damped[:, order][:, :, order]
    rows, zeros = (values.reshape(groups * c, k)[:, order] for values in (fitted, weight == 0))
    moment = moment[0] if groups == 1 else moment.repeat_interleave(c, 0)
    if bool(zeros.any()):
        rows = fit_survivors(rows, moment, ~zeros)
    return _Rows(rows, moment, order, moments, zeros)


def _counts(pair: SideBySide, place: Place, reactions: OutputGradients) -> Tensor | None:
    """What each position of a layer counts: how much the network's outputs react to it, and a little of all alike."""
    found = reactions.positions.get(place.layer.tensor)
    mean = 0.0 if found is None else float(found.mean(dtype=torch.float64))
    if found is None or mean == 0.0:
        return None
    counts = found / mean + EVEN
    return counts.to(pair.after[place.weight])


def _positive(moment: Tensor, power: Tensor, place: Place) -> Tensor:
    """Moments ``[g, k, k]`` with the least ridge at which they are positive definite in floats.

    Of inputs that are all but constant, the differences of float32 sums are left, of any sign.
    """
    if not bool(torch.isfinite(moment).all()):
        raise NumericsError(f"the inputs of {place.layer.tensor} aren't finite", hint="check the calibration data")
    eye = torch.eye(moment.shape[-1], dtype=moment.dtype, device=moment.device)
    for share in RIDGES:
        raised = moment + share * (power + SMALLEST_RIDGE) * eye
        unit = raised.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
        if not bool(torch.linalg.cholesky_ex((raised / unit).float()).info.any()) and bool((unit > 0).all()):
            return raised
    raise NumericsError(f"the inputs of {place.layer.tensor} leave nothing to solve", hint="pass --exclude for it")
