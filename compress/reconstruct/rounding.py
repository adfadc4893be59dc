"""Layers rounded one after another, each so that it gives what the dense network gives, on the inputs that it now gets.

Two networks run side by side. When a layer is reached, it is first fitted to what it should give by least squares, from
the inputs that the layers before it now make; then its rows are rounded by what that does to its outputs. The mean that
is still missing goes into its bias, or its batch norm's.
Source: Frantar et al. 2022, GPTQ (arXiv:2210.17323); the order and the fit are those of He et al. 2017
(arXiv:1707.06168). Cost: two forward passes, ``k^2`` products a position for a layer of k inputs, and the rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, fx

from ..context import Progress
from ..curvature.moments import MAX_POSITIONS, channel_dim, read_positions, sampling_step
from ..formats.packed import QuantizedTensor
from ..graph.rewrite import Grid, after_norms, bias_keys, on_device, operand, rounded_to, tensor_at, unlift
from ..graph.trace import WEIGHT_ARGUMENT, Graph, Layer, argument, aten
from ..numerics.output_rounding import round_rows
from ..numerics.rounding import spread_scale
from ..widths import Width
from .side_by_side import SideBySide, norm_after, walk, wanted_output

FIT_DAMPING = 0.02  # of the mean squared input: what pulls the fit to the weights as they are
ROUNDING = 1e-5  # of the mean squared input: what float32 products leave of a variance that is none
CHUNK = 2**16  # positions at a time


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
    dense, module = (on_device(unlift(graph.program, graph.tied), device) for _ in range(2))
    pair = SideBySide(dense, module)
    layers = {layer.tensor: layer for layer in graph.layers}
    biases = bias_keys(graph.program, graph.tied)
    stored = {str(node.target): node for node in module.graph.nodes if node.op == "get_attr"}
    uses: dict[str, list[fx.Node]] = {}
    for node in module.graph.nodes:
        for read in node.all_input_nodes:
            if read.op == "get_attr":
                uses.setdefault(str(read.target), []).append(node)
    for name, value in others.items():
        if name in stored and (len(uses[name]) > 1 or name not in grids):
            pair.put(stored[name], value)
    found = Rounded()

    def visit(node: fx.Node) -> None:
        weight_node = node.args[WEIGHT_ARGUMENT] if len(node.args) > WEIGHT_ARGUMENT else None
        if not isinstance(weight_node, fx.Node) or str(weight_node.target) not in grids:
            return
        tensor = str(weight_node.target)
        if tensor not in layers or len(uses[tensor]) > 1:
            return
        key = biases[tensor][1] if tensor in biases and biases[tensor][0] == node.name else None
        rounded, offset = _rounded(pair, node, layers[tensor], grids[tensor], has_offset=key is not None)
        if rounded is None:
            if tensor in others:
                pair.put(weight_node, others[tensor])
            return
        found.weights[tensor] = rounded
        pair.put(weight_node, rounded.dequantize())
        if key is not None:
            bias = _shifted(pair, node, stored[key], offset)
            pair.put(stored[key], bias)
            found.biases[key] = bias.cpu()

    names = {node.name: node for node in module.graph.nodes}
    rounds = {after_norms(names[name]): partial(rounded_to, grid=grid) for name, grid in activations.items()}
    walk(pair, inputs, visit, rounds=rounds, progress=progress, what="round the layers")
    return found


def _rounded(
    pair: SideBySide, node: fx.Node, layer: Layer, grid: Storage, *, has_offset: bool
) -> tuple[QuantizedTensor | None, Tensor]:
    """The layer's weight, and what is missing of its outputs' means, ``[c]``; None where it can't be done."""
    x_node, weight_node = node.args[:2]
    assert isinstance(x_node, fx.Node) and isinstance(weight_node, fx.Node)
    weight, nothing = pair.after[weight_node], torch.zeros(0)
    if layer.axis not in (0, None):
        return None, nothing
    wanted = wanted_output(pair, node, norm_after(node))
    bias = argument(node, "bias", None)
    if isinstance(bias, fx.Node):
        own = pair.after[bias]
        wanted = wanted - own.reshape([-1 if d == channel_dim(node) % wanted.dim() else 1 for d in range(wanted.dim())])
    moments = _moments(node, pair.after[x_node], weight, wanted)
    if moments is None:
        return None, nothing
    gram, cross, mean_x, mean_y = moments
    groups, k = mean_x.shape
    eye = torch.eye(k, dtype=torch.float64, device=gram.device)
    if not has_offset:
        gram = gram + mean_x[:, :, None] * mean_x[:, None]
        cross = cross + mean_x[:, :, None] * mean_y[:, None]
    spread = gram.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    noise = ROUNDING * (spread + (mean_x.square().mean(1)[:, None, None] if has_offset else 0.0))
    start = weight.reshape(groups, -1, k).double()
    ridge = FIT_DAMPING * spread + noise + torch.finfo(torch.float32).tiny
    zeros = start == 0
    if bool(zeros.any()):  # a pruned weight stays pruned, and isn't fitted: every weight would take part
        fitted, masked = start, zeros
    else:
        fitted, masked = (
            torch.linalg.solve(gram + ridge * eye, cross + ridge * start.transpose(1, 2)).transpose(1, 2),
            None,
        )
    gram = gram + noise * eye
    size = grid.group_size
    levels, scales = round_rows(fitted, gram, grid.levels, is_shared=layer.axis is None, zeros=masked, group_size=size)
    flat = scales.flatten(0, 1)
    scale = flat[0] if layer.axis is None else flat
    made = QuantizedTensor(levels.reshape(weight.shape).cpu(), grid.bits, scale.cpu().clone(), layer.axis, size)
    step = scales[..., None] if size is None else spread_scale(scales[0], 0, weight.shape, size)
    given = (step.double() * levels.double() @ mean_x[:, :, None])[..., 0]
    return made, (mean_y - given).reshape(-1)


def _moments(node: fx.Node, x: Tensor, weight: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """Covariances of ``x`` and of ``x`` with ``y``, ``E[x]`` and ``E[y]`` of each group, float64, over some positions.

    Values are taken from where the first of them lie: in float32 squares of a large mean would hide a small variance.
    """
    sums: list[Tensor] | None = None
    count = 0
    for rows, goals in _positions(node, x, weight, y):
        if sums is None:
            origins = rows.mean(1, keepdim=True), goals.mean(1, keepdim=True)
        rows, goals = rows - origins[0], goals - origins[1]
        parts = [
            (rows.transpose(1, 2) @ rows).double(),
            (rows.transpose(1, 2) @ goals).double(),
            rows.sum(1, dtype=torch.float64),
            goals.sum(1, dtype=torch.float64),
        ]
        sums = parts if sums is None else [a + b for a, b in zip(sums, parts, strict=True)]
        count += rows.shape[1]
    if sums is None:
        return None
    gram, cross, mean_x, mean_y = (total / count for total in sums)
    gram, cross = gram - mean_x[:, :, None] * mean_x[:, None], cross - mean_x[:, :, None] * mean_y[:, None]
    return gram, cross, mean_x + origins[0][:, 0], mean_y + origins[1][:, 0]


def _positions(node: fx.Node, x: Tensor, weight: Tensor, y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Chunks of what a layer multiplies, ``[g, p, k]``, and of what that should give, ``[g, p, c]``."""
    channels = y.shape[channel_dim(node)]
    total = y.numel() // channels
    each, step = max(1, CHUNK * len(y) // total), sampling_step(total, MAX_POSITIONS)
    for part, goal in zip(torch.split(x, each), torch.split(y, each), strict=True):
        rows = read_positions(node, part, weight, step)
        if rows is None:
            return
        if node.target is aten.linear.default:
            goals = goal.reshape(1, -1, channels)
        else:
            split = goal.reshape(len(goal), len(rows), channels // len(rows), -1)
            goals = split.permute(1, 0, 3, 2).reshape(len(rows), -1, channels // len(rows))
        yield rows, goals[:, ::step]


def _shifted(pair: SideBySide, node: fx.Node, bias_node: fx.Node, offset: Tensor) -> Tensor:
    """A layer's bias, or its batch norm's, that adds an offset to the layer's output."""
    bias = pair.after[bias_node]
    norm = norm_after(node)
    if norm is not None and operand(norm, 2) is bias_node:
        gain, variance = operand(norm, 1), operand(norm, 4)
        sigma = torch.sqrt(tensor_at(pair.module, str(variance.target)).double() + operand(norm, 7))
        offset = offset / sigma
        if gain is not None:
            offset = offset * tensor_at(pair.module, str(gain.target)).double()
    shifted: Tensor = (bias.double() + offset).to(bias.dtype)
    return shifted
