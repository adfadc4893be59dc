"""Matrix products of activations with int8 weights in an ONNX graph: found, and replaced by nodes that do the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from .onnx_graph import drop_unused, reads

BATCH_DIM = 0


@dataclass(frozen=True, slots=True)
class Product:
    """``y = x w^T + bias``, with ``w`` int8 levels ``[n, k]`` times a scale for each row, or for each group of one.

    Attributes:
        weight: Name of the int8 initializer, or of what a packed stream gives for it: a row for each scale.
        levels: ``[n m, k / m]``, where rows have ``m`` groups with a scale each; usually one.
        scale: float32 ``[n m]``.
        num_outputs: ``n``.
        bias: Name of a float32 ``[n]``; None where there is none.
        num_rows: Of ``x`` at batch 1; None where the graph doesn't say it.
    """

    weight: str
    x: str
    output: str
    bias: str | None
    levels: NDArray[np.int8]
    scale: NDArray[np.float32]
    num_outputs: int
    num_rows: int | None

    @property
    def num_inputs(self) -> int:
        return int(self.levels.size // self.num_outputs)

    @property
    def num_groups(self) -> int:
        """Scales of a row."""
        return int(len(self.levels) // self.num_outputs)


def find_products(model: onnx.ModelProto, names: Collection[str]) -> list[Product]:
    """The products whose weight is one of ``names`` and is read by that product alone, in the graph's order.

    Args:
        model: Before its weights are packed.
    """
    graph = onnx.shape_inference.infer_shapes(model).graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    made_by = {name: node for node in graph.node for name in node.output}
    shapes = {
        value.name: [dim.dim_value if dim.HasField("dim_value") else None for dim in value.type.tensor_type.shape.dim]
        for value in (*graph.value_info, *graph.input)
    }
    counts = Counter(reads(graph))
    found = []
    for node in graph.node:
        if node.op_type not in ("Gemm", "MatMul") or not _is_plain(node):
            continue
        maker = made_by.get(node.input[1])
        chain = [node.input[1]]
        if node.op_type == "MatMul":
            if maker is None or maker.op_type != "Transpose":
                continue
            chain.append(maker.input[0])
            maker = made_by.get(maker.input[0])
        num_outputs = None
        if maker is not None and maker.op_type == "Reshape" and maker.input[1] in constants:  # of groups of inputs
            chain.append(maker.input[0])
            num_outputs = int(numpy_helper.to_array(constants[maker.input[1]])[0])
            maker = made_by.get(maker.input[0])
        if maker is None or maker.op_type != "DequantizeLinear" or maker.input[0] not in names:
            continue
        weight = maker.input[0]
        attributes = {a.name: helper.get_attribute_value(a) for a in maker.attribute}
        levels = numpy_helper.to_array(constants[weight])
        is_alone = all(counts[name] == 1 for name in (*chain, weight))
        if not is_alone or levels.ndim != 2 or attributes.get("axis", 1) != 0 or maker.input[1] not in constants:
            continue
        scale = numpy_helper.to_array(constants[maker.input[1]])
        if scale.shape != levels.shape[:1] or node.input[0] in constants:
            continue
        bias = node.input[2] if len(node.input) == 3 and node.input[2] else None
        rows = _rows(shapes.get(node.input[0]))
        num_outputs = len(levels) if num_outputs is None else num_outputs
        found.append(Product(weight, node.input[0], node.output[0], bias, levels, scale, num_outputs, rows))
    return found


def _is_plain(node: onnx.NodeProto) -> bool:
    """A MatMul, or the Gemm of a linear layer."""
    usual = {"transA": 0, "transB": 1, "alpha": 1.0, "beta": 1.0}
    given = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    return node.op_type == "MatMul" or {"transA": 0, "transB": 0, "alpha": 1.0, "beta": 1.0, **given} == usual


def _rows(shape: Sequence[int | None] | None) -> int | None:
    """Rows of an activation at batch 1; None where a size besides the batch isn't known."""
    if shape is None or len(shape) < 2 or shape[BATCH_DIM] is not None:
        return None
    sizes = shape[BATCH_DIM + 1 : -1]
    known = [size for size in sizes if size is not None]
    return int(np.prod(known, dtype=np.int64)) if len(known) == len(sizes) else None


def replace_products(
    model: onnx.ModelProto,
    products: Sequence[Product],
    lower: Callable[[Product], tuple[list[onnx.NodeProto], dict[str, NDArray[np.generic]]]],
) -> onnx.ModelProto:
    """A model in which the nodes and initializers that ``lower`` gives stand for each product, without its bias.

    Args:
        model: Left as it is; its weights may be packed. ``lower``'s last node gives the product's output or, where
            there is a bias, ``<output>_product``, to which the bias is added.
    """
    replaced = onnx.ModelProto()
    replaced.CopyFrom(model)
    graph = replaced.graph
    by_output = {product.output: product for product in products}
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        product = by_output.get(node.output[0])
        if product is None:
            nodes.append(node)
            continue
        made, constants = lower(product)
        nodes.extend(made)
        graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in constants.items())
        if product.bias is not None:
            inputs, name = [product_output(product), product.bias], f"{product.output}_biased"
            nodes.append(helper.make_node("Add", inputs, [product.output], name=name))
    del graph.node[:]
    graph.node.extend(nodes)
    drop_unused(replaced)
    return replaced


def product_output(product: Product) -> str:
    """What the nodes that stand for a product are to give."""
    return product.output if product.bias is None else f"{product.output}_product"
