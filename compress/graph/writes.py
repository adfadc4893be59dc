"""Operators that write into their input, made to give a tensor of their own wherever nothing can tell.

``nn.ReLU(inplace=True)`` and ``x += y`` save memory in training. In a graph no value can be kept because of them:
whatever runs a part of it again, or reads a value late, would find another one. An op is replaced where what it writes
into is a new tensor that nothing reads afterwards, by itself or through a view. The node keeps its name.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch.export import ExportedProgram

aten = torch.ops.aten
# Ops made of others, whose schema wouldn't say that they give a view; these never do.
GIVE_NEW = {
    aten.conv1d, aten.conv2d, aten.conv3d, aten.conv_transpose1d, aten.conv_transpose2d, aten.conv_transpose3d,
    aten.linear, aten.matmul, aten.batch_norm, aten.group_norm, aten.layer_norm, aten.instance_norm,
    aten.max_pool1d, aten.max_pool2d, aten.max_pool3d, aten.relu6, aten.prelu,
}  # fmt: skip


def replace_writes(program: ExportedProgram) -> None:
    """Replace, in place, the ops of a program that write into their input, where that changes nothing."""
    order = {node: place for place, node in enumerate(program.graph.nodes)}
    for node in program.graph.nodes:
        plain = _without_write(node)
        if plain is None:
            continue
        source = node.args[0]
        if all(user is node or (order[user] < order[node] and _gives_new(user)) for user in source.users):
            node.target = plain
    program.graph_module.recompile()


def writes(node: fx.Node) -> bool:
    """Whether an operator writes into one of its inputs."""
    return bool(getattr(getattr(node.target, "_schema", None), "is_mutable", False))


def _without_write(node: fx.Node) -> OpOverload | None:
    """The op that gives what this one writes into its first argument, a new tensor; None where there is none."""
    target: Any = node.target
    if not writes(node) or not isinstance(target, OpOverload) or target.namespace != "aten":
        return None
    packet = getattr(aten, target._schema.name.removeprefix("aten::").removesuffix("_"), None)
    plain = getattr(packet, target._overloadname, None)
    if plain is None or plain._schema.is_mutable or len(node.args) == 0:
        return None
    source, values = node.args[0], [n.meta.get("val") for n in node.all_input_nodes]
    dtypes = {value.dtype for value in values if isinstance(value, Tensor)}
    arguments, others = ([a.name for a in op._schema.arguments[1:]] for op in (target, plain))
    is_alike = arguments == others and len(dtypes) == 1  # of several dtypes, only a write keeps the first one
    return plain if is_alike and isinstance(source, fx.Node) and _gives_new(source) else None


def _gives_new(node: fx.Node) -> bool:
    """Whether an op's output is a tensor that shares no memory with its inputs."""
    target: Any = node.target
    if not isinstance(target, OpOverload) or target.namespace != "aten":
        return False
    name = f"{target._schema.name}.{target._overloadname}".removesuffix(".default")
    if target.overloadpacket in GIVE_NEW:
        return True
    is_made_of_others = torch._C._dispatch_has_kernel_for_dispatch_key(name, "CompositeImplicitAutograd")
    return not is_made_of_others and all(value.alias_info is None for value in target._schema.returns)
