"""What each layer costs: parameters, MACs, bytes, bit operations and bits of its activations, as tables for planners.

Weights take ``elements * bits / 8`` bytes and four for each scale; bit operations are MACs times the bits of both
factors (Yao et al. 2021, HAWQ-V3, arXiv:2011.10680), here with activations of as many bits as the weights.
"""

from __future__ import annotations

from ..sensitivity import CostTable
from .trace import Graph, Layer

WIDTHS = (2, 3, 4, 5, 6, 7, 8, 32)
SCALE_BYTES = 4


def weight_bytes(layer: Layer, bits: int) -> int:
    """Bytes of a layer's weight at a bit width, scales included; 32 bits are floats, which have none."""
    channels = 1 if layer.axis is None else layer.shape[layer.axis]
    return -(-layer.elements * bits // 8) + (SCALE_BYTES * channels if bits < 32 else 0)


def cost_tables(graph: Graph) -> dict[str, CostTable]:
    """Tables by quantity; an entry's option is a bit width, or empty where the width doesn't matter."""
    layers = graph.layers
    return {
        "params": CostTable("params", {(layer.tensor, ""): layer.elements for layer in layers}),
        "macs": CostTable("macs", {(layer.tensor, ""): layer.macs for layer in layers}),
        "bytes": CostTable("bytes", {(la.tensor, str(b)): weight_bytes(la, b) for la in layers for b in WIDTHS}),
        "bops": CostTable("bops", {(la.tensor, str(b)): la.macs * b * b for la in layers for b in WIDTHS}),
        "activation_bits": CostTable(
            "activation_bits", {(la.tensor, str(b)): la.activations * b for la in layers for b in WIDTHS}
        ),
    }
