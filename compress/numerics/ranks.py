"""How well one list of numbers foretells another: the correlation of their ranks, and the spread of their ratios.

Source: Spearman 1904, The proof and measurement of association between two things. Cost: a sort.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence


def spearman(first: Sequence[float], second: Sequence[float]) -> float:
    """Correlation of the ranks, -1 to 1; equal numbers share the mean of their ranks. NaN where all of one are equal.

    Example:
        >>> spearman([1.0, 2.0, 3.0], [10.0, 30.0, 20.0])
        0.5
    """
    x, y = _centred(first), _centred(second)
    power = math.sqrt(sum(a * a for a in x) * sum(b * b for b in y))
    return sum(a * b for a, b in zip(x, y, strict=True)) / power if power else math.nan


def ratio_spread(predicted: Sequence[float], true: Sequence[float]) -> float:
    """The ninth decile of ``predicted / true`` divided by the first: 1 where predictions are off by a factor alone.

    Args:
        true: Above 0.
    """
    ratios = sorted(p / t for p, t in zip(predicted, true, strict=True))
    low = _quantile(ratios, 0.1)
    return _quantile(ratios, 0.9) / low if low > 0 else math.inf


def _centred(values: Sequence[float]) -> list[float]:
    """Ranks, less their mean."""
    ordered = sorted(values)
    ranks = [(bisect_left(ordered, value) + bisect_right(ordered, value) - 1) / 2 for value in values]
    return [rank - (len(ranks) - 1) / 2 for rank in ranks]


def _quantile(ordered: Sequence[float], share: float) -> float:
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])
