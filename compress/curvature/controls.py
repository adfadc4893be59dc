"""The Gauss-Newton matrix beside the exact Hessian: a control variate of its traces, and where its largest values are.

A probe's ``v^T H v`` wanders because of what is off the diagonal of H, and nearly all of that is in the Gauss-Newton
matrix, which a few passes with per-sample gradients know. Of ``R^T R / n`` with such rows R both ``v^T R^T R v`` and
the trace are known exactly, whatever the rows are: ``v^T H v`` less the one and plus the other has the same mean. Of a
network that is piecewise linear in a layer's weights nothing is left to wander. And as the largest eigenvalues of the
two nearly share their vectors, products with the one matrix tell where Hutch++ has to look in the other.
Source: control variates, Hammersley and Handscomb 1964; Schraudolph 2002 for the matrix.
Cost: ``MOST`` passes over the data with per-sample gradients, or ``factors`` of them where that is less, and a product
with those for each layer and probe; a byte a weight and probe.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..context import Progress
from ..data import Data
from ..graph.trace import Layer
from ..numerics.trace import Control
from ..task import Task
from .factors import Factors, UseGradients, factored, factors_of, squared_row_norms
from .loss_factor import Draw, period
from .network import PASS_BATCH, Network, batches, require_finite
from .recording import Recorder
from .sample_gradients import layer_rows

HELD_BYTES = 2**27  # of output gradients
AT_ONCE = 8  # products of factors
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
    sums = {layer.tensor: _Sums(signs, layer, count, _zeros(network, num_sketched, layer)) for layer in network.layers}
    recorder = Recorder(network)
    made, chosen, size = _ways(recorder, task, data, count + num_sketched)
    for start, batch in zip(range(0, len(data), size), batches(network, data, size), strict=True):
        progress("Gauss-Newton matrix", start, len(data))
        outputs, uses = recorder.record(batch.inputs)
        held: dict[str, list[UseGradients]] = {tensor: [] for tensor in chosen & sums.keys()}
        receivers = {tensor: draws.append for tensor, draws in held.items()}

        def receive(tensor: str, rows: Tensor) -> None:
            if tensor in sums:
                sums[tensor].add_rows(rows)

        for probe in range(made):
            draw = Draw(seed, range(start, start + len(batch)), probe, data.name)
            layer_rows(
                network,
                task,
                batch,
                outputs,
                uses,
                draw,
                receive,
                mode="ggn",
                is_last=probe + 1 == made,
                factored=receivers,
            )
        for tensor, draws in held.items():
            if draws:  # the loss depends on what reads it
                norms = sums[tensor].add_factors(factors_of(draws))
                require_finite(norms, f"the gradient of {tensor}", draw.examples, data.name)
            draws.clear()
    progress("Gauss-Newton matrix", len(data), len(data))
    return {tensor: found.known(len(data) * made) for tensor, found in sums.items()}


class _Sums:
    """What is added up of a layer's rows: squared norms, squared products with the probes, and rows times products."""

    def __init__(self, signs: Signs, layer: Layer, count: int, sketch: Tensor) -> None:
        drawn = [signs(layer.tensor, range(number, number + 1)).to(torch.int8) for number in range(count)]
        self.probes = torch.cat(drawn)  # [k, d]
        self.shape = (layer.shape[0], layer.elements // layer.shape[0])
        self.trace = 0.0
        self.values = torch.zeros(count, dtype=torch.float64)
        self.sketch = sketch

    def add_rows(self, rows: Tensor) -> None:
        """Rows ``[n, d]``."""
        self.trace += float(squared_row_norms(rows, self.shape[0]).sum())
        images = rows @ self.probes.to(rows.dtype).T
        self.values += images.double().square().sum(0).cpu()
        self.sketch += images[:, : len(self.sketch)].T @ rows

    def add_factors(self, factors: Factors) -> Tensor:
        """Rows that aren't made; gives their squared norms ``[n, draws]``."""
        norms = factors.squared_norms()
        self.trace += float(norms.sum())
        for start in range(0, len(self.probes), AT_ONCE):
            images = factors.times(self.probes[start : start + AT_ONCE].reshape(-1, *self.shape))
            self.values[start : start + AT_ONCE] += images.double().square().sum((0, 2)).cpu()
            for sketch, image in zip(self.sketch[start : start + AT_ONCE], images.unbind(1), strict=False):
                sketch += factors.summed(image).flatten()
        return norms

    def known(self, num_rows: int) -> Known:
        """The block of the mean over so many rows."""
        values = tuple((self.values / num_rows).tolist())
        return Known(Control(self.trace / num_rows, values), self.sketch / num_rows)


def _ways(recorder: Recorder, task: Task, data: Data, vectors: int) -> tuple[int, frozenset[str], int]:
    """The probes of an example, the weights whose rows aren't made, and the examples of a pass.

    Factors wait for all probes of a pass. Their gradients fit in ``HELD_BYTES``, or take no more than a pass of
    ``PASS_BATCH`` examples holds anyway.
    """
    network = recorder.network
    outputs, uses = recorder.record(next(batches(network, data, 1)).inputs)
    made = min(period(task, outputs) or MOST, MOST)
    chosen = factored(uses, draws=made, vectors=vectors)
    sizes = [math.prod(use.shape) * network.dtype.itemsize for use in uses if use.tensor in chosen]
    size = max(PASS_BATCH // (made + 1), HELD_BYTES // max(1, made * sum(sizes)), 1)
    return made, chosen, min(size, PASS_BATCH)


def _zeros(network: Network, count: int, layer: Layer) -> Tensor:
    return torch.zeros(count, layer.elements, dtype=network.dtype, device=network.device)
