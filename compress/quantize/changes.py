"""What rounding one tensor does to the network's outputs: the loss that it alone costs, from cached forward passes.

The network runs once on a batch; for each variant of a weight, and each grid of an activation, only the nodes that
depend on it run again. Cost: a forward pass from there on for each of them, and the batch's activations held at once.
"""

from __future__ import annotations

import itertools
import math
from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from ..context import Context
from ..data import Data
from ..graph.channel_rules import shape_of
from ..graph.rewrite import (
    Grid,
    after_norms,
    on_device,
    put_tensor,
    rounded_to,
    split_reads,
    tensor_at,
    unlift,
    writes_in_place,
)
from ..graph.trace import Graph
from ..reconstruct.side_by_side import attribute_of, call
from ..task import Task, divergences, floating, has_logits

MOST_ELEMENTS = 2**27  # of all activations of a batch
BATCH = 16
TEMPERATURE = 2.0  # that logits are divided by: of examples that a network was trained on it is all too sure
SELDOM = 0.1  # of the mean share: how often an example is drawn at least
PREDICTIONS = 4096  # of outputs with many for an example: fewer examples are drawn


def loss_changes(
    graph: Graph,
    variants: Mapping[str, Sequence[Tensor]],
    grids: Mapping[str, Sequence[Grid]],
    data: Data,
    task: Task,
    context: Context,
    *,
    counts: Tensor | None = None,
    temperature: float = 1.0,
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """How far the outputs are from the dense network's, on average, with each variant of each tensor alone.

    Args:
        variants: Of the weight's shape, by state-dict key.
        grids: That an activation is rounded to, by its name once batch norms are folded.
        counts: ``[n]``: how many examples each of ``data`` stands for; one each where that isn't given.
        temperature: That logits are divided by. What is found is put in units of the loss: times what all of it
            together would be at 1.

    Returns:
        Of weights, and of activations.
    """
    are_logits = has_logits(task)
    heat = temperature if are_logits else 1.0
    plain, count, done = 0.0, 0.0, 0
    counts = torch.ones(len(data)) if counts is None else counts

    def moved_by(reference: list[Tensor], outputs: list[Tensor], stands: Tensor) -> float:
        moved = divergences(reference, outputs, are_logits=are_logits).reshape(len(stands), -1)
        return float(stands.to(moved) @ moved.mean(1))

    changes: list[tuple[str, Tensor | Grid]] = [
        (name, value) for table in (variants, grids) for name, values in table.items() for value in values
    ]
    found = [0.0] * len(changes)
    for one in passes(graph, data, context):
        stands = counts[done : done + one.size]
        for place, (name, value) in enumerate(changes):
            context.progress("output changes", done * len(changes) + place * one.size, len(data) * len(changes))
            moved = one.outputs({name: value})
            plain += moved_by(one.reference, moved, stands)
            found[place] += moved_by(_cooled(one.reference, heat), _cooled(moved, heat), stands)
        count += float(stands.sum())
        done += one.size
    context.progress("output changes", len(data) * len(changes), len(data) * len(changes))
    whole = sum(found)
    unit = plain / whole / count if whole else 0.0
    left = iter([loss * unit for loss in found])
    weights_found, activations_found = (
        {name: list(itertools.islice(left, len(own))) for name, own in table.items()} for table in (variants, grids)
    )
    return weights_found, activations_found


@dataclass(frozen=True, slots=True)
class Pass:
    """A batch that went through the dense network.

    Attributes:
        size: Examples.
        reference: The network's floating outputs.
        outputs: The same with other weights, by state-dict key, or with activations on a grid, by the names that they
            have once batch norms are folded: what doesn't depend on them isn't run again.
    """

    size: int
    reference: list[Tensor]
    outputs: Callable[[Mapping[str, Tensor | Grid]], list[Tensor]]


def passes(graph: Graph, data: Data, context: Context) -> Iterator[Pass]:
    """Each batch in turn; its activations are dropped with it."""
    module = on_device(split_reads(unlift(graph.program, graph.tied)), context.device)
    nodes = list(module.graph.nodes)
    stored = {str(node.target): node for node in nodes if node.op == "get_attr"}
    named = {node.name: node for node in nodes}
    is_in_place = writes_in_place(module.graph)
    after: dict[frozenset[fx.Node], list[fx.Node]] = {}
    for batch in data.batches(_batch_size(graph)):
        known = dict(zip((n for n in nodes if n.op == "placeholder"), batch.inputs, strict=True))
        known = {node: value.to(context.device) for node, value in known.items()}
        with torch.no_grad():
            for node in nodes:
                if node not in known:
                    known[node] = _value(module, node, known)

        def outputs(changes: Mapping[str, Tensor | Grid], known: dict[fx.Node, Any] = known) -> list[Tensor]:
            made: dict[fx.Node, Callable[[Tensor], Tensor]] = {}
            for name, value in changes.items():
                if isinstance(value, Grid):
                    made[after_norms(named[name])] = partial(rounded_to, grid=value)
                else:
                    made[stored[name]] = partial(_given, value.to(context.device))
            starts = frozenset(made)
            if starts not in after:
                # An operator that writes into its input would write into what was kept: then all of it runs again.
                after[starts] = _depends_on(None if is_in_place else starts, nodes)
            with torch.no_grad():
                return floating(_run(module, after[starts], known, made))

        yield Pass(len(batch), floating(known[nodes[-1]]), outputs)


def _given(weight: Tensor, value: Tensor) -> Tensor:
    return weight


def _cooled(values: list[Tensor], heat: float) -> list[Tensor]:
    return [value / heat for value in values]


def telling_examples(
    graph: Graph,
    weights: Mapping[str, Tensor],
    data: Data,
    count: int,
    task: Task,
    context: Context,
    *,
    temperature: float = 1.0,
) -> tuple[Data, Tensor]:
    """So few examples that the means over them are near to those over all, and how many each one stands for.

    They are drawn at even steps through all examples, each as often as the root of how far its outputs move; what is
    drawn often stands for few (importance sampling).

    Args:
        weights: By state-dict key: what moves the outputs, all at once.
        count: At most so many, and no more than make ``PREDICTIONS``; all where there are no more.
    """
    are_logits = has_logits(task)
    heat = temperature if are_logits else 1.0
    module, moving = (on_device(unlift(graph.program, graph.tied), context.device) for _ in range(2))
    for name, weight in weights.items():
        put_tensor(moving, name, weight.to(tensor_at(moving, name)))
    parts = []
    with torch.no_grad():
        for batch in data.batches(_batch_size(graph)):
            inputs = tuple(x.to(context.device) for x in batch.inputs)
            reference, outputs = (_cooled(floating(network(*inputs)), heat) for network in (module, moving))
            parts.append(divergences(reference, outputs, are_logits=are_logits).reshape(len(batch), -1).cpu())
    moved = torch.cat(parts)
    count = min(count, max(1, PREDICTIONS // moved.shape[1]))
    if len(data) <= count:
        return data, torch.ones(len(data))
    share = moved.mean(1).sqrt()
    share = share + (SELDOM * share.mean() or 1.0)
    share = share / share.sum()
    places = torch.searchsorted(share.cumsum(0), (torch.arange(count, dtype=torch.float64) + 0.5) / count)
    chosen, times = torch.unique(places.clamp_max(len(data) - 1), return_counts=True)
    return data.at(chosen), (times / (count * share[chosen])).float()


def _batch_size(graph: Graph) -> int:
    """Examples whose activations are held at once."""
    batch = len(graph.example_inputs[0])
    elements = sum(math.prod(shape_of(n)) for n in graph.program.graph.nodes if n.op == "call_function")
    return max(1, min(BATCH, MOST_ELEMENTS * batch // max(1, elements)))


def _depends_on(starts: frozenset[fx.Node] | None, nodes: Sequence[fx.Node]) -> list[fx.Node]:
    """The nodes that read one of some values, directly or not, in order; None for the inputs and all weights."""
    if starts is None:
        return [node for node in nodes if node.op not in ("placeholder", "get_attr")]
    reached = set(starts)
    for node in nodes:
        if any(source in reached for source in node.all_input_nodes):
            reached.add(node)
    return [node for node in nodes if node in reached and (node not in starts or reached & set(node.all_input_nodes))]


def _run(
    module: fx.GraphModule,
    nodes: Sequence[fx.Node],
    known: dict[fx.Node, Any],
    made: Mapping[fx.Node, Callable[[Tensor], Tensor]],
) -> Any:
    """The value of the last of ``nodes``; their own are dropped once they have been read.

    Args:
        known: Values from before.
        made: What becomes of a node's value before anything reads it.
    """
    values = {node: change(known[node]) for node, change in made.items() if node not in nodes}
    layered = ChainMap(values, known)
    last = {source: node for node in nodes for source in node.all_input_nodes}
    for node in nodes:
        value = _value(module, node, layered)
        values[node] = made[node](value) if node in made else value
        for source in node.all_input_nodes:
            if last[source] is node:
                values.pop(source, None)
    return values[nodes[-1]]


def _value(module: fx.GraphModule, node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
    if node.op == "get_attr":
        return attribute_of(module, node)
    return fx.node.map_arg(node.args[0], lambda source: values[source]) if node.op == "output" else call(node, values)
