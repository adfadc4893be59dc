"""Matrix products on 4-bit weights in ONNX Runtime: MatMulNBits, whose integers stay packed in memory.

Weights of 2 to 4 bits lie in the file at their own bits. Nodes make two levels a byte of them, which the runtime folds
when it loads the file. Activations and sums are float32 (accuracy level 0); so the outputs are those of float weights.
Cost: the weights as int32 while the file is loaded, half a byte a weight after.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from .onnx_products import Product, product_output, replace_products

DOMAIN = "com.microsoft"
BITS = 4
MIDDLE = 1 << (BITS - 1)  # what a stored level of zero is
BLOCKS = (128, 64, 32, 16)  # weights of one scale that the kernels know
# Measured on one thread (docs/runtime.md): faster than floats where weights no longer fit the processor's cache, for a
# single row; from 8 rows on, taking the integers apart costs more than reading floats.
MIN_WEIGHTS = 1 << 20


def is_faster_in_blocks(product: Product) -> bool:
    """Whether a product of float activations at batch 1 is faster in this form, and the kernel takes it."""
    return (
        product.num_rows == 1
        and product.levels.size >= MIN_WEIGHTS
        and _block(product) is not None
        and _signs(product.levels) is not None
    )


def as_blocks(model: onnx.ModelProto, products: Sequence[Product]) -> onnx.ModelProto:
    """A model of the same outputs with MatMulNBits for ``products``, which all fit it.

    Args:
        model: Left as it is; the int8 weights of the products may be packed.
    """
    changed = replace_products(model, products, _lower)
    if products and DOMAIN not in {opset.domain for opset in changed.opset_import}:
        changed.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    return changed


def _block(product: Product) -> int | None:
    """The largest block that the weights of one scale are made of; None where the kernel has none."""
    return next((size for size in BLOCKS if product.levels.shape[1] % size == 0), None)


def _lower(product: Product) -> tuple[list[onnx.NodeProto], dict[str, NDArray[np.generic]]]:
    block, signs = _block(product), _signs(product.levels)
    assert block is not None and signs is not None
    blocks = product.num_inputs // block
    name = product.weight
    halves = [product.num_outputs, blocks, block // 2, 2]
    constants: dict[str, NDArray[np.generic]] = {
        f"{name}_sign": signs[:, None],
        f"{name}_middle": np.array(MIDDLE, np.int32),
        f"{name}_halves": np.array(halves),
        f"{name}_shifts": np.array([1, 1 << BITS], np.int32),
        f"{name}_last": np.array([-1]),
        f"{name}_row_scale": (product.scale * signs)[:, None].astype(np.float32),
        f"{name}_blocks": np.array([len(product.levels), blocks // product.num_groups]),
    }

    def node(kind: str, inputs: list[str], output: str, **attributes: Any) -> onnx.NodeProto:
        names = [text if text in (name, product.x) else f"{name}_{text}" for text in inputs]
        out = output if output == product_output(product) else f"{name}_{output}"
        return helper.make_node(kind, names, [out], name=out, **attributes)

    sizes = {"K": product.num_inputs, "N": product.num_outputs, "bits": BITS, "block_size": block}
    nodes = [
        node("Cast", [name], "wide", to=TensorProto.INT32),
        node("Cast", ["sign"], "wide_sign", to=TensorProto.INT32),
        node("Mul", ["wide", "wide_sign"], "signed"),
        node("Add", ["signed", "middle"], "unsigned"),
        node("Reshape", ["unsigned", "halves"], "pairs"),
        node("Mul", ["pairs", "shifts"], "shifted"),
        node("ReduceSum", ["shifted", "last"], "bytes", keepdims=0),
        node("Cast", ["bytes"], "packed", to=TensorProto.UINT8),
        node("Expand", ["row_scale", "blocks"], "expanded"),
        node("Reshape", ["expanded", "last"], "scales"),
        node(
            "MatMulNBits",
            [product.x, "packed", "scales"],
            product_output(product),
            domain=DOMAIN,
            accuracy_level=0,
            **sizes,
        ),
    ]
    return nodes, constants


def _signs(levels: NDArray[np.int8]) -> NDArray[np.int8] | None:
    """For each row of levels the sign, 1 or -1, with which it fits 4 bits; None where a row fits with neither."""
    wide = levels.astype(np.int16)
    signs = np.where(wide.max(axis=1, initial=-128) == MIDDLE, -1, 1).astype(np.int8)
    signed = wide * signs[:, None]
    fits = signed.size > 0 and signed.min() >= -MIDDLE and signed.max() < MIDDLE
    return signs if fits else None
