"""Weights that are decoded to floats keep float products in OpenVINO.

OpenVINO finds ``Cast(int8) * scale`` before a matrix product, keeps the integers and rounds the product's activations
to 8 bits: BabyLlama's outputs move by 1.5 % of the largest. Levels that pass through int32 aren't found: they are
folded to float weights when the file is loaded, and run at the same speed.
"""

from __future__ import annotations

from collections.abc import Container

import onnx
from onnx import TensorProto, helper


def decode_through_int32(model: onnx.ModelProto, names: Container[str]) -> onnx.ModelProto:
    """A model of the same outputs in which int8 values become int32 before they are floats.

    Args:
        model: Of ``pack_weights(..., dequantize="fold")``. Left as it is.
        names: Of those int8 values: initializers, or what their packed streams give.
    """
    decoded = onnx.ModelProto()
    decoded.CopyFrom(model)
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        kept = onnx.NodeProto()
        kept.CopyFrom(node)
        if node.op_type == "Cast" and node.input[0] in names and node.attribute[0].i == TensorProto.FLOAT:
            wide = f"{node.output[0]}_int32"
            nodes.append(helper.make_node("Cast", [node.input[0]], [wide], name=wide, to=TensorProto.INT32))
            kept.input[0] = wide
        nodes.append(kept)
    del decoded.graph.node[:]
    decoded.graph.node.extend(nodes)
    return decoded
