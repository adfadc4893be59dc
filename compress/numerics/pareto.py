"""The exact Pareto frontier of choosing one option for each item, where costs and predicted losses add up.

Source: Dong et al. 2020, HAWQ-V2 (arXiv:1911.03852), section 3.2, for the frontier of bit widths; Nemhauser and
Ullmann 1969, "Discrete dynamic programming and capital allocation", for merging one item at a time and dropping what
is dominated.
Cost: for each item, one pass over options x points so far, about 20 ns each. Points lie on integer costs divided by
their common divisor, so their number never exceeds the range of those; with a divisor of 1 it can reach millions.
Where the points are dense in that range, the pass is over its steps, 1 to 2 ns each. To read choices back, a merge
keeps 9 bytes a point, or 1 byte a step where dense. Items whose costs one more choice multiplies are merged once for
each of its ways.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

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
class Way:
    """One way to choose what multiplies the costs of some items.

    Attributes:
        factor: Above 0, of the items' costs.
        cost: Of its own.
    """

    factor: int
    cost: int
    value: float


@dataclass(frozen=True, slots=True)
class Fork:
    """Items whose costs one choice multiplies, such as the weights that read one activation.

    Attributes:
        items: Their numbers; an item is of one fork at most.
    """

    items: tuple[int, ...]
    ways: tuple[Way, ...]


@dataclass(frozen=True, slots=True)
class Merge:
    """What one item adds to the frontier of the items before it.

    Attributes:
        row: Number of the item.
        steps: Cost of each useful option above the cheapest, in the frontier's unit, ascending.
        indices: The caller's index of each useful option.
        ranks: Which useful option the point at a cost has.
        costs: Cost of each of ``ranks``, ascending; None where ``ranks`` has an entry for every cost.
    """

    row: int
    steps: Ints
    indices: Bytes
    ranks: Bytes
    costs: Ints | None

    def read(self, rest: Ints, options: Bytes) -> Ints:
        """Write the item's option at points of cost ``rest`` into ``options`` ``[rows, points]``; what is left."""
        ranks = self.ranks[rest if self.costs is None else np.searchsorted(self.costs, rest)]
        options[self.row] = self.indices[ranks]
        return rest - self.steps[ranks]


@dataclass(frozen=True, slots=True)
class Split:
    """What a fork adds: the merges of its items in each way, and which way the point at a cost takes.

    Attributes:
        row: Where the way is written.
        steps: Least cost of each way above that of the cheapest.
    """

    row: int
    steps: Ints
    merges: tuple[tuple[Merge, ...], ...]
    ranks: Bytes
    costs: Ints

    def read(self, rest: Ints, options: Bytes) -> Ints:
        """As of a merge."""
        ways = self.ranks[np.searchsorted(self.costs, rest)]
        options[self.row] = ways
        left = rest - self.steps[ways]
        for way, merges in enumerate(self.merges):
            chosen = np.flatnonzero(ways == way)
            part, own = options[:, chosen], left[chosen]
            for merge in reversed(merges):
                own = merge.read(own, part)
            options[:, chosen], left[chosen] = part, own
        return left


@dataclass(frozen=True, slots=True)
class _Points:
    """A frontier while it grows.

    Attributes:
        costs: Of the points; None where ``totals`` has an entry for every cost.
        reach: Cost of the last point.
        held: Bytes that are kept to read choices back.
    """

    costs: Ints | None
    totals: Floats
    reach: int
    held: int

    def sparse(self) -> tuple[Ints, Floats]:
        if self.costs is not None:
            return self.costs, self.totals
        drops = _drops(self.totals)
        return drops, self.totals[drops]


@dataclass(frozen=True, slots=True)
class Frontier:
    """Every assignment that no other beats, ordered by cost.

    Attributes:
        costs: Total costs ``[p]``, strictly ascending.
        values: Total predicted losses ``[p]``, strictly descending.
        unit: Common divisor of the differences of costs.
        merges: One for each item that is of no fork, and for each fork, to read the choices back.
    """

    costs: Ints
    values: Floats
    unit: int
    merges: tuple[Merge | Split, ...]

    def __len__(self) -> int:
        return len(self.costs)

    def choice(self, index: int) -> tuple[int, ...]:
        """The option of each item at one point, then the way of each fork."""
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
        """``[rows, points]``: walk back from the last item, paying for one option after the other."""
        rest = (costs - self.costs[0]) // self.unit
        rows = sum(1 if isinstance(m, Merge) else 1 + len(m.merges[0]) for m in self.merges)
        options = np.empty((rows, len(rest)), np.uint8)
        for merge in reversed(self.merges):
            rest = merge.read(rest, options)
        return options


def pareto_frontier(
    costs: Sequence[Sequence[int]], values: Sequence[Sequence[float]], forks: Sequence[Fork] = ()
) -> Frontier:
    """Find every assignment of one option to each item that no other dominates.

    One assignment dominates another if neither its cost nor its value is higher and one of them is lower. Values are
    added in float64 from the first item to the last. Rounding never reverses two sums that get the same term, so the
    points are those of an enumeration that adds in this order, to the last bit.

    Args:
        costs: ``costs[i][j]`` is the cost of option ``j`` of item ``i``; items may differ in their number of options.
        values: The predicted losses, in the same shape.
        forks: What multiplies costs. They come after the items that are of none, each way's value before its items'.

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
    _check_forks(forks, costs)
    items = [_useful(np.asarray(c, np.int64), np.asarray(v, np.float64)) for c, v in zip(costs, values, strict=True)]
    least = [min(map(int, row)) for row in costs]
    starts = [[way.factor * sum(least[i] for i in fork.items) + way.cost for way in fork.ways] for fork in forks]
    forked = {item: [way.factor for way in fork.ways] for fork in forks for item in fork.items}
    every = [int(np.gcd.reduce(above)) * f for i, (above, _, _) in enumerate(items) for f in forked.get(i, [1])]
    unit = math.gcd(*every, *(start - min(row) for row in starts for start in row)) or 1

    points = _Points(np.zeros(1, np.int64), np.zeros(1), 0, 0)
    merges: list[Merge | Split] = []
    for row, (above, losses, indices) in enumerate(items):
        if row not in forked:
            points, merge = _merged(points, row, above // unit, losses, indices)
            merges.append(merge)
    for number, (fork, begins) in enumerate(zip(forks, starts, strict=True)):
        ends, parts = [], []
        for way in fork.ways:
            end, part = replace(points, totals=points.totals + way.value), []
            for row in fork.items:
                above, losses, indices = items[row]
                end, merge = _merged(end, row, way.factor * above // unit, losses, indices)
                part.append(merge)
            ends.append(end)
            parts.append(tuple(part))
        steps = (np.asarray(begins, np.int64) - min(begins)) // unit
        points, ranks = _joined(points.held, ends, steps)
        merges.append(Split(len(items) + number, steps, tuple(parts), ranks, points.sparse()[0]))
    final, totals = points.sparse()
    cheapest = sum(least[row] for row in range(len(items)) if row not in forked) + sum(map(min, starts))
    return Frontier(cheapest + unit * final, totals, unit, tuple(merges))


def _merged(points: _Points, row: int, steps: Ints, losses: Floats, indices: Bytes) -> tuple[_Points, Merge]:
    """The frontier with one item more."""
    costs, totals, held = points.costs, points.totals, points.held
    reach = points.reach + int(steps[-1])
    num_points = len(totals) if costs is not None else 1 + np.count_nonzero(totals[1:] < totals[:-1])
    if reach < DENSE_STEPS * num_points:
        if costs is not None:
            totals = np.repeat(totals, np.diff(costs, append=costs[-1] + 1))
            costs = None
        _check_memory(held + STEP_BYTES * reach)
        totals, ranks = _merge_dense(totals, steps, losses)
    else:
        costs, totals = points.sparse()
        costs, totals, ranks = _merge_sorted(costs, totals, steps, losses, held)
    held += ranks.nbytes + (0 if costs is None else costs.nbytes)
    return _Points(costs, totals, reach, held), Merge(row, steps, indices, ranks, costs)


def _joined(held: int, ends: Sequence[_Points], steps: Ints) -> tuple[_Points, Bytes]:
    """The frontier of all ways of a fork, and the way of each point.

    Args:
        held: Bytes before the fork.
    """
    sparse = [end.sparse() for end in ends]
    held += sum(end.held - held for end in ends)
    _check_memory(held + POINT_BYTES * sum(len(costs) for costs, _ in sparse))
    costs = np.concatenate([costs + step for (costs, _), step in zip(sparse, steps, strict=True)])
    ways = np.concatenate([np.full(len(found), way, np.uint8) for way, (found, _) in enumerate(sparse)])
    costs, totals, ways = _lowest(costs, np.concatenate([totals for _, totals in sparse]), ways)
    return _Points(costs, totals, int(costs[-1]), held + costs.nbytes + ways.nbytes), ways


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


def _check_forks(forks: Sequence[Fork], costs: Sequence[Sequence[int]]) -> None:
    numbers = [item for fork in forks for item in fork.items]
    if len(set(numbers)) != len(numbers) or not set(numbers) <= set(range(len(costs))):
        raise ValueError(f"the items {numbers} of forks aren't those of {len(costs)}, or one is of two forks")
    for number, fork in enumerate(forks):
        if not 1 <= len(fork.ways) <= MAX_OPTIONS or any(way.factor < 1 for way in fork.ways):
            raise ValueError(f"fork {number} has {len(fork.ways)} ways, or a factor below 1")
        if not all(math.isfinite(way.value) for way in fork.ways):
            raise NumericsError(
                f"the predicted loss of fork {number} isn't finite", hint="check the data that it was measured on"
            )
    largest = sum(max(abs(int(cost)) for cost in row) for row in costs)
    factors, own = ([getattr(way, name) for fork in forks for way in fork.ways] for name in ("factor", "cost"))
    if max(factors, default=1) * largest + sum(map(abs, own)) > 2**62:
        raise ValueError("the costs of forks add up to more than 2**62")


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
        costs, values, ranks = _lowest(*(np.concatenate(column) for column in zip(*chunk, strict=True)))
        merged.append((costs, values, ranks))
        best = values[-1]
        num_points += len(costs)
        _check_memory(held + POINT_BYTES * num_points)
    costs, values, ranks = (np.concatenate(column) for column in zip(*merged, strict=True))
    return costs, values, ranks


def _lowest(costs: Ints, values: Floats, ranks: Bytes) -> tuple[Ints, Floats, Bytes]:
    """The sums that no cheaper or equal one is as low as, ascending; of equal ones, the first."""
    order = np.argsort(costs, kind="stable")
    lowest = np.minimum.accumulate(values[order])
    drops = _drops(lowest)
    costs = costs[order[drops]]
    cheaper = np.append(costs[1:] != costs[:-1], True)  # of drops at one cost, the lowest
    drops = drops[cheaper]
    return costs[cheaper], lowest[drops], ranks[order[drops]]


def _check_memory(needed: int) -> None:
    if needed > MEMORY_LIMIT:
        raise OutOfMemoryError(
            f"the exact frontier needs {format_bytes(needed)} or more: {format_bytes(MEMORY_LIMIT)} are allowed",
            hint="round the costs up to a coarser unit, or offer fewer options",
        )
