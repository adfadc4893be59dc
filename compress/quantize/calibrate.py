"""Ranges of activations, measured on calibration data: their extremes at 8 bits, clipped to the least error below.

Source: Nagel et al. 2021 (arXiv:2106.08295), section 3.1. Cost: one forward pass over the calibration examples, and one
more below 8 bits.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from ..apply import float_module
from ..context import Context, Progress
from ..curvature.network import require_finite
from ..data import Data
from ..errors import UsageError
from ..graph.rewrite import activation_points, feeds_layer, on_device, points_for
from ..graph.trace import Graph
from ..numerics.rounding import clipped_range
from ..plan import WIDEST, Quantize

CPU = torch.device("cpu")
BATCH = 16  # larger ones cost memory and are no faster
BINS = 2048  # of an activation's values between its extremes


class _Observer(fx.Interpreter):
    """Runs a graph and keeps the extremes of the nodes that are watched."""

    def __init__(self, module: fx.GraphModule, names: Iterable[str]) -> None:
        super().__init__(module)
        self.ranges: dict[str, tuple[float, float]] = dict.fromkeys(names, (0.0, 0.0))
        self.examples = range(0)  # that are run, of the data called ``name``
        self.name = ""

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.name in self.ranges and isinstance(value, Tensor):
            low, high = (float(v) for v in torch.aminmax(value))
            if not (abs(low) < float("inf") and abs(high) < float("inf")):
                numbers = self.examples if value.dim() and len(value) == len(self.examples) else self.examples[:1]
                rows = value if len(numbers) == len(self.examples) else value.reshape(1, -1)
                require_finite(rows, f"activation {n.name}", numbers, self.name)
            before = self.ranges[n.name]
            self.ranges[n.name] = (min(before[0], low), max(before[1], high))
        return value


class _Counter(fx.Interpreter):
    """Runs a graph and counts the values of the nodes that are watched, in bins between their extremes."""

    def __init__(self, module: fx.GraphModule, ranges: Mapping[str, tuple[float, float]]) -> None:
        super().__init__(module)
        self.ranges = ranges
        self.counts: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.name in self.ranges and isinstance(value, Tensor):
            low, high = self.ranges[n.name]
            counts = torch.histc(value.float(), BINS, low, high).double().cpu()
            self.counts[n.name] = self.counts[n.name] + counts if n.name in self.counts else counts
        return value


def calibrated(graph: Graph, data: Data | None, activations: str, context: Context) -> dict[str, tuple[float, float]]:
    """The range of every activation that may be rounded, by name; none where ``activations`` is ``float``.

    Args:
        activations: Bits, or ``float``.

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
    if int(activations) == WIDEST:
        return ranges
    narrow = {node.name for node in module.graph.nodes if _is_narrow(node)}
    found = {name: ends for name, ends in ranges.items() if name in narrow and ends[0] < ends[1]}
    return ranges | clipped_ranges(module, found, int(activations), data, context.progress, device=context.device)


def activation_decisions(
    graph: Graph, ranges: Mapping[str, tuple[float, float]], integer: Collection[str], activations: str
) -> tuple[Quantize, ...]:
    """The grids of the activations around integer layers: what float layers read stays as it is.

    Args:
        ranges: Of ``calibrated``.
        integer: Weights with integers, by state-dict key.
        activations: Bits of what layers read, or ``float``; the network's inputs, and what other ops alone read, have
            eight.
    """
    if not ranges:
        return ()
    points = [node for node in points_for(float_module(graph), integer) if node.name in ranges]
    bits = {node.name: int(activations) if _is_narrow(node) else WIDEST for node in points}
    return tuple(Quantize(name, "activation", bits[name], "asymmetric", None, ranges[name]) for name in bits)


def _is_narrow(node: fx.Node) -> bool:
    """Whether an activation has as many bits as are asked for, rather than eight."""
    return node.op != "placeholder" and feeds_layer(node)


def activation_ranges(
    module: fx.GraphModule, points: Iterable[str], data: Data, progress: Progress, *, device: torch.device = CPU
) -> dict[str, tuple[float, float]]:
    """Least and greatest value of each activation in ``points``, zero included.

    Raises:
        NumericsError: An activation isn't finite; names it.
    """
    observer = _Observer(on_device(module, device), points)
    with torch.no_grad():
        for done, batch in enumerate(data.batches(BATCH)):
            progress("calibrate activations", done * BATCH, len(data))
            observer.examples, observer.name = range(done * BATCH, done * BATCH + len(batch)), data.name
            observer.run(*(x.to(device) for x in batch.inputs))
    progress("calibrate activations", len(data), len(data))
    return observer.ranges


def clipped_ranges(
    module: fx.GraphModule,
    ranges: Mapping[str, tuple[float, float]],
    bits: int,
    data: Data,
    progress: Progress,
    *,
    device: torch.device = CPU,
) -> dict[str, tuple[float, float]]:
    """The part of each activation's range whose grid of ``bits`` bits rounds its values with the least error."""
    counter = _Counter(on_device(module, device), ranges)
    with torch.no_grad():
        for done, batch in enumerate(data.batches(BATCH)):
            progress("clip activations", done * BATCH, len(data))
            counter.run(*(x.to(device) for x in batch.inputs))
    progress("clip activations", len(data), len(data))
    return {name: clipped_range(counts, *ranges[name], bits) for name, counts in counter.counts.items()}
