"""A frontier as a file: what each choice for each item costs and is expected to lose, and the best points of all.

frontier.json is written beside plan.json. It holds all that a decision needs: another point is picked without measuring
again. An item is one weight, or several that were tied; its choices are bit widths.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from . import canonical
from .errors import InputError, escape
from .plan import BY_CHANNEL, RANGES
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
        chosen: Index of each item's choice at that point.
        activations: Least and greatest value of each activation that is rounded, by name.
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
        return tuple(item.choices[number] for item, number in zip(self.items, self.chosen, strict=True))

    def rivals(self) -> dict[str, tuple[int, float]]:
        """Cost and loss of the same width for every item, by name: ``4 bits``; the widths that every item has."""
        widths = [{c.bits: c for c in item.choices if isinstance(c.bits, int)} for item in self.items]
        shared = set.intersection(*(set(width) for width in widths)) if widths else set()
        return {
            "float" if bits == FLOAT_BITS else f"{bits} bits": (
                sum(width[bits].cost for width in widths),
                sum(width[bits].loss for width in widths),
            )
            for bits in sorted(shared)
        }


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
    fits = len(found.chosen) == len(found.items) and all(
        0 <= number < len(item.choices) for number, item in zip(found.chosen, found.items, strict=False)
    )
    if not fits:
        raise InputError(f"{path}: chosen names a choice that isn't there", hint="make the run again")
    ends = (end for pair in found.activations.values() for end in pair)
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
