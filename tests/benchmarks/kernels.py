"""Time one matrix product in every form that model.onnx may give it: the table that the exporter's rule stands on.

    python -m tests.benchmarks.kernels

Prints the table of docs/runtime.md. All forms of one size are timed in turns, on one thread.
Cost: about 4 minutes.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from compress.latency import cpu_name
from compress.verify import Session, open_session

ROWS = (1, 8, 128)
SIZES = (
    (128, 128),
    (256, 256),
    (256, 1024),
    (1024, 256),
    (512, 512),
    (1024, 1024),
    (1024, 4096),
    (4096, 1024),
    (4096, 4096),
)
BLOCK = 128
MIN_TIME_S = 0.4
ROUNDS = 9

Array = NDArray[np.generic]


def _model(nodes: list[onnx.NodeProto], constants: Mapping[str, Array], num_inputs: int, num_outputs: int) -> bytes:
    graph = helper.make_graph(
        nodes,
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["m", num_inputs])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["m", num_outputs])],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    content: bytes = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    return content


def _float32(weight: Array) -> bytes:
    return _model([helper.make_node("MatMul", ["x", "w"], ["y"])], {"w": weight}, *weight.shape)


def _blocks(bits: int, accuracy_level: int) -> Callable[[Array], bytes]:
    def build(weight: Array) -> bytes:
        num_inputs, num_outputs = weight.shape
        block = min(BLOCK, num_inputs)
        count = num_inputs // block
        random = np.random.default_rng(0)
        packed = random.integers(0, 256, (num_outputs, count, block * bits // 8), dtype=np.uint8)
        scales = np.full(num_outputs * count, 0.01, np.float32)
        sizes: dict[str, Any] = {"K": num_inputs, "N": num_outputs, "bits": bits, "block_size": block}
        node = helper.make_node(
            "MatMulNBits", ["x", "b", "s"], ["y"], domain="com.microsoft", accuracy_level=accuracy_level, **sizes
        )
        return _model([node], {"b": packed, "s": scales}, *weight.shape)

    return build


def _dynamic(dtype: type) -> Callable[[Array], bytes]:
    def build(weight: Array) -> bytes:
        levels = np.clip(np.round(weight * 40), -63, 63)
        zero = 128 if dtype is np.uint8 else 0
        constants = {
            "w": (levels + zero).astype(dtype),
            "wz": np.array(zero, dtype),
            "ws": np.full(weight.shape[1], 1 / 40, np.float32),
        }
        nodes = [
            helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"]),
            helper.make_node("MatMulInteger", ["q", "w", "z", "wz"], ["i"]),
            helper.make_node("Cast", ["i"], ["f"], to=TensorProto.FLOAT),
            helper.make_node("Mul", ["s", "ws"], ["sw"]),
            helper.make_node("Mul", ["f", "sw"], ["y"]),
        ]
        return _model(nodes, constants, *weight.shape)

    return build


def _static(weight: Array) -> bytes:
    levels = np.clip(np.round(weight * 40), -63, 63).astype(np.int8)
    constants: dict[str, Array] = {
        "w": levels,
        "wz": np.zeros(weight.shape[1], np.int8),
        "ws": np.full(weight.shape[1], 1 / 40, np.float32),
        "s": np.array(0.05, np.float32),
        "z": np.array(128, np.uint8),
        "os": np.array(0.5, np.float32),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["wd"], axis=1),
        helper.make_node("MatMul", ["d", "wd"], ["p"]),
        helper.make_node("QuantizeLinear", ["p", "os", "z"], ["pq"]),
        helper.make_node("DequantizeLinear", ["pq", "os", "z"], ["y"]),
    ]
    return _model(nodes, constants, *weight.shape)


FORMS: dict[str, Callable[[Array], bytes]] = {
    "float32": _float32,
    "MatMulNBits 2, float": _blocks(2, 0),
    "MatMulNBits 4, float": _blocks(4, 0),
    "MatMulNBits 8, float": _blocks(8, 0),
    "MatMulNBits 4, int8": _blocks(4, 4),
    "MatMulNBits 8, int8": _blocks(8, 4),
    "dynamic, int8": _dynamic(np.int8),
    "dynamic, uint8": _dynamic(np.uint8),
    "static, int8": _static,
}


def microseconds(sessions: Mapping[str, Session], x: Array) -> dict[str, float]:
    """Median over rounds of the time of one call of each session, in turns."""
    calls = {}
    for name, session in sessions.items():
        session.run(None, {"x": x})
        start = time.perf_counter()
        session.run(None, {"x": x})
        calls[name] = max(1, int(MIN_TIME_S / ROUNDS / max(1e-6, time.perf_counter() - start)))
    found: dict[str, list[float]] = {name: [] for name in sessions}
    for _ in range(ROUNDS):
        for name, session in sessions.items():
            start = time.perf_counter()
            for _ in range(calls[name]):
                session.run(None, {"x": x})
            found[name].append(1e6 * (time.perf_counter() - start) / calls[name])
    return {name: statistics.median(times) for name, times in found.items()}


def main() -> None:
    """Print the table as Markdown."""
    import onnxruntime

    print(f"ONNX Runtime {onnxruntime.__version__}, {cpu_name()}, one thread, microseconds a call.\n")
    print(f"| rows | inputs x outputs | {' | '.join(FORMS)} |")
    print(f"|{' --- |' * (len(FORMS) + 2)}")
    random = np.random.default_rng(0)
    for num_inputs, num_outputs in SIZES:
        weight = random.standard_normal((num_inputs, num_outputs)).astype(np.float32)
        sessions = {name: open_session(build(weight), 1) for name, build in FORMS.items()}
        for rows in ROWS:
            times = microseconds(sessions, random.standard_normal((rows, num_inputs)).astype(np.float32))
            cells = [f"{times[name]:.3g}" if times[name] < 1000 else f"{times[name]:.0f}" for name in FORMS]
            print(f"| {rows} | {num_inputs} x {num_outputs} | {' | '.join(cells)} |")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
