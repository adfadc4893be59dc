"""Activation traces: how fast an example's loss grows when what a layer reads moves, with its standard error.

Source: Dong et al. 2020, HAWQ-V2 (arXiv:1911.03852), section 3.3. Cost: 2 passes over the calibration data or more,
until ``rtol`` is reached.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..apply import float_module
from ..context import Context
from ..curvature.activation_traces import activation_traces
from ..graph.rewrite import activation_points, feeds_layer
from ..graph.trace import Graph
from ..model import Source
from ..sensitivity import FEW_PASSES, Estimate, Repeats, Sensitivity, repeats_of_passes
from ..task import Calibration


def measure(
    source: Source, graph: Graph, calibration: Calibration, options: Mapping[str, Any], context: Context
) -> tuple[Sensitivity, dict[str, Tensor]]:
    """The trace of an example's curvature in every activation that a layer reads, but the network's inputs.

    Args:
        options: ``rtol``, ``passes`` (the most).
    """
    module = float_module(graph)
    names = [node.name for node in activation_points(module) if node.op != "placeholder" and feeds_layer(node)]
    traces = activation_traces(
        module,
        names,
        calibration.task,
        calibration.data,
        rtol=float(options["rtol"]),
        max_passes=int(options["passes"]),
        generator=context.generator,
        progress=context.progress,
        device=context.device,
    )
    entries = {(name, ""): Estimate(e.mean, e.stderr) for name, e in traces.items()}
    unit = "loss per squared activation"
    return Sensitivity("activation-trace", unit, source.sha256, calibration.sha256(), entries, dict(options)), {}


def repeats(options: Mapping[str, Any], total: int) -> Repeats:
    """Passes of output-space probes."""
    return repeats_of_passes(options, total, fewest=FEW_PASSES[0])
