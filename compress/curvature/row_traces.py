"""How much the outputs react to each row of each layer's weight: what tells an important channel from another.

With random signs ``r`` in output space, the squared gradient of ``f . r`` by a row, summed over examples, estimates the
trace of the row's block of ``J^T J`` without bias, ``J`` the Jacobian of the outputs. Where the outputs are logits the
signs are centred, as a constant moves nothing; the loss's own curvature is left out, since on examples that the network
is sure of it is nearly nothing, and its few large values would decide. Other tasks are asked for theirs.
Source: the probes of ``traces``. Cost: a forward and backward pass for each of ``passes``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.autograd.graph import GradientEdge

from ..context import Progress
from ..data import Data
from ..graph.trace import WEIGHT_ARGUMENT
from ..task import Task, has_logits
from .gradient_rules import Site
from .loss_factor import Draw, cotangents
from .moments import channel_dim
from .network import PASS_BATCH, Network, batches, differentiable, outputs_of, require_finite
from .recording import record
from .sample_gradients import draw_seed


def row_traces(
    network: Network, task: Task, data: Data, *, passes: int, generator: torch.Generator, progress: Progress
) -> dict[str, Tensor]:
    """The trace of each row's block, float64 ``[c]`` for the first dimension of each layer's weight, by tensor."""
    names = [layer.tensor for layer in network.layers]
    found = {name: torch.zeros(len(network.weights[name]), dtype=torch.float64) for name in names}
    for batch, draw, signs in _probes(data, network, passes, generator, progress, "row traces"):
        with differentiable(network, names) as weights:
            outputs = network.module(*batch.inputs)
            gradients = _pulled_back(task, outputs, batch, draw, signs, weights)
        for name, gradient in zip(names, gradients, strict=True):
            if gradient is not None:
                found[name] += gradient.double().flatten(1).square().sum(1).cpu() / (passes * len(data))
    return found


@dataclass(frozen=True, slots=True)
class OutputGradients:
    """How much a network's outputs react to what its layers give: squared gradients, by the weights' tensors.

    Attributes:
        channels: float64 ``[c]``: of a layer's channels, summed over positions, on average over examples.
        positions: In the shape of a layer's output without its channels, summed over those; of weights that are used
            once, in layers whose input has the examples as a dimension of its own.
    """

    channels: dict[str, Tensor]
    positions: dict[str, Tensor]


def output_gradients(
    network: Network, task: Task, data: Data, *, passes: int, generator: torch.Generator, progress: Progress
) -> OutputGradients:
    """Squared gradients of the network's outputs by the layers' outputs, at random signs as for ``row_traces``."""
    # Outputs are differentiated, and no weight: the batch may be anywhere.
    sites = {node: (Site(node, WEIGHT_ARGUMENT, tensor, 0, ()),) for node, tensor in network.uses.items()}
    channels: dict[str, Tensor] = {}
    parts: dict[fx.Node, list[Tensor]] = {}
    for batch, draw, signs in _probes(data, network, passes, generator, progress, "output gradients"):
        outputs, uses = record(network, batch.inputs, sites)
        gradients = _pulled_back(task, outputs, batch, draw, signs, [use.edge for use in uses])
        for use, gradient in zip(uses, gradients, strict=True):
            squares = torch.zeros(use.shape, dtype=network.dtype) if gradient is None else gradient.square()
            dim = channel_dim(use.node) % len(use.shape)
            sums = squares.sum([d for d in range(squares.dim()) if d != dim], dtype=torch.float64).cpu()
            channels[use.tensor] = channels.get(use.tensor, 0.0) + sums / (passes * len(data))
            parts.setdefault(use.node, []).append(squares.sum(dim).cpu())
    nodes = {tensor: node for node, tensor in network.uses.items()}
    once = {t: n for t, n in nodes.items() if n in network.batch_dims and list(network.uses.values()).count(t) == 1}
    found = {tensor: _of_all_passes(parts[node], network.batch_dims[node], passes) for tensor, node in once.items()}
    return OutputGradients(channels, found)


def _of_all_passes(parts: Sequence[Tensor], batch_dim: int, passes: int) -> Tensor:
    size = len(parts) // passes
    each = [torch.cat(list(parts[start : start + size]), batch_dim) for start in range(0, len(parts), size)]
    return torch.stack(each).mean(0)


def _probes(
    data: Data, network: Network, passes: int, generator: torch.Generator, progress: Progress, stage: str
) -> Iterator[tuple[Data, Draw, torch.Generator]]:
    """Each batch of each pass, with what its random signs are drawn by."""
    seed, total = draw_seed(generator), passes * len(data)
    signs = torch.Generator().manual_seed(seed)
    for probe in range(passes):
        for number, batch in enumerate(batches(network, data)):
            start = number * PASS_BATCH
            progress(stage, probe * len(data) + start, total)
            yield batch, Draw(seed, range(start, start + len(batch)), probe, data.name), signs
    progress(stage, total, total)


def _pulled_back(
    task: Task,
    outputs: Any,
    batch: Data,
    draw: Draw,
    signs: torch.Generator,
    wanted: Sequence[GradientEdge] | Sequence[Tensor],
) -> tuple[Tensor | None, ...]:
    """The gradients of random signs times the outputs."""
    values = outputs_of(outputs)
    if has_logits(task):
        require_finite(values[0], "the output", draw.examples, draw.name)
        probes = (_centred_signs(values[0], signs), *map(torch.zeros_like, values[1:]))
    else:
        probes = tuple(cotangents(task, outputs, batch.targets, draw, mode="ggn"))
    return torch.autograd.grad(values, wanted, probes, allow_unused=True)


def _centred_signs(values: Tensor, generator: torch.Generator) -> Tensor:
    signs = 2.0 * torch.randint(0, 2, values.shape, generator=generator).to(values) - 1
    return signs - signs.mean(-1, keepdim=True)
