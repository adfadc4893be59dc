"""Traces of the loss's curvature in activations: how fast an example's loss grows when a tensor that it makes moves.

The Hessian of an example's loss in one activation is measured without being formed: one backward pass of random signs
in output space gives, for every activation and example, a gradient whose squared norm is on average the trace of the
Gauss-Newton block of that example.
Source: Dong et al. 2020, HAWQ-V2 (arXiv:1911.03852), section 3.3, whose probes lie in the activation; the passes are
those of ``traces``. Cost: a forward and a backward pass for each of 2 passes or more, and the batch's activations held.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from ..context import Progress
from ..data import Data
from ..graph.rewrite import on_device, writes_in_place
from ..numerics.trace import TraceEstimate
from ..task import Task
from .loss_factor import Draw, cotangents, output_curvature, period
from .network import PASS_BATCH, outputs_of, require_finite
from .traces import traces_by_passes


def activation_traces(
    module: fx.GraphModule,
    names: Collection[str],
    task: Task,
    data: Data,
    *,
    rtol: float,
    max_passes: int,
    generator: torch.Generator,
    progress: Progress,
    device: torch.device,
) -> dict[str, TraceEstimate]:
    """The trace of each example's block in each activation, a mean over examples: loss by squared activation.

    Args:
        names: Of nodes of ``module``.
        rtol: Passes are made until every standard error is at most this share of its mean.
        max_passes: The most passes; 2 or more.

    Raises:
        UsageError: The task's loss needs targets and there are none, or it has too many outputs.
        NumericsError: An output or a gradient isn't finite; names the examples and the activation.
    """
    moved, ordered = on_device(module, device), [node.name for node in module.graph.nodes if node.name in names]
    norms = partial(_squared_norms, moved, ordered, task, device)
    return traces_by_passes(
        ordered, norms, data, rtol=rtol, max_passes=max_passes, generator=generator, progress=progress
    )


class _Held(fx.Interpreter):
    """Runs a graph and keeps some of its values, to be differentiated in."""

    def __init__(self, module: fx.GraphModule, names: Collection[str]) -> None:
        super().__init__(module)
        self.names, self.held = names, dict[str, Tensor]()
        self.is_in_place = writes_in_place(module.graph)

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.name not in self.names:
            return value
        value = value if value.requires_grad else value.detach().requires_grad_(True)
        self.held[n.name] = value
        # An operator in place would change what was kept.
        return value.clone() if self.is_in_place else value


def _squared_norms(
    module: fx.GraphModule,
    names: Collection[str],
    task: Task,
    device: torch.device,
    data: Data,
    chosen: Tensor,
    seed: int,
    probe: int,
) -> tuple[Tensor, Tensor | None, int]:
    """``traces.SquaredNorms`` of activations."""
    norms, curvatures, complete = [], [], 0
    part = data.at(chosen)
    for numbers, batch in zip(torch.split(chosen, PASS_BATCH), part.batches(PASS_BATCH), strict=True):
        run = _Held(module, names)
        with torch.enable_grad():
            outputs = run.run(*(x.to(device) for x in batch.inputs))
        targets = None if batch.targets is None else batch.targets.to(device)
        complete, curvature = period(task, outputs), output_curvature(task, outputs)
        draw = Draw(seed, numbers.tolist(), probe, data.name)
        drawn = cotangents(task, outputs, targets, draw, mode="ggn")
        used = [(value, c) for value, c in zip(outputs_of(outputs), drawn, strict=True) if value.requires_grad]
        gradients = torch.autograd.grad(
            [value for value, _ in used], [run.held[name] for name in names], [c for _, c in used], allow_unused=True
        )
        columns = []
        for name, gradient in zip(names, gradients, strict=True):
            rows = _rows(gradient, len(batch))
            require_finite(rows, f"the gradient of activation {name}", draw.examples, data.name)
            columns.append(rows.square().sum(1).cpu())
        norms.append(torch.stack(columns, 1))
        curvatures += [] if curvature is None else [curvature.cpu()]
    return torch.cat(norms), torch.cat(curvatures) if curvatures else None, complete


def _rows(gradient: Tensor | None, n: int) -> Tensor:
    """Of each example, float64 ``[n, k]``; what doesn't differ by example is shared by all."""
    if gradient is None:
        return torch.zeros(n, 1, dtype=torch.float64)
    rows = gradient.double()
    return rows.reshape(1, -1).expand(n, -1) / n**0.5 if len(rows) % n else rows.reshape(n, -1)
