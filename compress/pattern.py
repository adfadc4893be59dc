"""Patterns of zeros: which weights are removed together, and how many of their neighbours may be.

A weight is read as a matrix of output rows by input columns, one such matrix for each position of a convolution's
kernel. ``4x1`` is four rows of one column, ``1x4`` four columns of one row, that go together or stay together. Of an
``n:m`` pattern, each weight is on its own, and of every m consecutive columns n stay.
Source: Mishra et al. 2021 (arXiv:2104.08378) for n:m; Narang et al. 2017 (arXiv:1711.02782) for blocks.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from .errors import UsageError

UNSTRUCTURED = "unstructured"
FORMS = "unstructured; n:m such as 2:4; or RxC such as 1x4, 4x1, 16x1"
LARGEST = 256  # weights of a block


@dataclass(frozen=True, slots=True)
class Pattern:
    """What goes together, and how much of it may.

    Attributes:
        rows: Consecutive outputs of a block.
        columns: Consecutive inputs of a block.
        quota: ``n`` and ``m``: of ``m`` consecutive inputs, ``n`` stay; None where any block may go.
    """

    rows: int = 1
    columns: int = 1
    quota: tuple[int, int] | None = None

    @property
    def is_block(self) -> bool:
        """Whether several weights go together."""
        return self.rows * self.columns > 1

    @property
    def units(self) -> str:
        """What goes or stays, as reports name it."""
        return "blocks" if self.is_block else "weights"


def parse_pattern(text: str) -> Pattern:
    """Read a pattern.

    Raises:
        UsageError: It is none; names those that are.

    Example:
        >>> parse_pattern("2:4")
        Pattern(rows=1, columns=1, quota=(2, 4))
        >>> parse_pattern("16x1")
        Pattern(rows=16, columns=1, quota=None)
    """
    if text == UNSTRUCTURED:
        return Pattern()
    match = re.fullmatch(r"([0-9]{1,9})([:x])([0-9]{1,9})", text)
    if match is None:
        raise UsageError(f"--pattern {text!r} is not a pattern", hint=FORMS)
    first, second = int(match.group(1)), int(match.group(3))
    if match.group(2) == ":":
        if not 0 < first < second:
            raise UsageError(f"--pattern {text}: keeps {first} of {second}", hint="n lies between 1 and m - 1")
        return Pattern(quota=(first, second))
    if not 1 < first * second <= LARGEST:
        raise UsageError(
            f"--pattern {text}: its blocks have {first * second} weight{'s' * (first * second != 1)}",
            hint=f"blocks of 2 to {LARGEST} weights, such as 1x4, 4x1 or 16x1; unstructured for single weights",
        )
    return Pattern(first, second)
