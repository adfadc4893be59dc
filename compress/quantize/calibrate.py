"""Ranges of activations, measured on calibration data.

Cost: one forward pass over the calibration examples.
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
from ..graph.rewrite import activation_points, on_device, points_for
from ..graph.trace import Graph
from ..plan import Quantize

CPU = torch.device("cpu")
BATCH = 16  # larger ones cost memory and are no faster


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


def calibrated(graph: Graph, data: Data | None, activations: str, context: Context) -> dict[str, tuple[float, float]]:
    """The range of every activation that may be rounded, by name; none where ``activations`` is ``float``.

    Raises:
        UsageError: There are no data.
    """
    if activations == "float":
        return {}
    if data is None:
        raise UsageError(
            "8-bit activations are calibrated on data, and none were given",
            hint="pass --data FILE.npz or FILE.py:fn(args), or --activations float",
        )
    module = float_module(graph)
    points = [node.name for node in activation_points(module)]
    return activation_ranges(module, points, data, context.progress, device=context.device)


def activation_decisions(
    graph: Graph, ranges: Mapping[str, tuple[float, float]], integer: Collection[str]
) -> tuple[Quantize, ...]:
    """Eight bits for the activations around integer layers: what float layers read stays as it is.

    Args:
        ranges: Of ``calibrated``.
        integer: Weights with integers, by state-dict key.
    """
    if not ranges:
        return ()
    points = [node.name for node in points_for(float_module(graph), integer)]
    return tuple(Quantize(name, "activation", 8, "asymmetric", None, ranges[name]) for name in points if name in ranges)


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
