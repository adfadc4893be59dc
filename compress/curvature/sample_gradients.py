"""Per-sample gradients of the layers' weights: one row of G for each example, without a loop over examples.

A layer's weight gradient for one example is a product of its input and of its output's gradient; both are known for the
whole batch after one backward pass (Goodfellow 2015, arXiv:1510.01799). A linear layer is one batched matrix product; a
convolution, of any kind, a convolution with the examples as groups. A weight that is used by anything else as well, or
by a layer whose input has the batch merged with another dimension, takes a pass an example. Cost: a forward and a
backward pass, as much again for the rows, and n times d numbers.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..context import Progress
from ..data import Data
from ..errors import UsageError
from ..graph.trace import batch_statistics
from ..numerics.mfac import Gradients, new_gradients
from ..task import Task
from .gradient_rules import Use, rows_of
from .loss_factor import Draw, cotangents
from .network import PASS_BATCH, Network, batches, differentiable, outputs_of, record, require_finite


def sample_gradients(
    network: Network,
    task: Task,
    data: Data,
    *,
    mode: str,
    generator: torch.Generator,
    progress: Progress,
    keep: Tensor | None = None,
    draws: int = 1,
    first: int = 0,
    step: int = 1,
    memory: int = sys.maxsize,
) -> Gradients:
    """``G`` ``[m, d]`` in the weights' dtype, m = examples times draws; column order as ``Network.flat``.

    Args:
        mode: Of ``cotangents``: ``ggn``, ``sampled`` or ``labels``.
        keep: ``[d]`` bool: the columns wanted; all where None.
        draws: Successive rows of each example, from one forward pass.
        first: Number of the first example, for seeds and messages.
        step: Of the examples, one in so many is taken.
        memory: Bytes that G may take; a larger one lies in a file.

    Raises:
        UsageError: The mode needs labels and there are none.
        NumericsError: An output or a row isn't finite; names the examples and the layer.
        DiskError: There is no room for the file.
    """
    columns = _columns(network, keep)
    width = network.num_weights if keep is None else int(keep.sum())
    numbers, data = range(first, first + len(data), step), data.every(step)
    rows = new_gradients(len(data) * draws, width, network.dtype, memory=memory, device=network.device)
    seed = draw_seed(generator)
    found = gradient_rows(network, task, data, mode=mode, seed=seed, numbers=numbers, draws=range(draws))
    for part, draw, tensor, values in found:
        progress("per-sample gradients", part.start, len(data))
        column, chosen = columns[tensor]
        values = values if chosen is None else values[:, chosen]
        of_draw = slice(part.start * draws + draw, part.stop * draws, draws)
        rows[of_draw, column : column + values.shape[1]] = values
    progress("per-sample gradients", len(data), len(data))
    return rows


def draw_seed(generator: torch.Generator) -> int:
    """The one random number of a run: all others follow from it and the examples' numbers."""
    return int(torch.randint(2**31, (), generator=generator))


def gradient_rows(
    network: Network, task: Task, data: Data, *, mode: str, seed: int, numbers: Sequence[int], draws: Sequence[int]
) -> Iterator[tuple[slice, int, str, Tensor]]:
    """Rows of one batch, draw and layer after the other; only one of them is in memory.

    Args:
        numbers: Of the examples, for seeds and messages.
        draws: Numbers of the draws of each example.

    Yields:
        Which examples, which of the draws, the layer's tensor, and its rows ``[n, elements]``.
    """
    for start, batch in zip(range(0, len(data), PASS_BATCH), batches(network, data), strict=True):
        part = slice(start, start + len(batch))
        outputs, uses = record(network, batch.inputs)
        for number in draws:
            draw = Draw(seed, numbers[part], number, data.name)
            for tensor, rows in layer_rows(network, task, batch, outputs, uses, draw, mode=mode):
                yield part, number, tensor, rows


def layer_rows(
    network: Network, task: Task, batch: Data, outputs: Any, uses: Sequence[Use], draw: Draw, *, mode: str
) -> Iterator[tuple[str, Tensor]]:
    """The rows ``[n, elements]`` of one layer after the other, summed over the uses of its weight; none is kept.

    Args:
        outputs: Of ``record``, with ``uses``; it may be called again with another draw.

    Raises:
        UsageError: A batch norm mixes the examples.
        NumericsError: A gradient isn't finite; names the examples and the layer.
    """
    if mixing := batch_statistics(network.module.graph):
        raise UsageError(
            f"{mixing[0]} takes its statistics from the batch, so that examples have no gradients of their own",
            hint="use batch norms with running statistics, --trace hessian, or --method magnitude or uniform",
        )
    probe = cotangents(task, outputs, batch.targets, draw, mode=mode)
    found = gradients_of(outputs_of(outputs), [use.output for use in uses], probe)
    by_tensor: dict[str, list[tuple[Use, Tensor]]] = {tensor: [] for tensor in network.weights}
    for use, gradient in zip(uses, found, strict=True):
        if gradient is not None:
            by_tensor[use.tensor].append((use, gradient))
    looped = _one_by_one(network, batch, probe)
    for tensor, weight in network.weights.items():
        parts = [rows_of(use, gradient) for use, gradient in by_tensor[tensor]]
        if tensor in looped:
            parts.append(looped[tensor])
        rows = parts.pop() if parts else weight.new_zeros(len(batch), weight.numel())
        for part in parts:
            rows = rows + part
        require_finite(rows, f"the gradient of {tensor}", draw.examples, draw.name)
        yield tensor, rows


def gradients_of(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], probe: Sequence[Tensor]
) -> tuple[Tensor | None, ...]:
    """Gradients of ``outputs`` times ``probe`` in ``inputs``; None where there is none."""
    reached = [(output, cotangent) for output, cotangent in zip(outputs, probe, strict=True) if output.requires_grad]
    if not reached or not inputs:
        return (None,) * len(inputs)
    values, weights = zip(*reached, strict=True)
    return torch.autograd.grad(values, inputs, weights, retain_graph=True, allow_unused=True)


def _columns(network: Network, keep: Tensor | None) -> dict[str, tuple[int, Tensor | None]]:
    """Where each layer's columns start, and which of its weights have one."""
    columns: dict[str, tuple[int, Tensor | None]] = {}
    start = 0
    masks = {} if keep is None else network.split(keep.to(network.device))
    for tensor, weight in network.weights.items():
        chosen = masks[tensor].flatten().nonzero().flatten() if masks else None
        columns[tensor] = (start, chosen)
        start += weight.numel() if chosen is None else len(chosen)
    return columns


def _one_by_one(network: Network, batch: Data, probe: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Rows of the looped tensors: a forward and a backward pass an example."""
    names = sorted(network.looped)
    if not names:
        return {}
    found = []
    with differentiable(network, names) as weights, torch.enable_grad():
        for i in range(len(batch)):
            values = outputs_of(network.module(*(x[i : i + 1] for x in batch.inputs)))
            parts = gradients_of(values, weights, [p[i : i + 1] for p in probe])
            found.append([torch.zeros_like(w) if g is None else g for w, g in zip(weights, parts, strict=True)])
    return {name: torch.stack(rows).flatten(1) for name, rows in zip(names, zip(*found, strict=True), strict=True)}
