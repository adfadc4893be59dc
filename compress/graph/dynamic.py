"""Activations of linear layers rounded as they come: ONNX's DynamicQuantizeLinear in ATen ops."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import fx

from .rewrite import decomposed, finish, operand

aten = torch.ops.aten
TOP = 255  # levels of uint8


def integer_linears(module: fx.GraphModule) -> set[str]:
    """The weights' levels, by name, of the linear layers on integers that nothing else reads."""
    return {name for _, name in _linears(module)}


def round_inputs(module: fx.GraphModule, names: Collection[str]) -> None:
    """Round the inputs of the linear layers whose levels are ``names``, each to 256 levels over its own extremes.

    ``s = (max(x, 0) - min(x, 0)) / 255``, ``z = round(-min / s)``, ``x' = s (clamp(round(x / s) + z, 0, 255) - z)``;
    the extremes are those of the whole batch. An input of zeros stays.
    """
    for layer, name in _linears(module):
        if name in names:
            layer.replace_input_with(operand(layer, 0), _rounded(module, layer, operand(layer, 0)))
    finish(module)


def _linears(module: fx.GraphModule) -> list[tuple[fx.Node, str]]:
    found = []
    for node in module.graph.nodes:
        weight = operand(node, 1) if node.target is aten.linear.default else None
        if (
            isinstance(weight, fx.Node)
            and weight.target is decomposed.dequantize_per_channel.default
            and len(weight.users) == 1
        ):
            found.append((node, str(operand(weight, 0).target)))
    return found


def _rounded(module: fx.GraphModule, layer: fx.Node, x: fx.Node) -> fx.Node:
    def op(target: Any, *arguments: Any) -> fx.Node:
        return module.graph.call_function(target, arguments)

    with module.graph.inserting_before(layer):
        low = op(aten.clamp.default, op(aten.amin.default, x), None, 0)
        high = op(aten.clamp.default, op(aten.amax.default, x), 0)
        step = op(aten.div.Tensor, op(aten.sub.Tensor, high, low), TOP)
        scale = op(aten.add.Tensor, step, op(aten.eq.Scalar, step, 0))  # 1 where all is zero
        zero = op(aten.round.default, op(aten.div.Tensor, op(aten.neg.default, low), scale))
        levels = op(aten.add.Tensor, op(aten.round.default, op(aten.div.Tensor, x, scale)), zero)
        kept = op(aten.clamp.default, levels, 0, TOP)
        return op(aten.mul.Tensor, op(aten.sub.Tensor, kept, zero), scale)
