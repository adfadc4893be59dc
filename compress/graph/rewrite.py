"""Rewrites of a traced network: batch norms folded, weights as integers, activations rounded.

Each works on the unlifted module of a program (``program.module()``), in place, and replaces tensors instead of writing
into them: the program's own weights are never changed.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.ao.quantization.fx._decomposed  # registers torch.ops.quantized_decomposed
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from .trace import CONVOLUTIONS, TRANSPOSED, WEIGHT_ARGUMENT, WEIGHT_OPS, aten

decomposed = torch.ops.quantized_decomposed
BATCH_NORMS = (aten.batch_norm.default,)
# An op whose output keeps its input's grid: rounding again would change nothing.
MOVES = {
    aten.view.default, aten.reshape.default, aten.flatten.using_ints, aten.permute.default, aten.transpose.int,
    aten.slice.Tensor, aten.select.int, aten.squeeze.dim, aten.squeeze.dims, aten.unsqueeze.default,
    aten.contiguous.default, aten.max_pool2d.default, aten.max_pool1d.default, aten.dropout.default,
    aten.clone.default, aten.expand.default, aten.chunk.default, aten.split.Tensor, aten.unbind.int, operator.getitem,
}  # fmt: skip
ACTIVATIONS = {
    aten.relu.default, aten.relu_.default, aten.hardtanh.default, aten.hardtanh_.default, aten.relu6.default,
    aten.clamp.default, aten.clamp_min.default,
}  # fmt: skip
ROUNDED = {
    *WEIGHT_OPS, *ACTIVATIONS, aten.add.Tensor, aten.add_.Tensor, aten.mul.Tensor, aten.mul_.Tensor, aten.cat.default,
    aten.mean.dim, aten.adaptive_avg_pool2d.default, aten.avg_pool2d.default, aten.batch_norm.default, aten.pad.default,
    aten.sigmoid.default, aten.silu.default, aten.silu_.default, aten.hardswish.default, aten.hardswish_.default,
    aten.hardsigmoid.default, aten.gelu.default, aten.leaky_relu.default, aten.leaky_relu_.default, aten.elu.default,
    aten.tanh.default, aten.sub.Tensor, aten.upsample_nearest2d.vec, aten.prelu.default,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class IntegerWeight:
    """Levels and scale that stand for a weight: ``levels * scale``, the scale along ``axis``."""

    levels: Tensor
    scale: Tensor
    axis: int | None


@dataclass(frozen=True, slots=True)
class Grid:
    """Unsigned grid of an activation."""

    scale: float
    zero_point: int
    bits: int


def unlift(program: ExportedProgram, tied: Sequence[Sequence[str]] = ()) -> fx.GraphModule:
    """The program as a module of its own, whose tensors may be replaced; tied weights go by their first name."""
    module = program.module(check_guards=False)
    assert isinstance(module, fx.GraphModule)
    canonical = {alias: names[0] for names in tied for alias in names}
    for node in module.graph.nodes:
        if node.op == "get_attr" and node.target in canonical:
            node.target = canonical[node.target]
    return module


def operand(node: fx.Node, position: int) -> Any:
    """An argument of a call; torch types it as a union of all that an argument may be."""
    return node.args[position]


def tensor_at(module: nn.Module, target: str) -> Tensor:
    """The parameter, buffer or constant that a ``get_attr`` target names."""
    value = operator.attrgetter(target)(module)
    assert isinstance(value, Tensor)
    return value.detach()


def put_tensor(module: nn.Module, target: str, value: Tensor) -> None:
    """Set a buffer called ``target``, replacing what has that name."""
    path, _, name = target.rpartition(".")
    owner = module.get_submodule(path)
    if name in owner._parameters:
        del owner._parameters[name]
    if name in owner._buffers:
        owner._buffers[name] = value
    elif hasattr(owner, name):
        setattr(owner, name, value)
    else:
        owner.register_buffer(name, value)


def fold_batch_norms(module: fx.GraphModule) -> dict[str, Tensor]:
    """Fold each batch norm into the convolution or linear layer before it.

    ``gamma (w x + b - mean) / sigma + beta = (k w) x + (b - mean) k + beta`` with ``k = gamma / sigma``.

    Returns:
        The factor ``k``, shape ``[c]``, of every folded weight by its target: the weight itself is left for the caller,
        who multiplies the float weight or, for integers, the scale. Biases are folded here.
    """
    factors = {}
    for node in list(module.graph.nodes):
        if node.target in BATCH_NORMS and _is_foldable(node):
            layer = operand(node, 0)
            weight = operand(layer, WEIGHT_ARGUMENT)
            gamma, beta, mean, variance = (
                None if a is None else tensor_at(module, a.target) for a in (operand(node, i) for i in range(1, 5))
            )
            factor = 1 / torch.sqrt(variance.double() + operand(node, 7))
            if gamma is not None:
                factor = factor * gamma.double()
            old_bias = _bias(module, layer)
            bias = ((0.0 if old_bias is None else old_bias.double()) - mean.double()) * factor
            if beta is not None:
                bias = bias + beta.double()
            _set_bias(module, layer, bias.to(mean.dtype))
            factors[weight.target] = factor.to(mean.dtype)
            node.replace_all_uses_with(layer)
            module.graph.erase_node(node)
    return factors


def _is_foldable(node: fx.Node) -> bool:
    layer = operand(node, 0)
    if not isinstance(layer, fx.Node) or layer.target not in WEIGHT_OPS or len(layer.users) != 1:
        return False
    if operand(node, 3) is None or node.args[5]:  # no running statistics, or training mode
        return False
    if layer.target is aten.linear.default and operand(node, 0).meta["val"].dim() != 2:
        return False  # batch norm over dim 1 of [n, t, c] isn't the linear layer's output dim
    if layer.target in TRANSPOSED and len(layer.args) > 6 and operand(layer, 6) != 1:
        return False
    weight = operand(layer, WEIGHT_ARGUMENT)
    return isinstance(weight, fx.Node) and weight.op == "get_attr" and _num_uses(weight) == 1


def _num_uses(weight: fx.Node) -> int:
    """Uses of a weight over all the ``get_attr`` nodes that name it."""
    return sum(len(n.users) for n in weight.graph.nodes if n.op == "get_attr" and n.target == weight.target)


def _bias(module: fx.GraphModule, layer: fx.Node) -> Tensor | None:
    node = operand(layer, 2) if len(layer.args) > 2 else layer.kwargs.get("bias")
    return tensor_at(module, node.target) if isinstance(node, fx.Node) else None


def _set_bias(module: fx.GraphModule, layer: fx.Node, value: Tensor) -> None:
    weight = operand(layer, WEIGHT_ARGUMENT)
    target = f"{weight.target.removesuffix('weight')}folded_bias"
    put_tensor(module, target, value)
    with module.graph.inserting_before(layer):
        node = module.graph.get_attr(target)
    _set_argument(layer, 2, node)


def _set_argument(layer: fx.Node, position: int, value: fx.Node) -> None:
    padded = list(layer.args) + [None] * (position + 1 - len(layer.args))
    padded[position] = value
    layer.args = tuple(padded)


def set_weight(module: fx.GraphModule, target: str, value: Tensor | IntegerWeight) -> None:
    """Replace the weight at ``target``, by floats or by integers behind a dequantization."""
    if isinstance(value, Tensor):
        put_tensor(module, target, value)
        return
    axis = 0 if value.axis is None else value.axis
    scale = value.scale.expand(value.levels.shape[axis]) if value.axis is None else value.scale
    # Runtimes want positive scales; a negative one moves its sign into the levels.
    sign = torch.where(scale < 0, -1, 1).to(torch.int8)
    levels = value.levels * sign.reshape([-1 if d == axis else 1 for d in range(value.levels.dim())])
    names = [f"{target}_{part}" for part in ("levels", "scale", "zero_point")]
    values = (levels.contiguous(), scale.abs().contiguous(), torch.zeros(len(scale), dtype=torch.int64))
    for name, tensor in zip(names, values, strict=True):
        put_tensor(module, name, tensor)
    for node in [n for n in module.graph.nodes if n.op == "get_attr" and n.target == target]:
        with module.graph.inserting_before(node):
            parts = [module.graph.get_attr(name) for name in names]
            integer = module.graph.call_function(
                decomposed.dequantize_per_channel.default, (*parts, axis, -128, 127, torch.int8)
            )
            integer.meta["val"] = node.meta.get("val")
        node.replace_all_uses_with(integer)
        module.graph.erase_node(node)


def activation_points(module: fx.GraphModule) -> list[fx.Node]:
    """Tensors that are rounded in a network with integer activations: inputs, and the outputs of compute ops.

    A layer followed by an activation function alone is rounded after it, as runtimes fuse the two; the network's output
    stays float.
    """
    points = []
    for node in module.graph.nodes:
        value = node.meta.get("val")
        if not isinstance(value, Tensor) or not value.is_floating_point() or not node.users:
            continue
        if node.op == "placeholder" or (
            node.op == "call_function" and node.target in ROUNDED and not _is_fused(node) and not _is_output(node)
        ):
            points.append(node)
    return points


def _is_fused(node: fx.Node) -> bool:
    users = list(node.users)
    return len(users) == 1 and users[0].target in ACTIVATIONS and node.target not in ACTIVATIONS


def _is_output(node: fx.Node) -> bool:
    return any(user.op == "output" or (user.target in MOVES and _is_output(user)) for user in node.users)


def quantize_activations(module: fx.GraphModule, grids: Mapping[str, Grid]) -> None:
    """Round the activations named in ``grids``; the biases of integer layers fed by them become int32."""
    by_node = {}
    for node in list(module.graph.nodes):
        if node.name not in grids:
            continue
        grid = grids[node.name]
        # Fewer than eight bits use the lower part of uint8, with ONNX's saturation at the top kept by the clamp.
        arguments = (grid.scale, grid.zero_point, 0, 2**grid.bits - 1, torch.uint8)
        users = list(node.users)
        with module.graph.inserting_after(node):
            rounded = module.graph.call_function(decomposed.quantize_per_tensor.default, (node, *arguments))
        with module.graph.inserting_after(rounded):
            back = module.graph.call_function(decomposed.dequantize_per_tensor.default, (rounded, *arguments))
        rounded.meta["val"] = back.meta["val"] = node.meta["val"]
        by_node[back] = grid
        for user in users:
            user.replace_input_with(node, back)
    for node in list(module.graph.nodes):
        if node.target in WEIGHT_OPS:
            grid = by_node.get(_through_moves(operand(node, 0)))
            if grid is not None:
                _integer_bias(module, node, grid)


def _through_moves(node: fx.Node) -> fx.Node:
    while node.target in MOVES:
        node = operand(node, 0)
    return node


def _integer_bias(module: fx.GraphModule, layer: fx.Node, grid: Grid) -> None:
    """An int32 bias at scale ``input scale * weight scale``; left float where it would overflow."""
    weight, bias = operand(layer, WEIGHT_ARGUMENT), _bias(module, layer)
    if bias is None or weight.target is not decomposed.dequantize_per_channel.default:
        return
    if layer.target in TRANSPOSED or _num_uses(operand(layer, 2)) != 1:
        return
    scale = tensor_at(module, operand(weight, 1).target) * grid.scale
    levels = torch.round(bias.double() / scale.double())
    if levels.abs().max() >= 2**31 - 1:
        return
    target = operand(layer, 2).target
    names = [f"{target}_{part}" for part in ("levels", "scale", "zero_point")]
    values = (levels.to(torch.int32), scale, torch.zeros(len(scale), dtype=torch.int64))
    for name, tensor in zip(names, values, strict=True):
        put_tensor(module, name, tensor)
    with module.graph.inserting_before(layer):
        parts = [module.graph.get_attr(name) for name in names]
        integer = module.graph.call_function(
            decomposed.dequantize_per_channel.default, (*parts, 0, -(2**31), 2**31 - 1, torch.int32)
        )
    _set_argument(layer, 2, integer)


def to_aten(module: fx.GraphModule) -> None:
    """Say the same with ATen ops alone, so that a saved program loads without importing anything."""
    for node in list(module.graph.nodes):
        if node.target is decomposed.dequantize_per_tensor.default:
            rounded = operand(node, 0)
            scale, zero_point, low, high = (operand(rounded, i) for i in range(1, 5))
            steps = (
                (aten.div.Tensor, scale),
                (aten.round.default,),
                (aten.add.Tensor, zero_point),
                (aten.clamp.default, low, high),
                (aten.sub.Tensor, zero_point),
                (aten.mul.Tensor, scale),
            )
            value = operand(rounded, 0)
            with module.graph.inserting_before(node):
                for target, *arguments in steps:
                    value = module.graph.call_function(target, (value, *arguments))
            node.replace_all_uses_with(value)
        elif node.target is decomposed.dequantize_per_channel.default:
            levels, scale, _, axis = (operand(node, i) for i in range(4))
            dims = tensor_at(module, levels.target).dim()
            shape = [-1 if d == axis else 1 for d in range(dims)]
            with module.graph.inserting_before(node):
                floats = module.graph.call_function(aten.to.dtype, (levels, torch.float32))
                wide = module.graph.call_function(aten.view.default, (scale, shape))
                product = module.graph.call_function(aten.mul.Tensor, (floats, wide))
            node.replace_all_uses_with(product)
    finish(module)


def finish(module: fx.GraphModule) -> fx.GraphModule:
    """Drop what nothing uses, nodes and tensors, and recompile."""
    module.graph.eliminate_dead_code()
    used = {node.target for node in module.graph.nodes if node.op == "get_attr"}
    for name, _ in [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]:
        if name not in used:
            path, _, leaf = name.rpartition(".")
            delattr(module.get_submodule(path), leaf)
    module.graph.lint()
    module.recompile()
    return module


def convolutional(program: ExportedProgram) -> bool:
    """Whether the network has a convolution: its activations are 8 bits by default."""
    return any(node.target in CONVOLUTIONS for node in program.graph.nodes)
