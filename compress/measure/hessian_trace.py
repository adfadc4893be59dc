"""Curvature traces: how fast the loss grows when a layer's weights move, for every layer, with its standard error.

The default is the generalized Gauss-Newton matrix, measured for all layers at once by output-space probes; ``hessian``
is the exact Hessian by Hutchinson's probes, a layer at a time. Source: Dong et al. 2020, HAWQ-V2 (arXiv:1911.03852),
section 3.1. Cost: 2 passes over the calibration data or more, until ``rtol`` is reached.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor

from ..context import Context
from ..curvature.network import open_network
from ..curvature.traces import AIDED, CONTROLLED, ggn_traces, hessian_traces
from ..errors import UsageError
from ..graph.trace import Graph
from ..model import Source
from ..numerics.trace import FIRST as FEWEST_PRODUCTS
from ..sensitivity import FEW_PASSES, Estimate, Repeats, Sensitivity, repeats_of_passes
from ..task import Calibration

WITHOUT_CONTROL = "xtrace"


def measure(
    source: Source, graph: Graph, calibration: Calibration, options: Mapping[str, Any], context: Context
) -> tuple[Sensitivity, dict[str, Tensor]]:
    """The trace of every layer's block of the mean loss's curvature.

    Args:
        options: ``trace`` (``ggn`` or ``hessian``), ``estimator`` of the latter, ``rtol``, ``passes`` (the most).
    """
    network = open_network(graph, device=context.device)
    rtol, limit = float(options["rtol"]), int(options["passes"])
    task, data, generator, progress = calibration.task, calibration.data, context.generator, context.progress
    if options["trace"] == "ggn":
        traces = ggn_traces(network, task, data, rtol=rtol, max_passes=limit, generator=generator, progress=progress)
    else:
        estimator = str(options["estimator"])
        sampled = partial(
            hessian_traces, network, task, data, rtol=rtol, max_probes=limit, generator=generator, progress=progress
        )
        try:
            traces = sampled(estimator=estimator)
        except UsageError as error:
            if estimator not in AIDED:
                raise
            # What keeps the Gauss-Newton matrix from being known need not stand in the way of the Hessian.
            estimator = WITHOUT_CONTROL if estimator == CONTROLLED else estimator
            traces = sampled(estimator=estimator, is_aided=False)
            context.notes.append(
                f"traces are estimated by {estimator} alone, without a Gauss-Newton matrix: {error.message}"
            )
        options = {**options, "estimator": estimator}
    entries = {(name, ""): Estimate(e.mean, e.stderr) for name, e in traces.items()}
    passes = max((e.passes for e in traces.values()), default=0)
    late = [name for name, e in traces.items() if e.stderr > rtol * abs(e.mean)]
    if late:
        context.notes.append(
            f"{len(late)} traces are less certain than --rtol {rtol:g} after {passes} passes; "
            "raise --passes for closer ones"
        )
    recorded = {**options, "passes": passes}
    record = Sensitivity(
        "hessian-trace", "loss per squared weight", source.sha256, calibration.sha256(), entries, recorded
    )
    return record, {}


def repeats(options: Mapping[str, Any], total: int) -> Repeats:
    """Passes of output-space probes, or products of each block."""
    fewest = FEWEST_PRODUCTS if options["trace"] == "hessian" else FEW_PASSES[0]
    return repeats_of_passes(options, total, fewest=fewest)
