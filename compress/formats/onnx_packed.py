"""Low-bit weights in a standard ONNX file, restored by nodes that the runtime folds when it loads the file.

An int8 initializer becomes fields of 1, 2 or 4 bits (``planes.py``), and one stream of bytes for each field holds all
initializers of one width. Nodes take them apart again: Cast, Gather in a table of 256 rows, Reshape, Add where there
are several fields, Split, Reshape. The tables are made in the graph by Div and Mod, with the field's shift and the
levels' offset in them. Weights whose channels have widths of their own share the streams: the rows of one length, of
all such weights, are put together by Concat, brought into their order by Gather, and split again; the order of many
rows is that of their widths, sorted by TopK. A code by stages is added up: TopK finds the values that go on in the next
stage, and ScatterElements puts their sums there. Only ops that ONNX Runtime and OpenVINO fold are used, so with their
default optimisations the running network is that of the plain file, bit for bit; without them it unpacks in every run.

Cost: packing, one pass over the weights. ONNX Runtime keeps what it folds until it has folded the whole graph: loading
takes 2 to 5 bytes of memory a weight more than the plain file at 2 and 4 bits, and 24 to 53 at the other widths, which
have several fields. A stream takes no further layer beyond ``onnx_build.STREAM_WEIGHTS`` weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from ..widths import WIDTHS, Width, is_mixed, is_width, kind_of, letters_of, levels_of, of_letter, offset_of
from . import planes
from .onnx_build import (
    Builder,
    digits,
    free_prefix,
    insert,
    is_few,
    largest_first,
    look_up,
    places_of_largest,
    runs,
    split,
    table,
)
from .onnx_codes import add_fields

Dequantize = Literal["linear", "fold"]
MOST_PLACES = 256  # rows that are put into their order by a byte each


def pack_weights(
    model: onnx.ModelProto, bits: Mapping[str, Width], *, dequantize: Dequantize = "linear"
) -> onnx.ModelProto:
    """A model of the same outputs whose int8 weights take ``bits`` bits in the file.

    Args:
        model: Opset 21 or later, without local functions. Left as it is.
        bits: int8 initializer to 2 to 8 bits. A channel's levels lie in ``[-2**(b - 1), 2**(b - 1) - 1]`` or, with the
            sign flipped, in ``[-2**(b - 1) + 1, 2**(b - 1)]``. 8 leaves the initializer as it is. Or a width for each
            channel (``widths.py``) of the DequantizeLinear's axis.
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
    build = Builder(free_prefix(packed.graph))
    narrow = [weight for weight in weights if weight.bits != 8]
    groups = list(_groups(weight for weight in narrow if is_mixed(weight.bits)))
    segments = [_whole(weight) for weight in narrow if not is_mixed(weight.bits)]
    segments += [segment for group in groups for segment in group.segments()]
    for stream in runs(sorted(segments, key=_Segment.kind), _Segment.size, _Segment.kind):
        _add_stream(build, stream)
    for group, signs, order in zip(groups, _row_signs(build, groups), _row_orders(build, groups), strict=True):
        _add_rows(build, group, signs, order)
    replaced = {weight.name for weight in narrow}
    if dequantize == "fold":
        replaced |= _fold(build, packed.graph, weights)
    insert(build, packed.graph, replaced)
    return packed


@dataclass(frozen=True, slots=True)
class _Weight:
    """An initializer to pack, with the DequantizeLinear nodes that read it.

    Attributes:
        shape: The weight's.
        axis: Of the channels.
        levels: Flipped where ``signs`` say so, as ``planes.numbers_of`` numbers them; ``shape``.
        signs: -1 for each channel that is stored flipped, else 1; int8, broadcasts to ``shape``.
        scales: For each node, its float32 scale, broadcasts to ``shape``.
    """

    name: str
    bits: Width
    axis: int
    levels: planes.Bytes
    signs: NDArray[np.int8]
    nodes: tuple[onnx.NodeProto, ...]
    scales: tuple[NDArray[np.float32], ...]

    def is_flipped(self) -> bool:
        return bool((self.signs < 0).any())

    def rows(self) -> planes.Bytes:
        """``[c, k]``: the levels of each channel."""
        return np.moveaxis(self.levels, self.axis, 0).reshape(self.levels.shape[self.axis], -1)


@dataclass(frozen=True, slots=True)
class _Segment:
    """Levels of one width, a part of a stream.

    Attributes:
        is_flipped: Signs will be applied, so that int32 is wanted.
        finish: Adds the nodes that take the segment, given its name.
    """

    width: Width
    levels: planes.Bytes
    is_flipped: bool
    finish: Callable[[Builder, str], None]

    def size(self) -> int:
        return self.levels.size

    def kind(self) -> tuple[str, bool]:
        """What segments of one stream share."""
        return str(self.width), self.is_flipped


@dataclass(frozen=True, slots=True)
class _Group:
    """Weights whose channels have widths of their own, all of so many weights a channel.

    Attributes:
        taken: The segments' names by letter, once there are streams.
    """

    weights: tuple[_Weight, ...]
    taken: dict[str, str] = field(default_factory=dict)

    def letters(self) -> str:
        """One for each row; of widths that are stored in the same way, the first one's."""
        return "".join(kind_of(letter) for weight in self.weights for letter in letters_of(weight.bits))

    def is_flipped(self) -> bool:
        return any(weight.is_flipped() for weight in self.weights)

    def segments(self) -> Iterator[_Segment]:
        """The rows of each width."""
        rows, letters = np.concatenate([weight.rows() for weight in self.weights]), np.array(list(self.letters()))
        for letter in WIDTHS:
            if letter != "0" and (letters == letter).any():
                width = of_letter(letter)
                yield _Segment(
                    width, rows[letters == letter].reshape(-1), self.is_flipped(), partial(self._take, letter)
                )

    def _take(self, letter: str, build: Builder, name: str) -> None:
        self.taken[letter] = name


def _weight(graph: onnx.GraphProto, constants: Mapping[str, onnx.TensorProto], name: str, bits: Width) -> _Weight:
    if name not in constants or constants[name].data_type != onnx.TensorProto.INT8:
        raise ValueError(f"{name} is not an int8 initializer of the model")
    if not is_width(bits):
        raise ValueError(f"{name}: {bits} bits; 2 to 8 are possible")
    levels = numpy_helper.to_array(constants[name])
    nodes = tuple(node for node in graph.node if node.op_type == "DequantizeLinear" and node.input[0] == name)
    scales = tuple(_scale(node, constants, levels.ndim) for node in nodes)
    along = scales[0].shape if scales else (1,) * levels.ndim
    axis = next((dim for dim, size in enumerate(along) if size > 1), 0)
    letters = letters_of(bits)
    if is_mixed(bits) and len(letters) != levels.shape[axis]:
        raise ValueError(f"{name}: widths for {len(letters)} channels, not for {levels.shape[axis]}")
    per_channel = [-1 if dim == axis else 1 for dim in range(levels.ndim)]
    low, high = (
        np.array(ends, np.int16).reshape(per_channel if is_mixed(bits) else 1)
        for ends in zip(*map(_ends, letters), strict=True)
    )
    signs = _signs(levels, np.broadcast_shapes(along, low.shape), low, high)
    stored = levels.astype(np.int16) * signs
    if not ((stored >= low) & (stored <= high)).all():
        raise ValueError(f"{name}: levels {levels.min()} to {levels.max()} don't fit {bits} bits")
    rows = np.moveaxis(stored, axis, 0).reshape(levels.shape[axis] if is_mixed(bits) else 1, -1)
    numbers = np.empty(rows.shape, np.uint8)
    for letter in set(letters):
        chosen = [own == letter for own in letters]
        numbers[chosen] = planes.numbers_of(rows[chosen], letter)
    moved = np.moveaxis(stored, axis, 0).shape
    return _Weight(name, bits, axis, np.moveaxis(numbers.reshape(moved), 0, axis), signs, nodes, scales)


def _ends(letter: str) -> tuple[int, int]:
    """Lowest and highest level that can be stored."""
    return (-128, 127) if letter == "8" else (levels_of(letter).low, levels_of(letter).high)


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


def _signs(
    levels: NDArray[np.int8], shape: tuple[int, ...], low: NDArray[np.int16], high: NDArray[np.int16]
) -> NDArray[np.int8]:
    """-1 for each channel that only fits its width when flipped; of ``shape``."""
    others = tuple(dim for dim, size in enumerate(shape) if size == 1)
    largest = levels.max(axis=others, keepdims=True, initial=-128).astype(np.int16)
    smallest = levels.min(axis=others, keepdims=True, initial=127).astype(np.int16)
    fits = (smallest >= low) & (largest <= high)
    return np.where(~fits & (-largest >= low) & (-smallest <= high), np.int8(-1), np.int8(1)).astype(np.int8)


def _whole(weight: _Weight) -> _Segment:
    """A weight of one width."""
    flat = weight.levels.reshape(-1)
    return _Segment(weight.bits, flat, weight.is_flipped(), partial(_add_whole, weight))


def _add_whole(weight: _Weight, build: Builder, part: str) -> None:
    """The initializer from its levels in one dimension."""
    shape = build.constant(np.array(weight.levels.shape, np.int64))
    if weight.is_flipped():
        levels = build.op("Mul", build.op("Reshape", part, shape), _signs_of(build, weight.signs))
        build.emit("Cast", [levels], [weight.name], to=onnx.TensorProto.INT8)
    else:
        build.emit("Reshape", [part, shape], [weight.name])


def _groups(weights: Iterable[_Weight]) -> Iterator[_Group]:
    """Weights of one length of rows, at most ``STREAM_WEIGHTS`` weights or one initializer."""
    ordered = sorted(weights, key=lambda weight: weight.rows().shape[1])
    for run in runs(ordered, lambda weight: weight.levels.size, lambda weight: weight.rows().shape[1]):
        yield _Group(tuple(run))


def _row_signs(build: Builder, groups: Sequence[_Group]) -> list[str]:
    """int32 ``[c, 1]``: the signs of each group's rows, from one bit a row; no name where none is flipped."""
    flipped = [group for group in groups if group.is_flipped()]
    if not flipped:
        return [""] * len(groups)
    every = np.concatenate([weight.signs.reshape(-1) for group in flipped for weight in group.weights])
    bits = _padded([(every > 0).astype(np.uint8)])
    flat = build.fields_of(planes.pack(bits, 1), 1, 1, 1)
    column = build.op("Reshape", flat, build.constant(np.array([-1, 1])))
    parts = iter(_parted(build, column, [len(group.letters()) for group in flipped], bits.size - every.size))
    return [next(parts) if group.is_flipped() else "" for group in groups]


def _parted(build: Builder, value: str, sizes: Sequence[int], padding: int) -> list[str]:
    """``value`` in parts of ``sizes``; without a node where it is the only one."""
    return split(build, value, sizes, padding=padding) if len(sizes) > 1 or padding else [value]


def _row_orders(build: Builder, groups: Sequence[_Group]) -> list[str]:
    """int32 ``[c]``: where each of a group's rows is once they are put in the order of their widths.

    Of so many that a place isn't a byte, the places are found from the widths, which take four bits at most.
    """
    coded = [group.letters() for group in groups if len(group.letters()) > MOST_PLACES]
    kinds = [letter for letter in reversed(WIDTHS) if any(letter in letters for letters in coded)]
    parts: Iterator[str] = iter(())
    if coded:
        rows = [len(letters) for letters in coded]
        values = _padded([np.array([kinds.index(letter) for letters in coded for letter in letters], np.uint8)])
        flat = add_fields(build, values.astype(np.int64), max(1, (len(kinds) - 1).bit_length()))
        parts = iter(_parted(build, flat, rows, values.size - sum(rows)))
    orders = []
    for group in groups:
        count = len(group.letters())
        if count > MOST_PLACES:
            places = largest_first(build, next(parts), count)
            orders.append(largest_first(build, build.op("Sub", build.number(0), places), count))
        else:
            letters = np.array(list(group.letters()))
            places_of = np.concatenate([np.flatnonzero(letters == letter) for letter in WIDTHS])
            orders.append(build.int32(np.argsort(places_of).astype(np.uint8)))
    return orders


def _add_rows(build: Builder, group: _Group, signs: str, order: str) -> None:
    """The initializers of a group, from the segments that its widths have taken.

    Args:
        signs: Of its rows; empty where none is flipped.
        order: Where each of its rows is, in the order of their widths.
    """
    letters = np.array(list(group.letters()))
    rows = [weight.levels.shape[weight.axis] for weight in group.weights]
    length = group.weights[0].levels.size // rows[0]
    parts = []
    for letter in WIDTHS:
        found = np.flatnonzero(letters == letter)
        if not len(found):
            continue
        if letter == "0":
            zero = build.constant(np.array(0, np.int32 if signs else np.int8))
            parts.append(build.op("Expand", zero, build.constant(np.array([len(found) * length]))))
        else:
            parts.append(group.taken[letter])
    flat = build.op("Concat", *parts, axis=0) if len(parts) > 1 else parts[0]
    matrix = build.op("Reshape", flat, build.constant(np.array([-1, length])))
    matrix = build.op("Gather", matrix, order)
    if signs:
        matrix = build.op("Mul", matrix, signs)
        matrix = build.op("Cast", matrix, to=onnx.TensorProto.INT8)
    names = _parted(build, matrix, rows, 0)
    for weight, name in zip(group.weights, names, strict=True):
        moved = np.moveaxis(weight.levels, weight.axis, 0).shape
        shape = build.constant(np.array(moved, np.int64))
        if weight.axis == 0:
            build.emit("Reshape", [name, shape], [weight.name])
        else:
            back = np.argsort([weight.axis, *(dim for dim in range(len(moved)) if dim != weight.axis)])
            build.emit("Transpose", [build.op("Reshape", name, shape)], [weight.name], perm=back.tolist())


def _add_stream(build: Builder, segments: Sequence[_Segment]) -> None:
    """The stream of ``segments``, all of one width, and the nodes that make their levels."""
    width, is_flipped = segments[0].width, segments[0].is_flipped
    if planes.stages_of(width):
        merged = _padded_stages([segment.levels for segment in segments], width)
        total = _add_stages(build, merged, width)
        if is_flipped:
            total = build.op("Cast", total, to=onnx.TensorProto.INT32)
    else:
        merged = _padded(
            [segment.levels for segment in segments], 8 if isinstance(width, int) else levels_of(width).per_byte
        )
        total = _add_whole_bits(build, merged, width, is_flipped=is_flipped)
    sizes = [segment.size() for segment in segments]
    parts = split(build, total, sizes, padding=merged.size - sum(sizes))
    for segment, part in zip(segments, parts, strict=True):
        segment.finish(build, part)


def _add_stages(build: Builder, numbers: planes.Bytes, width: Width) -> str:
    """int8 ``[n]``: levels of a code by stages, whose values each fill whole bytes."""
    parts, stages = planes.in_stages(numbers, width), planes.stages_of(width)
    total = ""
    for values, bits in reversed([*zip(parts, stages, strict=True)]):
        if not values.size:
            continue
        found = add_fields(build, values.astype(np.int64), bits)
        if total:
            most = build.number(2**bits - 1)
            places = places_of_largest(build, build.op("Div", found, most), int((values == 2**bits - 1).sum()))
            total = build.op("ScatterElements", found, places, build.op("Add", total, most))
        else:
            total = found
    every = planes.levels_from(np.arange(levels_of(width).count(), dtype=np.uint8), width)
    return build.op("Gather", build.constant(every.astype(np.int8)), total)


def _padded_stages(parts: Sequence[planes.Bytes], width: Width) -> planes.Bytes:
    """The parts, and values that fill up the bytes of every stage."""
    merged = np.concatenate(parts)
    for first in reversed(levels_of(width).firsts()):
        missing = -int((merged >= first).sum()) % 8
        merged = np.concatenate([merged, np.full(missing, first, np.uint8)])
    return merged


def _add_whole_bits(build: Builder, merged: planes.Bytes, width: Width, *, is_flipped: bool) -> str:
    """int8 ``[n]``, or int32 where signs will be applied: levels that take equally many bits."""
    if isinstance(width, str):
        total = look_up(build, _digits(build, width, offset_of(width)), build.int32(planes.pack(merged, width)))
    elif is_flipped or len(planes.fields(width)) > 1 or is_few(plane := planes.pack(merged, width)):
        total = add_fields(build, merged.astype(np.int64), width, offset=offset_of(width))
    else:  # no int32 of every weight
        rows = build.op("Cast", table(build, width, 0, offset_of(width)), to=onnx.TensorProto.INT8)
        return look_up(build, rows, build.int32(plane))
    if not is_flipped:
        total = build.op("Cast", total, to=onnx.TensorProto.INT8)
    return total


def _padded(parts: Sequence[planes.Bytes], multiple: int = 8) -> planes.Bytes:
    """The parts and zeros to a multiple of levels: whole bytes in every field, so that all unpack to one length."""
    return np.concatenate([*parts, np.zeros(-sum(part.size for part in parts) % multiple, np.uint8)])


def _signs_of(build: Builder, signs: NDArray[np.int8]) -> str:
    """int32 signs from one byte a channel; by Gather, as OpenVINO keeps a Mul right behind a Cast from int8."""
    choices = build.constant(np.array([1, -1], np.int32))
    chosen = (signs < 0).astype(np.uint8)
    return build.op("Gather", choices, build.int32(chosen))


def _digits(build: Builder, letter: str, offset: int) -> str:
    """int32 ``[256, d]``: for each byte its digits, minus ``offset``."""
    levels = levels_of(letter)
    powers = levels.count() ** np.arange(levels.per_byte, dtype=np.int32)
    return build.op("Sub", digits(build, powers, levels.count()), build.number(offset))


def _fold(build: Builder, graph: onnx.GraphProto, weights: Iterable[_Weight]) -> set[str]:
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
