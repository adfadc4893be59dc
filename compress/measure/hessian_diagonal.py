"""The Hessian's diagonal by Hutchinson's method, averaged as in AdaHessian; a layer's entry is its mean.

Source: Yao et al. 2021, AdaHessian (arXiv:2006.00719). Cost: one Hessian-vector product a probe, for all layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..context import Context
from ..curvature.diagonal import hessian_diagonal
from ..curvature.network import open_network
from ..graph.trace import Graph
from ..model import Source
from ..numerics.trace import FIRST as FEWEST_PRODUCTS
from ..sensitivity import Estimate, Repeats, Sensitivity, repeats_of_passes
from ..task import Calibration

BLOCK_SIZE = 32  # inputs of a linear layer that share an average


def measure(
    source: Source, graph: Graph, calibration: Calibration, options: Mapping[str, Any], context: Context
) -> tuple[Sensitivity, dict[str, Tensor]]:
    """The mean diagonal entry of every layer, and the diagonals themselves by tensor.

    Args:
        options: ``rtol``, ``passes``: the most probes, each one pass over the calibration data.
    """
    network, rtol = open_network(graph, device=context.device), float(options["rtol"])
    found = hessian_diagonal(
        network,
        calibration.task,
        calibration.data,
        num_probes=int(options["passes"]),
        rtol=rtol,
        block_size=BLOCK_SIZE,
        generator=context.generator,
        progress=context.progress,
    )
    entries = {(name, ""): Estimate(d.mean, d.stderr) for name, d in found.items()}
    made = max((d.probes for d in found.values()), default=0)
    late = sum(d.stderr > rtol * abs(d.mean) for d in found.values())
    if late:
        context.notes.append(
            f"{late} means of the diagonal are less certain than --rtol {rtol:g} after {made} probes; "
            "raise --passes for closer ones"
        )
    recorded, unit = {**options, "passes": made}, "loss per squared weight"
    record = Sensitivity("hessian-diagonal", unit, source.sha256, calibration.sha256(), entries, recorded)
    return record, {name: d.entries.float() for name, d in found.items()}


def repeats(options: Mapping[str, Any], total: int) -> Repeats:
    """Products."""
    return repeats_of_passes(options, total, fewest=FEWEST_PRODUCTS)
