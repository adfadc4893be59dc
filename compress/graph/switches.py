"""The mode of an exported network, which is written into its nodes.

``aten.batch_norm`` says whether it takes its statistics from the batch, ``aten.dropout`` whether it drops. A branch on
``self.training`` is gone for good, and attention keeps the dropout that it was exported with, none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import fx

from .trace import argument, aten

# What ops call the argument that says whether they train: norms, dropouts, recurrent layers, rrelu.
SWITCHES = ("training", "train", "use_input_stats")
NORMS = (aten.batch_norm.default, aten.instance_norm.default)
MOMENTUM = 0.1  # of statistics whose own is zero: what torch exports for those that average over all batches
METADATA = aten._assert_tensor_metadata.default  # of dtypes and devices, which may be others
Changes = Mapping[str, Any]


def switched(node: fx.Node) -> Changes:
    """The argument that puts an op into training; none where it has none or trains already."""
    names = {parameter.name for parameter in getattr(getattr(node.target, "_schema", None), "arguments", ())}
    return {name: True for name in SWITCHES if name in names and argument(node, name, None) is False}


def training_arguments(node: fx.Node) -> Changes:
    """The arguments that an op has in training; none where they are what they were."""
    changes = switched(node)
    if changes and node.target in NORMS and argument(node, "momentum", MOMENTUM) == 0:
        return {**changes, "momentum": MOMENTUM}
    return changes


def set_argument(node: fx.Node, name: str, value: Any) -> None:
    """Set an argument by its schema name; those before it that are left out take their defaults."""
    parameters = node.target._schema.arguments  # type: ignore[union-attr]
    place = next(i for i, parameter in enumerate(parameters) if parameter.name == name)
    if name in node.kwargs or parameters[place].kwarg_only:
        node.kwargs = {**node.kwargs, name: value}
        return
    before = [argument(node, parameter.name, parameter.default_value) for parameter in parameters[:place]]
    node.args = (*before, value, *node.args[place + 1 :])
    node.kwargs = {k: v for k, v in node.kwargs.items() if k not in {p.name for p in parameters[:place]}}
