"""The parts of an ONNX file add up to its bytes, and each constant counts as what it is."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from compress.formats.onnx_packed import Dequantize, pack_weights
from compress.formats.onnx_sizes import onnx_sizes
from compress.formats.onnx_sparse import sparse_bytes, sparsify
from compress.formats.planes import packed_size
from compress.widths import Width

ROWS, COLUMNS = 16, 40


def model() -> onnx.ModelProto:
    """``relu(x dequantized(w)^T + b)``, ``w`` int8 with a scale a row."""
    levels = np.random.default_rng(0).integers(-1, 2, (ROWS, COLUMNS)).astype(np.int8)
    scale = np.linspace(0.1, 0.2, ROWS).astype(np.float32)
    constants = {"w": levels, "s": scale, "b": np.ones(ROWS, np.float32)}
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "s"], ["d"], name="dequantize", axis=0),
        helper.make_node("Gemm", ["x", "d", "b"], ["g"], name="product", transB=1),
        helper.make_node("Relu", ["g"], ["y"], name="relu"),
    ]
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", c]) for n, c in (("x", COLUMNS), ("y", ROWS))]
    tensors = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, "net", ends[:1], ends[1:], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def sizes_of(made: onnx.ModelProto) -> dict[str, int]:
    data = made.SerializeToString()
    found = onnx_sizes(data)
    assert sum(found.values()) == len(data)
    assert all(size >= 0 for size in found.values())
    return found


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8, "channels:" + "2" * 4 + "3" * 4 + "t" * 4 + "8" * 4])
@pytest.mark.parametrize("dequantize", ["linear", "fold"])
def test_weights_are_their_packed_bits_and_scales_one_float_a_row(bits: Width, dequantize: Dequantize) -> None:
    found = sizes_of(pack_weights(model(), {"w": bits}, dequantize=dequantize))
    assert found["weights"] == pytest.approx(packed_size(ROWS * COLUMNS, bits), abs=8)
    assert found["scales"] == 4 * ROWS
    assert found["floats"] == 4 * ROWS


def test_nodes_take_what_they_add_to_the_file() -> None:
    made = model()
    whole, before = len(made.SerializeToString()), sizes_of(made)
    added = helper.make_node("Relu", ["y"], ["z"], name="another" * 40)
    made.graph.node.append(added)
    after = sizes_of(made)
    assert after["nodes"] - before["nodes"] > added.ByteSize()
    # The graph's own length takes another byte once it is long.
    assert 0 <= len(made.SerializeToString()) - whole - (after["nodes"] - before["nodes"]) <= 1


def test_places_and_parts_of_survivors_are_weights() -> None:
    random = np.random.default_rng(0)
    weight = np.where(random.random((64, 640)) < 0.1, random.standard_normal((64, 640)), 0).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 640])],
        [numpy_helper.from_array(weight, "w")],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    found = sizes_of(sparsify(made, ["w"]))
    assert found["weights"] == pytest.approx(sparse_bytes(weight), abs=10)
    assert found["floats"] < 100  # the units of the exponents, and the zero that is expanded


def test_values_count_whatever_field_holds_them() -> None:
    made = model()
    made.graph.initializer[2].CopyFrom(helper.make_tensor("b", TensorProto.FLOAT, [ROWS], np.ones(ROWS)))
    assert not made.graph.initializer[2].HasField("raw_data")
    assert sizes_of(made)["floats"] >= 4 * ROWS
