"""Activations that are rounded once more, to a grid of their own, for the layers that read them.

A stream that blocks add to keeps 8 bits, and layers read it in fewer. DequantizeLinear, QuantizeLinear and Clip are
three passes over the image; with a sum with zero between the first two they are one integer addition in ONNX Runtime
(QLinearAdd). The Clip is spared too where uint8 itself ends on the side on which values may be beyond the grid: the
zero point is moved so that the highest level is 255, or stays where the lowest is 0.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from .onnx_graph import drop_unused

TOP = 255  # of uint8
MARGIN = 0.49  # of a level; a runtime may round a tie either way
Grid = tuple[float, int]  # scale and zero point
ZERO, ONE = "reread_zero", "reread_one"


def rereads_as_sums(model: onnx.ModelProto) -> onnx.ModelProto:
    """A model that computes the same, with a sum with zero wherever integers are rounded once more.

    Args:
        model: Left as it is. Activations are uint8, each with one scale and one zero point.
    """
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    graph = changed.graph
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    made_by = {name: node for node in graph.node for name in node.output}
    users: dict[str, list[onnx.NodeProto]] = defaultdict(list)
    for node in graph.node:
        for name in node.input:
            users[name].append(node)
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        nodes.append(node)
        source = made_by.get(node.input[0]) if node.op_type == "QuantizeLinear" else None
        if source is None or source.op_type != "DequantizeLinear":
            continue
        own, grid = _grid(source, constants), _grid(node, constants)
        if own is None or grid is None:
            continue
        levels = _ends(made_by.get(source.input[0]), constants) or (0, TOP)
        moved = _spare_clip(node, grid, _levels(levels, own, grid), users, constants)
        if moved is not None:
            graph.initializer.append(moved)
        name = node.output[0]
        nodes.insert(-1, helper.make_node("DequantizeLinear", [ZERO, ONE, ZERO], [f"{name}_zero"]))
        nodes.insert(-1, helper.make_node("Add", [node.input[0], f"{name}_zero"], [f"{name}_sum"]))
        node.input[0] = f"{name}_sum"
    if len(nodes) > len(graph.node):
        graph.initializer.append(numpy_helper.from_array(np.array(0, np.uint8), ZERO))
        graph.initializer.append(numpy_helper.from_array(np.array(1, np.float32), ONE))
        del graph.node[:]
        graph.node.extend(nodes)
        drop_unused(changed)
    return changed


def _spare_clip(
    node: onnx.NodeProto,
    grid: Grid,
    reached: tuple[float, float],
    users: Mapping[str, Sequence[onnx.NodeProto]],
    constants: Mapping[str, NDArray[np.generic]],
) -> onnx.TensorProto | None:
    """Lead what reads a QuantizeLinear's Clip around it where uint8 does the same, at the zero point that is returned.

    Args:
        reached: The lowest and the highest level, from the zero point on, that values may have.
        users: The nodes that read each value.
    """
    name, (_, zero) = node.output[0], grid
    clip = users[name][0] if len(users[name]) == 1 else None
    ends = _ends(clip, constants)
    if clip is None or ends is None:
        return None
    readers, (low, top) = users[clip.output[0]], ends
    is_low, is_high = reached[0] < low - zero - MARGIN, reached[1] > top - zero + MARGIN
    if low or (is_low and is_high) or any(reader.op_type != "DequantizeLinear" for reader in readers):
        return None
    zero_point = f"{name}_zero_point"
    for reader in readers:
        reader.input[0], reader.input[2] = name, zero_point
    node.input[2] = zero_point
    return numpy_helper.from_array(np.array(zero if is_low else TOP - top + zero, np.uint8), zero_point)


def _levels(levels: tuple[int, int], own: Grid, grid: Grid) -> tuple[float, float]:
    """What levels of one grid are in another's steps, from its zero point on."""
    low, high = ((level - own[1]) * own[0] / grid[0] for level in levels)
    return low, high


def _grid(node: onnx.NodeProto, constants: Mapping[str, NDArray[np.generic]]) -> Grid | None:
    """Scale and zero point of a tensor of uint8; None where there are several, or another type."""
    scale, zero = (constants.get(name) for name in node.input[1:3]) if len(node.input) == 3 else (None, None)
    if scale is None or zero is None or scale.size != 1 or zero.size != 1 or zero.dtype != np.uint8:
        return None
    return float(scale.item()), int(zero.item())


def _ends(node: onnx.NodeProto | None, constants: Mapping[str, NDArray[np.generic]]) -> tuple[int, int] | None:
    """The lowest and the highest level that a Clip leaves; None of another node, and where an end isn't known."""
    if node is None or node.op_type != "Clip" or len(node.input) != 3:
        return None
    low, high = (constants.get(name) for name in node.input[1:])
    return None if low is None or high is None else (int(low.item()), int(high.item()))
