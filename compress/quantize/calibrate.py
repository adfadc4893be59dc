"""Ranges of activations, measured on calibration data: their extremes at 8 bits, clipped to the least error below.

Source: Nagel et al. 2021 (arXiv:2106.08295), section 3.1. Cost: one forward pass over the calibration examples, and one
more below 8 bits.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx

from ..apply import float_module
from ..context import Context, Progress
from ..curvature.network import require_finite
from ..data import Data
from ..errors import UsageError
from ..graph.rewrite import Grid, activation_points, feeds_layer, is_read, on_device, operand, points_for, rounded_to
from ..graph.trace import Graph
from ..numerics.rounding import between_steps, clipped_range
from ..plan import WIDEST, Quantize
from ..settings import MIXED

CPU = torch.device("cpu")
BATCH = 16  # larger ones cost memory and are no faster
BINS = 2048  # of an activation's values between its extremes


class _Watcher(fx.Interpreter):
    """Runs a graph and shows the values of some of its nodes, with the numbers of the examples that are run."""

    def __init__(
        self, module: fx.GraphModule, names: Collection[str], seen: Callable[[str, Tensor, range], None]
    ) -> None:
        super().__init__(module)
        self.names, self.seen, self.examples = names, seen, range(0)

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.name in self.names and isinstance(value, Tensor):
            self.seen(n.name, value, self.examples)
        return value

    def run_all(self, data: Data, what: str, progress: Progress, device: torch.device) -> None:
        with torch.no_grad():
            for done, batch in enumerate(data.batches(BATCH)):
                progress(what, done * BATCH, len(data))
                self.examples = range(done * BATCH, done * BATCH + len(batch))
                self.run(*(x.to(device) for x in batch.inputs))
        progress(what, len(data), len(data))


def calibrated(graph: Graph, data: Data | None, activations: str, context: Context) -> dict[str, tuple[float, float]]:
    """The range of every activation that may be rounded, by name; none where ``activations`` is ``float``.

    Args:
        activations: Bits, ``float``, or ``mixed``: the ranges of eight bits.

    Raises:
        UsageError: There are no data.
    """
    if activations == "float":
        return {}
    if data is None:
        raise UsageError(
            f"{activations}-bit activations are calibrated on data, and none were given",
            hint="pass --data FILE.npz or FILE.py:fn(args), or --activations float",
        )
    module = float_module(graph)
    points = [node.name for node in activation_points(module)]
    ranges = activation_ranges(module, points, data, context.progress, device=context.device)
    if activations in (MIXED, str(WIDEST)):
        return ranges
    narrow = {node.name for node in module.graph.nodes if _is_narrow(node)}
    found = {name: ends for name, ends in ranges.items() if name in narrow}
    bits = int(activations)
    return ranges | clipped_ranges(module, found, (bits,), data, context.progress, device=context.device)[bits]


def activation_decisions(
    graph: Graph,
    ranges: Mapping[str, tuple[float, float]],
    integer: Collection[str],
    activations: str,
    chosen: Mapping[str, tuple[int, tuple[float, float]]] = MappingProxyType({}),
) -> tuple[Quantize, ...]:
    """The grids of the activations around integer layers: what float layers read stays as it is.

    Args:
        ranges: Of ``calibrated``.
        integer: Weights with integers, by state-dict key.
        activations: Bits of what layers read, ``float``, or ``mixed``; the network's inputs, and what other ops alone
            read, have eight.
        chosen: Bits and range of those that have widths of their own.
    """
    if not ranges:
        return ()
    points = [node for node in points_for(float_module(graph), integer) if node.name in ranges]
    narrow = WIDEST if activations == MIXED else int(activations)
    own = {node.name: (narrow if _is_narrow(node) else WIDEST, ranges[node.name]) for node in points}
    own |= {name: found for name, found in chosen.items() if name in own}
    for node in points:
        if is_read(node) and own[node.name] == own.get(operand(node, 0).name):
            del own[node.name]  # layers read the value as it is
    return tuple(Quantize(name, "activation", bits, "asymmetric", None, ends) for name, (bits, ends) in own.items())


def _is_narrow(node: fx.Node) -> bool:
    """Whether an activation has as many bits as are asked for, rather than eight."""
    return node.op != "placeholder" and feeds_layer(node)


def activation_ranges(
    module: fx.GraphModule, points: Collection[str], data: Data, progress: Progress, *, device: torch.device = CPU
) -> dict[str, tuple[float, float]]:
    """Least and greatest value of each activation in ``points``, zero included.

    Raises:
        NumericsError: An activation isn't finite; names it.
    """
    ranges = dict.fromkeys(points, (0.0, 0.0))

    def seen(name: str, value: Tensor, examples: range) -> None:
        low, high = (float(v) for v in torch.aminmax(value))
        if not (abs(low) < float("inf") and abs(high) < float("inf")):
            numbers = examples if value.dim() and len(value) == len(examples) else examples[:1]
            rows = value if len(numbers) == len(examples) else value.reshape(1, -1)
            require_finite(rows, f"activation {name}", numbers, data.name)
        ranges[name] = (min(ranges[name][0], low), max(ranges[name][1], high))

    watcher = _Watcher(on_device(module, device), ranges, seen)
    watcher.run_all(data, "calibrate activations", progress, device)
    return ranges


def clipped_ranges(
    module: fx.GraphModule,
    ranges: Mapping[str, tuple[float, float]],
    widths: Sequence[int],
    data: Data,
    progress: Progress,
    *,
    device: torch.device = CPU,
) -> dict[int, dict[str, tuple[float, float]]]:
    """By width: the part of each activation's range whose grid of so many bits rounds its values with the least error.

    A range without extent stays as it is.
    """
    counts: dict[str, Tensor] = {}

    def seen(name: str, value: Tensor, examples: range) -> None:
        found = torch.histc(value.float(), BINS, *ranges[name]).double().cpu()
        counts[name] = counts[name] + found if name in counts else found

    wide = {name: ends for name, ends in ranges.items() if ends[0] < ends[1]}
    watcher = _Watcher(on_device(module, device), wide, seen)
    watcher.run_all(data, "clip activations", progress, device)
    found = {bits: {name: clipped_range(counts[name], *wide[name], bits) for name in counts} for bits in widths}
    reads = [node.name for node in module.graph.nodes if node.name in counts and is_read(node)]
    for bits, name in itertools.product(widths, reads):  # of a value that has eight bits by then
        found[bits][name] = between_steps(*found[bits][name], bits, wide[name])
    return {bits: {**ranges, **clipped} for bits, clipped in found.items()}


def squared_changes(
    module: fx.GraphModule,
    grids: Mapping[str, Sequence[Grid]],
    data: Data,
    progress: Progress,
    *,
    device: torch.device = CPU,
) -> dict[str, list[float]]:
    """By activation: the squared change of all its elements that each grid makes, a mean over the examples."""
    found = {name: [0.0] * len(own) for name, own in grids.items()}

    def seen(name: str, value: Tensor, examples: range) -> None:
        for place, grid in enumerate(grids[name]):
            moved = (rounded_to(value, grid) - value).square().sum(dtype=torch.float64)
            found[name][place] += float(moved) / len(data)

    watcher = _Watcher(on_device(module, device), grids, seen)
    watcher.run_all(data, "round activations", progress, device)
    return found
