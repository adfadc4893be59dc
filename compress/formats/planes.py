"""Bit planes: unsigned integers of 1 to 8 bits in as many bits, in fields of 1, 2, 4 or 8 that a table can unpack.

Layout, for a reader of one's own. A value of ``bits`` bits is cut into fields (``FIELDS``), the widest first, which
holds the lowest bits: 5 = 4 + 1 has bits 0-3 in the first field and bit 4 in the second. The first fields of all values
make a plane, then the second fields of all values, and the planes follow each other. Within a byte of a plane the first
value sits in the lowest bits; each plane is padded with zero bits to whole bytes:

    bits = 3, values 5, 2, 7    fields of 2: 1, 2, 3    byte 0b00_11_10_01
                                fields of 1: 1, 0, 1    byte 0b00000_1_0_1

Values of three levels (width ``t``) are the digits of a byte in base 3, five of them, the first one the lowest; those
of six levels (``s``) three digits in base 6. The last byte's missing digits are zeros.

Values of a code by stages (``widths.Levels.stages``) are stored stage by stage, each in the planes of its bits. A stage
of ``b`` bits that isn't the last has the smaller one of what is left of a value and ``2**b - 1``; where it is the
latter, the next stage goes on with the rest, in the same order. How many values a stage has follows from the one
before.

    stages of 2, 2, 2 bits, values 0, 7, 2, 3    first 0, 3, 2, 3; second 3, 0; third 1

Cost: one pass over the values for each plane; one byte of memory a value.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from ..widths import Width, is_mixed, letters_of, levels_of, of_letter, offset_of

Bytes = NDArray[np.uint8]
Taker = Callable[[int], Bytes]

FIELDS: dict[int, tuple[int, ...]] = {
    1: (1,),
    2: (2,),
    3: (2, 1),
    4: (4,),
    5: (4, 1),
    6: (4, 2),
    7: (4, 2, 1),
    8: (8,),
}


def pack(levels: Bytes, bits: Width) -> Bytes:
    """The planes of ``levels``, shape ``[n]``, one after the other: ``packed_size(n, bits)`` bytes.

    Of a code by stages, as many as the levels need.

    Raises:
        ValueError: ``bits`` is not 1 to 8 or a letter of ``widths.WIDTHS``, or a level needs more than ``bits`` bits.
    """
    if stages := stages_of(bits):
        return np.concatenate([pack(part, own) for part, own in zip(in_stages(levels, bits), stages, strict=True)])
    return np.concatenate(pack_planes(levels, bits))


def numbers_of(levels: NDArray[np.int16], bits: Width) -> Bytes:
    """What levels are stored as: numbered from zero outwards in a code by stages, counted from the lowest elsewhere."""
    numbers = 2 * np.abs(levels) - (levels > 0) if stages_of(bits) else levels + offset_of(bits)
    return numbers.astype(np.uint8)


def levels_from(numbers: Bytes, bits: Width) -> NDArray[np.int16]:
    """The levels that ``numbers_of`` was given."""
    wide = numbers.astype(np.int16)
    if stages_of(bits):
        return np.where(wide % 2 == 1, wide + 1, -wide) // 2
    return wide - np.int16(offset_of(bits))


def stages_of(bits: Width) -> tuple[int, ...]:
    """Bits of the stages; none where all values take as many."""
    return levels_of(bits).stages if isinstance(bits, str) and not is_mixed(bits) else ()


def in_stages(values: Bytes, bits: Width) -> tuple[Bytes, ...]:
    """The values of each stage.

    Raises:
        ValueError: A value is none of the code's.
    """
    if values.size and int(values.max()) >= levels_of(bits).count():
        raise ValueError(f"level {int(values.max())} is none of {levels_of(bits).count()} levels")
    *before, _ = stages_of(bits)
    parts = []
    for own in before:
        most = np.uint8(2**own - 1)
        parts.append(np.minimum(values, most))
        values = values[values >= most] - most
    return (*parts, values)


def unpack(data: Bytes | bytes, bits: Width, num_levels: int) -> Bytes:
    """The ``num_levels`` values that ``pack`` was given, shape ``[n]``.

    Raises:
        ValueError: ``data`` is not ``packed_size(num_levels, bits)`` bytes.
    """
    stream = np.frombuffer(data, dtype=np.uint8) if isinstance(data, bytes) else data
    if stages_of(bits):
        start = 0

        def take(size: int) -> Bytes:
            nonlocal start
            start += size
            return stream[start - size : start]

        values = read(take, bits, num_levels)
        if start != stream.size:
            raise ValueError(f"{num_levels} levels of width {bits} are {start} B, not {stream.size}")
        return values
    if stream.size != packed_size(num_levels, bits):
        raise ValueError(f"{num_levels} levels of {bits} bits are {packed_size(num_levels, bits)} B, not {stream.size}")
    if isinstance(bits, str):
        digits = stream[:, None] // _powers(bits) % np.uint8(levels_of(bits).count())
        return digits.reshape(-1)[:num_levels].astype(np.uint8)
    levels = np.zeros(num_levels, dtype=np.uint8)
    start = shift = 0
    for width in fields(bits):
        stop = start + plane_size(num_levels, width)
        spread = stream[start:stop, None] >> _positions(width) & np.uint8((1 << width) - 1)
        levels |= spread.reshape(-1)[:num_levels] << np.uint8(shift)
        start, shift = stop, shift + width
    return levels


def read(take: Taker, bits: Width, num_levels: int) -> Bytes:
    """The same from the front of a stream, of which ``take`` gives the next so many bytes."""
    stages = stages_of(bits)
    if not stages:
        return unpack(take(packed_size(num_levels, bits)), bits, num_levels)
    values, places = np.zeros(num_levels, np.uint8), np.arange(num_levels)
    for own in stages:
        found = read(take, own, len(places))
        values[places] += found
        places = places[found == 2**own - 1]
    return values


def packed_size(num_levels: int, bits: Width) -> int:
    """Bytes of ``num_levels`` values of ``bits`` bits, every plane padded to whole bytes.

    Where channels have widths of their own, the values of one width are packed together. Of a code by stages, the bytes
    that its width is meant to take; ``least_size`` is what it takes in any case.
    """
    if is_mixed(bits):
        letters = letters_of(bits)
        each, used = num_levels // len(letters), set(letters) - {"0"}
        return sum(packed_size(letters.count(letter) * each, of_letter(letter)) for letter in used)
    if stages_of(bits):
        return math.ceil(num_levels * levels_of(bits).bits / 8)
    if isinstance(bits, str):
        return -(-num_levels // len(_powers(bits)))
    return sum(plane_size(num_levels, width) for width in fields(bits))


def least_size(num_levels: int, bits: Width) -> int:
    """Bytes that ``num_levels`` values take at least."""
    if is_mixed(bits):
        letters = letters_of(bits)
        each, used = num_levels // len(letters), set(letters) - {"0"}
        return sum(least_size(letters.count(letter) * each, of_letter(letter)) for letter in used)
    stages = stages_of(bits)
    return packed_size(num_levels, stages[0] if stages else bits)


def plane_size(num_levels: int, width: int) -> int:
    """Bytes of one plane: ``num_levels`` fields of ``width`` bits."""
    return (num_levels * width + 7) // 8


def fields(bits: int) -> tuple[int, ...]:
    """Widths of the fields of a value of ``bits`` bits, lowest bits first."""
    if bits not in FIELDS:
        raise ValueError(f"{bits} bits; a plane holds 1 to 8")
    return FIELDS[bits]


def pack_planes(levels: Bytes, bits: Width) -> tuple[Bytes, ...]:
    """One array of bytes for each of ``fields(bits)``, or one of digits; ``levels`` has shape ``[n]``."""
    if isinstance(bits, str):
        return (_digits(levels, bits),)
    widths = fields(bits)
    if levels.size and int(levels.max()) >= 1 << bits:
        raise ValueError(f"level {int(levels.max())} doesn't fit {bits} bits (0 to {(1 << bits) - 1})")
    shifts = np.cumsum((0, *widths))
    return tuple(_plane(levels >> np.uint8(shift), width) for shift, width in zip(shifts, widths, strict=False))


def _plane(values: Bytes, width: int) -> Bytes:
    """The low ``width`` bits of each value, ``8 / width`` values a byte."""
    per_byte = 8 // width
    padded = np.zeros(plane_size(values.size, width) * per_byte, dtype=np.uint8)
    padded[: values.size] = values & np.uint8((1 << width) - 1)
    plane: Bytes = np.bitwise_or.reduce(padded.reshape(-1, per_byte) << _positions(width), axis=1)
    return plane


def _digits(levels: Bytes, letter: str) -> Bytes:
    powers, count = _powers(letter), levels_of(letter).count()
    if levels.size and int(levels.max()) >= count:
        raise ValueError(f"level {int(levels.max())} is none of {count} levels")
    padded = np.zeros(packed_size(levels.size, letter) * len(powers), dtype=np.uint8)
    padded[: levels.size] = levels
    every: Bytes = (padded.reshape(-1, len(powers)) * powers).sum(axis=1, dtype=np.uint8)
    return every


def _powers(letter: str) -> Bytes:
    """What a byte's digits are multiplied by."""
    levels = levels_of(letter)
    if not levels.per_byte:
        raise ValueError(f"width {letter} isn't one of digits")
    return np.array([levels.count() ** place for place in range(levels.per_byte)], dtype=np.uint8)


def _positions(width: int) -> Bytes:
    """Lowest bit of each field in a byte."""
    return np.arange(0, 8, width, dtype=np.uint8)
