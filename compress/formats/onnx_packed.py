"""Low-bit and sparse weights in a standard ONNX file, restored by nodes that the runtime folds when it loads the file.

An int8 initializer becomes fields of 1, 2 or 4 bits (``planes.py``), and one stream of bytes for each field holds all
initializers of one width. Nodes take them apart again: Cast, Gather in a table of 256 rows, Reshape, Add where there
are several fields, Split, Reshape. The tables are made in the graph by Div and Mod, with the field's shift and the
levels' offset in them. Only ops that ONNX Runtime and OpenVINO fold are used, so with their default optimisations the
running network is that of the plain file, bit for bit; without them it unpacks in every run.

Cost: packing, one pass over the weights. ONNX Runtime keeps what it folds until it has folded the whole graph: loading
takes 2 to 5 bytes of memory a weight more than the plain file at 2 and 4 bits, and 24 to 53 at the other widths, which
have several fields. A stream takes no further layer beyond ``STREAM_WEIGHTS`` weights.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from . import planes

STREAM_WEIGHTS = 4_000_000
TWO_LEVEL_NODES = 300  # Bytes of the nodes of a mask's upper level.

Array = NDArray[np.generic]
Dequantize = Literal["linear", "fold"]
T = TypeVar("T")


def pack_weights(
    model: onnx.ModelProto, bits: Mapping[str, int], *, dequantize: Dequantize = "linear"
) -> onnx.ModelProto:
    """A model of the same outputs whose int8 weights take ``bits`` bits in the file.

    Args:
        model: Opset 21 or later, without local functions. Left as it is.
        bits: int8 initializer to 2 to 8 bits. A channel's levels lie in ``[-2**(b - 1), 2**(b - 1) - 1]`` or, with the
            sign flipped, in ``[-2**(b - 1) + 1, 2**(b - 1)]``. 8 leaves the initializer as it is.
        dequantize: ``linear`` leaves DequantizeLinear nodes, from which runtimes make integer kernels where the
            activations are quantized too. ``fold`` turns those of the named weights into Cast and Mul, which runtimes
            compute when they load the file: float weights ``levels * scale`` at the speed of a float file.

    Raises:
        ValueError: A name is no int8 initializer, its levels need more bits, or a DequantizeLinear that reads it has
            no constant float32 scale or a zero point; for ``fold``, also where none reads it.
    """
    packed = onnx.ModelProto()
    packed.CopyFrom(model)
    constants = {tensor.name: tensor for tensor in packed.graph.initializer}
    weights = [_weight(packed.graph, constants, name, width) for name, width in sorted(bits.items())]
    build = _Builder(_free_prefix(packed.graph))
    narrow = sorted((weight for weight in weights if weight.bits < 8), key=_Weight.kind)
    for stream in _runs(narrow, _Weight.size, _Weight.kind):
        _add_stream(build, stream)
    replaced = {weight.name for weight in narrow}
    if dequantize == "fold":
        replaced |= _fold(build, packed.graph, weights)
    _insert(build, packed.graph, replaced)
    return packed


def sparsify(model: onnx.ModelProto, names: Sequence[str]) -> onnx.ModelProto:
    """A model of the same outputs whose float32 initializers ``names`` are stored without their zeros.

    A bit mask and the survivors take their place; TopK and ScatterElements put them together when the runtime loads the
    file. The mask has two levels (a bit for each byte of the mask, then its bytes that are not zero) where that is
    smaller. +0.0 is a zero, -0.0 a survivor.

    Raises:
        ValueError: A name is no float32 initializer.
    """
    sparse = onnx.ModelProto()
    sparse.CopyFrom(model)
    constants = {tensor.name: tensor for tensor in sparse.graph.initializer}
    for name in names:
        if name not in constants or constants[name].data_type != onnx.TensorProto.FLOAT:
            raise ValueError(f"{name} is not a float32 initializer of the model")
    build = _Builder(_free_prefix(sparse.graph))
    weights = [(name, numpy_helper.to_array(constants[name])) for name in sorted(set(names))]
    for stream in _runs(weights, lambda weight: weight[1].size, lambda weight: None):
        _add_sparse(build, stream)
    _insert(build, sparse.graph, set(names))
    return sparse


@dataclass(frozen=True, slots=True)
class _Weight:
    """An initializer to pack, with the DequantizeLinear nodes that read it.

    Attributes:
        shape: The weight's.
        unsigned: Levels, flipped where ``signs`` say so, plus half their range; shape ``[n]``.
        signs: -1 for each channel that is stored flipped, else 1; int8, broadcasts to ``shape``.
        scales: For each node, its float32 scale, broadcasts to ``shape``.
    """

    name: str
    bits: int
    shape: tuple[int, ...]
    unsigned: planes.Bytes
    signs: NDArray[np.int8]
    nodes: tuple[onnx.NodeProto, ...]
    scales: tuple[NDArray[np.float32], ...]

    def size(self) -> int:
        return self.unsigned.size

    def kind(self) -> tuple[int, bool]:
        """Width and whether a channel is flipped: what weights of one stream share."""
        return self.bits, bool((self.signs < 0).any())


@dataclass
class _Builder:
    """Nodes and constants to put before a graph's own; equal ones are made once."""

    prefix: str
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: dict[object, onnx.TensorProto] = field(default_factory=dict)
    known: dict[object, str] = field(default_factory=dict)

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
        name = f"{self.prefix}n{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, outputs, name=name, **attributes))


def _weight(graph: onnx.GraphProto, constants: Mapping[str, onnx.TensorProto], name: str, bits: int) -> _Weight:
    if name not in constants or constants[name].data_type != onnx.TensorProto.INT8:
        raise ValueError(f"{name} is not an int8 initializer of the model")
    if not 2 <= bits <= 8:
        raise ValueError(f"{name}: {bits} bits; 2 to 8 are possible")
    levels = numpy_helper.to_array(constants[name])
    nodes = tuple(node for node in graph.node if node.op_type == "DequantizeLinear" and node.input[0] == name)
    scales = tuple(_scale(node, constants, levels.ndim) for node in nodes)
    signs = _signs(levels, scales[0].shape if scales else (1,) * levels.ndim, bits)
    unsigned = levels.astype(np.int16) * signs + (1 << (bits - 1))
    if unsigned.size and not 0 <= unsigned.min() <= unsigned.max() < 1 << bits:
        raise ValueError(f"{name}: levels {levels.min()} to {levels.max()} don't fit {bits} bits")
    return _Weight(name, bits, levels.shape, unsigned.astype(np.uint8).reshape(-1), signs, nodes, scales)


def _scale(node: onnx.NodeProto, constants: Mapping[str, onnx.TensorProto], num_dims: int) -> NDArray[np.float32]:
    """The node's scale, shape ``[1, .., c, .., 1]`` or all ones, after checks that its zero point is zero."""
    attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    others = [numpy_helper.to_array(constants[name]) for name in node.input[1:] if name in constants]
    if len(others) < len([name for name in node.input[1:] if name]):
        raise ValueError(f"{node.name}: its scale and zero point are not constants")
    scale = others[0]
    if scale.dtype != np.float32 or scale.ndim > 1 or any(zero_point.any() for zero_point in others[1:]):
        raise ValueError(f"{node.name}: a float32 scale of at most one dimension and no zero point is expected")
    along = [1] * num_dims
    if scale.size > 1:
        along[attributes.get("axis", 1)] = scale.size
    return scale.reshape(along)


def _signs(levels: NDArray[np.int8], shape: tuple[int, ...], bits: int) -> NDArray[np.int8]:
    """-1 for each channel whose largest level only fits ``bits`` bits when flipped; of ``shape``."""
    others = tuple(dim for dim, size in enumerate(shape) if size == 1)
    largest = levels.max(axis=others, keepdims=True, initial=-128)
    return np.where(largest == 1 << (bits - 1), np.int8(-1), np.int8(1)).astype(np.int8)


def _runs(weights: Iterable[T], size: Callable[[T], int], kind: Callable[[T], object]) -> Iterator[list[T]]:
    """Runs of weights of one kind, of at most ``STREAM_WEIGHTS`` weights or one initializer."""
    run: list[T] = []
    for weight in weights:
        if run and (kind(weight) != kind(run[0]) or sum(map(size, run)) + size(weight) > STREAM_WEIGHTS):
            yield run
            run = []
        run.append(weight)
    if run:
        yield run


def _add_stream(build: _Builder, weights: Sequence[_Weight]) -> None:
    """The streams of ``weights``, all of one width, and the nodes that make the initializers of the same names."""
    bits, is_flipped = weights[0].kind()
    merged = _padded([weight.unsigned for weight in weights])
    total, shift = "", 0
    for width, plane in zip(planes.fields(bits), planes.pack_planes(merged, bits), strict=True):
        table = _table(build, width, shift, 0 if shift else 1 << (bits - 1))
        if width == bits and not is_flipped:
            table = build.op("Cast", table, to=onnx.TensorProto.INT8)
        flat = _look_up(build, table, build.op("Cast", build.constant(plane), to=onnx.TensorProto.INT32))
        total = build.op("Add", total, flat) if total else flat
        shift += width
    if len(planes.fields(bits)) > 1 and not is_flipped:
        total = build.op("Cast", total, to=onnx.TensorProto.INT8)
    parts = _split(build, total, [weight.size() for weight in weights])
    for weight, part in zip(weights, parts, strict=True):
        shape = build.constant(np.array(weight.shape, np.int64))
        if is_flipped:
            levels = build.op("Mul", build.op("Reshape", part, shape), _signs_of(build, weight))
            build.emit("Cast", [levels], [weight.name], to=onnx.TensorProto.INT8)
        else:
            build.emit("Reshape", [part, shape], [weight.name])


def _padded(parts: Sequence[planes.Bytes]) -> planes.Bytes:
    """The parts and up to 7 zeros: whole bytes in every field, so that all fields unpack to one length."""
    return np.concatenate([*parts, np.zeros(-sum(part.size for part in parts) % 8, np.uint8)])


def _look_up(build: _Builder, table: str, every_byte: str) -> str:
    """The fields of each byte, in one dimension."""
    return build.op("Reshape", build.op("Gather", table, every_byte), build.constant(np.array([-1])))


def _split(build: _Builder, flat: str, sizes: Sequence[int]) -> list[str]:
    """``flat`` in parts of ``sizes``; padding is a part that nobody reads."""
    padding = [-sum(sizes) % 8] if sum(sizes) % 8 else []
    parts = [f"{build.prefix}{len(build.nodes)}_{i}" for i in range(len(sizes) + len(padding))]
    build.emit("Split", [flat, build.constant(np.array([*sizes, *padding]))], parts)
    return parts[: len(sizes)]


def _signs_of(build: _Builder, weight: _Weight) -> str:
    """int32 signs from one byte a channel; by Gather, as OpenVINO keeps a Mul right behind a Cast from int8."""
    choices = build.constant(np.array([1, -1], np.int32))
    chosen = build.constant((weight.signs < 0).astype(np.uint8))
    return build.op("Gather", choices, build.op("Cast", chosen, to=onnx.TensorProto.INT32))


def _table(build: _Builder, width: int, shift: int, offset: int) -> str:
    """int32 ``[256, 8 / width]``: for each byte its fields, times ``2**shift``, minus ``offset``."""
    every_byte = build.op("Cast", build.constant(np.arange(256, dtype=np.uint8)[:, None]), to=onnx.TensorProto.INT32)
    positions = build.constant(1 << np.arange(0, 8, width, dtype=np.int32))
    table = build.op("Mod", build.op("Div", every_byte, positions), build.constant(np.array(1 << width, np.int32)))
    if shift:
        table = build.op("Mul", table, build.constant(np.array(1 << shift, np.int32)))
    return build.op("Sub", table, build.constant(np.array(offset, np.int32))) if offset else table


def _add_sparse(build: _Builder, weights: Sequence[tuple[str, NDArray[np.float32]]]) -> None:
    """One mask and one vector of survivors, and the nodes that make the initializers of the same names."""
    flat = np.concatenate([array.reshape(-1) for _, array in weights])
    alive = flat.view(np.uint32) != 0
    bits = _padded([alive.astype(np.uint8)])
    dense = build.op("Expand", build.constant(np.array(0, np.float32)), build.constant(np.array([bits.size])))
    if alive.any():
        mask = _look_up(build, _table(build, 1, 0, 0), _mask_bytes(build, planes.pack(bits, 1)))
        dense = build.op("ScatterElements", dense, _ones(build, mask, int(alive.sum())), build.constant(flat[alive]))
    parts = _split(build, dense, [array.size for _, array in weights])
    for (name, array), part in zip(weights, parts, strict=True):
        build.emit("Reshape", [part, build.constant(np.array(array.shape, np.int64))], [name])


def _mask_bytes(build: _Builder, mask: planes.Bytes) -> str:
    """int32 bytes of a mask, in two levels where those with their nodes are smaller."""
    upper = planes.pack(_padded([(mask != 0).astype(np.uint8)]), 1)
    filled = mask[mask != 0]
    if upper.size + filled.size + TWO_LEVEL_NODES > mask.size:
        return build.op("Cast", build.constant(mask), to=onnx.TensorProto.INT32)
    every_byte = build.op("Cast", build.constant(upper), to=onnx.TensorProto.INT32)
    where = _ones(build, _look_up(build, _table(build, 1, 0, 0), every_byte), filled.size)
    empty = build.op("Expand", build.constant(np.array(0, np.int32)), build.constant(np.array([mask.size])))
    values = build.op("Cast", build.constant(filled), to=onnx.TensorProto.INT32)
    return build.op("ScatterElements", empty, where, values)


def _ones(build: _Builder, mask: str, count: int) -> str:
    """Indices of the ``count`` ones of an int32 mask, rising: TopK breaks ties so."""
    outputs = [f"{build.prefix}{len(build.nodes)}_{part}" for part in ("values", "indices")]
    build.emit("TopK", [mask, build.constant(np.array([count]))], outputs)
    return outputs[1]


def _fold(build: _Builder, graph: onnx.GraphProto, weights: Iterable[_Weight]) -> set[str]:
    """Cast and Mul in place of each DequantizeLinear of ``weights``; returns the constants that those read."""
    removed: set[str] = set()
    for weight in weights:
        if not weight.nodes:
            raise ValueError(f"{weight.name} is read by no DequantizeLinear of the main graph")
        for node, scale in zip(weight.nodes, weight.scales, strict=True):
            levels = build.op("Cast", weight.name, to=onnx.TensorProto.FLOAT)
            build.emit("Mul", [levels, build.constant(scale)], node.output)
            removed |= set(node.input[1:])
            graph.node.remove(node)
    return removed


def _insert(build: _Builder, graph: onnx.GraphProto, replaced: Container[str]) -> None:
    """The builder's nodes before the graph's own, without the ``replaced`` initializers that no node needs any more."""
    nodes = [*build.nodes, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    read = set(_inputs(graph)) - _made(nodes)
    kept = [tensor for tensor in graph.initializer if tensor.name not in replaced or tensor.name in read]
    del graph.initializer[:]
    graph.initializer.extend([*kept, *build.constants.values()])


def _made(nodes: Iterable[onnx.NodeProto]) -> set[str]:
    return {name for node in nodes for name in node.output}


def _inputs(graph: onnx.GraphProto) -> Iterator[str]:
    """Every name that a node reads, in subgraphs too."""
    for node in graph.node:
        yield from node.input
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _inputs(attribute.g)


def _free_prefix(graph: onnx.GraphProto) -> str:
    """A prefix that no name of the graph starts with."""
    names = [
        *(value.name for value in (*graph.initializer, *graph.input)),
        *(node.name for node in graph.node),
        *_inputs(graph),
    ]
    prefix = "hc"
    while any(name.startswith(prefix) for name in [*names, *_made(graph.node)]):
        prefix += "_"
    return prefix
