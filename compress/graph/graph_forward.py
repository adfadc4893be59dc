"""The forward of a module whose code has a size in it that no attribute holds: the exported graph of what is left.

The module stays what it is, with its layers and the names of its tensors; its class becomes a subclass of its own whose
``forward`` runs the graph on them.
"""

from __future__ import annotations

import copy
import functools
import inspect
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from .rewrite import move, put_tensor, tensor_at, tensor_names
from .switches import METADATA, set_argument, training_arguments

HELD = "_hcompress_graph"  # attribute of the module
CPU = torch.device("cpu")


class HeldGraph:
    """A graph that runs on a module's tensors.

    In training its norms take the statistics of the batch, and its dropouts drop; what else the module's own code does
    then, and sizes other than the batch that it wasn't traced with, are out of reach.

    Attributes:
        reason: Why the module's own forward can't compute it.
        hint: What would let it.
    """

    def __init__(self, owner: nn.Module, graph: fx.GraphModule, reason: str, hint: str) -> None:
        self.reason, self.hint = reason, hint
        self.graphs = {(is_training, CPU): _prepared(graph, is_training=is_training) for is_training in (False, True)}
        named = (*owner.named_parameters(remove_duplicate=False), *owner.named_buffers(remove_duplicate=False))
        held = {name for name, _ in named}
        self.names, self.constants = sorted(tensor_names(graph) & held), sorted(tensor_names(graph) - held)
        for part in self.graphs.values():
            for name in self.names:  # as large as nothing: the owner's take their place
                put_tensor(part, name, torch.empty(0))

    def run(self, owner: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
        """What the graph computes with the tensors of ``owner``."""
        parameter = next(owner.parameters())
        graph = self._graph(owner.training, parameter.device)
        tensors = {name: _tensor(owner, name) for name in self.names}
        for name in self.constants:
            constant = tensor_at(graph, name).to(parameter.device)
            tensors[name] = constant.to(parameter.dtype) if constant.is_floating_point() else constant
        return functional_call(graph, tensors, inputs)

    def _graph(self, is_training: bool, device: torch.device) -> fx.GraphModule:
        key = (is_training, device)
        if key not in self.graphs:
            self.graphs[key] = copy.deepcopy(self.graphs[is_training, CPU])
            move(self.graphs[key], device)
        return self.graphs[key]


def give_graph(module: nn.Module, graph: fx.GraphModule, reason: str, hint: str) -> None:
    """Let a module's forward run a graph, which has its tensors under their names and was exported for evaluation."""
    before = type(module)
    own = before if HELD not in vars(module) else before.__mro__[1]
    vars(module)[HELD] = HeldGraph(module, graph, reason, hint)
    module.__class__ = type(own.__name__, (own,), {"forward": _running(own), "__module__": own.__module__})


def why_graph(module: nn.Module) -> str:
    """A sentence on a module whose forward runs a graph, and what to do about it; empty where it is its class's own."""
    held = vars(module).get(HELD)
    if not isinstance(held, HeldGraph):
        return ""
    return f"forward runs the exported graph, as its own code can't: {held.reason}; to have it, {held.hint}"


def _running(own: type[nn.Module]) -> Any:
    signature = inspect.signature(own.forward)

    @functools.wraps(own.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(self, *args, **kwargs)
        given = pytree.tree_leaves([*bound.args[1:], *bound.kwargs.values()])
        return vars(self)[HELD].run(self, tuple(x for x in given if isinstance(x, Tensor)))

    return forward


def _tensor(module: nn.Module, name: str) -> Tensor:
    path, _, last = name.rpartition(".")
    value = getattr(module.get_submodule(path), last)
    assert isinstance(value, Tensor)
    return value


def _prepared(graph: fx.GraphModule, *, is_training: bool) -> fx.GraphModule:
    made = copy.deepcopy(graph)
    for node in list(made.graph.nodes):
        if node.op == "call_function" and node.target is METADATA:
            made.graph.erase_node(node)
        elif node.op == "call_function" and is_training:
            for name, value in training_arguments(node).items():
                set_argument(node, name, value)
    made.recompile()
    return made
