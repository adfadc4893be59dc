"""Ranges of an activation's grid, from the histogram of its values: four ways to say what may be clipped.

Which one leaves the network nearest to what it was differs by tensor, width and network: ``RULES`` are candidates.
Sources: Nagel et al. 2021 (arXiv:2106.08295), section 3.1, for the least squared error; Migacz 2017, 8-bit Inference
with TensorRT (GPU Technology Conference), for the divergence of histograms.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch
from torch import Tensor

from .rounding import activation_grid

NUM_CLIPS, SMALLEST_CLIP = 24, 0.08  # shares of an activation's extreme that are tried, and the least of them
NESTED = 15  # odd: of its parts of a step are those of a coarser grid over the same values made

Ends = tuple[float, float]
# A range, given the counts of the values in equal bins from low to high, zero included, and the bits of its grid.
Rule = Callable[[Tensor, float, float, int], Ends]


def squared_error(counts: Tensor, low: float, high: float, ends: Ends, bits: int) -> float:
    """Sum of the squared changes that the grid over ``ends`` makes to the values of a histogram.

    Args:
        counts: float64 ``[n]``: of the values in equal bins from ``low`` to ``high``.
    """
    values = _centres(counts, low, high)
    scale, zero = activation_grid(*ends, bits)
    levels = torch.round(values / scale).clamp(-zero, 2**bits - 1 - zero)
    return float((counts * (values - scale * levels).square()).sum())


def clipped_range(counts: Tensor, low: float, high: float, bits: int) -> Ends:
    """The part of a range whose grid rounds values with the least squared error, both ends clipped on their own."""
    tried = ((squared_error(counts, low, high, ends, bits), *ends) for ends in _clips(low, high))
    best = min(tried, default=(0.0, low, high))
    return best[1], best[2]


def percentile_range(counts: Tensor, low: float, high: float, bits: int, percent: float) -> Ends:
    """What holds all values but so few at each end: ``100 - percent`` of a hundred; zero always.

    Ends are those of bins.
    """
    share, width = counts.cumsum(0) / counts.sum(), (high - low) / len(counts)
    above = int((share < percent / 100).sum()) + 1
    below = int((share <= 1 - percent / 100).sum())
    return min(low + width * below, 0.0), max(low + width * min(above, len(counts)), 0.0)


def divergent_range(counts: Tensor, low: float, high: float, bits: int) -> Ends:
    """The part of a range with the least divergence of its histogram, as rounded, from that of the clipped values.

    The values of a level are spread evenly over its bins; what is clipped counts at the ends of the clipped histogram
    alone, so that clipping has a cost. The bin of zero is left out, as rectified values fill it.
    """
    counts, values = counts.clone(), _centres(counts, low, high)
    counts[min(int(-low / (high - low) * len(counts)), len(counts) - 1)] = 0
    best = (math.inf, low, high)
    for ends in _clips(low, high):
        inside = (values >= ends[0]) & (values <= ends[1])
        kept = counts * inside
        if not kept.any():
            continue
        places = inside.nonzero().flatten()
        clipped = kept.clone()
        clipped[places[0]] += counts[values < ends[0]].sum()
        clipped[places[-1]] += counts[values > ends[1]].sum()
        best = min(best, (_divergence(clipped, _spread(kept, values, ends, bits)), *ends))
    return best[1], best[2]


def _spread(counts: Tensor, values: Tensor, ends: Ends, bits: int) -> Tensor:
    scale, zero = activation_grid(*ends, bits)
    levels = (torch.round(values / scale).clamp(-zero, 2**bits - 1 - zero) + zero).long()
    used = (counts > 0).double()
    sums, bins = (torch.zeros(2**bits).double().index_add_(0, levels, each) for each in (counts, used))
    return used * (sums / bins.clamp_min(1))[levels]


def _divergence(p: Tensor, q: Tensor) -> float:
    """KL divergence of two histograms; of a bin that ``q`` doesn't have, as if it held a 10**12th."""
    p, q = p / p.sum(), (q / q.sum()).clamp_min(1e-12)
    return float(torch.special.xlogy(p, p / q).sum())


def _centres(counts: Tensor, low: float, high: float) -> Tensor:
    return low + (high - low) / len(counts) * (torch.arange(len(counts), dtype=torch.float64) + 0.5)


def _clips(low: float, high: float) -> Iterator[Ends]:
    shares = torch.linspace(1.0, SMALLEST_CLIP, NUM_CLIPS, dtype=torch.float64).tolist()
    for bottom in shares if low < 0 else [1.0]:
        for top in shares if high > 0 else [1.0]:
            yield bottom * low, top * high


def _whole(counts: Tensor, low: float, high: float, bits: int) -> Ends:
    return low, high


RULES: Mapping[str, Rule] = {
    "minmax": _whole,
    "mse": clipped_range,
    "p99.99": partial(percentile_range, percent=99.99),
    "p99.9": partial(percentile_range, percent=99.9),
    "kl": divergent_range,
}


def between_steps(low: float, high: float, bits: int, whole: tuple[float, float]) -> tuple[float, float]:
    """The range nearest to ``[low, high]`` at which no value of another grid is halfway between two levels.

    A value that was rounded to 8 bits over ``whole`` is rounded to ``bits`` then. Halfway values would go one way or
    the other by the last bit of a division, which runtimes do in ways of their own. Scales that are to each other as
    odd numbers, ``p / NESTED``, keep all values ``1 / (2 NESTED)`` steps of the finer grid from such borders or more:
    ``(j + 1/2) p / NESTED`` is never nearer to an integer.
    """
    scale, (step, _) = activation_grid(low, high, bits)[0], activation_grid(*whole, 8)
    odd = 2 * round((scale / step * NESTED - 1) / 2) + 1
    ratio = max(odd, 1) / NESTED * step / scale
    return low * ratio, high * ratio
