"""HESSO as a command: the network trains by the settings of recovery while its channels go."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..budget import Budget
from ..context import Context
from ..graph.trace import Graph
from ..model import Source
from ..plan import Plan
from ..sensitivity import Sensitivity
from ..task import Calibration
from .hesso import Hesso
from .trained_plan import trained_plan


def plan(
    source: Source,
    graph: Graph,
    sensitivities: Mapping[str, Sensitivity],
    calibration: Calibration,
    budget: Budget | None,
    options: Mapping[str, Any],
    context: Context,
) -> tuple[Plan, dict[str, Tensor]]:
    """Train the network to a smaller one; see ``trained_plan``."""
    return trained_plan("hesso", Hesso, source, graph, calibration, budget, options, context)
