"""Corrected biases: the channels' means are the dense network's, the plan says so, and nothing else changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves
from zoo import Network, named

from compress.apply import apply_plan, assemble, float_module, values_key
from compress.context import Context
from compress.data import Data
from compress.graph.rewrite import bias_keys
from compress.graph.trace import Graph, trace_graph
from compress.model import Source
from compress.plan import Plan, Quantize
from compress.quantize import correct
from compress.quantize.correct import correct_biases
from compress.task import Calibration, Classification, divergence

CPU = torch.device("cpu")


def context() -> Context:
    def size(choices: Any) -> int:
        return 0

    return Context(torch.Generator().manual_seed(0), CPU, lambda *_: None, size, [])


class Means(fx.Interpreter):
    """The mean of each output channel of each layer."""

    def __init__(self, module: fx.GraphModule, dims: dict[str, int]) -> None:
        super().__init__(module)
        self.dims, self.found = dims, {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.name in self.dims:
            self.found[n.name] = value.double().movedim(self.dims[n.name], 0).flatten(1).mean(1)
        return value


def rounded(network: Network, bits: int) -> tuple[nn.Module, Graph, Plan, tuple[Tensor, ...]]:
    module = network.make()
    graph = trace_graph(module, network.inputs(2))
    choices = tuple(Quantize(la.tensor, "weight", bits, "symmetric", la.axis, "minmax") for la in graph.layers)
    plan = Plan("hawq", {"bias_correction": "on"}, 0, "0" * 64, None, None, choices, {})
    return module, graph, plan, network.inputs(32)


def corrected(
    network: Network, bits: int = 3
) -> tuple[nn.Module, Graph, Plan, Plan, dict[str, Tensor], tuple[Tensor, ...]]:
    module, graph, plan, inputs = rounded(network, bits)
    source = Source(Path("net.pt"), "0" * 64, module, "torch", None, {}, {}, ())
    calibration = Calibration(Classification(), Data(inputs, None, "random"))
    found, sidecar = correct_biases(plan, source, graph, calibration, context())
    return module, graph, plan, found, sidecar, inputs


@pytest.mark.parametrize(
    "name", ["padded_residual", "depthwise", "mlp", "biased_conv_bn", "SqueezeExcite", "transposed_2d"]
)
def test_the_means_of_every_channel_are_the_dense_networks(name: str) -> None:
    module, graph, plan, found, sidecar, inputs = corrected(named(name))
    keys = bias_keys(graph.program, graph.tied)
    linear = {layer.tensor for layer in graph.layers if layer.op == "linear"}
    dims = {node: -1 if tensor in linear else 1 for tensor, (node, _) in keys.items()}
    dense, before, after = (
        Means(m, dims)
        for m in (
            float_module(graph),
            assemble(graph, apply_plan(module, graph.tied, plan, {})),
            assemble(graph, apply_plan(module, graph.tied, found, sidecar)),
        )
    )
    outputs = [tree_leaves(network.run(*inputs))[0] for network in (dense, before, after)]
    assert set(found.corrections()) == {key for _, key in keys.values()}
    for node in dims:
        scale = float(dense.found[node].abs().max())
        assert torch.allclose(dense.found[node], after.found[node], atol=1e-4 * scale + 1e-6)
    assert divergence(outputs[0], outputs[2], are_logits=True) < divergence(outputs[0], outputs[1], are_logits=True)


def test_everything_but_the_biases_is_as_the_plan_had_it() -> None:
    module, graph, plan, found, sidecar, _ = corrected(named("padded_residual"))
    assert found.decisions[: len(plan.decisions)] == plan.decisions
    assert sidecar.keys() == {values_key(name) for name in found.corrections()}
    before, after = (
        apply_plan(module, graph.tied, p, s).tensors for p, s in ((found.without_corrections(), {}), (found, sidecar))
    )
    floats = {key: (value, after[key]) for key, value in before.items() if isinstance(value, Tensor)}
    changed = {key for key, (old, new) in floats.items() if isinstance(new, Tensor) and not torch.equal(old, new)}
    assert changed <= set(found.corrections())
    assert found.without_corrections().decisions == plan.decisions


def test_biases_that_several_layers_share_stay() -> None:
    network = named("SharedConvolution")
    graph = trace_graph(network.make(), network.inputs(2))
    assert "conv.weight" not in bias_keys(graph.program, graph.tied)


def test_the_bias_of_a_layer_is_its_batch_norms() -> None:
    network = named("biased_conv_bn")
    graph = trace_graph(network.make(), network.inputs(2))
    assert bias_keys(graph.program, graph.tied)["0.0.weight"][1] == "0.1.bias"
    network = named("double_batch_norm")
    graph = trace_graph(network.make(), network.inputs(2))
    assert "0.weight" not in bias_keys(graph.program, graph.tied)


def test_a_correction_that_gains_nothing_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(correct, "divergence", lambda *_, **__: 0.5)
    *_, plan, found, sidecar, _ = corrected(named("mlp"))
    assert found.decisions == plan.decisions
    assert sidecar == {}
