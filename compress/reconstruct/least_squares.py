"""Layers fitted again after a cut: least squares, layer by layer, from the cut network's inputs to the dense outputs.

The cut network and the dense one run side by side. Each layer of the cut one is solved for the weights that, on the
inputs that it now gets, come nearest to what it gave before: ``min_W |W X - Y|^2 + damping |W - W0|^2``. Where it
is added to a stream that has drifted, the drift is part of ``Y``. A batch norm takes the statistics that its input now
has, without a change of what it computes.
Source: He et al. 2017 (arXiv:1707.06168), channel pruning with reconstruction; the drift and the statistics are ours.
Cost: two forward passes, and for a layer with k inputs k^2 a position, and k^3.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from ..context import Progress
from ..data import Data
from ..graph.channel_rules import shape_of
from ..graph.groups import Channels, channel_dim, places_kept
from ..graph.rewrite import BATCH_NORMS, operand, put_tensor, tensor_at
from ..graph.trace import WEIGHT_ARGUMENT, Graph, argument, aten

DAMPING = 0.1  # of the mean squared input
MOST_POSITIONS = 400_000  # that a layer is solved on
CHUNK = 2**16  # positions at a time
MOST_ELEMENTS = 2**26  # of one activation over all calibration examples
LEAST_GAIN = 1e-3  # of a batch norm, for the drift after it to be reached through it
LEAST_VARIANCE = 1e-8
SUMS = (aten.add.Tensor, aten.add_.Tensor)
FITTED = {aten.conv1d.default, aten.conv1d.padding, aten.conv2d.default, aten.conv2d.padding, aten.linear.default}

Values = dict[fx.Node, Any]


@dataclass(slots=True)
class _Pair:
    """Two networks of one graph, side by side, at a node.

    Attributes:
        cut: Of the whole shape, the cut channels at zero; its tensors are replaced.
        original: The node of ``channels.module`` by name.
        before: Values of the dense network.
        after: Values of the cut one.
        changed: Tensors that were replaced.
    """

    channels: Channels
    kept: Tensor
    cut: fx.GraphModule
    original: Mapping[str, fx.Node]
    before: Values = field(default_factory=dict)
    after: Values = field(default_factory=dict)
    changed: set[str] = field(default_factory=set)

    def stays(self, node: Any, dim: int, size: int) -> Tensor:
        """bool ``[size]``: which places along a dimension of a node's value are left."""
        channel = self.channels.along(self.original[node.name], dim)
        return torch.ones(size, dtype=torch.bool) if channel is None else places_kept(self.kept, channel)

    def put(self, node: fx.Node, value: Tensor) -> None:
        """Replace a tensor of the cut network."""
        name = str(node.target)
        put_tensor(self.cut, name, value.to(tensor_at(self.cut, name)))
        self.after[node] = tensor_at(self.cut, name)
        self.changed.add(name)


def fitting_examples(graph: Graph, data: Data) -> Data:
    """As many examples as keep every activation within memory, all at once."""
    batch = len(graph.example_inputs[0])
    shapes = [shape_of(node) for node in graph.program.graph.nodes if node.op == "call_function"]
    return data.first(max(1, MOST_ELEMENTS // max(1, *(math.prod(shape) // batch for shape in shapes))))


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
    nodes = list(cut.graph.nodes)
    pair = _Pair(channels, kept, cut, {node.name: node for node in channels.module.graph.nodes})
    given = iter(inputs)
    last = {source: number for number, node in enumerate(nodes) for source in node.all_input_nodes}
    with torch.no_grad():
        for number, node in enumerate(nodes):
            progress("fit the layers", number, len(nodes))
            if node.op == "placeholder":
                pair.before[node] = pair.after[node] = next(given)
            elif node.op == "get_attr":
                pair.before[node] = _attribute(channels.module, node)
                pair.after[node] = _attribute(cut, node)
            elif node.op == "call_function":
                pair.before[node] = _call(node, pair.before)
                if _is_fitted(pair, node):
                    _fit(pair, node, damping)
                elif node.target in BATCH_NORMS:
                    _take_statistics(pair, node)
                pair.after[node] = _call(node, pair.after)
            for source in node.all_input_nodes:
                if last[source] == number:
                    del pair.before[source], pair.after[source]
    progress("fit the layers", len(nodes), len(nodes))
    return pair.changed


def _attribute(module: fx.GraphModule, node: fx.Node) -> Any:
    value: Any = module
    for part in str(node.target).split("."):
        value = getattr(value, part)
    return value.detach() if isinstance(value, Tensor) else value


def _call(node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: values[n])
    return node.target(*args, **kwargs)  # type: ignore[operator]


def _is_own(node: Any) -> bool:
    """Whether a node is a stored tensor that is read once."""
    return isinstance(node, fx.Node) and node.op == "get_attr" and len(node.users) == 1


def _is_fitted(pair: _Pair, node: fx.Node) -> bool:
    """A layer whose weight is its own, and that sums over all its inputs."""
    if node.target not in FITTED or pair.original[node.name] not in pair.channels.values:
        return False
    groups = 1 if node.target is aten.linear.default else int(argument(node, "groups", 1))
    return groups == 1 and _is_own(node.args[WEIGHT_ARGUMENT])


def _norm_after(node: fx.Node) -> fx.Node | None:
    """The batch norm with running statistics of its own that alone reads a layer."""
    users = list(node.users)
    if len(users) != 1 or users[0].target not in BATCH_NORMS or bool(users[0].args[5]):
        return None
    return users[0] if all(_is_own(a) for a in users[0].args[3:5]) else None


def _fit(pair: _Pair, node: fx.Node, damping: float) -> None:
    x_node, weight_node = node.args[:2]
    assert isinstance(x_node, fx.Node) and isinstance(weight_node, fx.Node)
    x, weight = pair.after[x_node], pair.after[weight_node]
    dim = channel_dim(pair.original[node.name])
    reads = pair.stays(x_node, dim, x.shape[dim])
    makes = pair.stays(node, dim, len(weight))
    if bool(reads.all()) and torch.equal(pair.before[x_node], x):
        return
    bias_node, norm = argument(node, "bias", None), _norm_after(node)
    offset_node = bias_node if _is_own(bias_node) else norm.args[3] if norm is not None else None
    start = weight[makes][:, reads]
    solved, offset = _solved(
        _positions(node, x, _wanted(pair, node, norm), reads, makes, tuple(weight.shape[2:])),
        start.reshape(len(start), -1).double(),
        damping,
        has_offset=offset_node is not None or isinstance(bias_node, fx.Node),
        given=None if bias_node is None or _is_own(bias_node) else pair.after[bias_node][makes].double(),
    )
    fresh, block = torch.zeros_like(weight), torch.zeros_like(weight[makes])
    block[:, reads] = solved.to(weight).reshape(start.shape)
    fresh[makes] = block
    pair.put(weight_node, fresh)
    if not isinstance(offset_node, fx.Node):
        return
    found = torch.zeros(len(weight), dtype=torch.float64)
    found[makes] = offset
    stored = tensor_at(pair.cut, str(offset_node.target)).double()
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


def _wanted(pair: _Pair, node: fx.Node, norm: fx.Node | None) -> Tensor:
    """What a layer should give: its dense output, and the drift of the stream that it is added to."""
    wanted: Tensor = pair.before[node]
    end = norm or node
    users = list(end.users)
    if len(users) != 1 or users[0].target not in SUMS:
        return wanted
    others = [a for a in users[0].args[:2] if a is not end and isinstance(a, fx.Node)]
    if len(others) != 1 or others[0] not in pair.after:
        return wanted
    drift = pair.before[others[0]] - pair.after[others[0]]
    if drift.shape != wanted.shape:
        return wanted
    if norm is not None:
        gamma, variance = norm.args[1], tensor_at(pair.cut, _name(norm.args[4]))
        gain = torch.ones_like(variance) if gamma is None else tensor_at(pair.cut, _name(gamma))
        scale = gain / torch.sqrt(variance + operand(norm, 7))
        inverse = torch.where(scale.abs() > LEAST_GAIN, 1 / scale, torch.zeros_like(scale))
        drift = drift * inverse.reshape([-1 if d == 1 else 1 for d in range(drift.dim())])
    made: Tensor = wanted + drift
    return made


def _name(node: Any) -> str:
    assert isinstance(node, fx.Node)
    return str(node.target)


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
    stored = [a for a in node.args[1:5] if _is_own(a)]
    if len(stored) != 4:
        return
    x = pair.after[operand(node, 0)]
    gamma, beta, mean, variance = (tensor_at(pair.cut, _name(a)).double() for a in stored)
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
