"""Two networks of one graph run node by node, the one as it was and one whose layers are made to come near to it.

Each layer of the second is changed when it is reached, on the inputs that it gets by then. Where its output is added to
a stream that has drifted, the drift is part of what it should give.
Cost: two forward passes over all examples at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from ..context import Progress
from ..data import Data
from ..graph.channel_rules import shape_of
from ..graph.rewrite import BATCH_NORMS, operand, put_tensor, tensor_at
from ..graph.trace import Graph, aten

MOST_ELEMENTS = 2**26  # of one activation over all calibration examples
LEAST_GAIN = 1e-3  # of a batch norm, for the drift after it to be reached through it
SUMS = (aten.add.Tensor, aten.add_.Tensor)

Values = dict[fx.Node, Any]


@dataclass(slots=True)
class SideBySide:
    """Two networks at a node.

    Attributes:
        dense: As it was.
        module: Of the same graph; its tensors are replaced.
        before: Values of the dense network.
        after: Values of the other one.
        changed: Tensors that were replaced.
    """

    dense: fx.GraphModule
    module: fx.GraphModule
    before: Values = field(default_factory=dict, kw_only=True)
    after: Values = field(default_factory=dict, kw_only=True)
    changed: set[str] = field(default_factory=set, kw_only=True)

    def put(self, node: fx.Node, value: Tensor) -> None:
        """Replace a tensor."""
        name = str(node.target)
        put_tensor(self.module, name, value.to(tensor_at(self.module, name)))
        self.after[node] = tensor_at(self.module, name)
        self.changed.add(name)


def fitting_examples(graph: Graph, data: Data) -> Data:
    """As many examples as keep every activation within memory, all at once."""
    batch = len(graph.example_inputs[0])
    shapes = [shape_of(node) for node in graph.program.graph.nodes if node.op == "call_function"]
    return data.first(max(1, MOST_ELEMENTS // max(1, *(math.prod(shape) // batch for shape in shapes))))


def walk(
    pair: SideBySide,
    inputs: tuple[Tensor, ...],
    visit: Callable[[fx.Node], None],
    *,
    rounds: Mapping[fx.Node, Callable[[Tensor], Tensor]] | None = None,
    progress: Progress,
    what: str,
) -> None:
    """Run both networks, in the order of execution.

    Args:
        inputs: Calibration examples ``[n, ...]``.
        visit: Called with each op once the dense network has its value and the other one its inputs.
        rounds: What becomes of a value of the other network before anything reads it.
        what: Stage that ``progress`` is told.
    """
    nodes = list(pair.module.graph.nodes)
    given = iter(inputs)
    last = {source: number for number, node in enumerate(nodes) for source in node.all_input_nodes}
    with torch.no_grad():
        for number, node in enumerate(nodes):
            progress(what, number, len(nodes))
            if node.op == "placeholder":
                value = next(given)  # of each network its own: a forward may write into its inputs
                pair.before[node], pair.after[node] = value.clone(), value.clone()
            elif node.op == "get_attr":
                pair.before[node] = attribute_of(pair.dense, node)
                pair.after[node] = attribute_of(pair.module, node)
            elif node.op == "call_function":
                pair.before[node] = call(node, pair.before)
                visit(node)
                pair.after[node] = call(node, pair.after)
            if rounds and node in rounds:
                pair.after[node] = rounds[node](pair.after[node])
            for source in node.all_input_nodes:
                if last[source] == number:
                    del pair.before[source], pair.after[source]
    progress(what, len(nodes), len(nodes))


def attribute_of(module: fx.GraphModule, node: fx.Node) -> Any:
    """What a get_attr node reads."""
    value: Any = module
    for part in str(node.target).split("."):
        value = getattr(value, part)
    return value.detach() if isinstance(value, Tensor) else value


def call(node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
    """What an op gives, its arguments among ``values``."""
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: values[n])
    return node.target(*args, **kwargs)  # type: ignore[operator]


def is_own(node: Any) -> bool:
    """Whether a node is a stored tensor that is read once."""
    return isinstance(node, fx.Node) and node.op == "get_attr" and len(node.users) == 1


def norm_after(node: fx.Node) -> fx.Node | None:
    """The batch norm with running statistics of its own that alone reads a layer."""
    users = list(node.users)
    if len(users) != 1 or users[0].target not in BATCH_NORMS or bool(users[0].args[5]):
        return None
    return users[0] if all(is_own(a) for a in users[0].args[3:5]) else None


def wanted_output(pair: SideBySide, node: fx.Node, norm: fx.Node | None) -> Tensor:
    """What a layer should give: its dense output, and the drift of the stream that it is added to."""
    wanted: Tensor = pair.before[node]
    end = norm or node
    users = list(end.users)
    if len(users) != 1 or users[0].target not in SUMS:
        return wanted
    others = [a for a in users[0].args[:2] if a is not end and isinstance(a, fx.Node)]
    if len(others) != 1 or others[0] not in pair.after:
        return wanted
    drift = pair.before[others[0]] - pair.after[others[0]]
    if drift.shape != wanted.shape:
        return wanted
    if norm is not None:
        gamma, variance = norm.args[1], tensor_at(pair.module, name_of(norm.args[4]))
        gain = torch.ones_like(variance) if gamma is None else tensor_at(pair.module, name_of(gamma))
        scale = gain / torch.sqrt(variance + operand(norm, 7))
        inverse = torch.where(scale.abs() > LEAST_GAIN, 1 / scale, torch.zeros_like(scale))
        drift = drift * inverse.reshape([-1 if d == 1 else 1 for d in range(drift.dim())])
    made: Tensor = wanted + drift
    return made


def name_of(node: Any) -> str:
    assert isinstance(node, fx.Node)
    return str(node.target)
