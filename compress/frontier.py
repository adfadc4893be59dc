"""A frontier as a file: what each choice for each item costs and is expected to lose, and the best points of all.

frontier.json is written beside plan.json. It holds all that a decision needs: another point is picked without measuring
again. An item is one weight, or several that were tied; its choices are bit widths. Where activations have widths of
their own, these are choices as well, and multiply the costs of the items that read them.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from . import canonical
from .errors import InputError, escape
from .plan import BY_CHANNEL, RANGES, WIDEST
from .widths import Width, is_mixed, is_width

NAME = "frontier.json"
FRONTIER_SCHEMA = "hcompress.frontier/1"
UNITS = {"bits": "average bits", "bytes": "bytes", "bops": "bit operations", "latency": "ms"}  # of a quantity
FLOAT_BITS = 32
LARGEST_COST = 2**53
SLACK = 1e-6  # of a cost, which is an integer: what is lost to floats


@dataclass(frozen=True, slots=True)
class Choice:
    """One way to store an item.

    Attributes:
        bits: 2 to 8, or a letter for each channel of the only tensor (``widths.WIDTHS``), or 32 for the floats as they
            are.
        cost: In the frontier's integer unit.
        loss: Expected increase of the loss.
        ranges: How each tensor's range is found (``plan.RANGES``); empty for floats.
    """

    bits: Width
    cost: int
    loss: float
    ranges: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Item:
    """Tensors that get one width, and their choices, the narrowest first."""

    tensors: tuple[str, ...]
    choices: tuple[Choice, ...]


@dataclass(frozen=True, slots=True)
class ReadChoice:
    """One width of activations.

    Attributes:
        loss: Expected increase of the loss.
        ranges: Least and greatest value of each.
    """

    bits: int
    loss: float
    ranges: tuple[tuple[float, float], ...]


@dataclass(frozen=True, slots=True)
class Read:
    """Activations that get one width, and the items that read them: whose costs are for each bit of it.

    Attributes:
        activations: Their names.
        items: Numbers of the items.
        cost: For each bit, of other layers that read them.
        choices: The narrowest first.
    """

    activations: tuple[str, ...]
    items: tuple[int, ...]
    cost: int
    choices: tuple[ReadChoice, ...]


@dataclass(frozen=True, slots=True)
class FrontierRecord:
    """Every assignment of choices to items that no other beats, ordered by cost.

    Attributes:
        method: Registered name of the method.
        quantity: Of the budget: ``bits``, ``bytes``, ``bops`` or ``latency``.
        scale: The quantity of a point is ``scale * (fixed + its cost)``.
        fixed: Cost of what isn't chosen, in the integer unit.
        dense_amount: The dense network's figure of the quantity, of which a relative budget is a share.
        loss_unit: Of every loss, e.g. ``nats``.
        items: In the order of ``chosen``.
        costs: Of the points ``[p]``, strictly ascending; without ``fixed``.
        losses: Expected, ``[p]``, strictly descending.
        index: The point of the plan.
        chosen: Index of each item's choice at that point, then of each read's.
        activations: Least and greatest value of each activation that is rounded, by name.
        reads: Activations whose widths are chosen as well; none where all have the same.
    """

    method: str
    quantity: str
    scale: float
    fixed: int
    dense_amount: float
    loss_unit: str
    items: tuple[Item, ...]
    costs: tuple[int, ...]
    losses: tuple[float, ...]
    index: int
    chosen: tuple[int, ...]
    activations: Mapping[str, tuple[float, float]]
    reads: tuple[Read, ...] = ()
    schema: str = FRONTIER_SCHEMA

    def amount(self, cost: int) -> float:
        """A cost in the budget's quantity."""
        return self.scale * (self.fixed + cost)

    def within(self, amount: float) -> int | None:
        """Index of the point with the least loss that takes at most this much of the quantity; None where none does."""
        whole = amount / self.scale
        fitting = bisect_right(self.costs, whole - self.fixed + max(SLACK, 4 * math.ulp(whole)))
        return fitting - 1 if fitting else None

    def at(self, index: int, chosen: tuple[int, ...]) -> FrontierRecord:
        """The same frontier with another point."""
        return replace(self, index=index, chosen=chosen)

    def chosen_choices(self) -> tuple[Choice, ...]:
        """The choice of each item at the point."""
        return tuple(item.choices[number] for item, number in zip(self.items, self.chosen, strict=False))

    def chosen_reads(self) -> tuple[ReadChoice, ...]:
        """The choice of each read at the point."""
        numbers = self.chosen[len(self.items) :]
        return tuple(read.choices[number] for read, number in zip(self.reads, numbers, strict=True))

    def factors(self) -> tuple[int, ...]:
        """What each item's costs are multiplied by at the point: the bits of what it reads, where those are chosen."""
        read_by = {
            number: choice.bits
            for read, choice in zip(self.reads, self.chosen_reads(), strict=True)
            for number in read.items
        }
        return tuple(read_by.get(number, 1) for number in range(len(self.items)))

    def chosen_cost(self) -> int:
        """Of the choices, in the integer unit."""
        own = sum(read.cost * choice.bits for read, choice in zip(self.reads, self.chosen_reads(), strict=True))
        costs = zip(self.factors(), self.chosen_choices(), strict=True)
        return own + sum(factor * choice.cost for factor, choice in costs)

    def chosen_loss(self) -> float:
        """Expected of the choices."""
        losses = [choice.loss for choice in self.chosen_choices()]
        return sum(losses + [choice.loss for choice in self.chosen_reads()])

    def uniform(self) -> dict[str, FrontierRecord]:
        """By name, the same width for every item and for every read: ``4 bits``, ``4 bits, activations 6``.

        Of the widths that all of them have; the index is that of the plan.
        """
        widths = [[choice.bits for choice in item.choices] for item in self.items]
        read = [[choice.bits for choice in one.choices] for one in self.reads]
        shared = sorted(_shared(widths), key=float)
        found = {}
        for bits in shared:
            name = "float" if bits == FLOAT_BITS else f"{bits} bits"
            for own in sorted(_shared(read)) or [0]:
                chosen = (*(every.index(bits) for every in widths), *(every.index(own) for every in read))
                found[f"{name}, activations {own}" if own else name] = replace(self, chosen=chosen)
        return found

    def rivals(self) -> dict[str, tuple[int, float]]:
        """Cost and loss of ``uniform``; of those with widths of activations, what no other of them beats."""
        found = {name: (record.chosen_cost(), record.chosen_loss()) for name, record in self.uniform().items()}
        if not self.reads:
            return found
        return {
            name: (cost, loss)
            for name, (cost, loss) in found.items()
            if not any(c <= cost and x <= loss and (c, x) != (cost, loss) for c, x in found.values())
        }


def _shared(widths: Sequence[Sequence[Width]]) -> set[int]:
    """The whole widths that all have."""
    found = [{width for width in own if isinstance(width, int)} for own in widths]
    return set.intersection(*found) if found else set()


def read_frontier(path: Path) -> FrontierRecord:
    """Read and check frontier.json.

    Raises:
        InputError: Not a frontier; names the file and the key.
    """
    record = canonical.read_record(path, FRONTIER_SCHEMA)
    try:
        found = FrontierRecord(
            method=str(record["method"]),
            quantity=str(record["quantity"]),
            scale=float(record["scale"]),
            fixed=int(record["fixed"]),
            dense_amount=float(record["dense_amount"]),
            loss_unit=str(record["loss_unit"]),
            items=tuple(_item(entry) for entry in record["items"]),
            costs=tuple(int(cost) for cost in record["costs"]),
            losses=tuple(float(loss) for loss in record["losses"]),
            index=int(record["index"]),
            chosen=tuple(int(choice) for choice in record["chosen"]),
            activations={str(name): (float(low), float(high)) for name, (low, high) in record["activations"].items()},
            reads=tuple(_read(entry) for entry in record.get("reads", ())),  # older ones have none
        )
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise InputError(f"{path}: bad entry ({error})", hint="make the run again") from None
    _check(path, found)
    return found


def _check(path: Path, found: FrontierRecord) -> None:
    """Every index points at something."""
    lengths = {len(found.costs), len(found.losses)}
    if len(lengths) > 1 or not 0 <= found.index < len(found.costs):
        raise InputError(f"{path}: index {found.index} is no point of the frontier", hint="make the run again")
    counts = [len(item.choices) for item in found.items] + [len(read.choices) for read in found.reads]
    fits = len(found.chosen) == len(counts) and all(
        0 <= number < count for number, count in zip(found.chosen, counts, strict=True)
    )
    if not fits:
        raise InputError(f"{path}: chosen names a choice that isn't there", hint="make the run again")
    for number, read in enumerate(found.reads):
        others = {item for other in found.reads[:number] for item in other.items}
        if not _is_read(read, len(found.items)) or len(set(read.items) - others) != len(read.items):
            raise InputError(
                f"{path}: the choices of activation {escape(read.activations[0])} have bits other than 2 to 8, or no "
                "range for each, or too large a cost, or items that aren't there or are another's",
                hint="make the run again",
            )
    ranges = [pair for read in found.reads for choice in read.choices for pair in choice.ranges]
    ends = (end for pair in (*found.activations.values(), *ranges) for end in pair)
    if not found.scale > 0 or not all(map(math.isfinite, (found.scale, found.dense_amount, *found.losses, *ends))):
        raise InputError(f"{path}: a number isn't finite, or the scale isn't above 0", hint="make the run again")
    for item in found.items:
        for choice in item.choices:
            if not _is_choice(choice, len(item.tensors)):
                bits = escape(str(choice.bits))
                raise InputError(
                    f"{path}: {escape(item.tensors[0])} has no choice of {bits} bits, cost {choice.cost} and "
                    f"ranges {escape(', '.join(choice.ranges))}",
                    hint="make the run again",
                )


def _is_read(read: Read, num_items: int) -> bool:
    is_known = abs(read.cost) <= LARGEST_COST and all(0 <= number < num_items for number in read.items)
    return is_known and all(
        2 <= choice.bits <= WIDEST and len(choice.ranges) == len(read.activations) for choice in read.choices
    )


def _is_choice(choice: Choice, num_tensors: int) -> bool:
    """Whether a plan may hold it: a range for each tensor, and none for floats."""
    if abs(choice.cost) > LARGEST_COST:
        return False
    if choice.bits == FLOAT_BITS:
        return not choice.ranges
    is_one = not is_mixed(choice.bits) or num_tensors == 1
    return is_one and is_width(choice.bits) and len(choice.ranges) == num_tensors and all(map(_is_range, choice.ranges))


def _is_range(name: str) -> bool:
    letters = name.removeprefix(BY_CHANNEL)
    return name in RANGES or (letters not in ("", name) and set(letters) <= set(RANGES.values()))


def _read(entry: Mapping[str, Any]) -> Read:
    choices = tuple(
        ReadChoice(int(c["bits"]), float(c["loss"]), tuple((float(low), float(high)) for low, high in c["ranges"]))
        for c in entry["choices"]
    )
    names = tuple(str(name) for name in entry["activations"])
    if not names:
        raise ValueError("a read without activations")
    return Read(names, tuple(int(number) for number in entry["items"]), int(entry["cost"]), choices)


def _width(value: Any) -> Width:
    return value if isinstance(value, str) else int(value)


def _item(entry: Mapping[str, Any]) -> Item:
    choices = tuple(
        Choice(
            _width(c["bits"]),
            int(c["cost"]),
            float(c["loss"]),
            tuple(str(r) for r in c["ranges"]),
        )
        for c in entry["choices"]
    )
    tensors = tuple(str(name) for name in entry["tensors"])
    if not tensors:
        raise ValueError("an item without tensors")
    return Item(tensors, choices)
