"""What of an ONNX graph is read, and what isn't."""

from __future__ import annotations

from collections.abc import Iterator

from onnx import GraphProto, ModelProto


def reads(graph: GraphProto) -> Iterator[str]:
    """The names that a graph's outputs and nodes read, once each time, those in the bodies of loops included."""
    yield from (value.name for value in graph.output)
    for node in graph.node:
        yield from node.input
        for attribute in node.attribute:
            for body in (attribute.g, *attribute.graphs):
                yield from reads(body)


def drop_unused(model: ModelProto) -> None:
    """Take out, in place, the nodes whose outputs nothing reads, and the initializers."""
    graph = model.graph
    while True:
        used = set(reads(graph))
        dead = [node for node in graph.node if not any(name in used for name in node.output)]
        if not dead:
            break
        for node in dead:
            graph.node.remove(node)
    for tensor in [t for t in graph.initializer if t.name not in used]:
        graph.initializer.remove(tensor)
