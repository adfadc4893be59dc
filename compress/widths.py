"""Widths: how many levels a rounded weight has, and how many bits one takes in a file.

One width for a whole weight is an int, 2 to 8 bits. Where each output channel has its own, the width is a text:
``channels:`` and a letter of ``WIDTHS`` for each, as in ``channels:33t4``. Beside whole bits there are the widths that
fill a byte better: five weights of three levels, or three of six. A channel of width ``0`` has no levels: its weights
are zeros, and take nothing.

Widths ``a`` to ``m`` are those of a code by stages, in which the levels that are seldom take more bits. Levels are
numbered from zero outwards, 0, 1, -1, 2, -2 and so on. The first stage has so many bits for each weight: the smallest
numbers, and one that says that there is more in the next stage, where the same is done with what is left. Such a
width's bits are those that a channel takes at most on average: its scale is chosen for that.
Source: Golomb 1966 (Run-length encodings) and Rice 1979 (JPL 79-22), whose unary part counts here in digits of more
than a bit; that entropy-coded uniform levels beat equally long ones is Gish and Pierce 1968 (Asymptotically efficient
quantizing).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

BY_CHANNEL = "channels:"
CHANNEL_BYTES = 1  # of a channel with a width of its own: its place in model.onnx, its letter in the index
MOST_EMPTY = 64  # at most so many channels for each that has levels: zeros must not swell a file without end
Width = int | str


@dataclass(frozen=True, slots=True)
class Levels:
    """Lowest and highest level, and the bits that one takes in a file.

    Attributes:
        per_byte: How many of them are the digits of one byte; 0 where whole bits are stored (``formats.planes``).
        stages: Bits of the stages of a code by stages; none where all levels take as many.
    """

    low: int
    high: int
    bits: float
    per_byte: int = 0
    stages: tuple[int, ...] = ()

    def count(self) -> int:
        """How many levels there are."""
        return self.high - self.low + 1

    def firsts(self) -> tuple[int, ...]:
        """The first number of each stage, of levels that are numbered from zero outwards."""
        return tuple(sum(2**own - 1 for own in self.stages[:place]) for place in range(len(self.stages)))

    def largest_at_first(self) -> int:
        """The largest level of the first stage."""
        return (1 << self.stages[0]) // 2 - 1


def _by_stages(bits: float, *stages: int) -> Levels:
    """As many on both sides as the stages can tell: all that each has, less one that leads to the next."""
    high = sum(2**own - 1 for own in stages) // 2
    return Levels(-high, high, bits, stages=stages)


WIDTHS = {
    "0": Levels(0, 0, 0.0),
    "t": Levels(-1, 1, 8 / 5, per_byte=5),
    "2": Levels(-2, 1, 2.0),
    "s": Levels(-3, 2, 8 / 3, per_byte=3),
    **{str(bits): Levels(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1, float(bits)) for bits in range(3, 8)},
    "8": Levels(-127, 127, 8.0),
    "a": _by_stages(1.5625, 1, 1),
    "b": _by_stages(2.125, 2, 2, 2),
    "c": _by_stages(2.375, 2, 2, 2),
    "d": _by_stages(2.625, 2, 2, 2),
    "e": _by_stages(2.875, 2, 2, 2),
    "f": _by_stages(3.25, 3, 3, 2),
    "g": _by_stages(3.625, 3, 3, 2),
    "h": _by_stages(4.25, 4, 4, 2),
    "i": _by_stages(4.625, 4, 4, 2),
    "j": _by_stages(5.25, 5, 5),
    "k": _by_stages(5.75, 5, 5),
    "l": _by_stages(6.25, 6, 6),
    "m": _by_stages(6.75, 6, 6),
}


def levels_of(width: Width) -> Levels:
    """Of a whole weight's bits, or of one channel's letter."""
    return WIDTHS[str(width)]


def kind_of(letter: str) -> str:
    """The first letter whose levels are stored in the same way: of a code by stages, the letters of one code."""
    stages = WIDTHS[letter].stages
    return next(own for own in WIDTHS if WIDTHS[own].stages == stages) if stages else letter


def offset_of(width: Width) -> int:
    """What is added to levels that take equally many bits, so that none is negative.

    Of 8 bits too, of whose numbers the lowest is no level.
    """
    return 128 if str(width) == "8" else -levels_of(width).low


def of_letter(letter: str) -> Width:
    """Of the channels that have this letter, taken together: an int for whole bits."""
    return int(letter) if letter.isdecimal() else letter


def by_channel(letters: Sequence[str]) -> Width:
    """The width of a weight whose channels have these; an int where all share one of whole bits."""
    first = letters[0]
    return int(first) if len(set(letters)) == 1 and first in "2345678" else BY_CHANNEL + "".join(letters)


def letters_of(width: Width) -> str:
    """One letter for each channel, or one for all."""
    return str(width).removeprefix(BY_CHANNEL)


def is_mixed(width: Width) -> bool:
    """Whether each channel has its own; a letter alone is the width of all."""
    return isinstance(width, str) and width.startswith(BY_CHANNEL)


def mean_bits(width: Width) -> float:
    """Bits of a weight on average; every channel has as many weights."""
    letters = letters_of(width)
    return sum(WIDTHS[letter].bits for letter in letters) / len(letters)


def is_width(value: object) -> bool:
    """Whether this is 2 to 8, or a letter for each of one or more channels, not nearly all of which are ``0``."""
    if isinstance(value, str):
        letters = value.removeprefix(BY_CHANNEL)
        return (
            letters not in ("", value)
            and set(letters) <= WIDTHS.keys()
            and len(letters) <= MOST_EMPTY * (len(letters) - letters.count("0"))
        )
    return type(value) is int and 2 <= value <= 8


def shown(width: Width) -> str:
    """``4 bits``, or ``2.75 bits by channel``."""
    return f"{mean_bits(width):.4g} bits by channel" if is_mixed(width) else f"{width} bits"


def counts(width: Width) -> str:
    """How many channels have which width: ``2 without levels, 5 of 3 levels, 9 of 2 bits``."""
    letters = letters_of(width)
    names = {"0": "without levels", **{letter: f"of {WIDTHS[letter].count()} levels" for letter in "ts"}}
    return ", ".join(
        f"{letters.count(letter)} {names.get(letter, f'of {WIDTHS[letter].bits:g} bits')}"
        for letter in WIDTHS
        if letter in letters
    )
