"""Matrix products of integers whose activations are rounded as they come: DynamicQuantizeLinear and MatMulInteger.

Each activation gets a scale and a zero point from its own extremes, over the whole batch. Standard ops: ONNX Runtime
and OpenVINO have kernels for them. Processors without VNNI add two products of int8 weights in 16 bits, where levels
beyond those of 7 bits overflow: such weights become uint8 with a zero point, which every processor adds right, at less
speed.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from .onnx_products import Product, product_output, replace_products

SAFE = 64  # largest of 7 bits: twice 255 * 64 fits 16 bits
INTEGER_PRODUCT = "MatMulInteger"  # whose nodes are named after their weights
MIDDLE = 128  # the zero of uint8 weights
SUMS = "_sums"
# Measured on one thread (docs/runtime.md): below, rounding activations takes what the product saves.
MIN_MACS = 1 << 20
# uint8 weights are no faster to multiply than floats, only to read.
MOST_UNSIGNED_ROWS = 8
MIN_UNSIGNED_WEIGHTS = 1 << 20


def is_faster_as_integers(product: Product) -> bool:
    """Whether a product is faster in this form than with float weights at batch 1."""
    if product.num_rows is None or product.num_groups > 1:
        return False
    if _is_unsigned(product):
        return product.num_rows <= MOST_UNSIGNED_ROWS and product.levels.size >= MIN_UNSIGNED_WEIGHTS
    return product.num_rows * product.levels.size >= MIN_MACS


def dynamic_weights(model: onnx.ModelProto) -> set[str]:
    """The weights of the products that ``as_dynamic`` wrote."""
    return {node.name.removesuffix(SUMS) for node in model.graph.node if node.op_type == INTEGER_PRODUCT}


def _is_unsigned(product: Product) -> bool:
    return bool(np.abs(product.levels.astype(np.int16)).max(initial=0) > SAFE)


def as_dynamic(model: onnx.ModelProto, products: Sequence[Product]) -> onnx.ModelProto:
    """A model in which ``products`` are those of uint8 activations and integer weights.

    Args:
        model: Left as it is; the int8 weights of the products may be packed.
    """
    rounded: set[str] = set()

    def lower(product: Product) -> tuple[list[onnx.NodeProto], dict[str, NDArray[np.generic]]]:
        x, w = product.x, product.weight
        nodes = []
        if x not in rounded:
            rounded.add(x)
            parts = [f"{x}_{part}" for part in ("levels", "scale", "zero_point")]
            nodes.append(helper.make_node("DynamicQuantizeLinear", [x], parts, name=parts[0]))
        constants: dict[str, NDArray[np.generic]] = {f"{w}_row_scale": product.scale}
        integers, zero = w, []
        if _is_unsigned(product):
            constants |= {f"{w}_middle": np.array(MIDDLE, np.int32), f"{w}_zero": np.array(MIDDLE, np.uint8)}
            integers, zero = f"{w}_unsigned", [f"{w}_zero"]
            nodes += [
                helper.make_node("Cast", [w], [f"{w}_wide"], name=f"{w}_wide", to=TensorProto.INT32),
                helper.make_node("Add", [f"{w}_wide", f"{w}_middle"], [f"{w}_moved"], name=f"{w}_moved"),
                helper.make_node("Cast", [f"{w}_moved"], [integers], name=integers, to=TensorProto.UINT8),
            ]
        inputs = [f"{x}_levels", f"{w}_columns", f"{x}_zero_point", *zero]
        sums, scale = f"{w}{SUMS}", f"{w}_scale_of_sums"
        nodes += [
            helper.make_node("Transpose", [integers], [f"{w}_columns"], name=f"{w}_columns", perm=[1, 0]),
            helper.make_node(INTEGER_PRODUCT, inputs, [sums], name=sums),
            helper.make_node("Cast", [sums], [f"{sums}_float"], name=f"{sums}_float", to=TensorProto.FLOAT),
            helper.make_node("Mul", [f"{x}_scale", f"{w}_row_scale"], [scale], name=scale),
            helper.make_node("Mul", [f"{sums}_float", scale], [product_output(product)], name=f"{w}_product"),
        ]
        return nodes, constants

    return replace_products(model, products, lower)
