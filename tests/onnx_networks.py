"""Small ONNX networks with int8 or float weights, and what ONNX Runtime makes of them."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

Array = NDArray[np.generic]
Levels = dict[str, NDArray[np.int8]]

SHAPES = {"conv1": (8, 3, 3, 3), "conv2": (12, 8, 3, 3), "conv3": (5, 12, 1, 1), "head": (5, 7)}
AXES = {"conv1": 0, "conv2": 0, "conv3": 0, "head": 1}


def network(levels: Levels, kind: str) -> onnx.ModelProto:
    """Three convolutions and a MatMul; ``kind``: integer (quantized activations), weights (only those), or float."""
    nodes: list[onnx.NodeProto] = []
    constants: dict[str, Array] = {"axes": np.array([2, 3])}

    def activation(name: str) -> str:
        if kind != "integer":
            return name
        zero = "middle" if name in ("x", "product") else "least"  # The rest follow a Relu.
        constants.update(step=np.array(0.05, np.float32), middle=np.array(128, np.uint8), least=np.array(0, np.uint8))
        nodes.append(helper.make_node("QuantizeLinear", [name, "step", zero], [f"{name}.q"]))
        nodes.append(helper.make_node("DequantizeLinear", [f"{name}.q", "step", zero], [f"{name}.d"]))
        return f"{name}.d"

    def weight(name: str) -> str:
        num_channels = SHAPES[name][AXES[name]]
        scale = np.linspace(0.01, 0.03, num_channels, dtype=np.float32)
        if kind == "float":
            along = [-1 if dim == AXES[name] else 1 for dim in range(len(SHAPES[name]))]
            constants[f"{name}.w"] = levels[name].astype(np.float32) * scale.reshape(along)
        else:
            constants[name] = levels[name]
            constants[f"{name}.scale"] = scale
            constants[f"zeros{num_channels}"] = np.zeros(num_channels, np.int8)
            inputs = [name, f"{name}.scale", f"zeros{num_channels}"]
            nodes.append(helper.make_node("DequantizeLinear", inputs, [f"{name}.w"], axis=AXES[name]))
        return f"{name}.w"

    x = activation("x")
    for name in ("conv1", "conv2", "conv3"):
        nodes.append(helper.make_node("Conv", [x, weight(name)], [f"{name}.y"]))
        nodes.append(helper.make_node("Relu", [f"{name}.y"], [f"{name}.r"]))
        x = activation(f"{name}.r")
    nodes.append(helper.make_node("ReduceMean", [x, "axes"], ["mean"], keepdims=0))
    nodes.append(helper.make_node("MatMul", [activation("mean"), weight("head")], ["product"]))
    nodes.append(helper.make_node("Identity", [activation("product")], ["y"]))
    return finish(nodes, constants, [("x", ["n", 3, 12, 12])], [("y", ["n", 7])])


def finish(
    nodes: list[onnx.NodeProto],
    constants: dict[str, Array],
    inputs: list[tuple[str, list[str | int]]],
    outputs: list[tuple[str, list[str | int]]],
) -> onnx.ModelProto:
    infos = [
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n, shape in io] for io in (inputs, outputs)
    ]
    initializers = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, "network", infos[0], infos[1], initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def run(model: onnx.ModelProto, path: Path | None = None) -> list[Array]:
    """Outputs for batches of 1 and 3; the graph that the runtime made goes to ``path``."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    if path:
        options.optimized_model_filepath = str(path)
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    random = np.random.default_rng(0)
    feeds = [{"x": random.standard_normal((n, 3, 12, 12), dtype=np.float32)} for n in (1, 3)]
    return [output for feed in feeds for output in session.run(None, feed if session.get_inputs() else {})]


def kernels(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(path).graph.node)


def assert_same_network(packed: onnx.ModelProto, plain: onnx.ModelProto, folder: Path) -> Counter[str]:
    """The same outputs to the bit from the same kernels; returns how many of each."""
    onnx.checker.check_model(packed, full_check=True)
    found, expected = run(packed, folder / "packed.onnx"), run(plain, folder / "plain.onnx")
    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))
    assert kernels(folder / "packed.onnx") == kernels(folder / "plain.onnx")
    return kernels(folder / "packed.onnx")


def of_levels(levels: Levels, scales: dict[str, NDArray[np.float32]]) -> onnx.ModelProto:
    """A model whose outputs are its dequantized weights, channels first."""
    nodes = [helper.make_node("DequantizeLinear", [n, f"{n}.scale"], [f"{n}.w"], axis=0) for n in levels]
    constants: dict[str, Array] = {**levels, **{f"{name}.scale": scale for name, scale in scales.items()}}
    return finish(nodes, constants, [], [(f"{name}.w", list(array.shape)) for name, array in levels.items()])


def resnet20_weights() -> dict[str, Array]:
    """The real ResNet-20's weights, without biases and norms; skips the test where they are not."""
    folder = os.environ.get("HCOMPRESS_TEST_DATA")
    if not folder:
        pytest.skip("HCOMPRESS_TEST_DATA is not set: the real ResNet-20 is not here")
    path = Path(folder) / "cifar10" / "resnet20-12fca82f.th"
    state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    return {name: tensor.numpy() for name, tensor in state.items() if tensor.dim() > 1}
