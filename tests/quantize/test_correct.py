"""Making up for rounding: levels by outputs, biases by means; the plan says so, and nothing else changes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves
from zoo import Network, named

from compress.apply import apply_plan, assemble, float_module, levels_keys, values_key
from compress.context import Context
from compress.data import Data
from compress.errors import InputError
from compress.graph.rewrite import bias_keys
from compress.graph.trace import Graph, trace_graph
from compress.model import Source
from compress.plan import Plan, Quantize
from compress.quantize import correct
from compress.quantize.calibrate import activation_decisions, calibrated
from compress.reconstruct import rounding
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
    plan = Plan("hawq", {"bias_correction": "on", "reconstruction": "none"}, 0, "0" * 64, None, None, choices, {})
    return module, graph, plan, network.inputs(32)


def corrected(
    network: Network, bits: int = 3, **options: str
) -> tuple[nn.Module, Graph, Plan, Plan, dict[str, Tensor], tuple[Tensor, ...]]:
    module, graph, plan, inputs = rounded(network, bits)
    plan = replace(plan, options={**plan.options, **options})
    source = Source(Path("net.pt"), "0" * 64, module, "torch", None, {}, {}, ())
    calibration = Calibration(Classification(), Data(inputs, None, "random"))
    found, sidecar = correct.correct(plan, source, graph, calibration, context())
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


@pytest.mark.parametrize(
    "name",
    ["padded_residual", "depthwise", "grouped", "mlp", "biased_conv_bn", "SqueezeExcite", "Gpt", "conv3d"],
)
@pytest.mark.parametrize("bits", [2, 4])
def test_levels_by_outputs_bring_the_network_nearer(name: str, bits: int) -> None:
    network = named(name)
    module, graph, plan, found, sidecar, inputs = corrected(network, bits, reconstruction="gptq", bias_correction="off")
    dense = tree_leaves(float_module(graph)(*inputs))[0]
    outputs = [
        tree_leaves(assemble(graph, apply_plan(module, graph.tied, p, s))(*inputs))[0]
        for p, s in ((plan, {}), (found, sidecar))
    ]
    nearest, chosen = (divergence(dense, out, are_logits=True) for out in outputs)
    # The weight of Gpt's head is its embedding's too, and stays the nearest.
    assert chosen < (1.0 if name == "Gpt" else 0.7) * nearest
    for tensor, choice in found.quantized("weight").items():
        is_shared = tensor == "tokens.weight"
        assert (choice.values_sha256 is None) == is_shared
        if is_shared:
            continue
        levels, scales = (sidecar[key] for key in levels_keys(tensor))
        assert levels.dtype == torch.int8
        assert -(2 ** (bits - 1)) <= int(levels.min()) <= int(levels.max()) < 2 ** (bits - 1)
        assert scales.shape == ((choice.axis is not None) * (graph_axis(graph, tensor),) or ())
    assert found.without_corrections().decisions == plan.decisions


@pytest.mark.parametrize("name", ["padded_residual", "depthwise", "biased_conv_bn", "SqueezeExcite"])
def test_levels_are_chosen_beside_rounded_activations(name: str) -> None:
    network = named(name)
    module, graph, plan, inputs = rounded(network, 4)
    calibration = Calibration(Classification(), Data(inputs, None, "random"))
    ranges = calibrated(graph, calibration, {"activations": "4", "activation_range": "auto"}, context())
    weights = plan.quantized("weight")
    activations = activation_decisions(graph, ranges, weights.keys(), "4")
    plan = replace(plan, decisions=(*plan.decisions, *activations))
    dense = tree_leaves(float_module(graph)(*inputs))[0]
    source = Source(Path("net.pt"), "0" * 64, module, "torch", None, {}, {}, ())
    moved = {}
    for how in ("none", "gptq"):
        asked = replace(plan, options={"reconstruction": how, "bias_correction": "on"})
        found, sidecar = correct.correct(asked, source, graph, calibration, context())
        assert found.quantized("activation") == plan.quantized("activation")
        outputs = tree_leaves(assemble(graph, apply_plan(module, graph.tied, found, sidecar))(*inputs))[0]
        moved[how] = divergence(dense, outputs, are_logits=True)
    assert moved["gptq"] < 0.9 * moved["none"]


def graph_axis(graph: Graph, tensor: str) -> int:
    layer = next(layer for layer in graph.layers if layer.tensor == tensor)
    return layer.shape[layer.axis or 0]


@pytest.mark.parametrize("name", ["SharedConvolution", "transposed_2d"])
def test_what_is_shared_or_transposed_is_rounded_to_the_nearest(name: str) -> None:
    _, graph, _, found, _, _ = corrected(named(name), 4, reconstruction="gptq", bias_correction="off")
    left = {t for t, choice in found.quantized("weight").items() if choice.values_sha256 is None}
    assert left
    assert left <= {layer.tensor for layer in graph.layers}


def test_a_pruned_weight_stays_pruned() -> None:
    network = named("padded_residual")
    module, graph, _, inputs = rounded(network, 3)
    zeros = {}
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.dim() > 1:
                zeros[name] = torch.rand(parameter.shape, generator=torch.Generator().manual_seed(0)) < 0.6
                parameter.masked_fill_(zeros[name], 0)
    grids = {layer.tensor: rounding.Storage(3, 3) for layer in graph.layers}
    graph = trace_graph(module, network.inputs(2))
    found = rounding.round_layers(graph, grids, {}, {}, inputs, device=CPU, progress=lambda *_: None)
    for name, value in found.weights.items():
        assert not bool(value.levels[zeros[name]].any())
        assert bool(value.levels.any())


def test_layers_with_pruned_weights_are_fitted_as_well() -> None:
    """Sparse layers make up for the rounding of those before, as dense ones do; one zero changes next to nothing."""
    network = named("padded_residual")
    moved = {}
    for share in (0.0, 0.001, 0.5):
        module, graph, plan, inputs = rounded(network, 3)
        with torch.no_grad():
            for parameter in module.parameters():
                if parameter.dim() > 1:
                    drawn = torch.rand(parameter.shape, generator=torch.Generator().manual_seed(0))
                    parameter.masked_fill_(drawn < share, 0)
        graph = trace_graph(module, network.inputs(2))
        dense = tree_leaves(float_module(graph)(*inputs))[0]
        source = Source(Path("net.pt"), "0" * 64, module, "torch", None, {}, {}, ())
        calibration = Calibration(Classification(), Data(inputs, None, "random"))
        for how in ("none", "gptq"):
            asked = replace(plan, options={"reconstruction": how, "bias_correction": "on"})
            found, sidecar = correct.correct(asked, source, graph, calibration, context())
            outputs = tree_leaves(assemble(graph, apply_plan(module, graph.tied, found, sidecar))(*inputs))[0]
            moved[share, how] = divergence(dense, outputs, are_logits=True)
    assert moved[0.001, "gptq"] == pytest.approx(moved[0.0, "gptq"], rel=0.02)
    assert moved[0.5, "gptq"] < 0.5 * moved[0.5, "none"]


@pytest.mark.parametrize("name", ["padded_residual", "SqueezeExcite", "mlp", "depthwise"])
@pytest.mark.parametrize("is_constant", [False, True])
def test_one_example_and_constant_inputs_are_enough(name: str, is_constant: bool) -> None:
    network = named(name)
    module = network.make()
    graph = trace_graph(module, network.inputs(2))
    inputs = tuple(torch.full_like(x, 1.7) if is_constant else x for x in network.inputs(1))
    storage = {layer.tensor: rounding.Storage(4, 4) for layer in graph.layers}
    found = rounding.round_layers(graph, storage, {}, {}, inputs, device=CPU, progress=lambda *_: None)
    assert found.weights
    for value in found.weights.values():
        assert bool(torch.isfinite(value.scale).all())
    assert all(bool(torch.isfinite(bias).all()) for bias in found.biases.values())


def test_levels_that_are_not_the_plans_are_refused() -> None:
    module, graph, _, found, sidecar, _ = corrected(named("mlp"), 3, reconstruction="gptq", bias_correction="off")
    tensor = next(iter(found.quantized("weight")))
    key = levels_keys(tensor)[0]
    for broken in ({k: v for k, v in sidecar.items() if k != key}, {**sidecar, key: sidecar[key] + 1}):
        with pytest.raises(InputError, match=f"the levels of {tensor} in the sidecar are missing or others"):
            apply_plan(module, graph.tied, found, broken)
    narrow = tuple(replace(d, bits=2) if isinstance(d, Quantize) else d for d in found.decisions)
    with pytest.raises(InputError, match="has levels beyond its 2 bits"):
        apply_plan(module, graph.tied, replace(found, decisions=narrow), sidecar)


def test_without_data_levels_are_the_nearest_and_a_note_says_so() -> None:
    module, graph, plan, _ = rounded(named("mlp"), 3)
    source = Source(Path("net.pt"), "0" * 64, module, "torch", None, {}, {}, ())
    surroundings = context()
    found, sidecar = correct.correct(plan, source, graph, None, surroundings)
    assert (found.decisions, sidecar) == (plan.decisions, {})
    assert surroundings.notes == [
        "levels are the nearest, and biases the checkpoint's own: making up for rounding needs --data"
    ]
