"""Per-sample gradients of the weights: a row of G for each example, or for each few, without a loop over examples.

A layer's weight gradient for one example is a product of its input and of its output's gradient; both are known for the
whole batch in one backward pass (Goodfellow 2015, arXiv:1510.01799), where a hook at each use of a weight makes the
rows while the gradient is at hand, and keeps neither. A linear layer is one batched matrix product; a convolution, of
any kind, a convolution with the examples as groups. What else reads a weight is differentiated by ``torch.func``; a
weight that something reads whose input has the batch merged with another dimension takes a pass an example. Cost: a
forward and a backward pass, as much again for the rows, and n times d numbers.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..context import Progress
from ..data import Data
from ..errors import UsageError
from ..graph.trace import batch_statistics
from ..numerics.mfac import Gradients, new_gradients
from ..task import Task
from .factors import UseGradients
from .gradient_rules import Use, rows_of, summed
from .loss_factor import Draw, cotangents
from .network import PASS_BATCH, Network, batches, differentiable, outputs_of, require_finite
from .recording import Recorder


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
    group: int = 1,
    first: int = 0,
    step: int = 1,
    memory: int = sys.maxsize,
) -> Gradients:
    """``G`` ``[m, d]`` in the weights' dtype, m = groups of examples times draws; column order as ``Network.flat``.

    Args:
        mode: Of ``cotangents``: ``ggn``, ``sampled`` or ``labels``.
        keep: ``[d]`` bool: the columns wanted; all where None.
        draws: Successive rows of each group, from one forward pass.
        group: Successive examples whose gradients are summed in a row; the last one has those that are left.
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
    rows = new_gradients(-(-len(data) // group) * draws, width, network.dtype, memory=memory, device=network.device)
    seed = draw_seed(generator)

    def write(part: slice, draw: int, tensor: str, values: Tensor) -> None:
        column, chosen = columns[tensor]
        values = values if chosen is None else values[:, chosen]
        of_draw = slice(part.start * draws + draw, part.stop * draws, draws)
        rows[of_draw, column : column + values.shape[1]] = values

    gradient_rows(
        network,
        task,
        data,
        write,
        mode=mode,
        seed=seed,
        numbers=numbers,
        draws=range(draws),
        progress=progress,
        group=group,
    )
    return rows


def draw_seed(generator: torch.Generator) -> int:
    """The one random number of a run: all others follow from it and the examples' numbers."""
    return int(torch.randint(2**31, (), generator=generator))


def gradient_rows(
    network: Network,
    task: Task,
    data: Data,
    receive: Callable[[slice, int, str, Tensor], None],
    *,
    mode: str,
    seed: int,
    numbers: Sequence[int],
    draws: Sequence[int],
    progress: Progress,
    group: int = 1,
) -> None:
    """Make the rows of all examples, batch by batch and draw by draw; none is kept.

    Args:
        receive: Is given which rows, of which draw, of which tensor, and the rows ``[n, elements]``, as they are made.
        numbers: Of the examples, for seeds and messages.
        draws: Numbers of the draws of each example.
        group: Successive examples of a row.
    """
    recorder, size = Recorder(network), max(PASS_BATCH // group, 1) * group
    for start, batch in zip(range(0, len(data), size), batches(network, data, size), strict=True):
        progress("per-sample gradients", start, len(data))
        part = slice(start // group, -(-(start + len(batch)) // group))
        outputs, uses = recorder.record(batch.inputs)
        for number in draws:
            draw = Draw(seed, numbers[start : start + len(batch)], number, data.name)
            layer_rows(
                network,
                task,
                batch,
                outputs,
                uses,
                draw,
                partial(receive, part, number),
                mode=mode,
                group=group,
                is_last=number == draws[-1],
            )
    progress("per-sample gradients", len(data), len(data))


def layer_rows(
    network: Network,
    task: Task,
    batch: Data,
    outputs: Any,
    uses: Sequence[Use],
    draw: Draw,
    receive: Callable[[str, Tensor], None],
    *,
    mode: str,
    group: int = 1,
    is_last: bool = True,
    factored: Mapping[str, Callable[[UseGradients], None]] | None = None,
) -> None:
    """Make the rows of a batch, ``[ceil(n / group), elements]`` of each tensor, in the order of the backward pass.

    Args:
        outputs: Of a recorder, with ``uses``.
        receive: Is given each tensor once, with its rows, summed over its uses.
        factored: Of tensors whose rows aren't made: each is given its uses' output gradients, if it has any.
        is_last: Whether no other draw is made of the same outputs.

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
    waiting = Counter(use.tensor for use in uses)
    sums: dict[str, Tensor] = {}
    factored = factored or {}
    held: dict[str, list[tuple[Use, Tensor]]] = {}
    given = set(factored)

    def add(tensor: str, rows: Tensor) -> None:
        sums[tensor] = sums[tensor] + rows if tensor in sums else rows

    def give(tensor: str) -> None:
        rows, weight = sums.pop(tensor, None), network.weights[tensor]
        if rows is None:  # nothing that the loss depends on reads it
            rows = weight.new_zeros(-(-len(batch) // group), weight.numel())
        require_finite(rows, f"the gradient of {tensor}", _names(draw.examples, group), draw.name)
        given.add(tensor)
        receive(tensor, rows)

    def take(use: Use, gradient: Tensor) -> None:
        tensor = use.tensor
        if tensor in factored:
            held.setdefault(tensor, []).append((use, gradient))
        else:
            add(tensor, rows_of(use, gradient, group=group))
        waiting[tensor] -= 1
        if waiting[tensor]:
            return
        if tensor in factored:
            factored[tensor](held.pop(tensor))
        else:
            give(tensor)

    _pull_back(outputs_of(outputs), probe, uses, take, retain_graph=not is_last)
    for tensor, gradients in held.items():  # other uses of it have none
        factored[tensor](gradients)
    for tensor, rows in _one_by_one(network, batch, probe).items():
        add(tensor, summed(rows, group))
    for tensor in network.weights:
        if tensor not in given:
            give(tensor)


def _pull_back(
    outputs: Sequence[Tensor],
    probe: Sequence[Tensor],
    uses: Sequence[Use],
    take: Callable[[Use, Tensor], None],
    *,
    retain_graph: bool,
) -> None:
    """One backward pass of ``outputs`` times ``probe``; ``take`` gets the gradient of each use's output as it comes."""
    reached = [(output, cotangent) for output, cotangent in zip(outputs, probe, strict=True) if output.requires_grad]
    if not reached or not uses:
        return
    starts = [use for use in uses if not use.edge.node.next_functions]  # whose inputs depend on no use
    edges = list(dict.fromkeys(use.edge for use in starts))

    def hook(use: Use, gradients: tuple[Tensor | None, ...]) -> None:
        gradient = gradients[use.edge.output_nr]
        if gradient is not None:
            take(use, gradient)

    handles = [use.edge.node.register_prehook(partial(hook, use)) for use in uses if use.edge.node.next_functions]
    try:
        values, weights = zip(*reached, strict=True)
        found = torch.autograd.grad(values, edges, weights, retain_graph=retain_graph, allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()
    by_edge = dict(zip(edges, found, strict=True))
    for use in starts:
        if (gradient := by_edge[use.edge]) is not None:
            take(use, gradient)


def _names(examples: Sequence[int], group: int) -> Sequence[int | str]:
    """Of the rows of some examples, for messages."""
    if group == 1:
        return examples
    parts = [examples[start : start + group] for start in range(0, len(examples), group)]
    return [f"{part[0]}-{part[-1]}" for part in parts]


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
            pairs = [(value, p[i : i + 1]) for value, p in zip(values, probe, strict=True) if value.requires_grad]
            total = sum(((value * p).sum() for value, p in pairs), torch.zeros((), device=network.device))
            parts = torch.autograd.grad(total, weights, allow_unused=True) if pairs else [None] * len(weights)
            found.append([torch.zeros_like(w) if g is None else g for w, g in zip(weights, parts, strict=True)])
    return {name: torch.stack(rows).flatten(1) for name, rows in zip(names, zip(*found, strict=True), strict=True)}
