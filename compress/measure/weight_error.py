"""Weight error: the squared change of a layer's weights under each bit width or sparsity; needs no data.

``||W - Q_b(W)||^2`` for 2 to 8 bits with min-max ranges, and the sum of the smallest squared weights for each
sparsity. It is the second factor of HAWQ-V2's Omega (Dong et al. 2020, arXiv:1911.03852, equation 10) and of the
magnitude saliency. Cost: seven roundings and one sort of each weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..context import Context
from ..graph.trace import Graph
from ..model import Source
from ..numerics.rounding import broadcast_scale, round_weight
from ..sensitivity import Estimate, Key, Sensitivity
from ..task import Calibration

SPARSITIES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def measure(
    source: Source, graph: Graph, calibration: Calibration | None, options: Mapping[str, Any], context: Context
) -> tuple[Sensitivity, dict[str, Tensor]]:
    """The squared weight change of every layer under each bit width (``"4"``) and each sparsity (``"0.5"``)."""
    state = source.module.state_dict()
    entries: dict[Key, Estimate] = {}
    for layer in graph.layers:
        weight = state[layer.tensor].detach().float()
        for bits in range(2, 9):
            levels, scale = round_weight(weight, bits, axis=layer.axis, search="minmax")
            change = levels * broadcast_scale(scale, layer.axis, weight.dim()) - weight
            entries[layer.tensor, str(bits)] = Estimate(float(change.double().square().sum()))
        squares = torch.sort(weight.double().flatten().square()).values.cumsum(0)
        for sparsity in SPARSITIES:
            removed = round(sparsity * weight.numel())
            entries[layer.tensor, str(sparsity)] = Estimate(float(squares[removed - 1]) if removed else 0.0)
    return Sensitivity("weight-error", "squared weight", source.sha256, None, entries), {}
