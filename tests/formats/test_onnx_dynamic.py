"""Products that round their activations as they come: integer arithmetic's own result, on every processor."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from compress.formats.onnx_dynamic import as_dynamic, is_faster_as_integers
from compress.formats.onnx_packed import pack_weights
from compress.formats.onnx_products import Product, find_products
from compress.verify import open_session

K, N = 48, 24


def network(levels: NDArray[np.int8]) -> onnx.ModelProto:
    """Two products of one input, their sum with a bias."""
    scale = np.linspace(0.01, 0.03, N, dtype=np.float32)
    constants = {"v": levels, "w": levels[::-1].copy(), "s": scale, "b": np.linspace(-1, 1, N, dtype=np.float32)}
    nodes = [
        helper.make_node("DequantizeLinear", ["v", "s"], ["vd"], axis=0),
        helper.make_node("DequantizeLinear", ["w", "s"], ["wd"], axis=0),
        helper.make_node("Gemm", ["x", "vd", "b"], ["p"], transB=1),
        helper.make_node("Transpose", ["wd"], ["t"], perm=[1, 0]),
        helper.make_node("MatMul", ["x", "t"], ["q"]),
        helper.make_node("Add", ["p", "q"], ["y"]),
    ]
    infos = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", size]) for name, size in (("x", K), ("y", N))
    ]
    tensors = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, "g", infos[:1], infos[1:], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def expected(levels: NDArray[np.int8], x: NDArray[np.float32]) -> NDArray[np.float64]:
    """By the definition of DynamicQuantizeLinear, in integers and then in float64."""
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    step = np.float32(np.float32(high - low) / np.float32(255)) or np.float32(1)
    zero = np.clip(np.round(np.float32(-low) / step), 0, 255)
    rounded = (np.clip(np.round(x / step) + zero, 0, 255) - zero).astype(np.int64)
    scale = np.linspace(0.01, 0.03, N, dtype=np.float32).astype(np.float64)
    weights = levels.astype(np.int64), levels[::-1].astype(np.int64)
    sums = [rounded @ weight.T * (float(step) * scale) for weight in weights]
    return sums[0] + sums[1] + np.linspace(-1, 1, N, dtype=np.float32)


@pytest.mark.parametrize(("bits", "kind"), [(3, TensorProto.INT8), (7, TensorProto.INT8), (8, TensorProto.UINT8)])
def test_outputs_are_those_of_the_definition(bits: int, kind: int) -> None:
    half = 2 ** (bits - 1)
    levels = np.random.default_rng(bits).integers(-half, half, (N, K)).astype(np.int8)
    levels[0] = half - 1  # what overflows 16 bits two at a time, beside activations of 255
    model = network(levels)
    written = as_dynamic(pack_weights(model, {"v": bits, "w": bits}), find_products(model, ["v", "w"]))
    onnx.checker.check_model(written, full_check=True)
    ops = [node.op_type for node in written.graph.node]
    assert ops.count("DynamicQuantizeLinear") == 1 and ops.count("MatMulInteger") == 2
    is_unsigned = any(len(node.input) == 4 for node in written.graph.node if node.op_type == "MatMulInteger")
    assert is_unsigned == (kind == TensorProto.UINT8)
    session = open_session(written.SerializeToString(), 1)
    for batch in (1, 3, 7):
        x = np.random.default_rng(batch).standard_normal((batch, K)).astype(np.float32)
        x[0] = np.abs(x).max()
        np.testing.assert_allclose(session.run(None, {"x": x})[0], expected(levels, x), rtol=1e-4, atol=1e-4)


def test_an_input_of_zeros_gives_the_bias() -> None:
    model = network(np.full((N, K), 3, np.int8))
    written = as_dynamic(pack_weights(model, {"v": 4, "w": 4}), find_products(model, ["v", "w"]))
    (y,) = open_session(written.SerializeToString(), 1).run(None, {"x": np.zeros((2, K), np.float32)})
    np.testing.assert_allclose(y, np.tile(np.linspace(-1, 1, N, dtype=np.float32), (2, 1)), atol=1e-7)


@pytest.mark.parametrize(
    ("largest", "num_rows", "shape", "is_faster"),
    [
        (63, 1, (1024, 1024), True),
        (63, 1, (256, 256), False),
        (63, 64, (128, 128), True),
        (63, None, (4096, 4096), False),
        (64, 1, (1024, 1024), True),
        (127, 1, (1024, 1024), True),
        (127, 64, (1024, 1024), False),
        (127, 1, (512, 512), False),
    ],
)
def test_the_rule_is_that_of_the_table(
    largest: int, num_rows: int | None, shape: tuple[int, int], is_faster: bool
) -> None:
    levels = np.full(shape, -largest, np.int8)
    product = Product("w", "x", "y", None, levels, np.ones(shape[0], np.float32), shape[0], num_rows)
    assert is_faster_as_integers(product) == is_faster


def test_groups_of_inputs_are_no_integer_product() -> None:
    levels = np.full((2048, 512), 63, np.int8)
    product = Product("w", "x", "y", None, levels, np.ones(2048, np.float32), 1024, 1)
    assert (product.num_inputs, product.num_groups) == (1024, 2)
    assert not is_faster_as_integers(product)
