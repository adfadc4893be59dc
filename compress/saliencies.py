"""The saliencies of what a plan keeps and of what it removes, counted in bins of a logarithmic axis.

A histogram is taken when a plan is made, as the saliencies themselves are as large as the network and aren't kept.
Cost: one sort of the saliencies.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

STEPS = (0.125, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 25.0)  # decades of a bin
MOST_BINS = 32
TAIL = 0.001  # of the positive saliencies may lie below the first bin; they are counted in it


@dataclass(frozen=True, slots=True)
class Part:
    """Of what is kept, or of what is removed.

    Attributes:
        count: How many.
        zeros: How many of them have a saliency that isn't above zero, and no place on the axis.
        bins: How many lie in each bin.
        least: Of the saliencies above zero, as are the next two; None where there are none.
    """

    count: int
    zeros: int
    bins: tuple[int, ...]
    least: float | None
    median: float | None
    most: float | None


@dataclass(frozen=True, slots=True)
class Saliencies:
    """A histogram.

    Attributes:
        what: The saliency in words.
        unit: Of it; may be empty.
        of: What has one: ``weights``, ``blocks`` or ``channels``.
        low: Base-ten logarithm of the lower end of the first bin, which also counts what lies below.
        step: Decades of each bin.
    """

    what: str
    unit: str
    of: str
    low: float
    step: float
    kept: Part
    removed: Part


def saliency_histogram(values: Tensor, kept: Tensor, *, what: str, unit: str = "", of: str = "weights") -> Saliencies:
    """Count saliencies.

    Args:
        values: Any shape. What isn't finite, as it stays in any case, is left out.
        kept: bool, of the same shape.

    Example:
        >>> found = saliency_histogram(torch.tensor([0.0, 0.1, 1.0]), torch.tensor([False, False, True]), what="size")
        >>> found.removed.count, found.removed.zeros, found.kept.median
        (2, 1, 1.0)
    """
    values, kept = values.detach().flatten().double().cpu(), kept.flatten().cpu()
    finite = torch.isfinite(values)
    values, kept = values[finite], kept[finite]
    is_positive = values > 0
    logs = values[is_positive].log10()
    low, step, count = _axis(logs)
    bins = ((logs - low) / step).floor().long().clamp(0, max(0, count - 1))

    def part(which: Tensor) -> Part:
        own, number = values[which & is_positive].sort().values, int(which.sum())
        ends = (None, None, None) if not len(own) else (float(own[0]), float(own[len(own) // 2]), float(own[-1]))
        counts = torch.bincount(bins[which[is_positive]], minlength=count).tolist()
        return Part(number, number - len(own), tuple(counts), *ends)

    return Saliencies(what, unit, of, low, step, part(kept), part(~kept))


def _axis(logs: Tensor) -> tuple[float, float, int]:
    """Where the bins start, their decades, and how many there are: the finest that are few enough."""
    if not len(logs):
        return 0.0, STEPS[0], 0
    first, last = float(logs.kthvalue(1 + int(TAIL * len(logs))).values), float(logs.max())
    for step in STEPS:
        low = math.floor(first / step) * step
        count = math.floor((last - low) / step) + 1
        if count <= MOST_BINS:
            return low, step, count
    raise AssertionError("floats of 64 bits span 650 decades")
