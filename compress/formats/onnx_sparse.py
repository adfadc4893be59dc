"""Weights without their zeros in a standard ONNX file, put back by nodes that the runtime folds when it loads the file.

Survivors of all weights of a type follow each other. Their places are gaps in Rice codes (``onnx_codes.py``); int8
levels are codes of their rank by frequency; of floats, the sign and the bits of the mantissa that any survivor uses lie
in fields, and the exponent is a code of its rank. Survivors that have no such parts, as -0.0, stay floats. CumSum makes
places of gaps and ScatterElements puts the survivors there; Split and Reshape make the initializers.

Cost: packing, a few passes over the survivors. ONNX Runtime keeps what it folds until it has folded the whole graph:
at sparsity 0.9, loading takes 46 bytes of memory a weight more than the plain file. A stream has at most
``STREAM_WEIGHTS`` weights; larger initializers are made of several.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from . import onnx_build
from .onnx_build import Array, Builder, free_prefix, insert, runs, split
from .onnx_codes import GROUP, MOST_LOW_BITS, Integers, add_fields, add_numbers, add_places, best_low_bits, coded_bytes

TYPES = {onnx.TensorProto.FLOAT: np.float32, onnx.TensorProto.INT8: np.int8}
MANTISSA = 23
LEAST_EXPONENT = 24  # Below, a unit of the mantissa isn't a normal number, which some processors take for zero.
MOST_EXPONENT = 254
NODE_BYTES = 800  # of the nodes that put the parts of floats together

Floats = NDArray[np.float32]
Named = tuple[str, Array]


def sparsify(model: onnx.ModelProto, names: Sequence[str]) -> onnx.ModelProto:
    """A model of the same outputs whose float32 and int8 initializers ``names`` are stored without their zeros.

    -0.0 is a survivor.

    Raises:
        ValueError: A name is no float32 or int8 initializer.
    """
    sparse = onnx.ModelProto()
    sparse.CopyFrom(model)
    constants = {tensor.name: tensor for tensor in sparse.graph.initializer}
    for name in names:
        if name not in constants or constants[name].data_type not in TYPES:
            raise ValueError(f"{name} is not a float32 or int8 initializer of the model")
    build = Builder(free_prefix(sparse.graph))
    weights = [(name, numpy_helper.to_array(constants[name])) for name in sorted(set(names))]
    for kind in TYPES.values():
        alike = [(name, array) for name, array in weights if array.dtype == kind]
        for stream in runs(alike, lambda weight: weight[1].size, lambda weight: None):
            _add_stream(build, stream)
    insert(build, sparse.graph, set(names))
    return sparse


def sparse_bytes(array: Array) -> int:
    """Bytes of a weight's survivors alone, without the nodes that all weights share."""
    flat = array.reshape(-1)
    places = np.flatnonzero(_is_alive(flat))
    if not places.size:
        return 0
    gaps, values = np.diff(places, prepend=-1) - 1, flat[places]
    size = coded_bytes(gaps, best_low_bits(gaps))
    if values.dtype == np.int8:
        ranks, _ = _ranked(values)
        return size + coded_bytes(ranks, best_low_bits(ranks))
    floats = values.astype(np.float32)
    return size + min(floats.nbytes, _parts_bytes(floats))


def expected_bytes(total: int, kept: int, bits: float) -> int:
    """Bytes of so many survivors of ``bits`` bits at random places, of ``total`` weights, before they are known."""
    if not kept:
        return 0
    # A gap beyond the low bits is 1 / (1 - q) - 1 times 2^k on average, where q of the weights are zeros 2^k in a row.
    zeros = 1 - kept / total
    gap = min(k + 1 + zeros ** (1 << k) / (1 - zeros ** (1 << k)) for k in range(MOST_LOW_BITS + 1))
    return math.ceil(kept * (gap + bits) / 8)


def expected_bits(weight: Floats, significand: int) -> float:
    """Bits of a survivor of a float weight on average.

    Args:
        significand: Bits of the numbers' significands, the leading one included.
    """
    values = weight.reshape(-1)[weight.reshape(-1) != 0]
    ranks, _ = _ranked(np.frexp(values)[1])
    return significand + (8 * coded_bytes(ranks, best_low_bits(ranks)) / values.size if values.size else 0)


def _add_stream(build: Builder, weights: Sequence[Named]) -> None:
    """The initializers of ``weights``: of several together, or one of several pieces."""
    flat = np.concatenate([array.reshape(-1) for _, array in weights])
    sizes = [array.size for _, array in weights]
    if len(weights) == 1:
        pieces = [flat[i : i + onnx_build.STREAM_WEIGHTS] for i in range(0, flat.size, onnx_build.STREAM_WEIGHTS)]
        parts = [_add_dense(build, piece, [piece.size])[0] for piece in pieces]
        names = [build.op("Concat", *parts, axis=0) if len(parts) > 1 else parts[0]]
    else:
        names = _add_dense(build, flat, sizes)
    for (name, array), part in zip(weights, names, strict=True):
        build.emit("Reshape", [part, build.constant(np.array(array.shape, np.int64))], [name])


def _add_dense(build: Builder, flat: Array, sizes: Sequence[int]) -> list[str]:
    """``flat`` ``[n]`` in parts of ``sizes``."""
    places = np.flatnonzero(_is_alive(flat))
    padding = -places.size % GROUP
    is_float = flat.dtype == np.float32
    zero = build.constant(np.array(0, np.float32 if is_float else np.int32))
    dense = build.op("Expand", zero, build.constant(np.array([flat.size + padding])))
    if places.size:
        values = np.concatenate([flat[places], np.repeat(flat[places[:1]], padding)])
        where = add_places(build, np.concatenate([places, flat.size + np.arange(padding)]))
        survivors = _add_floats(build, values) if is_float else _add_levels(build, values)
        dense = build.op("ScatterElements", dense, where, survivors)
    if not is_float:
        dense = build.op("Cast", dense, to=onnx.TensorProto.INT8)
    return split(build, dense, sizes, padding=padding) if padding or len(sizes) > 1 else [dense]


def _is_alive(flat: Array) -> NDArray[np.bool_]:
    alive: NDArray[np.bool_] = (flat.view(np.uint32) if flat.dtype == np.float32 else flat) != 0
    return alive


def _add_levels(build: Builder, levels: Array) -> str:
    """int32 ``[n]``."""
    ranks, alphabet = _ranked(levels)
    return build.op("Gather", build.int32(alphabet), add_numbers(build, ranks))


def _add_floats(build: Builder, values: Floats) -> str:
    """float32 ``[n]``."""
    parts = _parts(values)
    if parts is None or _parts_bytes(values) + NODE_BYTES > values.nbytes:
        return build.constant(values)
    # A negative one's mantissa is stored as its complement, so that less ``most`` it is minus the significand.
    bits, most = parts.bits, (2 << parts.bits) - 1
    signed = add_fields(build, np.where(parts.is_negative, 0, 1 << bits) + parts.mantissa, bits + 1)
    is_positive = build.op("Div", signed, build.number(1 << bits))
    significand = build.op("Add", signed, build.op("Mul", is_positive, build.number(most)))
    significand = build.op("Sub", significand, build.number(most))
    ranks, alphabet = _ranked(parts.exponent)
    units = np.ldexp(np.float32(1), alphabet - parts.bits).astype(np.float32)
    unit = build.op("Gather", build.constant(units), add_numbers(build, ranks))
    # Both are exact: 24 bits, and a power of two.
    return build.op("Mul", build.op("Cast", significand, to=onnx.TensorProto.FLOAT), unit)


@dataclass(frozen=True, slots=True)
class _Parts:
    """Floats ``+-(1 + m / 2**bits) * 2**exponent``.

    Attributes:
        mantissa: ``m``, of a negative one ``2**bits - 1 - m``.
        bits: Of the mantissa: the fewest that hold them all.
    """

    is_negative: NDArray[np.bool_]
    exponent: Integers
    mantissa: Integers
    bits: int


def _parts(values: Floats) -> _Parts | None:
    """None where a value isn't a normal number, or nearly not."""
    raw = values.view(np.uint32).astype(np.int64)
    exponent, mantissa = raw >> MANTISSA & 255, raw & ((1 << MANTISSA) - 1)
    if exponent.min() < LEAST_EXPONENT or exponent.max() > MOST_EXPONENT:
        return None
    used = int(np.bitwise_or.reduce(mantissa))
    unused = (used & -used).bit_length() - 1 if used else MANTISSA
    bits, is_negative = MANTISSA - unused, raw >> 31 == 1
    mantissa >>= unused
    return _Parts(is_negative, exponent - 127, np.where(is_negative, (1 << bits) - 1 - mantissa, mantissa), bits)


def _parts_bytes(values: Floats) -> int:
    """Bytes of the parts of floats; those of the floats where they have none."""
    parts = _parts(values)
    if parts is None:
        return values.nbytes
    ranks, _ = _ranked(parts.exponent)
    return (parts.bits + 1) * values.size // 8 + coded_bytes(ranks, best_low_bits(ranks))


def _ranked(values: Array) -> tuple[Integers, Array]:
    """For each value its rank by frequency, and the values by rank."""
    distinct, index, counts = np.unique(values, return_inverse=True, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    return np.argsort(order)[index].astype(np.int64), distinct[order]
