"""What a layer is fitted to: moments of the inputs that it now gets, and of what it should give.

Of two networks side by side, it reads the inputs of the changed one and the wanted outputs. Where the layer has a bias,
or a batch norm behind it has one, moments are taken around the means: the bias makes up for those afterwards.
Cost: ``k^2`` products a position for a layer of k inputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from ..curvature.moments import MAX_POSITIONS, channel_dim, read_positions, sampling_step
from ..errors import NumericsError
from ..graph.rewrite import bias_keys, operand, tensor_at
from ..graph.trace import WEIGHT_ARGUMENT, Graph, Layer, argument, aten
from .side_by_side import SideBySide, norm_after, wanted_output

FIT_DAMPING = 0.02  # of the mean squared input: what pulls the fit to the weights as they are
SMALLEST_RIDGE = torch.finfo(torch.float32).tiny
ROUNDING = 1e-5  # of the mean squared input: what float32 products leave of a variance that is none
RIDGES = (0.0, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # of the mean squared input
CHUNK = 2**16  # positions at a time


@dataclass(frozen=True, slots=True)
class Moments:
    """Of one layer, float64, for each of ``g`` groups of ``k`` inputs and ``c`` outputs.

    Attributes:
        gram: ``E[x x^T]`` ``[g, k, k]``, of the inputs around their means where the layer has an offset; positive
            definite.
        power: Mean square of an input, ``[g, 1, 1]``.
        cross: ``E[x y^T]`` ``[g, k, c]``, likewise, with the wanted outputs.
        mean_x: ``[g, k]``.
        mean_y: ``[g, c]``.
    """

    gram: Tensor
    power: Tensor
    cross: Tensor
    mean_x: Tensor
    mean_y: Tensor

    def fitted(self, start: Tensor) -> tuple[Tensor, Tensor]:
        """The rows ``[g, c, k]`` nearest to the wanted outputs, with a pull to ``start``, and the damped ``gram``.

        Of rows ``v``, ``(v - fitted) damped (v - fitted)^T`` is how much farther they are.
        """
        eye = torch.eye(self.gram.shape[-1], dtype=torch.float64, device=self.gram.device)
        ridge = FIT_DAMPING * self.gram.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] + SMALLEST_RIDGE
        damped = self.gram + ridge * eye
        pull = (ridge + ROUNDING * self.power) * start.transpose(1, 2)  # inputs that never change leave the weights
        rows: Tensor = torch.linalg.solve(damped, self.cross + pull).transpose(1, 2)
        return rows, damped

    def positive(self, damped: Tensor, tensor: str) -> Tensor:
        """What ``fitted`` gives, with the least ridge at which it is positive definite in floats.

        Of inputs that are all but constant, the differences of float32 sums are left, of any sign.

        Args:
            tensor: The layer's, for what is said of it.

        Raises:
            NumericsError: Inputs aren't finite, or there is no such ridge.
        """
        if not bool(torch.isfinite(damped).all()):
            raise NumericsError(f"the inputs of {tensor} aren't finite", hint="check the calibration data")
        eye = torch.eye(damped.shape[-1], dtype=damped.dtype, device=damped.device)
        for share in RIDGES:
            raised = damped + share * (self.power + SMALLEST_RIDGE) * eye
            unit = raised.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
            if not bool(torch.linalg.cholesky_ex((raised / unit).float()).info.any()) and bool((unit > 0).all()):
                return raised
        raise NumericsError(f"the inputs of {tensor} leave nothing to solve", hint="pass --exclude for it")

    def offset(self, rows: Tensor) -> Tensor:
        """What is missing of the outputs' means with rows ``[g, c, k]``, ``[g c]``."""
        given = (rows.double() @ self.mean_x[:, :, None])[..., 0]
        return (self.mean_y - given).reshape(-1)


@dataclass(frozen=True, slots=True)
class Place:
    """A layer whose weight nothing else reads.

    Attributes:
        node: That multiplies.
        weight: Its weight's node.
        bias: Of the tensor that adds a constant to each of its channels: its bias, or its batch norm's; None where
            there is none of its own.
    """

    layer: Layer
    node: fx.Node
    weight: fx.Node
    bias: fx.Node | None


def layer_places(graph: Graph, module: fx.GraphModule) -> dict[fx.Node, Place]:
    """The layers of a network, by node."""
    layers = {layer.tensor: layer for layer in graph.layers}
    biases = bias_keys(graph.program, graph.tied)
    stored = {str(node.target): node for node in module.graph.nodes if node.op == "get_attr"}
    num_uses: dict[str, int] = {}
    for node in module.graph.nodes:
        for read in node.all_input_nodes:
            num_uses[str(read.target)] = num_uses.get(str(read.target), 0) + (read.op == "get_attr")
    found = {}
    for node in module.graph.nodes:
        weight = node.args[WEIGHT_ARGUMENT] if len(node.args) > WEIGHT_ARGUMENT else None
        if not isinstance(weight, fx.Node) or weight.op != "get_attr":
            continue
        tensor = str(weight.target)
        if tensor in layers and num_uses[tensor] == 1:
            key = biases[tensor][1] if tensor in biases and biases[tensor][0] == node.name else None
            found[node] = Place(layers[tensor], node, weight, None if key is None else stored[key])
    return found


def moments_of(pair: SideBySide, place: Place, counts: Tensor | None = None) -> Moments | None:
    """Moments of a layer; None where none are taken (``curvature.moments.read_positions``).

    Args:
        counts: What each position counts, in the shape of the layer's output without its channels; None for 1.
    """
    node, x_node = place.node, place.node.args[0]
    assert isinstance(x_node, fx.Node)
    wanted = wanted_output(pair, node, norm_after(node))
    bias = argument(node, "bias", None)
    if isinstance(bias, fx.Node):
        own = pair.after[bias]
        wanted = wanted - own.reshape([-1 if d == channel_dim(node) % wanted.dim() else 1 for d in range(wanted.dim())])
    moments = _moments(node, pair.after[x_node], pair.after[place.weight], wanted, counts)
    if moments is None:
        return None
    gram, cross, mean_x, mean_y = moments
    eye = torch.eye(mean_x.shape[1], dtype=torch.float64, device=gram.device)
    power = gram.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] + mean_x.square().mean(1)[:, None, None]
    if place.bias is None:
        gram = gram + mean_x[:, :, None] * mean_x[:, None]
        cross = cross + mean_x[:, :, None] * mean_y[:, None]
    return Moments(gram + ROUNDING * power * eye, power, cross, mean_x, mean_y)


def _moments(
    node: fx.Node, x: Tensor, weight: Tensor, y: Tensor, counts: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """Covariances of ``x`` and of ``x`` with ``y``, ``E[x]`` and ``E[y]`` of each group, float64, over some positions.

    Values are taken from where the first of them lie: in float32 squares of a large mean would hide a small variance.
    """
    sums: list[Tensor] | None = None
    total = 0.0
    for rows, goals, weights in _positions(node, x, weight, y, counts):
        if sums is None:
            origins = rows.mean(1, keepdim=True), goals.mean(1, keepdim=True)
        rows, goals = rows - origins[0], goals - origins[1]
        weighted = rows if weights is None else rows * weights[:, None]
        parts = [
            (weighted.transpose(1, 2) @ rows).double(),
            (weighted.transpose(1, 2) @ goals).double(),
            weighted.sum(1).double(),
            (goals if weights is None else goals * weights[:, None]).sum(1).double(),
        ]
        sums = parts if sums is None else [a + b for a, b in zip(sums, parts, strict=True)]
        total += rows.shape[1] if weights is None else float(weights.sum(dtype=torch.float64))
    if sums is None:
        return None
    gram, cross, mean_x, mean_y = (summed / total for summed in sums)
    gram, cross = gram - mean_x[:, :, None] * mean_x[:, None], cross - mean_x[:, :, None] * mean_y[:, None]
    return gram, cross, mean_x + origins[0][:, 0], mean_y + origins[1][:, 0]


def _positions(
    node: fx.Node, x: Tensor, weight: Tensor, y: Tensor, counts: Tensor | None
) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """Chunks of what a layer multiplies, ``[g, p, k]``, of what that should give, ``[g, p, c]``, and of its counts."""
    channels = y.shape[channel_dim(node)]
    total = y.numel() // channels
    each, step = max(1, CHUNK * len(y) // total), sampling_step(total, MAX_POSITIONS)
    parts = len(torch.split(y, each))
    split_counts = [None] * parts if counts is None else torch.split(counts, each)
    for part, goal, count in zip(torch.split(x, each), torch.split(y, each), split_counts, strict=True):
        rows = read_positions(node, part, weight, step)
        if rows is None:
            return
        if node.target is aten.linear.default:
            goals = goal.reshape(1, -1, channels)
        else:
            split = goal.reshape(len(goal), len(rows), channels // len(rows), -1)
            goals = split.permute(1, 0, 3, 2).reshape(len(rows), -1, channels // len(rows))
        yield rows, goals[:, ::step], None if count is None else count.flatten()[::step]


def add_offset(pair: SideBySide, place: Place, offset: Tensor) -> Tensor:
    """Add ``[c]`` to a layer's output by its bias, or its batch norm's; returns the tensor that it now is."""
    assert place.bias is not None
    bias = pair.after[place.bias]
    norm = norm_after(place.node)
    if norm is not None and operand(norm, 2) is place.bias:
        gain, variance = operand(norm, 1), operand(norm, 4)
        sigma = torch.sqrt(tensor_at(pair.module, str(variance.target)).double() + operand(norm, 7))
        offset = offset / sigma
        if gain is not None:
            offset = offset * tensor_at(pair.module, str(gain.target)).double()
    pair.put(place.bias, (bias.double() + offset).to(bias.dtype))
    changed: Tensor = pair.after[place.bias].cpu()
    return changed
