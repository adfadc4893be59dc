"""Second moments of what each layer reads: how much a change of its weights moves its outputs.

An output of a layer is ``w . x`` with a row ``w`` of its weight and the inputs ``x`` under it; a change ``d`` of the
row moves it by ``d^T E[x x^T] d`` in the mean square. Cost: a forward pass, and ``k^2`` products for each position.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx

from ..context import Progress
from ..data import Data
from ..graph.trace import TRANSPOSED, argument, aten
from .factors import windows
from .network import PASS_BATCH, Network, batches

LARGEST_MOMENT = 8192  # inputs of an output; beyond, a moment would take more than half a gigabyte
MAX_POSITIONS = 2**17  # of a layer, over all examples: the moments of more are no closer


class _Reader(fx.Interpreter):
    """Runs the graph and adds up the moments of the layers' inputs."""

    def __init__(self, network: Network, limit: int) -> None:
        super().__init__(network.module)
        self.network = network
        self.limit = limit
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        tensor = self.network.uses.get(n)
        if tensor is not None:
            read = n.args[0]
            assert isinstance(read, fx.Node)
            step = sampling_step(value.numel() // value.shape[channel_dim(n)], self.limit)
            part = read_positions(n, self.env[read], self.network.weights[tensor], step)
            if part is not None:
                part = part.double() if self.network.dtype == torch.float64 else part
                moment = (part.transpose(1, 2) @ part).double()
                self.sums[tensor] = self.sums[tensor] + moment if tensor in self.sums else moment
                self.counts[tensor] = self.counts.get(tensor, 0) + part.shape[1]
        return value


def input_moments(network: Network, data: Data, *, progress: Progress) -> dict[str, Tensor]:
    """``E[x x^T]`` of each layer, float64, by tensor, over examples and positions.

    Returns:
        ``[k, k]`` in the order of ``rounding.rows`` of the weight; ``[g, k, k]`` for ``g`` groups of a convolution.
        There is none for a transposed convolution, nor where k exceeds ``LARGEST_MOMENT``.
    """
    reader = _Reader(network, max(1, MAX_POSITIONS * PASS_BATCH // max(len(data), 1)))
    with torch.no_grad():
        for done, batch in enumerate(batches(network, data)):
            progress("input moments", done * PASS_BATCH, len(data))
            reader.run(*batch.inputs)
    progress("input moments", len(data), len(data))
    means = {tensor: total / reader.counts[tensor] for tensor, total in reader.sums.items()}
    return {tensor: (mean[0] if len(mean) == 1 else mean).cpu() for tensor, mean in means.items()}


def sampling_step(count: int, limit: int) -> int:
    """From one sampled position to the next: a common divisor with ``count`` would take few columns of an image."""
    step = -(-count // limit)
    while math.gcd(step, count) > 1:
        step += 1
    return step


def channel_dim(node: fx.Node) -> int:
    """Where a layer's output has its channels: last in a linear layer's, after the batch in a convolution's."""
    return -1 if node.target is aten.linear.default else 1


def read_positions(node: fx.Node, inputs: Tensor, weight: Tensor, step: int) -> Tensor | None:
    """What every ``step``-th output position reads, ``[g, positions, k]``; None where no moment is taken."""
    if weight[0].numel() > LARGEST_MOMENT or node.target in TRANSPOSED:
        return None
    if node.target is aten.linear.default:
        return inputs.reshape(1, -1, inputs.shape[-1])[:, ::step]
    spatial = weight.dim() - 2
    found = windows(node, inputs, weight)
    # [n, channels, positions..., kernel...] -> [p, channels, kernel...] -> [g, p, channels of a group x kernel]
    shape = (len(found), *found.shape[2 : 2 + spatial])
    numbers = torch.arange(0, math.prod(shape), step, device=found.device)
    example, *places = torch.unravel_index(numbers, shape)
    index: tuple[Any, ...] = (example, slice(None), *places)
    picked = found[index]
    return picked.reshape(len(numbers), int(argument(node, "groups", 1)), -1).transpose(0, 1)
