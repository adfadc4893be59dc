"""16-bit float initializers: the outputs of the float32 file, in half of its bytes, cast once when it is loaded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from compress.formats.onnx_half import store_halves
from compress.verify import open_session

DTYPES = (torch.float16, torch.bfloat16)


def model(weight: np.ndarray, bias: np.ndarray) -> onnx.ModelProto:
    """A product and a sum."""
    nodes = [helper.make_node("MatMul", ["x", "w"], ["p"]), helper.make_node("Add", ["p", "b"], ["y"])]
    infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", None]) for name in "xy"]
    constants = [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(bias, "b")]
    graph = helper.make_graph(nodes, "g", infos[:1], infos[1:], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def rounded(shape: tuple[int, ...], dtype: torch.dtype) -> np.ndarray:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values.view(-1)[0] = -0.0
    return values.to(dtype).float().numpy()


def run(content: bytes, x: np.ndarray) -> np.ndarray:
    (y,) = open_session(content, 1).run(None, {"x": x})
    return np.asarray(y)


@pytest.mark.parametrize("dtype", DTYPES)
def test_outputs_are_those_of_the_float32_file_to_the_bit(dtype: torch.dtype) -> None:
    whole = model(rounded((64, 96), dtype), rounded((96,), dtype))
    half = store_halves(whole, dtype)
    onnx.checker.check_model(half, full_check=True)
    x = np.random.default_rng(0).standard_normal((5, 64)).astype(np.float32)
    assert np.array_equal(run(half.SerializeToString(), x), run(whole.SerializeToString(), x))
    assert half.ByteSize() < 0.52 * whole.ByteSize()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_runtime_folds_the_cast(dtype: torch.dtype, tmp_path: Path) -> None:
    half = store_halves(model(rounded((64, 96), dtype), rounded((96,), dtype)), dtype)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(half.SerializeToString(), options, providers=["CPUExecutionProvider"])
    assert "Cast" not in [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_16_bits_would_change_stays_as_it_is(dtype: torch.dtype) -> None:
    weight, small = np.full((64, 64), 1 + 2**-20, np.float32), rounded((63,), dtype)
    whole = model(weight, rounded((64,), dtype))
    assert store_halves(whole, dtype).graph.initializer[0].data_type == TensorProto.FLOAT
    assert store_halves(whole, dtype, exact=False).graph.initializer[0].data_type != TensorProto.FLOAT
    assert store_halves(model(weight[:, :63], small), dtype).graph.node[0].op_type == "MatMul"
    overflow = np.full((64, 64), np.finfo(np.float32).min, np.float32)
    assert store_halves(model(overflow, rounded((64,), dtype)), dtype).graph.initializer[0].name == "w"


def test_grids_stay_float32() -> None:
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "s"], ["d"], axis=0),
        helper.make_node("MatMul", ["x", "d"], ["y"]),
    ]
    infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", None]) for name in "xy"]
    constants = [
        numpy_helper.from_array(np.ones((64, 8), np.int8), "w"),
        numpy_helper.from_array(np.ones(64, np.float32), "s"),
    ]
    graph = helper.make_graph(nodes, "g", infos[:1], infos[1:], constants)
    whole = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    assert store_halves(whole, torch.float16) == whole
