"""Which channels go for a budget: the ones that cost the loss least for what they save, until the limit is met.

Greedy: a step cuts, of the group where it is cheapest, the least salient channels that may go. What they save depends
on what else was cut: it is kept exactly, term by term.
"""

from __future__ import annotations

import copy
import heapq
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from ..errors import BudgetError
from ..graph.channel_cost import Term, total
from ..graph.groups import Channels

NAMES = {"macs": "MACs", "params": "parameters", "bytes": "bytes of parameters"}
NAMED = 4  # of what a message lists
MULTIPLES = (8, 4, 2, 1)
BLOCK = 16  # channels that a runtime computes in one go: floats in a register of AVX-512
NEAR = 0.98  # of the limit
ROUNDING = 1e-9  # of a number of blocks, which channels add up to in floats
SLACK = 1.0  # of an amount that is summed up step by step: what is near is counted again


def choose(
    channels: Channels,
    scores: Tensor,
    terms: Sequence[Term],
    limit: float,
    *,
    multiple_of: int | Sequence[int] | None = 1,
    least: float = 0.0,
    movable: Tensor | None = None,
    gone: Tensor | None = None,
    in_blocks: bool = False,
) -> Tensor:
    """The channels that stay, bool ``[c]``, so that the sum of ``terms`` is at most ``limit``.

    Args:
        scores: What the loss gains without each channel, ``[c]``, of any unit.
        terms: Of the budget's quantity (``channel_cost.channel_costs``).
        multiple_of: What each group that loses channels keeps is a multiple of this, or of its own number. None for
            what runtimes have kernels for: 8 in groups of 16 or more, 4 of 8 or more; finer where that would miss the
            limit by far.
        least: The share of a group's channels that stays in any case; one channel always does.
        movable: Channels that may go, bool ``[c]``; all where None.
        gone: Those that are away already: they go first, also before others of score zero, and aren't put back.
        in_blocks: Prefer the channels with which a block of ``BLOCK`` goes, at equal saliency for what they save: half
            of what a channel saves is counted as runtimes compute it, in whole blocks. Always where ``multiple_of`` is
            None.

    Raises:
        BudgetError: The limit is out of reach; gives the least that is left. Or no channel may go: lists the reasons.
    """
    if multiple_of is None:
        return _aligned(channels, scores, terms, limit, least, movable, gone)[1]
    if isinstance(multiple_of, int):
        multiple_of = [multiple_of] * len(channels.groups)
    return _chosen(channels, scores, terms, limit, multiple_of, least, movable, gone, in_blocks)


def aligned_multiples(
    channels: Channels,
    scores: Tensor,
    terms: Sequence[Term],
    limit: float,
    *,
    least: float = 0.0,
    movable: Tensor | None = None,
) -> list[int]:
    """For each group the coarsest number that runtimes have kernels for, and that comes near the limit.

    Raises:
        BudgetError: As for ``choose``.
    """
    return _aligned(channels, scores, terms, limit, least, movable, None)[0]


def _aligned(
    channels: Channels,
    scores: Tensor,
    terms: Sequence[Term],
    limit: float,
    least: float,
    movable: Tensor | None,
    gone: Tensor | None,
) -> tuple[list[int], Tensor]:
    """Those numbers, and the channels that stay with them."""
    for most in MULTIPLES:
        sizes = [next((m for m in (most, most // 2) if m and group.size >= 2 * m), 1) for group in channels.groups]
        try:
            kept = _chosen(channels, scores, terms, limit, sizes, least, movable, gone, in_blocks=True)
        except BudgetError:
            if most == 1:
                raise
            continue
        if most == 1 or total(terms, kept) >= NEAR * limit:
            return sizes, kept
    raise AssertionError("the finest multiples always return or raise")


def _chosen(
    channels: Channels,
    scores: Tensor,
    terms: Sequence[Term],
    limit: float,
    multiples: Sequence[int],
    least: float,
    movable: Tensor | None,
    gone: Tensor | None,
    in_blocks: bool,
) -> Tensor:
    scores = scores.double() if gone is None else torch.where(gone, -1.0, scores.double())
    movable = torch.ones(len(scores), dtype=torch.bool) if movable is None else movable
    kept = torch.ones(len(scores), dtype=torch.bool)
    queues = _queues(channels, scores, movable, multiples, least)
    require_prunable(channels, is_any=any(queues), held=f"--multiple-of {max(multiples, default=1)}")
    tally = _Tally(channels, terms, in_blocks=in_blocks)
    removed = _cheapest_first(tally, queues, scores, limit)
    for _, block in removed:
        kept[block] = False
    if tally.amount > limit and total(terms, kept) > limit:
        reached = total(terms, kept)
        raise BudgetError("the limit is out of reach", hint=f"{reached:,} are left with all that may go", least=reached)
    # The last step may have gone far below: what fits comes back, the most salient first, a whole step at a time.
    removed = [(group, block) for group, block in removed if gone is None or not bool(gone[block].any())]
    for group, block in sorted(removed, key=lambda entry: -float(scores[entry[1]].sum())):
        if tally.amount - tally.saved(group, -len(block)) > limit + SLACK:
            continue
        kept[block] = True
        if total(terms, kept) > limit or not _is_whole(channels, kept, multiples):
            kept[block] = False
        else:
            tally.remove(group, -len(block))
    reached = total(terms, kept)
    if reached >= NEAR * limit:
        return kept
    # Still far below, by a block that saves much: it comes back, and less salient ones of other groups go.
    last = {group: block for group, block in removed if not bool(kept[block].any())}
    found = [(False, 0.0, kept)]
    for group, block in last.items():
        trial, tried = copy.deepcopy(tally), kept.clone()
        trial.remove(group, -len(block))
        others = [[] if other == group else list(queue) for other, queue in enumerate(queues)]
        given = [block for _, block in _cheapest_first(trial, others, scores, limit)]
        tried[block] = True
        lost = -float(scores[block].sum())
        for block in given:
            tried[block] = False
            lost += float(scores[block].sum())
        cost = total(terms, tried)
        if reached < cost <= limit and (cost >= NEAR * limit or lost < 0) and _is_whole(channels, tried, multiples):
            found.append((cost >= NEAR * limit, -lost, tried))
    return max(found, key=lambda entry: entry[:2])[2]


def _cheapest_first(
    tally: _Tally, queues: Sequence[list[Tensor]], scores: Tensor, limit: float
) -> list[tuple[int, Tensor]]:
    """Take blocks from the queues until the tally is at the limit; those that lose least for what they save first."""
    heap: list[tuple[float, int, int]] = []

    def push(group: int) -> None:
        if queues[group]:
            saved = tally.worth(group, len(queues[group][0]))
            if saved > 0:
                heapq.heappush(heap, (float(scores[queues[group][0]].sum()) / saved, group, tally.versions[group]))

    for group in range(len(queues)):
        push(group)
    removed: list[tuple[int, Tensor]] = []
    while tally.amount > limit and heap:
        _, group, version = heapq.heappop(heap)
        if version != tally.versions[group]:
            push(group)
            continue
        block = queues[group].pop(0)
        removed.append((group, block))
        tally.remove(group, len(block))
        push(group)
    return removed


@contextmanager
def budget_of(quantity: str, terms: Sequence[Term]) -> Iterator[None]:
    """Say of a limit that is out of reach what it is a limit of, and how much of it is left or may go."""
    try:
        yield
    except BudgetError as error:
        if error.least is None:
            raise
        least, whole = error.least, sum(term.amount for term in terms)
        if quantity == "sparsity":
            most = math.floor(1e4 * (1 - least / whole)) / 1e4
            what, hint = f"at most {most:.2%} of the channels may go", f"lower the budget to sparsity={most:g}"
        else:
            share = math.ceil(1e3 * least / whole) / 10
            what = f"with all that may be cut, {least:,.0f} {NAMES[quantity]} of {whole:,.0f} are left"
            goal = f"{share:g}%" if quantity == "bytes" else f"{quantity}={share:g}%"
            hint = f"raise the budget to {goal}"
        raise BudgetError(f"the budget is out of reach: {what}", hint=hint, least=least) from None


def require_prunable(channels: Channels, *, is_any: bool, held: str = "") -> None:
    """Refuse a network where nothing can be cut.

    Args:
        held: The option that holds the channels that could be, if one does.

    Raises:
        BudgetError: Lists the reasons, with the layers that each is of.
    """
    if is_any:
        return
    if channels.groups and held:
        largest = max(group.size for group in channels.groups)
        raise BudgetError(
            f"no channel of the network can be cut: {held} holds all that could be, "
            f"those of {listed([group.name for group in channels.groups])}",
            hint=f"use --multiple-of {largest // 2} or less" if held.startswith("--multiple") else "exclude less",
        )
    tensors: dict[str, list[str]] = defaultdict(list)
    for frozen in channels.frozen:
        tensors[frozen.reason].append(frozen.tensor)
    reasons = "; ".join(f"{reason}: {listed(list(dict.fromkeys(names)))}" for reason, names in tensors.items())
    raise BudgetError(
        f"no channel of the network can be cut: {reasons or 'no layer has channels'}",
        hint="hcompress inspect --channels lists what stays and why, with the line",
    )


def listed(names: Sequence[str]) -> str:
    """The first few of some names."""
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")


def _queues(
    channels: Channels, scores: Tensor, movable: Tensor, multiples: Sequence[int], least: float
) -> list[list[Tensor]]:
    """By group, the blocks of channels that go one after another."""
    found = []
    for (group, numbers), multiple in zip(channels.split(torch.arange(channels.count)), multiples, strict=True):
        free = numbers[movable[numbers]]
        order = free[scores[free].argsort(stable=True)]
        fewest = max(1, math.ceil(least * group.size), multiple)
        blocks, place = [], 0
        block = group.size % multiple or multiple
        while place + block <= len(order) and group.size - place - block >= fewest:
            blocks.append(order[place : place + block])
            place, block = place + block, multiple
        found.append(blocks)
    return found


def _is_whole(channels: Channels, kept: Tensor, multiples: Sequence[int]) -> bool:
    """Whether each group that lost channels keeps a multiple."""
    counts = [int(chosen.sum()) for _, chosen in channels.split(kept)]
    return all(
        count == group.size or count % multiple == 0
        for count, group, multiple in zip(counts, channels.groups, multiples, strict=True)
    )


class _Tally:
    """The sum of the terms while channels go; those of a group are alike."""

    def __init__(self, channels: Channels, terms: Sequence[Term], *, in_blocks: bool) -> None:
        self.in_blocks = in_blocks
        sizes = [group.size for group in channels.groups]
        # The last place is that of channel -1, which always stays.
        owner = torch.arange(-1, len(sizes)).roll(-1).repeat_interleave(torch.tensor([*sizes, 1]))
        self.amounts = [term.amount for term in terms]
        self.lengths: list[list[int]] = []
        self.left: list[list[float]] = []
        self.touched: list[list[tuple[int, int, float]]] = [[] for _ in channels.groups]
        for t, term in enumerate(terms):
            self.lengths.append([len(factor) for factor in term.factors])
            self.left.append([float(len(factor)) for factor in term.factors])
            for f, factor in enumerate(term.factors):
                groups, counts = torch.unique(owner[factor], return_counts=True)
                for g, count in zip(groups.tolist(), counts.tolist(), strict=True):
                    if g >= 0:
                        self.touched[g].append((t, f, count / sizes[g]))
        self.neighbours = self._neighbours()
        self.versions = [0] * len(sizes)
        self.amount = sum(self._value(t) for t in range(len(terms)))

    def _neighbours(self) -> list[set[int]]:
        by_term: dict[int, set[int]] = defaultdict(set)
        for g, entries in enumerate(self.touched):
            for t, _, _ in entries:
                by_term[t].add(g)
        return [set().union(*(by_term[t] for t, _, _ in entries)) if entries else set() for entries in self.touched]

    def _value(self, t: int) -> float:
        return self.amounts[t] * math.prod(
            left / length for left, length in zip(self.left[t], self.lengths[t], strict=True)
        )

    def _in_blocks(self, t: int) -> float:
        """A term as runtimes compute it: a block that is begun costs as a whole one, the last one of all as it is."""
        return self.amounts[t] * math.prod(
            min(1.0, math.ceil(left / BLOCK - ROUNDING) * BLOCK / length)
            for left, length in zip(self.left[t], self.lengths[t], strict=True)
        )

    def saved(self, group: int, count: int) -> float:
        """What ``count`` more channels of a group save."""
        return self._saved(group, count, self._value)

    def worth(self, group: int, count: int) -> float:
        """What they save, for the order in which channels go."""
        saved = self.saved(group, count)
        return (saved + self._saved(group, count, self._in_blocks)) / 2 if self.in_blocks else saved

    def _saved(self, group: int, count: int, value: Callable[[int], float]) -> float:
        terms = {t for t, _, _ in self.touched[group]}
        before = sum(value(t) for t in terms)
        for t, f, each in self.touched[group]:
            self.left[t][f] -= each * count
        after = sum(value(t) for t in terms)
        for t, f, each in self.touched[group]:
            self.left[t][f] += each * count
        return before - after

    def remove(self, group: int, count: int) -> None:
        self.amount -= self.saved(group, count)
        for t, f, each in self.touched[group]:
            self.left[t][f] -= each * count
        for neighbour in self.neighbours[group]:
            self.versions[neighbour] += 1
