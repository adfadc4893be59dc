"""Whether a network's channels are equalized before it is rounded, and the network that is.

The plan records it, and the factors follow from the checkpoint: what is applied needs no data.
Cost: where some channels differ much, the network is traced again, and rounded twice for a few examples.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import fx

from .apply import apply_plan, assemble, float_module
from .build import Dense, planning_context
from .data import Data
from .graph.equalize import equalized, find_links
from .graph.rewrite import on_device, unlift
from .graph.trace import Graph, trace_graph
from .job import Job
from .measuring import NETWORK
from .plan import Plan, Quantize
from .quantize.calibrate import activation_decisions, calibrated
from .task import divergence, has_logits

OPTION = "equalization"
SPREAD = 16.0  # between the factors of two channels: where they are nearer, nothing is tried
FAR_LESS = 0.5  # of the loss without it
BITS = 4  # of the weights that are rounded to see
EXAMPLES, BATCH = 64, 16


def as_planned(job: Job, plan: Plan) -> Job:
    """The job with the network that a plan's decisions are for."""
    return equalize(job)[0] if plan.options.get(OPTION) == "on" else job


def equalize(job: Job) -> tuple[Job, float]:
    """The job with its network equalized, and the largest factor between two channels; the job itself where none is."""
    module = unlift(job.graph.program, job.graph.tied)
    excluded = {layer.tensor for layer in job.graph.layers if _is_excluded(job, layer.tensor)}
    blocked = {name for blocker in job.graph.blockers for name in (blocker.layer, f"{blocker.layer}.weight")}
    state = job.source.module.state_dict()
    found, spread = equalized(find_links(module, excluded | blocked | job.source.stored.keys()), state)
    if not found:
        return job, spread
    kept = {key: value for key, value in job.memo.items() if key != NETWORK}  # what doesn't depend on the weights
    network = copy.deepcopy(job.source.module)
    network.load_state_dict({**state, **found})
    graph = trace_graph(network, job.graph.example_inputs)
    return replace(job, source=replace(job.source, module=network), graph=graph, memo=kept, is_equalized=True), spread


def _is_excluded(job: Job, tensor: str) -> bool:
    return any(fnmatchcase(tensor, glob) for glob in job.value("exclude") or ())


def chosen(job: Job, options: Mapping[str, Any], dense: Dense) -> Job:
    """The job as a method's options say; with ``auto``, equalized where rounding then costs far less."""
    wanted = options.get(OPTION, "off")
    if wanted == "off":
        return job
    other, spread = equalize(job)
    if other is job:
        if wanted == "on":
            job.notes.append("no two layers have channels between them that could be equalized")
        return job
    if wanted == "auto":
        if spread < SPREAD or job.calibration is None:
            return job
        before, after = (_loss(each, str(options["activations"]), dense) for each in (job, other))
        if after >= FAR_LESS * before:
            return job
        job.notes.append(
            f"channels between layers are equalized: rounded to {BITS} bits the network is {after / before:.2g} times "
            "as far from the dense one as without (--equalization off leaves them)"
        )
    return other


def _loss(job: Job, activations: str, dense: Dense) -> float:
    """How far the network is from the dense one with every weight at a few bits, the nearest levels."""
    assert job.calibration is not None
    few = replace(job.calibration, data=job.calibration.data.first(EXAMPLES))
    context = replace(planning_context(job, dense, 0), notes=[], memo={}, frontiers=[])
    ranges = calibrated(job.graph, few, {"activations": activations, "activation_range": "mse"}, context)
    layers = job.graph.without(tuple(job.value("exclude") or ()))
    weights = (Quantize(layer.tensor, "weight", BITS, "symmetric", layer.axis, "mse") for layer in layers)
    rounded = activation_decisions(job.graph, ranges, {layer.tensor for layer in layers}, activations)
    plan = Plan("uniform", {}, 0, "", None, None, (*weights, *rounded), {})
    network = assemble(job.graph, apply_plan(job.source.module, job.graph.tied, plan, {}))
    return _moved(job.graph, network, few.data, are_logits=has_logits(job.task), device=context.device)


def _moved(graph: Graph, network: fx.GraphModule, data: Data, *, are_logits: bool, device: torch.device) -> float:
    dense, rounded = (on_device(module, device) for module in (float_module(graph), network))
    moved = 0.0
    with torch.no_grad():
        for batch in data.batches(BATCH):
            inputs = [x.to(device) for x in batch.inputs]
            moved += len(batch) * divergence(dense(*inputs), rounded(*inputs), are_logits=are_logits)
    return moved
