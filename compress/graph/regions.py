"""Regions of a forward with a context of their own, ``no_grad`` or autocast: graphs in the graph, put in line.

A region without autocast computes in float32 what it computes outside of it. What leaves a region without gradients is
detached instead. A region *with* autocast rounds to another dtype: it stays a graph in the graph.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

GRADIENTS = torch.ops.higher_order.wrap_with_set_grad_enabled  # (is enabled, graph, *operands)
AUTOCAST = torch.ops.higher_order.wrap_with_autocast  # (device, dtype, is enabled, has cache, graph, *operands)


def inline_regions(program: ExportedProgram) -> None:
    """Put the regions of a program in line, in place."""
    module = program.graph_module
    waiting = list(module.graph.nodes)
    while waiting:
        node = waiting.pop()
        if node.target is GRADIENTS:
            waiting += _inline(program, node, 1, is_detached=not node.args[0])
        elif node.target is AUTOCAST and not node.args[2]:
            waiting += _inline(program, node, 4, is_detached=False)
    module.graph.lint()
    module.recompile()


def _inline(program: ExportedProgram, region: fx.Node, place: int, *, is_detached: bool) -> list[fx.Node]:
    """Copy the nodes of a region, whose graph is its argument at ``place``, to where it is called.

    Returns:
        The copies.
    """
    module = program.graph_module
    called, *operands = region.args[place:]
    assert isinstance(called, fx.Node)
    inner = module.get_submodule(str(called.target))
    assert isinstance(inner, fx.GraphModule)
    inputs = iter(operands)
    known: dict[fx.Node, fx.Node] = {}
    results: Any = ()
    with module.graph.inserting_before(region):
        for node in inner.graph.nodes:
            if node.op == "placeholder":
                known[node] = next(inputs)  # type: ignore[assignment]
            elif node.op == "output":
                results = fx.node.map_arg(node.args[0], known.__getitem__)
            else:
                known[node] = module.graph.node_copy(node, known.__getitem__)
                if node.op == "get_attr":  # a region in the region
                    known[node].target = f"{called.target}_{node.target}"
                    module.add_submodule(str(known[node].target), inner.get_submodule(str(node.target)))
        for user in list(region.users):
            assert user.target is operator.getitem
            value = results[user.args[1]]
            if is_detached and value not in operands:
                meta = dict(value.meta)
                value = module.graph.call_function(torch.ops.aten.detach.default, (value,))
                value.meta = meta
            user.replace_all_uses_with(value)
            program.graph_signature.replace_all_uses(user.name, value.name)
            module.graph.erase_node(user)
    module.graph.erase_node(region)
    if not called.users:
        module.graph.erase_node(called)
        module.delete_submodule(str(called.target))
    return [node for node in known.values() if node.op == "call_function"]
