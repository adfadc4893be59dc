"""A network in training mode, and back exactly as it was.

An exported network has its mode written into its nodes (``graph/switches.py``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import fx, nn

from ..graph.switches import METADATA, NORMS, Changes, set_argument, switched, training_arguments
from ..graph.trace import argument


@contextmanager
def training_mode(module: nn.Module) -> Iterator[None]:
    """Let a network train: norms with running statistics update them, dropouts drop.

    Args:
        module: An exported network, nested graphs included, or any other, whose own ``train()`` is called. A graph is
            compiled again on the way in and out, which takes about 0.2 ms a node.
    """
    with _modes(module), _changed(module, training_arguments):
        if not any(isinstance(part, fx.GraphModule) for part in module.modules()):
            module.train()  # the user's own may hold some layers back
        for part in _graphs_and_parts(module):
            part.training = True
        yield


@contextmanager
def batch_statistics(module: nn.Module) -> Iterator[None]:
    """Let norms replace their running statistics by those of each batch; all else stays in evaluation mode.

    A norm that a graph uses k times gets the mean of its k statistics; in any other module the last one counts.
    """
    uses: Counter[str] = Counter()

    def of_the_batch(node: fx.Node) -> Changes:
        changes = switched(node) if node.target in NORMS else {}
        if not changes:
            return {}
        uses[str(argument(node, "running_mean", None))] += 1
        return {**changes, "momentum": 1.0 / uses[str(argument(node, "running_mean", None))]}

    # An exported network keeps a norm's tensors in plain modules, whose momentum is in the graph.
    parts: list[Any] = [part for part in module.modules() if hasattr(part, "momentum")]
    norms = [part for part in parts if getattr(part, "running_mean", None) is not None]
    momenta = [part.momentum for part in norms]
    with _modes(module), _changed(module, of_the_batch):
        for part in norms:
            part.training, part.momentum = True, 1.0
        try:
            yield
        finally:
            for part, momentum in zip(norms, momenta, strict=True):
                part.momentum = momentum


@contextmanager
def unguarded(module: object) -> Iterator[None]:
    """Lift the asserts on dtypes and devices that torch.export writes for ``x.to(...)``: here both may be others."""
    with _changed(module, lambda node: {}, silence=METADATA):
        yield


def _graphs_and_parts(module: nn.Module) -> list[nn.Module]:
    """All parts of a module that holds a graph; ``train()`` of an exported one raises."""
    parts = list(module.modules())
    return parts if any(isinstance(part, fx.GraphModule) for part in parts) else []


@contextmanager
def _modes(module: nn.Module) -> Iterator[None]:
    """The ``training`` flag of every part, as found."""
    found = [(part, part.training) for part in module.modules()]
    try:
        yield
    finally:
        for part, flag in found:
            part.training = flag


@contextmanager
def _changed(module: object, changes: Callable[[fx.Node], Changes], silence: object = None) -> Iterator[None]:
    """Change arguments of nodes; ops called ``silence`` do nothing."""
    parts = module.modules() if isinstance(module, nn.Module) else ()
    graphs = [part for part in parts if isinstance(part, fx.GraphModule)]
    found = []
    try:
        for part in graphs:
            for node in part.graph.nodes:
                wanted = changes(node) if node.op == "call_function" else {}
                if wanted or (silence is not None and node.target is silence):
                    found.append((part, node, node.target, node.args, node.kwargs))
                    for name, value in wanted.items():
                        set_argument(node, name, value)
                    node.target = _nothing if node.target is silence else node.target
        for part in {id(part): part for part, *_ in found}.values():
            part.recompile()
        yield
    finally:
        for _, node, target, args, kwargs in found:
            node.target, node.args, node.kwargs = target, args, kwargs
        for part in {id(part): part for part, *_ in found}.values():
            part.recompile()


def _nothing(*args: Any, **kwargs: Any) -> None:
    """In place of an assert."""
