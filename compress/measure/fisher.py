"""The Fisher matrix's diagonal from per-sample gradients; a layer's entry is its trace.

``ggn`` (output-space probes, no labels) and ``sampled`` (labels drawn from the model) estimate the true Fisher, which
for cross-entropy is the Gauss-Newton matrix; ``labels`` is the empirical Fisher of the data's labels (Kunstner et al.
2019, arXiv:1905.12558, on how far it may be from the other two). Cost: one pass with per-sample gradients.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..context import Context
from ..curvature.network import open_network
from ..curvature.sample_gradients import draw_seed, gradient_rows
from ..graph.trace import Graph
from ..model import Source
from ..sensitivity import Estimate, Sensitivity
from ..task import Calibration


def measure(
    source: Source, graph: Graph, calibration: Calibration, options: Mapping[str, Any], context: Context
) -> tuple[Sensitivity, dict[str, Tensor]]:
    """The trace of every layer's Fisher block, with the standard error over examples, and the diagonals by tensor.

    Args:
        options: ``fisher``: ``ggn``, ``sampled`` or ``labels``.
    """
    data = calibration.data
    network = open_network(graph, device=context.device)
    diagonals = {layer.tensor: torch.zeros(layer.elements, dtype=torch.float64) for layer in network.layers}
    norms = {layer.tensor: torch.zeros(len(data), dtype=torch.float64) for layer in network.layers}

    def add(part: slice, _: int, tensor: str, rows: Tensor) -> None:
        squares = rows.double().square()
        diagonals[tensor] += squares.sum(0).cpu() / len(data)
        norms[tensor][part] = squares.sum(1).cpu()

    gradient_rows(
        network,
        calibration.task,
        data,
        add,
        mode=str(options["fisher"]),
        seed=draw_seed(context.generator),
        numbers=range(len(data)),
        draws=range(1),
        progress=context.progress,
    )
    if len(data) == 1:
        context.notes.append("Fisher traces of one example have no standard error; pass more with --num-calibration")
    entries = {(name, ""): _mean(values) for name, values in norms.items()}
    record = Sensitivity(
        "fisher", "loss per squared weight", source.sha256, calibration.sha256(), entries, dict(options)
    )
    return record, {layer.tensor: diagonals[layer.tensor].reshape(layer.shape).float() for layer in network.layers}


def _mean(values: Tensor) -> Estimate:
    error = float(values.std()) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return Estimate(float(values.mean()), error)
