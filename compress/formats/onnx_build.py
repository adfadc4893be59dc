"""Nodes and constants that are put before an ONNX graph's own: tables, fields of a byte, streams that are split.

Only ops that ONNX Runtime and OpenVINO fold when they load a file. Cost: as many nodes as are asked for; equal ones and
equal constants are made once.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from .onnx_graph import reads

STREAM_WEIGHTS = 4_000_000
FEW_BYTES = 2**17  # of a plane: the bytes of nodes count, and those of memory don't
MOST_TOGETHER = 2**21  # bytes of planes that are looked up at once

Array = NDArray[np.generic]
T = TypeVar("T")


@dataclass
class _Together:
    """Planes of one width that are read together: the nodes that read all of them, and that give each its own."""

    cast: onnx.NodeProto
    parts: onnx.NodeProto
    planes: list[Array] = field(default_factory=list)


@dataclass
class Builder:
    """Nodes and constants to put before a graph's own; equal ones are made once."""

    prefix: str
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: dict[object, onnx.TensorProto] = field(default_factory=dict)
    known: dict[object, str] = field(default_factory=dict)
    together: dict[int, _Together] = field(default_factory=dict)

    def constant(self, array: Array) -> str:
        """The name of an initializer that holds ``array``."""
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self.constants:
            self.constants[key] = numpy_helper.from_array(array, f"{self.prefix}c{len(self.constants)}")
        return str(self.constants[key].name)

    def op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """The output of such a node."""
        key = (kind, inputs, *attributes.items())
        if key not in self.known:
            self.known[key] = f"{self.prefix}{len(self.nodes)}"
            self.emit(kind, inputs, [self.known[key]], **attributes)
        return self.known[key]

    def emit(self, kind: str, inputs: Sequence[str], outputs: Sequence[str], **attributes: Any) -> None:
        self.nodes.append(helper.make_node(kind, inputs, outputs, **attributes))

    def int32(self, array: Array) -> str:
        """``array``, of a small integer type, as int32."""
        if array.ndim == 1 and array.dtype == np.uint8:
            return self.fields_of(array, 8)
        return self.op("Cast", self.constant(array), to=onnx.TensorProto.INT32)

    def fields_of(self, plane: Array, width: int, shift: int = 0, offset: int = 0) -> str:
        """int32, one dimension: the fields of a plane's bytes, times ``2**shift``, minus ``offset``.

        Few bytes are looked up together with those of all other planes of this width.
        """
        if is_few(plane) and self._has_room(plane, width):
            key = (plane.tobytes(), width)
            if key not in self.known:
                self.known[key] = self._part(plane, width)
            fields = self.known[key]
        else:
            fields = self.op("Cast", self.constant(plane), to=onnx.TensorProto.INT32)
            if width < 8:
                return look_up(self, table(self, width, shift, offset), fields)
        if shift:
            fields = self.op("Mul", fields, self.number(1 << shift))
        return self.op("Sub", fields, self.number(offset)) if offset else fields

    def _has_room(self, plane: Array, width: int) -> bool:
        planes = self.together[width].planes if width in self.together else []
        return plane.size + sum(other.size for other in planes) <= MOST_TOGETHER

    def _part(self, plane: Array, width: int) -> str:
        if width not in self.together:
            cast, parts = (onnx.NodeProto(op_type=kind) for kind in ("Cast", "Split"))
            cast.attribute.append(helper.make_attribute("to", onnx.TensorProto.INT32))
            cast.output.append(f"{self.prefix}bytes{width}")
            self.nodes.append(cast)
            fields = cast.output[0]
            if width < 8:
                fields = look_up(self, table(self, width, 0, 0), fields)
            parts.input.append(fields)
            self.nodes.append(parts)
            self.together[width] = _Together(cast, parts)
        together = self.together[width]
        together.planes.append(plane)
        together.parts.output.append(f"{self.prefix}fields{width}_{len(together.planes)}")
        return str(together.parts.output[-1])

    def finish(self) -> None:
        """Fill in what was put together."""
        for width, together in self.together.items():
            together.cast.input.append(self.constant(np.concatenate(together.planes)))
            if len(together.planes) == 1:  # nothing to split
                (fields,), (alone,) = together.parts.input, together.parts.output
                self.nodes.remove(together.parts)
                next(node for node in self.nodes if fields in node.output).output[0] = alone
                continue
            sizes = [plane.size * (8 // width) for plane in together.planes]
            together.parts.input.append(self.constant(np.array(sizes)))

    def number(self, value: int) -> str:
        """An int32 of no dimension."""
        return self.constant(np.array(value, np.int32))


def runs(weights: Iterable[T], size: Callable[[T], int], kind: Callable[[T], object]) -> Iterator[list[T]]:
    """Runs of weights of one kind, of at most ``STREAM_WEIGHTS`` weights or one initializer."""
    run: list[T] = []
    for weight in weights:
        if run and (kind(weight) != kind(run[0]) or sum(map(size, run)) + size(weight) > STREAM_WEIGHTS):
            yield run
            run = []
        run.append(weight)
    if run:
        yield run


def table(build: Builder, width: int, shift: int, offset: int) -> str:
    """int32 ``[256, 8 / width]``: for each byte its fields, times ``2**shift``, minus ``offset``."""
    fields = digits(build, 1 << np.arange(0, 8, width, dtype=np.int32), 1 << width)
    if shift:
        fields = build.op("Mul", fields, build.number(1 << shift))
    return build.op("Sub", fields, build.number(offset)) if offset else fields


def digits(build: Builder, powers: Array, base: int) -> str:
    """int32 ``[256, d]``: for each byte, the digits of these powers."""
    every_byte = build.op("Range", build.number(0), build.number(256), build.number(1))
    every_byte = build.op("Reshape", every_byte, build.constant(np.array([-1, 1])))
    return build.op("Mod", build.op("Div", every_byte, build.constant(powers)), build.number(base))


def is_few(plane: Array) -> bool:
    """Whether a plane is read together with others."""
    return plane.size <= FEW_BYTES


def look_up(build: Builder, table: str, every_byte: str) -> str:
    """The fields of each byte, in one dimension."""
    return build.op("Reshape", build.op("Gather", table, every_byte), build.constant(np.array([-1])))


def largest_first(build: Builder, values: str, count: int) -> str:
    """int32: the places of the ``count`` largest values; those of equal values ascend."""
    return build.op("Cast", places_of_largest(build, values, count), to=onnx.TensorProto.INT32)


def places_of_largest(build: Builder, values: str, count: int) -> str:
    """The same in int64."""
    outputs = [f"{build.prefix}{len(build.nodes)}_{part}" for part in ("values", "indices")]
    build.emit("TopK", [values, build.constant(np.array([count]))], outputs)
    return outputs[1]


def split(
    build: Builder, value: str, sizes: Sequence[int], *, padding: int, names: Sequence[str] | None = None
) -> list[str]:
    """``value`` in parts of ``sizes``, of new names or of these; padding is a part that nobody reads."""
    every = [*sizes, padding] if padding else list(sizes)
    parts = [f"{build.prefix}{len(build.nodes)}_{i}" for i in range(len(every))]
    if names is not None:
        parts[: len(sizes)] = names
    build.emit("Split", [value, build.constant(np.array(every))], parts)
    return parts[: len(sizes)]


def insert(build: Builder, graph: onnx.GraphProto, replaced: Container[str]) -> None:
    """The builder's nodes before the graph's own, without the ``replaced`` initializers that no node needs any more."""
    build.finish()
    nodes = [*build.nodes, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    read = set(reads(graph)) - _made(nodes)
    kept = [tensor for tensor in graph.initializer if tensor.name not in replaced or tensor.name in read]
    del graph.initializer[:]
    graph.initializer.extend([*kept, *build.constants.values()])


def free_prefix(graph: onnx.GraphProto) -> str:
    """A prefix that no name of the graph starts with."""
    names = [
        *(value.name for value in (*graph.initializer, *graph.input)),
        *(node.name for node in graph.node),
        *reads(graph),
    ]
    prefix = "hc"
    while any(name.startswith(prefix) for name in [*names, *_made(graph.node)]):
        prefix += "_"
    return prefix


def _made(nodes: Iterable[onnx.NodeProto]) -> set[str]:
    return {name for node in nodes for name in node.output}
