"""How much the outputs react to each row of each layer's weight: what tells an important channel from another.

With random signs ``r`` in output space, the squared gradient of ``f . r`` by a row, summed over examples, estimates the
trace of the row's block of ``J^T J`` without bias, ``J`` the Jacobian of the outputs. Where the outputs are logits the
signs are centred, as a constant moves nothing; the loss's own curvature is left out, since on examples that the network
is sure of it is nearly nothing, and its few large values would decide. Other tasks are asked for theirs.
Source: the probes of ``traces``. Cost: a forward and backward pass for each of ``passes``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..context import Progress
from ..data import Data
from ..task import Task, has_logits
from .loss_factor import Draw, cotangents
from .network import PASS_BATCH, Network, batches, differentiable, outputs_of
from .sample_gradients import draw_seed


def row_traces(
    network: Network, task: Task, data: Data, *, passes: int, generator: torch.Generator, progress: Progress
) -> dict[str, Tensor]:
    """The trace of each row's block, float64 ``[c]`` for the first dimension of each layer's weight, by tensor."""
    names = [layer.tensor for layer in network.layers]
    found = {name: torch.zeros(len(network.weights[name]), dtype=torch.float64) for name in names}
    seed, total = draw_seed(generator), passes * len(data)
    signs = torch.Generator().manual_seed(seed)
    for probe in range(passes):
        for number, batch in enumerate(batches(network, data)):
            start = number * PASS_BATCH
            progress("row traces", probe * len(data) + start, total)
            with differentiable(network, names) as weights:
                outputs = network.module(*batch.inputs)
                values = outputs_of(outputs)
                if has_logits(task):
                    probes = (_centred_signs(values[0], signs), *map(torch.zeros_like, values[1:]))
                else:
                    draw = Draw(seed, range(start, start + len(batch)), probe, data.name)
                    probes = cotangents(task, outputs, batch.targets, draw, mode="ggn")
                gradients = torch.autograd.grad(values, weights, probes, allow_unused=True)
            for name, gradient in zip(names, gradients, strict=True):
                if gradient is not None:
                    found[name] += gradient.double().flatten(1).square().sum(1).cpu() / total
    progress("row traces", total, total)
    return found


def _centred_signs(values: Tensor, generator: torch.Generator) -> Tensor:
    signs = 2.0 * torch.randint(0, 2, values.shape, generator=generator).to(values) - 1
    return signs - signs.mean(-1, keepdim=True)
