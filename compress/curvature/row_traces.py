"""How much the outputs react to each row of each layer's weight: what tells an important channel from another.

With random signs ``r`` in output space, the squared gradient of ``f . r`` by a row, summed over examples, estimates the
trace of the row's block of ``J^T J`` without bias, ``J`` the Jacobian of the outputs. Where the outputs are logits the
signs are centred, as a constant moves nothing; the loss's own curvature is left out, since on examples that the network
is sure of it is nearly nothing, and its few large values would decide. Other tasks are asked for theirs.
Source: the probes of ``traces``. Cost: a forward and backward pass for each of ``passes``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..context import Progress
from ..data import Data
from ..task import Task, has_logits
from .loss_factor import Draw, cotangents
from .moments import channel_dim
from .network import PASS_BATCH, Network, batches, differentiable, outputs_of, record
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


def output_gradients(
    network: Network, task: Task, data: Data, *, passes: int, generator: torch.Generator, progress: Progress
) -> dict[str, Tensor]:
    """What a small change of each layer's output counts, float64 ``[c]`` for its channels, by the weight's tensor.

    The squared gradient of the outputs by the channel, summed over its positions, on average over examples. A weight
    that is used more than once has the sum; there is none for those in ``network.looped``.
    """
    found: dict[str, Tensor] = {}
    for batch, draw, signs in _probes(data, network, passes, generator, progress, "output gradients"):
        outputs, uses = record(network, batch.inputs)
        gradients = _pulled_back(task, outputs, batch, draw, signs, [use.output for use in uses])
        for use, gradient in zip(uses, gradients, strict=True):
            if gradient is not None:
                dim = channel_dim(use.node) % gradient.dim()
                squares = gradient.double().square().sum([d for d in range(gradient.dim()) if d != dim]).cpu()
                found[use.tensor] = found.get(use.tensor, 0.0) + squares / (passes * len(data))
    return found


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
    task: Task, outputs: Any, batch: Data, draw: Draw, signs: torch.Generator, wanted: Sequence[Tensor]
) -> tuple[Tensor | None, ...]:
    """The gradients of random signs times the outputs."""
    values = outputs_of(outputs)
    if has_logits(task):
        probes = (_centred_signs(values[0], signs), *map(torch.zeros_like, values[1:]))
    else:
        probes = tuple(cotangents(task, outputs, batch.targets, draw, mode="ggn"))
    return torch.autograd.grad(values, wanted, probes, allow_unused=True)


def _centred_signs(values: Tensor, generator: torch.Generator) -> Tensor:
    signs = 2.0 * torch.randint(0, 2, values.shape, generator=generator).to(values) - 1
    return signs - signs.mean(-1, keepdim=True)
