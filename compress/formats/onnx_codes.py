"""Integers in an ONNX file at nearly their entropy: Golomb-Rice codes that the runtime folds when it loads the file.

A number is cut into its low ``k`` bits, which lie in fields of a table's width (``planes.py``), and the rest in unary:
so many zero bits and a one. TopK finds the ones, and how far they are apart is the number. Gaps between places need no
differences: the place of the i-th one, less i, is the sum of the unary parts so far.

Source: Rice, Plaunt 1971, Adaptive variable-length coding (IEEE Trans. Commun. 19(6)), the codes. Cost: packing, a
pass over the numbers for each ``k``; taking apart, 4 bytes of memory a bit of unary code and about 40 a number.
"""

from __future__ import annotations

import numpy as np
import onnx
from numpy.typing import NDArray

from . import planes
from .onnx_build import Builder, largest_first

MOST_LOW_BITS = 16
GROUP = 8  # Numbers come in so many, that all fields unpack to one length.

Integers = NDArray[np.int64]


def best_low_bits(values: Integers) -> int:
    """The ``k`` with which ``values`` take the fewest bytes."""
    return min(range(MOST_LOW_BITS + 1), key=lambda k: (coded_bytes(values, k), k))


def coded_bytes(values: Integers, low_bits: int) -> int:
    """Bytes of ``values``, none of them negative, with so many low bits."""
    rest = values >> low_bits
    unary = (values.size + int(rest.sum()) + 7) // 8 if rest.any() else 0
    return unary + sum(planes.plane_size(values.size, width) for width in _fields(low_bits))


def add_numbers(build: Builder, values: Integers) -> str:
    """int32 ``[n]``: ``values``, ``n`` a multiple of ``GROUP``, none of them negative."""
    low_bits = best_low_bits(values)
    rest = values >> low_bits
    if not rest.any():
        return add_fields(build, values, low_bits) if low_bits else _zeros(build, values.size)
    # A first one, before which no number lies, makes every number a distance.
    ones = _add_ones(build, np.concatenate([[0], rest]))
    after, before = (
        build.op("Slice", ones, build.constant(np.array([start])), build.constant(np.array([start + rest.size])))
        for start in (1, 0)
    )
    unary = build.op("Sub", build.op("Sub", after, before), build.number(1))
    if not low_bits:
        return unary
    high = build.op("Mul", unary, build.number(1 << low_bits))
    return build.op("Add", high, add_fields(build, values, low_bits))


def signed_bytes(values: Integers) -> int:
    """Bytes of ``values`` of both signs."""
    folded = _folded(values)
    return coded_bytes(folded, best_low_bits(folded))


def add_signed(build: Builder, values: Integers) -> str:
    """int32 ``[n]``: ``values`` of both signs, between ``-2**30`` and ``2**30``, ``n`` a multiple of ``GROUP``."""
    folded, two = add_numbers(build, _folded(values)), build.number(2)
    is_negative = build.op("Mod", folded, two)
    return build.op("Sub", build.op("Div", folded, two), build.op("Mul", is_negative, folded))


def add_places(build: Builder, places: Integers) -> str:
    """int32 ``[n]``: rising ``places`` below ``2**24``, ``n`` a multiple of ``GROUP``."""
    gaps = np.diff(places, prepend=-1) - 1
    low_bits = best_low_bits(gaps)
    ones = _add_ones(build, gaps >> low_bits)
    if not low_bits:
        return ones
    # With r for the low bits and p for a one's place, a place is 2^k (p_i - i) + sum_{j<=i} r_j + i.
    step = 1 - (1 << low_bits)
    low = build.op("Cast", add_fields(build, gaps, low_bits, offset=-step), to=onnx.TensorProto.FLOAT)
    # In floats, as OpenVINO folds no other sum; all of it is below 2^24, and exact.
    sums = build.op("CumSum", low, build.number(0))
    high = build.op("Mul", ones, build.number(1 << low_bits))
    offset = build.op("Add", build.op("Cast", sums, to=onnx.TensorProto.INT32), build.number(-step))
    return build.op("Add", high, offset)


def add_fields(build: Builder, values: Integers, bits: int, *, offset: int = 0) -> str:
    """int32 ``[n]``: the low ``bits`` bits of ``values``, less ``offset``; ``n`` a multiple of ``GROUP``."""
    total, shift = "", 0
    for width in _fields(bits):
        plane = planes.pack((values >> shift & ((1 << width) - 1)).astype(np.uint8), width)
        part = build.fields_of(plane, width, shift, offset)
        total = build.op("Add", total, part) if total else part
        shift, offset = shift + width, 0
    return total


def _folded(values: Integers) -> Integers:
    """0, -1, 1, -2, .. as 0, 1, 2, 3, .."""
    return np.where(values < 0, -2 * values - 1, 2 * values)


def _fields(bits: int) -> tuple[int, ...]:
    """Widths of the fields of so many bits, lowest first: whole bytes, then those of ``planes``."""
    return (*[8] * (bits // 8), *(planes.fields(bits % 8) if bits % 8 else ()))


def _add_ones(build: Builder, unary: Integers) -> str:
    """int32 ``[n]``: the places of the ones in the unary code of ``unary``."""
    ends = np.cumsum(unary + 1) - 1
    bits = np.zeros(-(-int(ends[-1] + 1) // 8) * 8, np.uint8)
    bits[ends] = 1
    return largest_first(build, build.fields_of(planes.pack(bits, 1), 1), unary.size)


def _zeros(build: Builder, count: int) -> str:
    return build.op("Expand", build.number(0), build.constant(np.array([count])))
