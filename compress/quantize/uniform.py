"""Uniform quantization: the same bit width for every weight, one scale an output channel; static activations.

Source: Jacob et al. 2018 (arXiv:1712.05877); Nagel et al. 2021 (arXiv:2106.08295), sections 2 and 3.
Cost: a forward pass over the calibration data for activations, two more to choose the weight ranges.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..apply import apply_plan, assemble, float_module
from ..budget import Budget
from ..context import Context, Storage
from ..errors import BudgetError
from ..graph.rewrite import on_device
from ..graph.trace import Graph, Layer
from ..model import Source
from ..plan import Decision, Plan, Quantize, weight_scheme
from ..sensitivity import Sensitivity
from ..task import Calibration
from ..train.distill import divergences_from
from .calibrate import AUTO, BATCH, activation_decisions, calibrated
from .correct import correct as correct
from .points import group_sizes_of

ALL_BITS = range(8, 1, -1)
RANGES = ("minmax", "mse")


def plan(
    source: Source,
    graph: Graph,
    sensitivities: Mapping[str, Sensitivity],
    calibration: Calibration | None,
    budget: Budget | None,
    options: Mapping[str, Any],
    context: Context,
) -> tuple[Plan, dict[str, Tensor]]:
    """Choose the bit width, the weight ranges and the activation ranges.

    Args:
        budget: ``bits`` (the widest that fits), or ``bytes`` of the delivered file; None means 8 bits.
        options: ``activations`` (``8``, ``6``, ``4`` or ``float``), ``range`` (``auto``, ``minmax``, ``mse``),
            ``group_size`` (of the weights of linear layers, or None), ``exclude`` (globs), ``reconstruction`` (``gptq``
            or ``none``) and ``bias_correction`` (``on`` or ``off``), both for ``correct``.

    Raises:
        BudgetError: No bit width meets a budget of bits; gives the feasible minimum. Where none meets a budget of
            bytes, the smallest plan is returned: what it takes in the file is the feasible minimum.
        UsageError: Nothing to quantize, or calibration data are needed and missing.
    """
    exclude = tuple(options.get("exclude") or ())
    layers = graph.compressible(exclude, "quantize")
    bits = _choose_bits(source, graph, layers, budget, context)

    ranges = calibrated(graph, calibration, options, context)
    activations = activation_decisions(graph, ranges, {layer.tensor for layer in layers}, str(options["activations"]))
    search = str(options.get("range") or "auto")
    scheme = weight_scheme(bits, with_integers=bool(activations))
    group_sizes = group_sizes_of(layers, options)
    if search == "auto":
        decided = {search: _weight_decisions(layers, bits, scheme, search, group_sizes) for search in RANGES}
        search = _measure_range(source, graph, decided, calibration, context)
    weights = _weight_decisions(layers, bits, scheme, search, group_sizes)
    decisions = (*weights, *activations)
    recorded = {
        "activation_range": options.get("activation_range", AUTO),
        "activations": str(options["activations"]),
        "bias_correction": options["bias_correction"],
        "exclude": list(exclude),
        "group_size": options.get("group_size"),
        "range": search,
        "reconstruction": options["reconstruction"],
    }
    predicted = {"average_bits": _average_bits(graph, layers, bits)}
    measured = activations or options.get("range") in (None, "auto")
    task_sha256 = calibration.sha256() if calibration is not None and measured else None
    return Plan("uniform", recorded, 0, source.sha256, task_sha256, budget, decisions, predicted), {}


def _average_bits(graph: Graph, layers: Sequence[Layer], bits: int) -> float:
    chosen = {layer.tensor for layer in layers}
    total = sum(layer.elements for layer in graph.layers)
    return sum(layer.elements * (bits if layer.tensor in chosen else 32) for layer in graph.layers) / total


def _weight_decisions(
    layers: Sequence[Layer], bits: int, scheme: str, search: str, group_sizes: Mapping[str, int]
) -> tuple[Decision, ...]:
    return tuple(
        Quantize(t.tensor, "weight", bits, scheme, t.axis, search, group_size=group_sizes.get(t.tensor)) for t in layers
    )


def _choose_bits(source: Source, graph: Graph, layers: Sequence[Layer], budget: Budget | None, context: Context) -> int:
    if budget is None:
        return 8
    if budget.quantity == "bits":
        if budget.limit > ALL_BITS[0]:
            context.notes.append(f"{budget} asks for more than uniform's widest weights, {ALL_BITS[0]} bits")
        for bits in ALL_BITS:
            if _average_bits(graph, layers, bits) <= budget.limit + 1e-9:
                return bits
        raise BudgetError(
            f"{budget} is out of reach: uniform goes down to {_average_bits(graph, layers, 2):.4g} average bits",
            hint=f"raise --budget to {_average_bits(graph, layers, 2):.4g}bit",
        )
    state = source.module.state_dict()
    kept = {layer.tensor: int(torch.count_nonzero(state[layer.tensor])) for layer in layers}
    limit = budget.absolute(context.model_bytes({}))
    for bits in ALL_BITS:
        if context.model_bytes({name: Storage(count, bits) for name, count in kept.items()}) <= limit:
            return bits
    return ALL_BITS[-1]


def _measure_range(
    source: Source,
    graph: Graph,
    decided: Mapping[str, tuple[Decision, ...]],
    calibration: Calibration | None,
    context: Context,
) -> str:
    """The range search whose decisions keep the network nearest to the dense one on the calibration data."""
    if calibration is None:
        return "mse"
    data = calibration.data
    candidates = []
    for decisions in decided.values():
        rounded = apply_plan(source.module, graph.tied, Plan("uniform", {}, 0, "", None, None, decisions, {}), {})
        candidates.append(on_device(assemble(graph, rounded), context.device))
    moved = divergences_from(
        on_device(float_module(graph), context.device),
        candidates,
        data,
        calibration.task,
        context.device,
        batch_size=BATCH,
        progress=lambda done: context.progress("choose weight ranges", done, len(data)),
    )
    return min(zip(moved, decided, strict=True))[1]
