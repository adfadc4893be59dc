"""Whether a network's channels are equalized before it is rounded, and the network that is.

The plan records the factors: what it decides is for that network, on this checkpoint or another one.
Cost: where some channels differ much, the network is traced again, and rounded twice for a few examples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from .apply import apply_plan, assemble, float_module
from .build import Dense, planning_context
from .errors import InputError, escape
from .finish import EVALUATION
from .graph.equalize import Link, exponents, find_links, scaled
from .graph.reload import copied
from .graph.rewrite import on_device, unlift
from .graph.trace import Graph, trace_graph
from .job import Job
from .plan import Plan, Quantize
from .quantize.calibrate import activation_decisions, calibrated
from .recovery import TRAINING_DATA
from .train.distill import divergences_from

OPTION = "equalization"
SPREAD = 16.0  # between the factors of two channels: where they are nearer, nothing is tried
FAR_LESS = 0.5  # of the loss without it
NEAR = 1e-5  # of the largest output: powers of two leave the bits, unless a kernel chooses its way by the values
BITS = 4  # of the weights that are rounded to see
EXAMPLES, BATCH = 64, 16


def as_planned(job: Job, plan: Plan) -> Job:
    """The job with the network that a plan's decisions are for.

    Raises:
        InputError: Its factors don't fit the network.
    """
    recorded = plan.options.get(OPTION)
    if not isinstance(recorded, dict):
        return job
    links = {link.weight: link for link in _links(job, ())}
    state = job.source.module.state_dict()
    factors = {}
    for weight, found in recorded.items():
        is_whole = isinstance(found, list) and all(isinstance(e, int) and abs(e) < 64 for e in found)
        if weight not in links or not is_whole or len(found) != len(state[weight]):
            raise InputError(
                f"plan: the factors of {escape(str(weight))} don't fit the network's channels",
                hint="the plan is for another architecture; make it again",
            )
        factors[weight] = torch.tensor(found, dtype=torch.float64)
    return _equalized(job, list(links.values()), factors)


def chosen(job: Job, options: Mapping[str, Any], dense: Dense) -> Job:
    """The job as a method's options say; with ``auto``, equalized where rounding then costs far less."""
    wanted = options.get(OPTION, "off")
    if wanted == "off" or (wanted == "auto" and job.calibration is None):
        return job
    links = _links(job, tuple(job.value("exclude") or ()))
    factors = exponents(links, job.source.module.state_dict())
    spread = max((float(torch.exp2(e.max() - e.min())) for e in factors.values()), default=1.0)
    if wanted == "auto" and spread < SPREAD:
        return job
    other = _equalized(job, links, factors)
    if other is job:
        job.notes.append("no two layers have channels between them that could be equalized")
        return job
    if (apart := _apart(job, other)) > NEAR:
        job.notes.append(f"channels between layers stay as they are: scaled, they move the outputs by {apart:.2g}")
        return job
    if wanted == "auto":
        before, after = (_loss(each, job.graph, str(options["activations"]), dense) for each in (job, other))
        if after >= FAR_LESS * before:
            return job
        job.notes.append(
            f"channels between layers are equalized: rounded to {BITS} bits the network is {after / before:.2g} times "
            "as far from the dense one as without (--equalization off leaves them)"
        )
    return other


def _links(job: Job, exclude: Sequence[str]) -> list[Link]:
    """The channels that may be scaled, but for weights that globs exclude, and what is quantized already."""
    excluded = {layer.tensor for layer in job.graph.layers} - {layer.tensor for layer in job.graph.without(exclude)}
    module = unlift(job.graph.program, job.graph.tied)
    return find_links(module, job.source.module.state_dict().keys(), excluded | job.source.stored.keys())


def _equalized(job: Job, links: list[Link], factors: Mapping[str, Tensor]) -> Job:
    """The job with its channels scaled; the job itself where no factor is other than 1."""
    state = job.source.module.state_dict()
    found = scaled(links, state, factors)
    if not found:
        return job
    for names in job.graph.tied:
        found |= {alias: found[names[0]] for alias in names if names[0] in found}
    network = copied(job.source.module)
    network.load_state_dict({**state, **found})
    return replace(
        job,
        source=replace(job.source, module=network),
        graph=trace_graph(network, job.graph.example_inputs),
        memo={key: job.memo[key] for key in (EVALUATION, TRAINING_DATA) if key in job.memo},
        equalization={weight: [int(e) for e in own] for weight, own in factors.items() if own.any()},
    )


def _apart(job: Job, other: Job) -> float:
    """How far the outputs of two networks are apart on the examples they were traced with, of the largest output."""
    with torch.no_grad():
        pair = [tree_leaves(float_module(each.graph)(*job.graph.example_inputs)) for each in (job, other)]
    most = 0.0
    for a, b in zip(*pair, strict=True):
        if isinstance(a, Tensor) and a.is_floating_point():
            most = max(most, float((a - b).abs().max()) / (float(a.abs().max()) or 1.0))
    return most


def _loss(job: Job, dense_graph: Graph, activations: str, dense: Dense) -> float:
    """How far the network is from the dense one with every weight at a few bits, the nearest levels."""
    assert job.calibration is not None
    few = replace(job.calibration, data=job.calibration.data.first(EXAMPLES))
    context = replace(planning_context(job, dense, 0), notes=[], memo={}, frontiers=[])
    ranges = calibrated(job.graph, few, {"activations": activations, "activation_range": "mse"}, context)
    layers = job.graph.without(tuple(job.value("exclude") or ()))
    weights = (Quantize(layer.tensor, "weight", BITS, "symmetric", layer.axis, "mse") for layer in layers)
    decided = activation_decisions(job.graph, ranges, {layer.tensor for layer in layers}, activations)
    plan = Plan("uniform", {}, 0, "", None, None, (*weights, *decided), {})
    network = assemble(job.graph, apply_plan(job.source.module, job.graph.tied, plan, {}))
    reference, rounded = (on_device(module, context.device) for module in (float_module(dense_graph), network))
    return divergences_from(reference, [rounded], few.data, job.task, context.device, batch_size=BATCH)[0]
