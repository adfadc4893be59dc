"""The saliencies of a report in words and as a plot: which ones went, which ones stayed, and where they overlap."""

from __future__ import annotations

from typing import Any

from .plot import histogram_svg

MOST_LOG = 300  # that a float holds


def saliency_text(record: dict[str, Any]) -> str:
    """What was removed and kept, in a sentence each."""
    removed, kept = (part_text(record[name], record["of"]) for name in ("removed", "kept"))
    return f"Saliency: {record['what']}{_unit(record)}. Removed: {removed}. Kept: {kept}"


def saliency_svg(record: dict[str, Any]) -> str:
    """The two histograms, one on the other; what has no place on a logarithmic axis is in the sentence alone."""
    low, step = float(record["low"]), float(record["step"])

    def bars(name: str) -> list[tuple[int, str]]:
        return [
            (count, f"{range_text(low, step, number)}: {count:,} {record['of']} {name}")
            for number, count in enumerate(record[name]["bins"])
        ]

    title = f"{record['of']} by saliency: {record['what']}"
    axis = f"saliency{_unit(record)}, logarithmic; the bars count {record['of']}"
    return histogram_svg(title, axis, low, step, {name: bars(name) for name in ("removed", "kept")})


def range_text(low: float, step: float, number: int) -> str:
    """What a bin counts."""
    start, end = (low + step * place for place in (number, number + 1))
    return f"{_power(start)} to {_power(end)}" if number else f"up to {_power(end)}"


def _power(log: float) -> str:
    return f"{10.0**log:.3g}" if abs(log) < MOST_LOG else f"1e{log:g}"


def _unit(record: dict[str, Any]) -> str:
    return f" ({record['unit']})" if record["unit"] else ""


def part_text(part: dict[str, Any], of: str, none: str = "zero") -> str:
    """How many there are, and their range.

    Args:
        none: What those are that have no place on the axis.
    """
    text = f"{part['count']:,} {of}"
    if part["zeros"]:
        text += f", {part['zeros']:,} of them {none}"
    if part["median"] is None:
        return text
    return f"{text}, from {part['least']:.3g} to {part['most']:.3g}, median {part['median']:.3g}"
