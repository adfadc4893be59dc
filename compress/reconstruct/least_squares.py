"""Layers fitted again after a cut: least squares, layer by layer, from the cut network's inputs to the dense outputs.

The cut network and the dense one run side by side. Each layer of the cut one is solved for the weights that, on the
inputs that it now gets, come nearest to what it gave before: ``min_W |W X - Y|^2 + damping |W - W0|^2``. Where it
is added to a stream that has drifted, the drift is part of ``Y``. A batch norm takes the statistics that its input now
has, without a change of what it computes.
Source: He et al. 2017 (arXiv:1707.06168), channel pruning with reconstruction; the drift and the statistics are ours.
Cost: two forward passes, and for a layer with k inputs k^2 a position, and k^3.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from ..context import Progress
from ..graph.groups import Channels, channel_dim, places_kept
from ..graph.rewrite import BATCH_NORMS, operand, tensor_at
from ..graph.trace import WEIGHT_ARGUMENT, argument, aten
from .side_by_side import SideBySide, is_own, name_of, norm_after, walk, wanted_output

DAMPING = 0.1  # of the mean squared input
MOST_POSITIONS = 400_000  # that a layer is solved on
CHUNK = 2**16  # positions at a time
LEAST_VARIANCE = 1e-8
FITTED = {aten.conv1d.default, aten.conv1d.padding, aten.conv2d.default, aten.conv2d.padding, aten.linear.default}


@dataclass(slots=True)
class _Pair(SideBySide):
    """A network and one of the whole shape whose cut channels are at zero.

    Attributes:
        original: The node of ``channels.module`` by name.
    """

    channels: Channels
    kept: Tensor
    original: Mapping[str, fx.Node]

    def stays(self, node: Any, dim: int, size: int) -> Tensor:
        """bool ``[size]``: which places along a dimension of a node's value are left."""
        channel = self.channels.along(self.original[node.name], dim)
        return torch.ones(size, dtype=torch.bool) if channel is None else places_kept(self.kept, channel)


def refit_layers(
    channels: Channels,
    kept: Tensor,
    cut: fx.GraphModule,
    inputs: tuple[Tensor, ...],
    *,
    damping: float = DAMPING,
    progress: Progress,
) -> set[str]:
    """Fit the layers of ``cut`` in place, in the order of execution.

    Args:
        channels: Their module is the dense network.
        kept: bool over all channels.
        cut: As ``graph.cut.masked`` gives it.
        inputs: Calibration examples ``[n, ...]``.
        damping: Of the mean squared input of a layer.

    Returns:
        The tensors that were replaced.
    """
    pair = _Pair(channels.module, cut, channels, kept, {node.name: node for node in channels.module.graph.nodes})

    def visit(node: fx.Node) -> None:
        if _is_fitted(pair, node):
            _fit(pair, node, damping)
        elif node.target in BATCH_NORMS:
            _take_statistics(pair, node)

    walk(pair, inputs, visit, progress=progress, what="fit the layers")
    return pair.changed


def _is_fitted(pair: _Pair, node: fx.Node) -> bool:
    """A layer whose weight is its own, and that sums over all its inputs."""
    if node.target not in FITTED or pair.original[node.name] not in pair.channels.values:
        return False
    groups = 1 if node.target is aten.linear.default else int(argument(node, "groups", 1))
    return groups == 1 and is_own(node.args[WEIGHT_ARGUMENT])


def _fit(pair: _Pair, node: fx.Node, damping: float) -> None:
    x_node, weight_node = node.args[:2]
    assert isinstance(x_node, fx.Node) and isinstance(weight_node, fx.Node)
    x, weight = pair.after[x_node], pair.after[weight_node]
    dim = channel_dim(pair.original[node.name])
    reads = pair.stays(x_node, dim, x.shape[dim])
    makes = pair.stays(node, dim, len(weight))
    if bool(reads.all()) and torch.equal(pair.before[x_node], x):
        return
    bias_node, norm = argument(node, "bias", None), norm_after(node)
    offset_node = bias_node if is_own(bias_node) else norm.args[3] if norm is not None else None
    start = weight[makes][:, reads]
    solved, offset = _solved(
        _positions(node, x, wanted_output(pair, node, norm), reads, makes, tuple(weight.shape[2:])),
        start.reshape(len(start), -1).double(),
        damping,
        has_offset=offset_node is not None or isinstance(bias_node, fx.Node),
        given=None if bias_node is None or is_own(bias_node) else pair.after[bias_node][makes].double(),
    )
    fresh, block = torch.zeros_like(weight), torch.zeros_like(weight[makes])
    block[:, reads] = solved.to(weight).reshape(start.shape)
    fresh[makes] = block
    pair.put(weight_node, fresh)
    if not isinstance(offset_node, fx.Node):
        return
    found = torch.zeros(len(weight), dtype=torch.float64)
    found[makes] = offset
    stored = tensor_at(pair.module, str(offset_node.target)).double()
    # A batch norm subtracts its mean: what the layer lacks is taken off.
    pair.put(offset_node, torch.where(makes, found if offset_node is bias_node else stored - found, stored))


def _solved(
    positions: Iterator[tuple[Tensor, Tensor]], start: Tensor, damping: float, *, has_offset: bool, given: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The weights ``[o, k]`` and offsets ``[o]``, float64.

    Args:
        positions: Inputs ``[p, k]`` and what they should give, ``[p, o]``.
        start: The weights that damping pulls to.
        given: Offsets that stay as they are.
    """
    o, k = start.shape
    gram, cross = torch.zeros(k, k, dtype=torch.float64), torch.zeros(k, o, dtype=torch.float64)
    sum_x, sum_y, count = torch.zeros(k, dtype=torch.float64), torch.zeros(o, dtype=torch.float64), 0
    for a, b in positions:
        gram += (a.T @ a).double()
        cross += (a.T @ b).double()
        sum_x += a.sum(0).double()
        sum_y += b.sum(0).double()
        count += len(a)
    mean_x, mean_y = sum_x / count, sum_y / count
    fixed = torch.zeros(o, dtype=torch.float64) if given is None else given
    if has_offset and given is None:
        gram -= count * torch.outer(mean_x, mean_x)
        cross -= count * torch.outer(mean_x, mean_y)
    else:
        cross -= torch.outer(sum_x, fixed)
    ridge = damping * float(gram.diagonal().mean()) + torch.finfo(torch.float32).tiny
    system = gram + ridge * torch.eye(k, dtype=torch.float64)
    solved = torch.linalg.solve(system, cross + ridge * start.T).T
    return solved, mean_y - solved @ mean_x if has_offset and given is None else fixed


def _positions(
    node: fx.Node, x: Tensor, wanted: Tensor, reads: Tensor, makes: Tensor, kernel: tuple[int, ...]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Chunks of what a layer multiplies, ``[p, k]``, and of what that should give, ``[p, o]``."""
    places, made = reads.nonzero().reshape(-1), makes.nonzero().reshape(-1)
    if node.target is aten.linear.default:
        rows = x.index_select(-1, places).reshape(-1, len(places))
        goals = wanted.index_select(-1, made).reshape(-1, len(made))
        step = -(-len(rows) // MOST_POSITIONS)
        yield from zip(torch.split(rows[::step], CHUNK), torch.split(goals[::step], CHUNK), strict=True)
        return
    x, wanted = x.index_select(1, places), wanted.index_select(1, made)
    stride, dilation = (_pair(argument(node, key, 1)) for key in ("stride", "dilation"))
    padding = argument(node, "padding", 0)
    if len(kernel) == 1:
        x, wanted, kernel = x.unsqueeze(2), wanted.unsqueeze(2), (1, *kernel)
        stride, dilation = (1, stride[1]), (1, dilation[1])
        padding = padding if isinstance(padding, str) else (0, _pair(padding)[1])
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        x = F.pad(x, (total[1] // 2, total[1] - total[1] // 2, total[0] // 2, total[0] - total[0] // 2))
    padding = (0, 0) if isinstance(padding, str) else _pair(padding)
    area = wanted.shape[2] * wanted.shape[3]
    each, step = max(1, CHUNK // area), -(-len(x) * area // MOST_POSITIONS)
    for part, goal in zip(torch.split(x, each), torch.split(wanted, each), strict=True):
        columns = F.unfold(part, kernel, dilation, padding, stride).movedim(1, 2).flatten(0, 1)
        yield columns[::step], goal.movedim(1, -1).reshape(len(columns), -1)[::step]


def _pair(value: Any) -> tuple[int, int]:
    values = [value] if isinstance(value, int) else list(value)
    return int(values[0]), int(values[-1])


def _take_statistics(pair: _Pair, node: fx.Node) -> None:
    """The statistics of a batch norm's input become what they now are; gain and offset keep its output."""
    if bool(node.args[5]) or pair.original[node.name] not in pair.channels.values:
        return
    stored = [a for a in node.args[1:5] if is_own(a)]
    if len(stored) != 4:
        return
    x = pair.after[operand(node, 0)]
    gamma, beta, mean, variance = (tensor_at(pair.module, name_of(a)).double() for a in stored)
    new_variance, new_mean = torch.var_mean(x.double(), [d for d in range(x.dim()) if d != 1], correction=0)
    usable = pair.stays(node, 1, len(mean)) & (new_variance > LEAST_VARIANCE)
    epsilon = float(operand(node, 7))
    old = torch.sqrt(variance + epsilon)
    fresh = (
        gamma * torch.sqrt(new_variance + epsilon) / old,
        beta + gamma * (new_mean - mean) / old,
        new_mean,
        new_variance,
    )
    for place, value, stale in zip(stored, fresh, (gamma, beta, mean, variance), strict=True):
        assert isinstance(place, fx.Node)
        pair.put(place, torch.where(usable, value, stale))
