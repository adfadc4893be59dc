"""Strided shortcuts with padded channels, as CIFAR's ResNets have them, written as convolutions.

ONNX Runtime keeps the activations of convolutions in blocks of 8 or 16 channels, and integers with the channels last. A
Slice or a Pad ends that: there and after every addition to what they return, activations are put in order and back, and
additions are passes of their own. A 1x1 convolution whose weight is the identity's rows among rows of zeros does the
same, in blocks; between integers it is an integer convolution, where a Slice and a Pad are passes over floats.
Cost: the weight's bytes in the file, and ``out * in * height * width`` MACs a shortcut, of its own output's sizes.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from ..widths import Width
from .onnx_graph import drop_unused, reads

SPATIAL = (2, 3)  # dimensions [n, c, h, w]
SHORTCUT_BITS: Width = 2  # of integers: zeros and ones


def shortcuts_as_convolutions(model: onnx.ModelProto, *, floats: bool = True) -> tuple[onnx.ModelProto, list[str]]:
    """A model of the same outputs, bit for bit where the activations are finite, and the new integer weights' names.

    Every second row and column, or every n-th, of float32 images ``[n, c, h, w]`` to which channels of zeros are added
    become one Conv. Between two rounded activations its weight is an int8 of zeros and ones. Left as it is: what slices
    from another place than the first or a part, or is read by others too.

    Args:
        model: Left as it is.
        floats: Whether shortcuts are changed that aren't between two rounded activations.
    """
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    graph = changed.graph
    shapes = _shapes(changed)
    constants = {tensor.name: tensor for tensor in graph.initializer}
    made_by = {name: node for node in graph.node for name in node.output}
    readers = Counter(reads(graph))
    rounded = {node.input[0] for node in graph.node if node.op_type == "QuantizeLinear"}
    integers, nodes = [], []
    for pad in graph.node:
        nodes.append(pad)
        added = _added_channels(pad, constants)
        if added is None:
            continue
        strides, source = dict.fromkeys(SPATIAL, 1), pad.input[0]
        while readers[source] == 1 and (step := _step(made_by.get(source), constants)) is not None:
            dim, stride = step
            strides[dim] *= stride
            source = made_by[source].input[0]
        channels = shapes.get(source)
        is_dequantized = source in made_by and made_by[source].op_type == "DequantizeLinear"
        is_integer = is_dequantized and pad.output[0] in rounded and readers[pad.output[0]] == 1
        if source == pad.input[0] or channels is None or not (is_integer or floats):
            continue
        before, after = added
        weight = np.zeros((before + channels + after, channels, 1, 1), np.int8 if is_integer else np.float32)
        weight[before + np.arange(channels), np.arange(channels)] = 1
        name = stored = f"{pad.output[0]}_weight"
        if is_integer:
            stored = f"{name}_levels"
            integers.append(stored)
            graph.initializer.append(numpy_helper.from_array(np.array(1, np.float32), f"{name}_scale"))
            nodes.insert(-1, helper.make_node("DequantizeLinear", [stored, f"{name}_scale"], [name]))
        graph.initializer.append(numpy_helper.from_array(weight, stored))
        sizes: dict[str, Any] = {"kernel_shape": [1, 1], "strides": [strides[dim] for dim in SPATIAL]}
        pad.CopyFrom(helper.make_node("Conv", [source, name], [pad.output[0]], pad.name, **sizes))
    del graph.node[:]
    graph.node.extend(nodes)
    drop_unused(changed)
    return changed, integers


def _shapes(model: onnx.ModelProto) -> dict[str, int]:
    """Channels of every float32 value ``[n, c, h, w]`` where they are known."""
    inferred = onnx.shape_inference.infer_shapes(model).graph
    found = {}
    for value in (*inferred.value_info, *inferred.input):
        tensor = value.type.tensor_type
        dims = tensor.shape.dim
        if tensor.elem_type == onnx.TensorProto.FLOAT and len(dims) == 4 and dims[1].HasField("dim_value"):
            found[value.name] = int(dims[1].dim_value)
    return found


def _added_channels(node: onnx.NodeProto, constants: dict[str, onnx.TensorProto]) -> tuple[int, int] | None:
    """Channels of zeros that a Pad of four dimensions adds before and behind, where that is all it does."""
    if (
        node.op_type != "Pad"
        or len(node.input) > 3
        or any(a.name == "mode" and a.s != b"constant" for a in node.attribute)
    ):
        return None
    pads = _constant(node, 1, constants)
    fill = _constant(node, 2, constants) if len(node.input) == 3 and node.input[2] else np.zeros(1)
    if pads is None or len(pads) != 8 or fill is None or fill.any() or pads.min() < 0:
        return None
    before, after = int(pads[1]), int(pads[5])
    return (before, after) if before + after == pads.sum() else None


def _step(node: onnx.NodeProto | None, constants: dict[str, onnx.TensorProto]) -> tuple[int, int] | None:
    """Dimension and step of a Slice that takes every n-th row or column of all, from the first on."""
    if node is None or node.op_type != "Slice" or len(node.input) < 5:
        return None
    given = [_constant(node, place, constants) for place in range(1, 5)]
    if any(values is None or len(values) != 1 for values in given):
        return None
    start, end, dim, step = (int(values[0]) for values in given if values is not None)
    is_all = start == 0 and end >= np.iinfo(np.int32).max
    return (dim, step) if is_all and dim in SPATIAL and step > 0 else None


def _constant(node: onnx.NodeProto, place: int, constants: dict[str, onnx.TensorProto]) -> NDArray[np.generic] | None:
    tensor = constants.get(node.input[place])
    return None if tensor is None else np.atleast_1d(numpy_helper.to_array(tensor))
