"""Where the bytes of an ONNX file go: packed weights, scales, float tensors, other constants, nodes, and the rest.

The parts are read off the file itself and add up to its size. What a constant is follows from its type and from the
node that reads it, past any Cast. Cost: one pass over the nodes and the initializers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import onnx
from onnx import TensorProto, numpy_helper

PARTS = ("weights", "scales", "floats", "constants", "nodes", "rest")
FLOATS = {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE}
LEVELS = {
    *(TensorProto.INT8, TensorProto.UINT8, TensorProto.INT4, TensorProto.UINT4, TensorProto.INT2, TensorProto.UINT2),
}
LEVEL_INPUTS = {"DequantizeLinear": 0, "QuantizeLinear": 0, "MatMulNBits": 1}
SCALE_INPUTS = {"DequantizeLinear": 1, "QuantizeLinear": 1, "MatMulNBits": 2}
Reader = tuple[onnx.NodeProto, int]  # and the place of what it reads


def onnx_sizes(data: bytes) -> dict[str, int]:
    """Bytes of each of ``PARTS`` in a serialized model.

    ``weights`` are levels, and the places and parts of survivors; ``scales`` those of weights and activations;
    ``constants`` are integers such as shapes, the order of channels, and biases; ``rest`` is what names and describes
    all of it.
    """
    graph = onnx.load_model_from_string(data).graph
    readers: dict[str, list[Reader]] = {}
    made = {output: node for node in graph.node for output in node.output}
    for node in graph.node:
        for place, name in enumerate(node.input):
            readers.setdefault(name, []).append((node, place))
    sizes = dict.fromkeys(PARTS, 0)
    constants = {tensor.name: tensor for tensor in graph.initializer}
    for tensor in graph.initializer:
        for part, size in _parts(tensor, constants, readers, made):
            sizes[part] += size
    sizes["nodes"] = sum(_field_bytes(node.ByteSize()) for node in graph.node)
    sizes["rest"] = len(data) - sum(sizes.values())
    return sizes


def _parts(
    tensor: TensorProto,
    constants: Mapping[str, TensorProto],
    readers: Mapping[str, list[Reader]],
    made: Mapping[str, onnx.NodeProto],
) -> Iterator[tuple[str, int]]:
    """What an initializer is, and its bytes; of one of bytes that are split, what each part is."""
    read = list(_past_casts(tensor.name, readers))
    kinds = [(node.op_type, place) for node, place in read]
    if tensor.data_type == TensorProto.UINT8 and kinds == [("Split", 0)] and read[0][0].input[1] in constants:
        node = read[0][0]
        for name, size in zip(node.output, numpy_helper.to_array(constants[node.input[1]]).tolist(), strict=True):
            yield _part(tensor, list(_past_casts(name, readers)), made), size
    else:
        yield _part(tensor, read, made), _value_bytes(tensor)


def _past_casts(name: str, readers: Mapping[str, list[Reader]]) -> Iterator[Reader]:
    for node, place in readers.get(name, []):
        if node.op_type == "Cast":
            yield from _past_casts(node.output[0], readers)
        else:
            yield node, place


def _part(tensor: TensorProto, readers: list[Reader], made: Mapping[str, onnx.NodeProto]) -> str:
    if tensor.data_type in FLOATS:
        is_scale = any(
            SCALE_INPUTS.get(node.op_type) == place or _is_decoding(node, place, made) for node, place in readers
        )
        return "scales" if is_scale else "floats"
    is_many = len(tensor.dims) > 0 and max(tensor.dims) > 1
    if tensor.data_type in LEVELS and is_many and all(_takes_levels(node, place, made) for node, place in readers):
        return "weights"
    return "constants"


def _is_decoding(node: onnx.NodeProto, place: int, made: Mapping[str, onnx.NodeProto]) -> bool:
    """Whether the node multiplies levels that were cast to floats."""
    other = made.get(node.input[1 - place]) if node.op_type == "Mul" else None
    return other is not None and other.op_type == "Cast"


def _takes_levels(node: onnx.NodeProto, place: int, made: Mapping[str, onnx.NodeProto]) -> bool:
    """Whether a byte that the node reads is one of a weight: not a table's, a sign's, a place's or a zero point's."""
    if node.op_type == "Gather":
        table = made.get(node.input[0])
        return place == 1 and table is not None and table.op_type != "Reshape"
    return node.op_type != "Div" and place == LEVEL_INPUTS.get(node.op_type, place)


def _value_bytes(tensor: TensorProto) -> int:
    """Of the values alone, whatever field holds them."""
    if tensor.HasField("raw_data"):
        return len(tensor.raw_data)
    bare = TensorProto()
    bare.CopyFrom(tensor)
    for name in ("float_data", "int32_data", "int64_data", "double_data", "uint64_data", "string_data"):
        bare.ClearField(name)
    return int(tensor.ByteSize() - bare.ByteSize())


def _field_bytes(size: int) -> int:
    """Of a message of so many bytes in a repeated field: with its tag and its length."""
    return 1 + (max(size.bit_length(), 1) + 6) // 7 + size
