"""Scales and biases that share constants: the outputs and the kernels of the plain file, in fewer bytes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper
from onnx_networks import Array, assert_same_network, finish

from compress.formats.onnx_vectors import share_vectors

CHANNELS = (3, 40, 24, 56)


def network(biases: list[Array], *, is_integer: bool, factor: float = 1.0) -> onnx.ModelProto:
    """Convolutions with these biases, int32 ones at ``factor`` times the product of their inputs' scales."""
    random = np.random.default_rng(1)
    step = np.float32(0.037)
    nodes: list[onnx.NodeProto] = []
    constants: dict[str, Array] = {"step": np.array(step), "axes": np.array([2, 3])}
    constants |= {"middle": np.array(128, np.uint8), "least": np.array(0, np.uint8)}
    x = "x"
    for i, bias in enumerate(biases):
        zero = "least" if i else "middle"  # The rest follow a Relu.
        weight = random.integers(-127, 128, (CHANNELS[i + 1], CHANNELS[i], 3, 3)).astype(np.int8)
        scale = random.uniform(1e-3, 3e-3, CHANNELS[i + 1]).astype(np.float32)
        constants[f"b{i}"] = bias
        if is_integer:
            constants |= {f"w{i}": weight, f"s{i}": scale, f"p{i}": scale * step * np.float32(factor)}
            nodes += [
                helper.make_node("QuantizeLinear", [x, "step", zero], [f"q{i}"]),
                helper.make_node("DequantizeLinear", [f"q{i}", "step", zero], [f"x{i}"]),
                helper.make_node("DequantizeLinear", [f"w{i}", f"s{i}"], [f"d{i}"], axis=0),
                helper.make_node("DequantizeLinear", [f"b{i}", f"p{i}"], [f"c{i}"], axis=0),
            ]
            inputs = [f"x{i}", f"d{i}", f"c{i}"]
        else:
            constants[f"w{i}"] = weight.astype(np.float32) * scale[:, None, None, None]
            inputs = [x, f"w{i}", f"b{i}"]
        nodes += [helper.make_node("Conv", inputs, [f"y{i}"]), helper.make_node("Relu", [f"y{i}"], [f"r{i}"])]
        x = f"r{i}"
    nodes += [
        helper.make_node("QuantizeLinear", [x, "step", "least"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "step", "least"], ["d"]),
        helper.make_node("ReduceMean", ["d", "axes"], ["y"], keepdims=0),
    ]
    return finish(nodes, constants, [("x", ["n", 3, 12, 12])], [("y", ["n", CHANNELS[len(biases)]])])


def biases(most: int) -> list[Array]:
    random = np.random.default_rng(0)
    return [random.integers(-most, most + 1, count).astype(np.int32) for count in CHANNELS[1:]]


def constants_of(model: onnx.ModelProto) -> list[tuple[int, tuple[int, ...]]]:
    return [(tensor.data_type, tuple(tensor.dims)) for tensor in model.graph.initializer]


@pytest.mark.parametrize("most", [0, 1, 900, 100_000, 2**30 - 1, 2**30, 2**31 - 1])
def test_integer_layers_run_as_those_of_the_plain_file(most: int, tmp_path: Path) -> None:
    plain = network(biases(most), is_integer=True)
    before = plain.SerializeToString()
    shared = share_vectors(plain)
    assert plain.SerializeToString() == before
    assert shared.ByteSize() < plain.ByteSize()
    found = assert_same_network(shared, plain, tmp_path)
    assert found["QLinearConv"] == 3
    assert [dims for kind, dims in constants_of(shared) if kind == onnx.TensorProto.FLOAT and dims] == [(120,)]


def test_the_scale_of_a_bias_that_is_no_product_stays(tmp_path: Path) -> None:
    plain = network(biases(1000), is_integer=True, factor=1.01)
    shared = share_vectors(plain)
    assert_same_network(shared, plain, tmp_path)
    assert (onnx.TensorProto.FLOAT, (240,)) in constants_of(shared)
    assert not any(node.op_type == "Mul" and "step" in node.input for node in shared.graph.node)


def test_float_biases_are_one_vector(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    plain = network([random.standard_normal(count).astype(np.float32) for count in CHANNELS[1:]], is_integer=False)
    shared = share_vectors(plain)
    assert_same_network(shared, plain, tmp_path)
    assert (onnx.TensorProto.FLOAT, (120,)) in constants_of(shared)
    assert Counter(node.op_type for node in shared.graph.node)["Split"] == 1


def test_a_bias_alone_is_left_as_it_is() -> None:
    plain = network([np.ones(40, np.float32)], is_integer=False)
    assert share_vectors(plain).SerializeToString() == plain.SerializeToString()


def test_what_layers_share_is_stored_once(tmp_path: Path) -> None:
    plain = network(biases(1000), is_integer=True)
    # torch.onnx keeps one of several equal constants, whatever they are for.
    for node in plain.graph.node:
        node.input[:] = ["s0" if name == "p0" else name for name in node.input]
    assert_same_network(share_vectors(plain), plain, tmp_path)
