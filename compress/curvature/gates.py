"""Curvature of the loss in gates on a network's channels: what cutting each of them would cost.

A gate multiplies a channel where the layers that sum over it read it; at zero, the channel is cut. One backward pass
gives the derivative along every gate for each example, a row of ``G``; over output-space probes ``GᵀG/n`` is the
Gauss-Newton matrix in the gates of all channels of the network together, whose diagonal is taken.
Source: Molchanov et al. 2019 (arXiv:1906.10771) for gates; Martens 2020 (arXiv:1412.1193) for the matrix.
Cost: a forward and a backward pass over the data for each probe.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ..context import Progress
from ..data import Data
from ..graph.channel_rules import shape_of
from ..graph.groups import Channels, channel_dim
from ..graph.trace import TRANSPOSED, WEIGHT_ARGUMENT, WEIGHT_OPS, argument, aten
from ..task import Task
from .loss_factor import Draw, cotangents, period
from .network import outputs_of, require_finite

BATCH = 64


def gate_curvatures(
    channels: Channels,
    module: fx.GraphModule,
    task: Task,
    data: Data,
    *,
    probes: int,
    seed: int,
    progress: Progress,
) -> Tensor:
    """The diagonal of the Gauss-Newton matrix of the mean loss in the gates, float64 ``[c]``, at the network as it is.

    Args:
        module: ``channels.module`` or a copy of it with other tensors of the same shapes.
        probes: The most passes over the data; where a task has fewer orthogonal ones, as many as are exact.

    Raises:
        NumericsError: An output or a derivative isn't finite; names the examples.
    """
    gates = _gates(channels)
    count = channels.count
    total = torch.zeros(count, dtype=torch.float64)
    done, batches = 0, -(-len(data) // BATCH)
    for number, batch in enumerate(data.batches(BATCH)):
        first = number * BATCH
        examples = list(range(first, first + len(batch)))
        run = _Gated(module, gates)
        with torch.enable_grad():
            outputs = run.run(*batch.inputs)
        complete = period(task, outputs)
        passes = min(probes, complete) if complete else probes
        values = list(outputs_of(outputs))
        for probe in range(passes):
            progress("curvature of the channels", done, batches * passes)
            drawn = cotangents(task, outputs, batch.targets, Draw(seed, examples, probe, data.name), mode="ggn")
            last = probe + 1 == passes
            rows = _rows(run, values, list(drawn), count, len(batch), retain=not last)
            require_finite(rows, "the derivative along the channels", examples, data.name)
            total += rows.square().sum(0) / (passes * len(data))
            done += 1
    return total


@dataclass(frozen=True, slots=True)
class _Gate:
    """A gate on a node's first input, or on its output.

    Attributes:
        channel: Of each place along ``dim``, -1 where it has no gate here.
    """

    dim: int
    channel: Tensor
    on_output: bool = False


class _Gated(fx.Interpreter):
    """Runs a network and keeps the gated inputs of its layers, each a tensor of its own."""

    def __init__(self, module: fx.GraphModule, gates: dict[str, _Gate]) -> None:
        super().__init__(module)
        self.gates, self.held = gates, dict[str, Tensor]()

    def run_node(self, n: fx.Node) -> Any:
        if n.name not in self.gates:
            return super().run_node(n)
        if self.gates[n.name].on_output:
            return self._gated(n, super().run_node(n))
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        x = self._gated(n, args[0])
        return self.call_function(n.target, (x, *args[1:]), kwargs)

    def _gated(self, n: fx.Node, x: Tensor) -> Tensor:
        x = x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
        self.held[n.name] = x
        return x


def _rows(run: _Gated, outputs: list[Tensor], cotangent: list[Tensor], count: int, n: int, *, retain: bool) -> Tensor:
    """Derivatives along the gates, float64 ``[n, c]``."""
    used = [(value, c) for value, c in zip(outputs, cotangent, strict=True) if value.requires_grad]
    held = list(run.held.items())
    gradients = torch.autograd.grad(
        [v for v, _ in used], [x for _, x in held], [c for _, c in used], retain_graph=retain, allow_unused=True
    )
    rows = torch.zeros(n, count + 1, dtype=torch.float64)
    found: list[Tensor | None] = list(gradients)
    for (name, x), gradient in zip(held, found, strict=True):
        if gradient is not None:
            gate = run.gates[name]
            product = (x.detach() * gradient).movedim(gate.dim, -1)
            product = product.reshape(n, -1, product.shape[-1]).sum(1).double().cpu()
            rows.index_add_(1, torch.where(gate.channel < 0, count, gate.channel), product)
    return rows[:, :count]


def _gates(channels: Channels) -> dict[str, _Gate]:
    """By node: the layers that sum over channels; of channels that none sums over, where they first appear."""
    found: dict[str, _Gate] = {}
    waiting = torch.ones(channels.count, dtype=torch.bool)
    for node in channels.module.graph.nodes:
        if node.target not in WEIGHT_OPS or node not in channels.values or passes_through(node):
            continue
        dim = channel_dim(node)
        channel = channels.along(node.args[0], dim)
        if channel is not None:
            found[node.name] = _Gate(dim, channel)
            waiting[channel[channel >= 0]] = False
    for node, value in channels.values.items():
        is_op = node.op == "call_function" and node.name not in found and isinstance(value, tuple)
        for dim in range(len(shape_of(node)) if is_op and waiting.any() else 0):
            channel = channels.along(node, dim)
            if channel is not None and bool(waiting[channel[channel >= 0]].any()):
                chosen = (channel >= 0) & waiting[channel.clamp(min=0)]
                found[node.name] = _Gate(dim, torch.where(chosen, channel, -1), on_output=True)
                waiting[channel[chosen]] = False
                break
    return found


def passes_through(node: fx.Node) -> bool:
    """Whether a convolution's outputs are its inputs' channels: depthwise, or in more groups than inputs of each."""
    groups = int(argument(node, "groups", 1)) if node.target is not aten.linear.default else 1
    inputs = shape_of(node.args[WEIGHT_ARGUMENT])[0 if node.target in TRANSPOSED else 1]
    return groups > 1 and groups > inputs // (groups if node.target in TRANSPOSED else 1)
