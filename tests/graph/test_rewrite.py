"""Folded batch norms and integer weights compute what the network computes."""

from __future__ import annotations

import functools
from collections import Counter
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves
from zoo import TOKENS, Network, named

from compress.apply import Compressed, _folded, apply_plan, assemble, float_module
from compress.data import Data
from compress.export import onnx_model, serialize, write_program
from compress.formats import pt2
from compress.graph.rewrite import (
    BATCH_NORMS,
    Grid,
    IntegerWeight,
    activation_points,
    feeds_layer,
    finish,
    fold_batch_norms,
    is_read,
    join_reads,
    move,
    points_for,
    quantize_activations,
    set_weight,
    split_reads,
    tensor_at,
    unlift,
)
from compress.graph.trace import WEIGHT_OPS, Graph, tied_names, trace_graph, trace_module
from compress.plan import Plan, Quantize
from compress.quantize.calibrate import activation_ranges
from compress.verify import measure_parity, open_session

COMPUTED_WEIGHTS = ("weight_norm", "FunctionalWeights")  # no layer's, and floats for ever
INTEGER_KERNELS = ("QLinearConv", "QGemm", "MatMulIntegerToFloat")
FLOAT_KERNELS = ("Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul", "FusedMatMul")


@functools.cache
def traced(name: str) -> Graph:
    """A network of the zoo, which every test of it reads and none changes."""
    network = named(name)
    return trace_graph(network.make(), network.inputs(2))


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
    found = tree_leaves(float_module(traced(network.name))(*network.inputs(5)))
    for e, f in zip(tree_leaves(network.make()(*network.inputs(5))), found, strict=True):
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
    module = float_module(traced("Concatenated"))
    grids = {node.name: Grid(0.05, 128, 8) for node in activation_points(module)}
    assert set(grids) == {"x", "relu", "relu_read", "conv2d_1"}
    plain = tree_leaves(module(*network.inputs(3)))
    quantize_activations(module, {"relu": grids["relu"]})
    finish(module)
    rounded = tree_leaves(module(*network.inputs(3)))
    assert torch.equal(plain[0], rounded[0])
    assert not torch.equal(plain[1], rounded[1])


def test_what_layers_read_of_a_shared_value_is_a_node_until_values_are_rounded(network: Network) -> None:
    graph = traced(network.name)
    plain = unlift(graph.program, graph.tied)
    names = [node.name for node in plain.graph.nodes]
    x = network.inputs(3)
    with torch.no_grad():
        expected = tree_leaves(plain(*x))
        split = split_reads(unlift(graph.program, graph.tied))
        assert all(torch.equal(a, b) for a, b in zip(tree_leaves(split(*x)), expected, strict=True))
    reads = [node for node in split.graph.nodes if is_read(node)]
    assert {node.name for node in split.graph.nodes} == {*names, *(node.name for node in reads)}
    for node in reads:
        assert node.name == f"{node.args[0].name}_read"
        assert feeds_layer(node)
        assert not feeds_layer(node.args[0])
        assert len(node.args[0].users) > 1
    folded = {node.name for node in float_module(graph).graph.nodes if is_read(node)}
    assert folded == {node.name for node in reads}
    join_reads(split)
    assert [node.name for node in split.graph.nodes] == names


def test_every_layers_input_is_rounded(network: Network) -> None:
    module = float_module(traced(network.name))
    points = set(activation_points(module))
    floats = [n for n in module.graph.nodes if n.target in WEIGHT_OPS and n.args[0].meta["val"].is_floating_point()]

    def origin(node: object) -> object:
        while node not in points and getattr(node, "args", ()):
            node = node.args[0]  # type: ignore[attr-defined]
        return node

    assert all(origin(layer.args[0]) in points for layer in floats)


def test_all_points_are_rounded_where_all_layers_are_integers_and_none_where_none_is(network: Network) -> None:
    graph = traced(network.name)
    module = float_module(graph)
    every = points_for(module, {layer.tensor for layer in graph.layers})
    assert (every == activation_points(module)) == (network.name not in COMPUTED_WEIGHTS)
    assert points_for(module, ()) == []


def mixed(network: Network, is_integer: list[bool]) -> tuple[Graph, Compressed, fx.GraphModule]:
    """The network with some of its layers as integers, in their order, and the points that these need."""
    module, inputs, graph = network.make(), network.inputs(16), traced(network.name)
    assert len(is_integer) == len(graph.layers)
    chosen = {layer.tensor: layer for layer, choice in zip(graph.layers, is_integer, strict=True) if choice}
    dense = float_module(graph)
    points = [node.name for node in points_for(dense, chosen)]
    ranges = activation_ranges(dense, points, Data(inputs, None, "zoo"), lambda *_: None)
    weights = [Quantize(name, "weight", 8, "symmetric_reduced", layer.axis, "minmax") for name, layer in chosen.items()]
    activations = [Quantize(name, "activation", 8, "asymmetric", None, ranges[name]) for name in points]
    plan = Plan("uniform", {}, 0, "0" * 64, None, None, (*weights, *activations), {})
    compressed = apply_plan(module, graph.tied, plan, {})
    return graph, compressed, assemble(graph, compressed)


def kernels(content: bytes, folder: Path) -> Counter[str]:
    """Ops of the network that ONNX Runtime makes of a file."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(folder / "optimized.onnx").graph.node)


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("plain_cnn", "ifi"),
        ("plain_cnn", "fif"),
        ("padded_residual", "ififii"),
        ("padded_residual", "fiiffi"),
        ("Inception", "ifiif"),
        ("SqueezeExcite", "iififii"),
        ("InvertedResidual", "ififi"),
        ("mlp", "ifi"),
        ("Split", "fifi"),
    ],
)
def test_in_a_mixed_network_each_layer_runs_as_it_was_chosen(name: str, layers: str, tmp_path: Path) -> None:
    network = named(name)
    graph, compressed, module = mixed(network, [letter == "i" for letter in layers])
    content = serialize(onnx_model(graph, compressed, module))
    found = kernels(content, tmp_path)
    assert sum(found[op] for op in INTEGER_KERNELS) == layers.count("i")
    assert sum(found[op] for op in FLOAT_KERNELS) == layers.count("f")
    # Ties of the grid apart, nothing is rounded in the runtime that isn't in torch.
    for parity in measure_parity(module, open_session(content, 1), network.inputs(8)):
        assert parity.mean_relative < 1e-3


def test_a_mixed_program_is_equal_after_reading(tmp_path: Path) -> None:
    network = named("plain_cnn")
    graph, _, module = mixed(network, [True, False, True])
    write_program(module, graph.example_inputs, tmp_path / "model.pt2")
    found = pt2.read(tmp_path / "model.pt2").module(check_guards=False)
    assert torch.equal(module(*network.inputs(3)), found(*network.inputs(3)))


class Positions(nn.Module):
    """Makes tensors while it runs, on the device of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.fc = nn.Embedding(8, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        seen = torch.ones(8, 8, device=x.device, dtype=torch.bool).tril()
        y = self.table(x) + self.table(torch.arange(8, device=x.device)) * torch.linspace(0, 1, 4).to(x.device)
        return self.fc(torch.where(seen[..., None], y[:, None], 0.0).sum(2))


def test_a_moved_graph_makes_its_tensors_where_it_is() -> None:
    x = torch.zeros(2, 8, dtype=torch.int64)
    graph = trace_graph(Positions().eval(), (x,))
    module = unlift(graph.program, graph.tied)
    expected = module(x)
    move(module, torch.device("meta"))
    assert module(x.to("meta")).device.type == "meta"
    assert expected.shape == module(x.to("meta")).shape
