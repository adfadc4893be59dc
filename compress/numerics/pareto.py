"""The exact Pareto frontier of choosing one option for each item, where costs and predicted losses add up.

Source: Dong et al. 2020, HAWQ-V2 (arXiv:1911.03852), section 3.2, for the frontier of bit widths; Nemhauser and
Ullmann 1969, "Discrete dynamic programming and capital allocation", for merging one item at a time and dropping what
is dominated.
Cost: for each item, one pass over options x points so far, about 20 ns each. Points lie on integer costs divided by
their common divisor, so their number never exceeds the range of those; with a divisor of 1 it can reach millions.
Where the points are dense in that range, the pass is over its steps, 1 to 2 ns each. To read choices back, a merge
keeps 9 bytes a point, or 1 byte a step where dense.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..budget import format_bytes
from ..errors import NumericsError, OutOfMemoryError

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Bytes = NDArray[np.uint8]

DENSE_STEPS = 12  # steps of the range a point, up to which a pass over the range beats a sort of the points
BLOCK = 32_768  # steps of the range merged at once: they stay in the cache
CHUNK = 32_768  # sums sorted at once
POINT_BYTES = 50  # of a point while sorted: before, in pieces, and joined
STEP_BYTES = 25  # of a step of the range while merged: before, padded, and after
MEMORY_LIMIT = 2 * 2**30  # bytes
MAX_OPTIONS = 256


@dataclass(frozen=True, slots=True)
class Merge:
    """What one item adds to the frontier of the items before it.

    Attributes:
        steps: Cost of each useful option above the cheapest, in the frontier's unit, ascending.
        indices: The caller's index of each useful option.
        ranks: Which useful option the point at a cost has.
        costs: Cost of each of ``ranks``, ascending; None where ``ranks`` has an entry for every cost.
    """

    steps: Ints
    indices: Bytes
    ranks: Bytes
    costs: Ints | None


@dataclass(frozen=True, slots=True)
class Frontier:
    """Every assignment that no other beats, ordered by cost.

    Attributes:
        costs: Total costs ``[p]``, strictly ascending.
        values: Total predicted losses ``[p]``, strictly descending.
        unit: Common divisor of the differences of costs.
        merges: One for each item, to read the choices back.
    """

    costs: Ints
    values: Floats
    unit: int
    merges: tuple[Merge, ...]

    def __len__(self) -> int:
        return len(self.costs)

    def choice(self, index: int) -> tuple[int, ...]:
        """The option of each item at one point."""
        return tuple(self._options(self.costs[[index]])[:, 0].tolist())

    def choices(self) -> Bytes:
        """The options of all points, ``[p, l]``."""
        return self._options(self.costs).T

    def within(self, limit: float) -> int | None:
        """Index of the point with the least loss whose cost is at most ``limit``; None where none is."""
        if math.isnan(limit):
            raise ValueError("the limit of a cost can't be nan")
        fitting = int(np.searchsorted(self.costs, limit, side="right"))
        return fitting - 1 if fitting else None

    def _options(self, costs: Ints) -> Bytes:
        """``[l, points]``: walk back from the last item, paying for one option after the other."""
        rest = (costs - self.costs[0]) // self.unit
        options = np.empty((len(self.merges), len(rest)), np.uint8)
        for merge, row in zip(reversed(self.merges), options[::-1], strict=True):
            ranks = merge.ranks[rest if merge.costs is None else np.searchsorted(merge.costs, rest)]
            row[:] = merge.indices[ranks]
            rest = rest - merge.steps[ranks]
        return options


def pareto_frontier(costs: Sequence[Sequence[int]], values: Sequence[Sequence[float]]) -> Frontier:
    """Find every assignment of one option to each item that no other dominates.

    One assignment dominates another if neither its cost nor its value is higher and one of them is lower. Values are
    added in float64 from the first item to the last. Rounding never reverses two sums that get the same term, so the
    points are those of an enumeration that adds in this order, to the last bit.

    Args:
        costs: ``costs[i][j]`` is the cost of option ``j`` of item ``i``; items may differ in their number of options.
        values: The predicted losses, in the same shape.

    Returns:
        All points; assignments that tie in both are one. Its choice is the cheapest such option of the last item, and
        so on backwards; of equal options, the first. No items give one point of cost 0 and value 0.

    Raises:
        NumericsError: A value, or the sum of values, is not finite; names the item.
        OutOfMemoryError: The points and what is kept to read choices back exceed ``MEMORY_LIMIT``.
        ValueError: Costs are no integers, an item has no option or too many, or the shapes differ.

    Example:
        >>> frontier = pareto_frontier([[1, 2], [2, 4]], [[0.5, 0.1], [0.9, 0.2]])
        >>> frontier.costs.tolist(), frontier.choice(2)
        ([3, 4, 5, 6], (0, 1))
    """
    _check(costs, values)
    items = [_useful(np.asarray(c, np.int64), np.asarray(v, np.float64)) for c, v in zip(costs, values, strict=True)]
    unit = math.gcd(*(int(np.gcd.reduce(above)) for above, _, _ in items)) or 1

    points: Ints | None = np.zeros(1, np.int64)  # None where totals has an entry for every cost
    totals: Floats = np.zeros(1)
    reach = held = 0
    merges: list[Merge] = []
    for above, losses, indices in items:
        steps = above // unit
        reach += int(steps[-1])
        num_points = len(totals) if points is not None else 1 + np.count_nonzero(totals[1:] < totals[:-1])
        if reach < DENSE_STEPS * num_points:
            if points is not None:
                totals = np.repeat(totals, np.diff(points, append=points[-1] + 1))
                points = None
            _check_memory(held + STEP_BYTES * reach)
            totals, ranks = _merge_dense(totals, steps, losses)
        else:
            if points is None:
                points = _drops(totals)
                totals = totals[points]
            points, totals, ranks = _merge_sorted(points, totals, steps, losses, held)
        merges.append(Merge(steps, indices, ranks, points))
        held += ranks.nbytes + (0 if points is None else points.nbytes)
    if points is None:
        points = _drops(totals)
        totals = totals[points]
    cheapest = sum(min(map(int, row)) for row in costs)
    return Frontier(cheapest + unit * points, totals, unit, tuple(merges))


def _check(costs: Sequence[Sequence[int]], values: Sequence[Sequence[float]]) -> None:
    if len(costs) != len(values):
        raise ValueError(f"{len(costs)} items have costs and {len(values)} have values")
    largest_cost, largest_value = 0, 0.0
    for item, (row, losses) in enumerate(zip(costs, values, strict=True)):
        if not 1 <= len(row) <= MAX_OPTIONS:
            raise ValueError(f"item {item} has {len(row)} options: 1 to {MAX_OPTIONS} are allowed")
        if len(row) != len(losses):
            raise ValueError(f"item {item} has {len(row)} costs and {len(losses)} values")
        if np.asarray(row).dtype.kind not in "iu":
            raise ValueError(f"item {item} has costs {list(row)}: they must be integers of 64 bits")
        finite = np.isfinite(np.asarray(losses, np.float64))
        if not finite.all():
            option = int(finite.argmin())
            raise NumericsError(
                f"the predicted loss of item {item} is {losses[option]} at option {option}",
                hint="check the data that it was measured on",
            )
        largest_cost += max(abs(int(cost)) for cost in row)
        largest_value += max(abs(float(loss)) for loss in losses)
        if not math.isfinite(largest_value):
            raise NumericsError(f"the predicted losses add up to more than a float64 holds at item {item}")
    if largest_cost > 2**62:
        raise ValueError(f"the costs add up to {largest_cost}: at most 2**62 is allowed")


def _useful(costs: Ints, values: Floats) -> tuple[Ints, Floats, Bytes]:
    """The options that no other dominates: costs above the cheapest, values, and indices."""
    order = np.lexsort((values, costs))
    useful = order[_drops(np.minimum.accumulate(values[order]))]
    return costs[useful] - costs[useful[0]], values[useful], useful.astype(np.uint8)


def _drops(falling: Floats) -> Ints:
    """Where a sequence that never rises is lower than before, and its start."""
    lower = np.ones(len(falling), bool)
    np.less(falling[1:], falling[:-1], out=lower[1:])
    return np.flatnonzero(lower)


def _merge_dense(totals: Floats, steps: Ints, losses: Floats) -> tuple[Floats, Bytes]:
    """Least total at each cost or below, with one item more, and the option that gives it.

    Where the total drops, the option leads back to a drop: else the same option would give that total one step earlier.
    """
    width = int(steps[-1])
    padded = np.concatenate([np.full(width, np.inf), totals, np.full(width, totals[-1])])
    merged = np.empty(len(totals) + width)
    ranks = np.zeros(len(merged), np.uint8)
    sums = np.empty(BLOCK)
    better = np.empty(BLOCK, np.uint8)
    for start in range(0, len(merged), BLOCK):
        least, chosen = merged[start : start + BLOCK], ranks[start : start + BLOCK]
        size = len(least)
        begins = start + width - steps
        # Totals fall: an option whose last sum exceeds the block's first least total is never the least.
        useful = padded[begins + size - 1] + losses <= (padded[begins] + losses).min()
        least.fill(np.inf)
        for rank in np.flatnonzero(useful).tolist():
            np.add(padded[begins[rank] : begins[rank] + size], losses[rank], out=sums[:size])
            np.less(sums[:size], least, out=better[:size].view(bool))
            np.minimum(least, sums[:size], out=least)
            np.multiply(better[:size], rank, out=better[:size])
            np.maximum(chosen, better[:size], out=chosen)
    return merged, ranks


def _merge_sorted(points: Ints, totals: Floats, steps: Ints, losses: Floats, held: int) -> tuple[Ints, Floats, Bytes]:
    """Costs, totals and options of the frontier with one item more."""
    # The sums are sorted in chunks of costs: what is no better than the chunk before is dropped unsorted.
    num_options = len(steps)
    samples = points[:: max(CHUNK // num_options, 1)] + steps[:, None]
    cuts = np.sort(samples.ravel())[num_options::num_options]
    stops = np.searchsorted(points, np.append(cuts, points[-1] + steps[-1] + 1)[:, None] - steps)
    starts = np.concatenate([np.zeros((1, num_options), np.int64), stops[:-1]])
    best = np.inf
    num_points = 0
    merged: list[tuple[Ints, Floats, Bytes]] = []
    for begin, end in zip(starts, stops, strict=True):
        chunk: list[tuple[Ints, Floats, Bytes]] = []
        useful = (begin < end) & (totals[end - 1] + losses < best)
        for rank in np.flatnonzero(useful).tolist():
            values = totals[begin[rank] : end[rank]] + losses[rank]
            count = np.count_nonzero(values < best)  # the last ones, as totals fall
            costs = points[end[rank] - count : end[rank]] + steps[rank]
            chunk.append((costs, values[len(values) - count :], np.full(count, rank, np.uint8)))
        if not chunk:
            continue
        costs, values, ranks = (np.concatenate(column) for column in zip(*chunk, strict=True))
        order = np.argsort(costs, kind="stable")
        lowest = np.minimum.accumulate(values[order])
        drops = _drops(lowest)
        costs = costs[order[drops]]
        cheaper = np.append(costs[1:] != costs[:-1], True)  # of drops at one cost, the lowest
        drops = drops[cheaper]
        merged.append((costs[cheaper], lowest[drops], ranks[order[drops]]))
        best = lowest[-1]
        num_points += len(drops)
        _check_memory(held + POINT_BYTES * num_points)
    costs, values, ranks = (np.concatenate(column) for column in zip(*merged, strict=True))
    return costs, values, ranks


def _check_memory(needed: int) -> None:
    if needed > MEMORY_LIMIT:
        raise OutOfMemoryError(
            f"the exact frontier needs {format_bytes(needed)} or more: {format_bytes(MEMORY_LIMIT)} are allowed",
            hint="round the costs up to a coarser unit, or offer fewer options",
        )
