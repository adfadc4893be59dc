"""MatMulNBits: the outputs of plain float products, from weights that lie in the file at 2 to 4 bits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from compress.formats import onnx_blocks
from compress.formats.onnx_blocks import as_blocks, is_faster_in_blocks
from compress.formats.onnx_packed import pack_weights
from compress.formats.onnx_products import find_products
from compress.verify import open_session

K, N = 48, 24


def levels_of(bits: int, *, is_flipped: bool = False) -> NDArray[np.int8]:
    half = 2 ** (bits - 1)
    values = np.random.default_rng(bits).integers(-half, half, (N, K)).astype(np.int8)
    if is_flipped:
        values[::2] *= -1
    return values


def network(levels: NDArray[np.int8], kind: str, sizes: list[str | int]) -> onnx.ModelProto:
    """A linear layer, a Gemm or a MatMul, on int8 levels or, with ``float `` before, on the same weights in floats."""
    scale = np.linspace(0.01, 0.03, N, dtype=np.float32)
    constants: dict[str, NDArray[np.generic]] = {"b": np.linspace(-1, 1, N, dtype=np.float32)}
    nodes = []
    if kind.startswith("float "):
        constants["d"] = levels.astype(np.float32) * scale[:, None]
    else:
        constants |= {"w": levels, "s": scale}
        nodes.append(helper.make_node("DequantizeLinear", ["w", "s"], ["d"], axis=0))
    if kind.endswith("Gemm"):
        nodes.append(helper.make_node("Gemm", ["x", "d", "b"], ["y"], transB=1))
    else:
        nodes.append(helper.make_node("Transpose", ["d"], ["t"], perm=[1, 0]))
        nodes.append(helper.make_node("MatMul", ["x", "t"], ["p"]))
        nodes.append(helper.make_node("Add", ["p", "b"], ["y"]))
    infos = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, [*sizes, K]),
        helper.make_tensor_value_info("y", TensorProto.FLOAT, [*sizes, N]),
    ]
    tensors = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, "g", infos[:1], infos[1:], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def run(model: onnx.ModelProto, x: NDArray[np.float32]) -> NDArray[np.float32]:
    (y,) = open_session(model.SerializeToString(), 1).run(None, {"x": x})
    return np.asarray(y)


@pytest.mark.parametrize("is_flipped", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize(("kind", "sizes"), [("Gemm", ["batch"]), ("MatMul", ["batch", 3])])
def test_outputs_are_those_of_float_weights(kind: str, sizes: list[str | int], bits: int, is_flipped: bool) -> None:
    levels = levels_of(bits, is_flipped=is_flipped)
    model = network(levels, kind, sizes)
    products = find_products(model, ["w"])
    packed = as_blocks(pack_weights(model, {"w": bits}), products)
    onnx.checker.check_model(packed, full_check=True)
    assert [p.num_rows for p in products] == [1 if kind == "Gemm" else 3]
    assert [n.op_type for n in packed.graph.node].count("MatMulNBits") == 1
    for batch in (1, 3, 7):
        x = np.random.default_rng(0).standard_normal((batch, *sizes[1:], K)).astype(np.float32)
        expected = run(network(levels, f"float {kind}", sizes), x)
        np.testing.assert_allclose(run(packed, x), expected, rtol=1e-5, atol=1e-5)


def grouped_network(levels: NDArray[np.int8], scale: NDArray[np.float32], *, is_gemm: bool) -> onnx.ModelProto:
    """As ``network``, with a scale for each group of inputs ``[n, m]``, negative ones among them."""
    model = network(levels, "Gemm" if is_gemm else "MatMul", ["batch"])
    graph = model.graph
    constants = {"w": levels.reshape(scale.size, -1), "s": scale.reshape(-1), "shape": np.array([N, -1])}
    kept = [tensor for tensor in graph.initializer if tensor.name not in constants]
    del graph.initializer[:]
    graph.initializer.extend([*kept, *(numpy_helper.from_array(array, name) for name, array in constants.items())])
    graph.node[0].output[0] = "grouped"
    graph.node.insert(1, helper.make_node("Reshape", ["grouped", "shape"], ["d"]))
    return model


@pytest.mark.parametrize("is_gemm", [False, True])
@pytest.mark.parametrize("bits", [2, 4])
def test_groups_of_inputs_are_blocks_with_a_scale_each(bits: int, is_gemm: bool) -> None:
    levels, generator = levels_of(bits), np.random.default_rng(0)
    scale = (generator.uniform(0.01, 0.1, (N, 3)) * generator.choice([-1, 1], (N, 3))).astype(np.float32)
    model = grouped_network(levels, scale, is_gemm=is_gemm)
    (product,) = find_products(model, ["w"])
    assert (product.num_outputs, product.num_inputs, product.num_groups, product.num_rows) == (N, K, 3, 1)
    packed = as_blocks(pack_weights(model, {"w": bits}), [product])
    onnx.checker.check_model(packed, full_check=True)
    (blocks,) = [node for node in packed.graph.node if node.op_type == "MatMulNBits"]
    assert {a.name: a.i for a in blocks.attribute}["block_size"] == 16
    weight = levels.astype(np.float64) * scale.repeat(16, axis=1)
    for batch in (1, 3, 7):
        x = generator.standard_normal((batch, K)).astype(np.float32)
        expected = x @ weight.T + np.linspace(-1, 1, N)
        np.testing.assert_allclose(run(packed, x), expected, rtol=1e-5, atol=1e-5)


def test_the_runtime_folds_what_makes_the_blocks(tmp_path: Path) -> None:
    model = network(levels_of(3), "Gemm", ["batch"])
    packed = as_blocks(pack_weights(model, {"w": 3}), find_products(model, ["w"]))
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(packed.SerializeToString(), options, providers=["CPUExecutionProvider"])
    left = {node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node}
    assert left <= {"MatMulNBits", "Add"}


def test_a_weight_that_others_read_stays() -> None:
    model = network(levels_of(4), "Gemm", ["batch"])
    model.graph.node.append(helper.make_node("ReduceSum", ["d"], ["sum"]))
    model.graph.output.append(helper.make_tensor_value_info("sum", TensorProto.FLOAT, None))
    assert find_products(model, ["w"]) == []


def test_the_rule_takes_one_row_and_many_weights_of_4_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    def rule(bits: int, sizes: list[str | int]) -> bool:
        (product,) = find_products(network(levels_of(bits), "MatMul", sizes), ["w"])
        return is_faster_in_blocks(product)

    assert not rule(4, ["batch", 1])
    monkeypatch.setattr(onnx_blocks, "MIN_WEIGHTS", N * K)
    assert rule(4, ["batch", 1]) and rule(2, ["batch"])
    assert not rule(5, ["batch", 1])
    assert not rule(4, ["batch", 8])
    assert not rule(4, ["batch", "tokens"])
