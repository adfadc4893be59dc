"""Bias correction: the mean of each output channel is what it was before the weights were rounded.

Rounding moves the outputs of a channel, in the mean as well, and the means of all layers after it. The network runs
once on calibration data; each layer's means are set right as they come, so that the next one reads corrected inputs.
Source: Nagel et al. 2019 (arXiv:1906.04721), section 4.2, here with measured means; Finkelstein et al. 2019
(arXiv:1906.03193). Cost: three forward passes over the calibration examples, all of them held at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from ..apply import apply_plan, assemble, float_module, values_key, values_sha256
from ..context import Context
from ..graph.rewrite import bias_keys, on_device
from ..graph.trace import Graph
from ..model import Source
from ..plan import CorrectBias, Plan
from ..reconstruct.least_squares import fitting_examples
from ..task import Calibration, divergence, has_logits
from ..train.distill import first_tensor


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


def correct_biases(
    plan: Plan, source: Source, graph: Graph, calibration: Calibration, context: Context
) -> tuple[Plan, dict[str, Tensor]]:
    """The plan with corrected biases, where that brings the outputs nearer to the dense network's.

    Args:
        plan: Rounds weights; corrections that it has are made anew.

    Returns:
        The plan, and its sidecar: the new values by tensor.
    """
    plan = plan.without_corrections()
    rounded, layers = plan.quantized("weight"), {layer.tensor: layer for layer in graph.layers}
    keys = {tensor: found for tensor, found in bias_keys(graph.program, graph.tied).items() if tensor in rounded}
    # A linear layer's channels are its last dimension, a convolution's come after the batch.
    channel = {node: -1 if layers[tensor].op == "linear" else 1 for tensor, (node, _) in keys.items()}
    data = fitting_examples(graph, calibration.data)
    inputs = tuple(x.to(context.device) for x in data.inputs)
    network = assemble(graph, apply_plan(source.module, graph.tied, plan, {}))

    def run(module: fx.GraphModule, wanted: Mapping[str, Tensor], step: int) -> tuple[_Means, Tensor]:
        context.progress("correct biases", step, 3)
        means = _Means(on_device(module, context.device), channel if wanted or step == 0 else {}, wanted)
        with torch.no_grad():
            outputs = means.run(*inputs)
        return means, first_tensor(outputs).cpu()

    before, dense = run(float_module(graph), {}, 0)
    corrected, outputs = run(network, before.means, 1)
    _, uncorrected = run(network, {}, 2)
    context.progress("correct biases", 3, 3)
    are_logits = has_logits(calibration.task)
    gain = divergence(dense, uncorrected, are_logits=are_logits) - divergence(dense, outputs, are_logits=are_logits)
    if not gain > 0:
        return plan, {}
    state = source.module.state_dict()
    decisions, sidecar = [], {}
    for node, key in keys.values():
        values = state[key].detach().float().cpu() + corrected.added[node].cpu()
        decisions.append(CorrectBias(key, values_sha256(values)))
        sidecar[values_key(key)] = values
    return replace(plan, decisions=(*plan.decisions, *decisions)), sidecar
