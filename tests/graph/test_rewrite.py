"""Folded batch norms and integer weights compute what the network computes."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from zoo import TOKENS, Network, named

from compress.apply import _folded, float_module
from compress.graph.rewrite import (
    BATCH_NORMS,
    Grid,
    IntegerWeight,
    activation_points,
    finish,
    fold_batch_norms,
    quantize_activations,
    set_weight,
    tensor_at,
    unlift,
)
from compress.graph.trace import WEIGHT_OPS, tied_names, trace_graph, trace_module


def num_batch_norms(nodes: object) -> int:
    return sum(node.target in BATCH_NORMS for node in nodes)  # type: ignore[attr-defined]


def test_folding_equals_the_module_in_float64(network: Network) -> None:
    if network.name in ("Recurrent", "IntegerInputs"):
        pytest.skip("makes float32 tensors in forward")
    module = network.make().double()
    inputs = tuple(x if TOKENS in network.traits else x.double() for x in network.inputs(3))
    graph_module = unlift(trace_module(module, inputs), tied_names(module))
    before = num_batch_norms(graph_module.graph.nodes)
    for target, factor in fold_batch_norms(graph_module).items():
        layer = next(n for n in graph_module.graph.nodes if n.target in WEIGHT_OPS and n.args[1].target == target)
        axis = 1 if "transpose" in str(layer.target) else 0
        set_weight(graph_module, target, _folded(tensor_at(graph_module, target), factor, axis))
    finish(graph_module)
    assert before - num_batch_norms(graph_module.graph.nodes) == network.num_folded
    expected, found = tree_leaves(module(*inputs)), tree_leaves(graph_module(*inputs))
    for e, f in zip(expected, found, strict=True):
        assert float((e - f).abs().max()) <= 1e-12 * float(e.abs().max())


def test_folding_equals_the_module_in_float32(network: Network) -> None:
    module, inputs = network.make(), network.inputs(3)
    found = tree_leaves(float_module(trace_graph(module, inputs))(*network.inputs(5)))
    for e, f in zip(tree_leaves(module(*network.inputs(5))), found, strict=True):
        assert float((e - f).abs().max()) <= 1e-5 * float(e.abs().max())


def test_negative_scales_put_their_sign_into_the_levels() -> None:
    layer = nn.Linear(3, 2, bias=False)
    module = unlift(trace_module(layer.eval(), (torch.randn(2, 3),)))
    levels = torch.tensor([[-8, 7, 1], [2, 0, -3]], dtype=torch.int8)
    set_weight(module, "weight", IntegerWeight(levels, torch.tensor([-0.5, 0.25]), 0))
    finish(module)
    assert module.weight_scale.tolist() == [0.5, 0.25]
    assert module.weight_levels.tolist() == [[8, -7, -1], [2, 0, -3]]
    assert torch.equal(module(torch.eye(3)).T, torch.tensor([[4.0, -3.5, -0.5], [0.5, 0.0, -0.75]]))


def integer_layer(weight: list[list[int]], scale: list[float], bias: list[float]) -> nn.Module:
    layer = nn.Linear(2, len(bias)).requires_grad_(False)
    layer.bias.data = torch.tensor(bias)
    module = unlift(trace_module(layer.eval(), (torch.randn(2, 2),)))
    set_weight(module, "weight", IntegerWeight(torch.tensor(weight, dtype=torch.int8), torch.tensor(scale), 0))
    (name,) = (node.name for node in module.graph.nodes if node.op == "placeholder")
    quantize_activations(module, {name: Grid(1 / 255, 0, 8)})
    return finish(module)


@pytest.mark.parametrize("scale", [1e-12, 1e-25, 1e-37])
def test_a_bias_that_would_overflow_int32_widens_its_channels_scale(scale: float) -> None:
    module = integer_layer([[127, -127], [127, 1]], [scale, 0.01], [0.75, 0.5])
    biases = {name: value for name, value in module.named_buffers() if "bias_levels" in name}
    (levels,) = biases.values()
    assert int(levels.abs().max()) <= 2**30
    torch.testing.assert_close(module(torch.zeros(1, 2)), torch.tensor([[0.75, 0.5]]), rtol=0, atol=1e-4)


def test_the_bias_of_a_channel_of_zeros_is_exact() -> None:
    module = integer_layer([[0, 0], [1, 1]], [1.0, 0.01], [0.7512345, 0.5])
    assert float(module(torch.zeros(1, 2))[0, 0]) == pytest.approx(0.7512345, rel=1e-7)


def test_what_is_only_the_output_stays_float_and_what_a_layer_reads_is_rounded() -> None:
    network = named("Concatenated")
    module = float_module(trace_graph(network.make(), network.inputs(2)))
    grids = {node.name: Grid(0.05, 128, 8) for node in activation_points(module)}
    assert set(grids) == {"x", "relu", "conv2d_1"}
    plain = tree_leaves(module(*network.inputs(3)))
    quantize_activations(module, {"relu": grids["relu"]})
    finish(module)
    rounded = tree_leaves(module(*network.inputs(3)))
    assert torch.equal(plain[0], rounded[0])
    assert not torch.equal(plain[1], rounded[1])


def test_every_layers_input_is_rounded(network: Network) -> None:
    module = float_module(trace_graph(network.make(), network.inputs(2)))
    points = set(activation_points(module))
    floats = [n for n in module.graph.nodes if n.target in WEIGHT_OPS and n.args[0].meta["val"].is_floating_point()]

    def origin(node: object) -> object:
        while node not in points and getattr(node, "args", ()):
            node = node.args[0]  # type: ignore[attr-defined]
        return node

    assert all(origin(layer.args[0]) in points for layer in floats)
