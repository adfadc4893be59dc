"""The Gauss-Newton matrix beside the exact Hessian: a control variate of its traces, and where its largest values are.

A probe's ``v^T H v`` wanders because of what is off the diagonal of H, and nearly all of that is in the Gauss-Newton
matrix, which a few passes with per-sample gradients know. Of ``R^T R / n`` with such rows R both ``v^T R^T R v`` and
the trace are known exactly, whatever the rows are: ``v^T H v`` less the one and plus the other has the same mean. Of a
network that is piecewise linear in a layer's weights nothing is left to wander. And as the largest eigenvalues of the
two nearly share their vectors, products with the one matrix tell where Hutch++ has to look in the other.
Source: control variates, Hammersley and Handscomb 1964; Schraudolph 2002 for the matrix.
Cost: ``MOST`` passes over the data with per-sample gradients, for all layers and probes; a byte a weight and probe.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..context import Progress
from ..data import Data
from ..numerics.trace import Control
from ..task import Task
from .loss_factor import Draw, period
from .network import PASS_BATCH, Network, batches
from .recording import Recorder
from .sample_gradients import layer_rows

MOST = 16  # probes of an example; fewer where they are complete
Signs = Callable[[str, range], Tensor]  # the probes ``[k, d]`` of a layer that a range numbers


@dataclass(frozen=True, slots=True)
class Known:
    """What is known of a layer's block of a Gauss-Newton matrix.

    Attributes:
        sketch: ``[k, d]``: the block times each of the first k probes.
    """

    control: Control
    sketch: Tensor


def gauss_newton_blocks(
    network: Network,
    task: Task,
    data: Data,
    signs: Signs,
    count: int,
    *,
    num_sketched: int,
    seed: int,
    progress: Progress,
) -> dict[str, Known]:
    """What the first ``count`` probes of every layer give of a Gauss-Newton matrix, and its blocks' traces.

    Args:
        signs: Of a layer's tensor; the same for the same number.
        num_sketched: Of the probes, how many get a product each: 4 bytes a weight.

    Raises:
        UsageError: Examples have no gradients of their own, or the loss has no matrix that is known.
        NumericsError: An output or a gradient isn't finite; names the examples and the layer.
    """
    names = [layer.tensor for layer in network.layers]
    traces = dict.fromkeys(names, 0.0)
    values = {name: torch.zeros(count, dtype=torch.float64) for name in names}
    sketches = {layer.tensor: _zeros(network, num_sketched, layer.elements) for layer in network.layers}
    drawn: dict[str, Tensor] = {}
    recorder, made = Recorder(network), 0
    for start, batch in zip(range(0, len(data), PASS_BATCH), batches(network, data), strict=True):
        progress("Gauss-Newton matrix", start, len(data))
        outputs, uses = recorder.record(batch.inputs)
        made = min(period(task, outputs) or MOST, MOST)

        def receive(tensor: str, rows: Tensor) -> None:
            if tensor in values:
                traces[tensor] += float(torch.linalg.vector_norm(rows, dtype=torch.float64)) ** 2
                if tensor not in drawn:
                    drawn[tensor] = signs(tensor, range(count)).to(torch.int8)
                images = rows @ drawn[tensor].to(rows.dtype).T
                values[tensor] += images.double().square().sum(0).cpu()
                sketches[tensor] += images[:, :num_sketched].T @ rows

        for probe in range(made):
            draw = Draw(seed, range(start, start + len(batch)), probe, data.name)
            is_last = probe + 1 == made
            layer_rows(network, task, batch, outputs, uses, draw, receive, mode="ggn", is_last=is_last)
    progress("Gauss-Newton matrix", len(data), len(data))
    rows = max(1, len(data) * made)
    return {
        name: Known(Control(traces[name] / rows, tuple((values[name] / rows).tolist())), sketches[name] / rows)
        for name in names
    }


def _zeros(network: Network, count: int, d: int) -> Tensor:
    return torch.zeros(count, d, dtype=network.dtype, device=network.device)
