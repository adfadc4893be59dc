"""What makes up for rounding once every width is known: levels chosen by the layers' outputs, and corrected biases.

Levels: ``reconstruct.rounding``. Biases: rounding moves the outputs of a channel, in the mean as well, and the means of
all layers after it. The network runs once on calibration data; each layer's means are set right as they come, so that
the next one reads corrected inputs. Of what was tried, that which brings the outputs nearest to the dense network's is
taken.
Source: Frantar et al. 2022, GPTQ (arXiv:2210.17323); Nagel et al. 2019 (arXiv:1906.04721), section 4.2, here with
measured means; Finkelstein et al. 2019 (arXiv:1906.03193). Cost: that of ``reconstruct.rounding``, and two forward
passes over the calibration examples, all of them held at once, for each that is tried.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from ..apply import (
    activation_grids,
    apply_plan,
    assemble,
    float_module,
    levels_keys,
    levels_sha256,
    values_key,
    values_sha256,
)
from ..context import Context
from ..data import Data
from ..graph.rewrite import bias_keys, on_device
from ..graph.trace import Graph
from ..model import Source
from ..plan import CorrectBias, Decision, Plan, Quantize, grid_bits
from ..reconstruct.rounding import Storage, round_layers
from ..reconstruct.side_by_side import fitting_examples
from ..task import Calibration, divergence, floating, has_logits

BATCH = 32  # examples whose activations stay in a processor's cache


class _Means(fx.Interpreter):
    """Runs a graph and keeps the mean of each output channel of some layers.

    Given the means that there should be, it adds what is missing before anything reads the output.
    """

    def __init__(self, module: fx.GraphModule, channel: Mapping[str, int], wanted: Mapping[str, Tensor]) -> None:
        super().__init__(module)
        self.channel, self.wanted = channel, wanted
        self.means: dict[str, Tensor] = {}
        self.added: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.name not in self.channel:
            return value
        dim = self.channel[n.name] % value.dim()
        mean = value.double().mean([d for d in range(value.dim()) if d != dim])
        if n.name not in self.wanted:
            self.means[n.name] = mean
            return value
        shift = (self.wanted[n.name] - mean).float()
        self.added[n.name] = shift
        return value + shift.reshape([-1 if d == dim else 1 for d in range(value.dim())])


@dataclass(frozen=True, slots=True)
class Corrected:
    """A plan, its sidecar, and how far the outputs are from the dense network's; 0 where that wasn't measured."""

    plan: Plan
    sidecar: dict[str, Tensor]
    moved: float


def correct(
    plan: Plan, source: Source, graph: Graph, calibration: Calibration | None, context: Context
) -> tuple[Plan, dict[str, Tensor]]:
    """The last step, at whatever widths were chosen: what makes up for rounding, as the options ask for it.

    Args:
        plan: Rounds weights; what it has of this step is made anew.

    Returns:
        The plan, and its sidecar: levels, scales and the biases' new values.
    """
    made = corrected(plan, source, graph, calibration, context)
    return made.plan, made.sidecar


def corrected(plan: Plan, source: Source, graph: Graph, calibration: Calibration | None, context: Context) -> Corrected:
    """The same, and how far the outputs are from the dense network's."""
    plan = plan.without_corrections()
    reconstructs, corrects = (
        plan.options.get(n) == on for n, on in (("reconstruction", "gptq"), ("bias_correction", "on"))
    )
    if not plan.quantized("weight") or not (reconstructs or corrects):
        return Corrected(plan, {}, 0.0)
    if calibration is None:
        context.notes.append(
            "levels are the nearest, and biases the checkpoint's own: making up for rounding needs --data"
        )
        return Corrected(plan, {}, 0.0)
    data = fitting_examples(graph, calibration.data)
    inputs = tuple(x.to(context.device) for x in data.inputs)
    are_logits = has_logits(calibration.task)
    keys = _bias_keys(plan, graph)
    wanted = _outputs(float_module(graph), data, context)

    def tried(found: Plan, sidecar: dict[str, Tensor]) -> Corrected:
        outputs = _outputs(assemble(graph, apply_plan(source.module, graph.tied, found, sidecar)), data, context)
        batches = zip(data.batches(BATCH), wanted, outputs, strict=True)
        moved = sum(len(batch) * divergence(a, b, are_logits=are_logits) for batch, a, b in batches)
        return Corrected(found, sidecar, moved / len(data))

    def best() -> Corrected:
        return min(every, key=lambda one: one.moved)

    every = [tried(plan, {})]
    if reconstructs:
        every.append(tried(*_reconstructed(plan, source, graph, inputs, context)))
    if corrects:
        context.progress("correct biases", 0, 1)
        dense = _Means(on_device(float_module(graph), context.device), _channels(graph, keys), {})
        with torch.no_grad():
            dense.run(*inputs)
        every.append(tried(*_corrected(best(), source, graph, keys, dense.means, inputs, context)))
        context.progress("correct biases", 1, 1)
    made = best()
    has_data = made.plan.makes_up_for_rounding()
    task_sha256 = calibration.sha256() if has_data else plan.task_sha256
    return replace(made, plan=replace(made.plan, task_sha256=task_sha256))


def _outputs(network: fx.GraphModule, data: Data, context: Context) -> list[list[Tensor]]:
    """Of each batch: outputs needn't have the examples as their first dimension."""
    network = on_device(network, context.device)
    with torch.no_grad():
        parts = [floating(network(*(x.to(context.device) for x in batch.inputs))) for batch in data.batches(BATCH)]
    return [[value.cpu() for value in values] for values in parts]


def _reconstructed(
    plan: Plan, source: Source, graph: Graph, inputs: tuple[Tensor, ...], context: Context
) -> tuple[Plan, dict[str, Tensor]]:
    """Levels and biases chosen layer by layer."""
    choices = plan.quantized("weight")
    grids = {
        name: Storage(choice.bits, grid_bits(choice.bits, choice.scheme), choice.group_size)
        for name, choice in choices.items()
    }
    nearest = apply_plan(source.module, graph.tied, plan, {}).state()
    others = {name: nearest[name] for name in choices}
    activations = activation_grids(plan.quantized("activation"))
    found = round_layers(graph, grids, others, activations, inputs, device=context.device, progress=context.progress)
    sidecar: dict[str, Tensor] = {}
    decisions: list[Decision] = []
    for decision in plan.decisions:
        made = found.weights.get(decision.tensor) if isinstance(decision, Quantize) else None
        if made is None or not isinstance(decision, Quantize) or decision.target != "weight":
            decisions.append(decision)
            continue
        sidecar |= dict(zip(levels_keys(decision.tensor), (made.levels, made.scale), strict=True))
        decisions.append(replace(decision, values_sha256=levels_sha256(made.levels, made.scale)))
    for key, values in sorted(found.biases.items()):
        decisions.append(CorrectBias(key, values_sha256(values)))
        sidecar[values_key(key)] = values
    return replace(plan, decisions=tuple(decisions)), sidecar


def _corrected(
    given: Corrected,
    source: Source,
    graph: Graph,
    keys: Mapping[str, tuple[str, str]],
    means: Mapping[str, Tensor],
    inputs: tuple[Tensor, ...],
    context: Context,
) -> tuple[Plan, dict[str, Tensor]]:
    """The same with biases that give each output channel the dense network's mean."""
    compressed = apply_plan(source.module, graph.tied, given.plan, given.sidecar)
    state = compressed.state()
    run = _Means(on_device(assemble(graph, compressed), context.device), _channels(graph, keys), means)
    with torch.no_grad():
        run.run(*inputs)
    sidecar = dict(given.sidecar)
    corrections: list[Decision] = []
    for node, key in keys.values():
        values = state[key].detach().float().cpu() + run.added[node].cpu()
        corrections.append(CorrectBias(key, values_sha256(values)))
        sidecar[values_key(key)] = values
    others = (d for d in given.plan.decisions if not isinstance(d, CorrectBias))
    return replace(given.plan, decisions=(*others, *corrections)), sidecar


def _bias_keys(plan: Plan, graph: Graph) -> dict[str, tuple[str, str]]:
    """Node and bias of the rounded layers, by weight."""
    rounded = plan.quantized("weight")
    return {tensor: found for tensor, found in bias_keys(graph.program, graph.tied).items() if tensor in rounded}


def _channels(graph: Graph, keys: Mapping[str, tuple[str, str]]) -> dict[str, int]:
    """Where each layer's output has its channels: last in a linear layer's, after the batch in a convolution's."""
    linear = {layer.tensor for layer in graph.layers if layer.op == "linear"}
    return {node: -1 if tensor in linear else 1 for tensor, (node, _) in keys.items()}
