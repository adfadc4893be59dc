"""Ranges of activations, measured on calibration data.

Cost: one forward pass over the calibration examples.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx

from ..context import Progress
from ..data import Data
from ..errors import NumericsError

CPU = torch.device("cpu")
BATCH = 16  # larger ones cost memory and are no faster


class _Observer(fx.Interpreter):
    """Runs a graph and keeps the extremes of the nodes that are watched."""

    def __init__(self, module: fx.GraphModule, names: Iterable[str]) -> None:
        super().__init__(module)
        self.ranges: dict[str, tuple[float, float]] = dict.fromkeys(names, (0.0, 0.0))

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.name in self.ranges and isinstance(value, Tensor):
            low, high = (float(v) for v in torch.aminmax(value))
            if not (abs(low) < float("inf") and abs(high) < float("inf")):
                raise NumericsError(f"activation {n.name} isn't finite on the calibration data", hint="check --data")
            before = self.ranges[n.name]
            self.ranges[n.name] = (min(before[0], low), max(before[1], high))
        return value


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
            observer.run(*(x.to(device) for x in batch.inputs))
    progress("calibrate activations", len(data), len(data))
    return observer.ranges


def on_device(module: fx.GraphModule, device: torch.device) -> fx.GraphModule:
    """The module itself on the CPU, a copy on any other device: it may share tensors with the source."""
    return module if device.type == "cpu" else copy.deepcopy(module).to(device)
