"""The vectors of a network's layers in a few constants: an initializer of its own takes a vector 30 bytes more.

Scales follow each other in one float32 vector, and so do float biases, which Split takes apart. int32 biases are
Golomb-Rice codes (``onnx_codes.py``) of few bits, and their scales, products of the weight's and the input's, are
computed. ONNX Runtime and OpenVINO fold all of it when they load the file. Cost: one pass over the vectors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from .onnx_build import Array, Builder, free_prefix, insert, runs, split
from .onnx_codes import GROUP, add_signed, signed_bytes

LAYERS = ("Conv", "Gemm")
BIAS = 2  # which input of a layer
MOST = 1 << 30  # of an integer that is coded
NODE_BYTES = 500  # of the nodes that take codes apart
Named = tuple[str, Array]


def share_vectors(model: onnx.ModelProto) -> onnx.ModelProto:
    """A model of the same outputs, bit for bit, whose scales and biases share constants where that is smaller.

    Args:
        model: Left as it is.
    """
    shared = onnx.ModelProto()
    shared.CopyFrom(model)
    graph = shared.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    build = Builder(free_prefix(graph))
    products = _take_products(build, graph, constants)
    replaced = set(products.values())
    for names in _alike(graph, constants):
        vectors = [(name, numpy_helper.to_array(constants[name])) for name in names]
        for run in runs(vectors, lambda vector: vector[1].size, lambda vector: None):
            if len(run) > 1:
                _add_run(build, run)
                replaced |= {name for name, _ in run}
    for step, scale, product in products:
        build.emit("Mul", [scale, step], [product])
    insert(build, graph, replaced)
    return shared


def _take_products(
    build: Builder, graph: onnx.GraphProto, constants: Mapping[str, TensorProto]
) -> dict[tuple[str, str, str], str]:
    """The scales of biases that are products: the names of step, scale and, from now on, product, and what it was."""
    made = {name: node for node in graph.node for name in node.output}
    found: dict[tuple[str, str, str], str] = {}
    for layer in graph.node:
        if layer.op_type not in LAYERS or len(layer.input) <= BIAS:
            continue
        parts = [part for part in map(made.get, layer.input) if part is not None and part.op_type == "DequantizeLinear"]
        names = [part.input[1] for part in parts]
        if len(parts) <= BIAS or any(name not in constants for name in names):
            continue
        step, scale, product = (numpy_helper.to_array(constants[name]) for name in names)
        if step.ndim == 0 and scale.ndim == 1 and np.array_equal(scale * step, product):
            new = f"{build.prefix}_product{len(found)}"
            parts[BIAS].input[1] = new
            found[names[0], names[1], new] = names[BIAS]
    return found


def _alike(graph: onnx.GraphProto, constants: Mapping[str, TensorProto]) -> Iterator[list[str]]:
    """The names of scales, of float biases and of int32 biases, each in the order of their first reader."""
    found: dict[tuple[str, int], dict[str, None]] = {}
    roles = {"DequantizeLinear": {0: TensorProto.INT32, 1: TensorProto.FLOAT}}
    roles |= {layer: {BIAS: TensorProto.FLOAT} for layer in LAYERS}
    for node in graph.node:
        for place, data_type in roles.get(node.op_type, {}).items():
            tensor = constants.get(node.input[place]) if place < len(node.input) else None
            if tensor is not None and tensor.data_type == data_type and len(tensor.dims) == 1 and tensor.dims[0] > 1:
                role = ("bias" if place == BIAS else "scale", data_type)
                found.setdefault(role, {})[tensor.name] = None
    known: set[str] = set()
    for names in found.values():
        yield [name for name in names if name not in known]
        known |= names.keys()


def _add_run(build: Builder, vectors: Sequence[Named]) -> None:
    flat = np.concatenate([array for _, array in vectors])
    padding = -flat.size % GROUP
    padded = np.concatenate([flat, np.zeros(padding, flat.dtype)])
    if flat.dtype == np.int32 and _is_smaller(padded):
        whole = add_signed(build, padded.astype(np.int64))
    else:
        whole, padding = build.constant(flat), 0
    split(build, whole, [array.size for _, array in vectors], padding=padding, names=[name for name, _ in vectors])


def _is_smaller(integers: Array) -> bool:
    wide = integers.astype(np.int64)
    return bool(abs(wide).max() < MOST) and signed_bytes(wide) + NODE_BYTES < integers.nbytes
