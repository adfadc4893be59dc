"""Widths: how many levels a rounded weight has, and how many bits one takes in a file.

One width for a whole weight is an int, 2 to 8 bits. Where each output channel has its own, the width is a text:
``channels:`` and a letter of ``WIDTHS`` for each, as in ``channels:33t4``. Beside whole bits there are the widths that
fill a byte better: five weights of three levels, or three of six. A channel of width ``0`` has no levels: its weights
are zeros, and take nothing.
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
    """

    low: int
    high: int
    bits: float
    per_byte: int = 0

    def count(self) -> int:
        """How many levels there are."""
        return self.high - self.low + 1


WIDTHS = {
    "0": Levels(0, 0, 0.0),
    "t": Levels(-1, 1, 8 / 5, per_byte=5),
    "2": Levels(-2, 1, 2.0),
    "s": Levels(-3, 2, 8 / 3, per_byte=3),
    **{str(bits): Levels(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1, float(bits)) for bits in range(3, 8)},
    "8": Levels(-127, 127, 8.0),
}


def levels_of(width: Width) -> Levels:
    """Of a whole weight's bits, or of one channel's letter."""
    return WIDTHS[str(width)]


def offset_of(width: Width) -> int:
    """What is added to levels, so that none is negative; of 8 bits too, of whose numbers the lowest is no level."""
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
        f"{letters.count(letter)} {names.get(letter, f'of {letter} bits')}" for letter in WIDTHS if letter in letters
    )
