"""Plots as SVG that needs no script and nothing from the network: bars of layers, a curve, a histogram, a scatter plot.

The bars are a file of their own, with its style. The others are part of a page, whose style.css has their colours.
Names of layers come from untrusted checkpoints: every text is escaped on its way out.
"""

from __future__ import annotations

import html
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from .errors import escape

Entry = tuple[str, float, float]  # label, value, standard error

BAR_WIDTH = 420.0
ROW, BAR_HEIGHT, WHISKER = 20, 11, 5
MARGIN, HEAD = 16, 76
CHARACTER = 7.3  # of a 12-pixel monospace
TITLE_CHARACTER = 8.4  # of a 15-pixel bold text
MAX_LABEL = 60
NUM_TICKS = 8
SPACE = 0.1  # decades between the axis and the smallest value
STYLE = """
text { font: 12px ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; fill: #171c24; }
.title { font: 600 15px system-ui, -apple-system, "Segoe UI", Roboto, Arial, sans-serif; }
.page { fill: #ffffff; } .muted { fill: #586272; } .bar { fill: #2b5fd0; }
.line { stroke: #dfe3e9; stroke-width: 1; } .whisker { stroke: #171c24; stroke-width: 1.2; fill: none; }
@media (prefers-color-scheme: dark) {
  text { fill: #e7ebf1; } .page { fill: #0e1217; } .muted { fill: #9da8b7; } .bar { fill: #5f8df0; }
  .line { stroke: #2b333e; } .whisker { stroke: #e7ebf1; }
}
"""


def bars_svg(title: str, unit: str, entries: Sequence[Entry]) -> str:
    """Horizontal bars, the largest value first, with whiskers of one standard error.

    Args:
        title: What the values are of.
        unit: Of the values.
        entries: Label, value and standard error (0 where it is exact). A value that isn't positive has no place on a
            logarithmic axis: its bar is empty, its number is there.
    """
    rows = sorted(entries, key=lambda entry: (math.isnan(entry[1]), -entry[1]))
    axis = decades(end for _, value, stderr in rows for end in (value, value + stderr)) or (0, 1)
    labels = [escape(label, MAX_LABEL) for label, _, _ in rows]
    numbers = [f"{value:.3g}" + (f" ± {stderr:.2g}" if stderr else "") for _, value, stderr in rows]
    left = MARGIN + CHARACTER * max(map(len, labels), default=0) + 10
    right = left + BAR_WIDTH
    wide = right + 12 + CHARACTER * max(map(len, numbers), default=0)
    scale = f"{unit}, logarithmic axis"
    head = MARGIN + max(TITLE_CHARACTER * len(escape(title)), CHARACTER * len(escape(scale)))
    width = math.ceil(MARGIN + max(wide, head))
    bottom = HEAD + ROW * len(rows)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {bottom + MARGIN}" width="{width}" '
        f'height="{bottom + MARGIN}" role="img">',
        f"<title>{_text(title)}</title>",
        f"<style>{STYLE}</style>",
        f'<rect class="page" width="{width}" height="{bottom + MARGIN}"/>',
        f'<text class="title" x="{MARGIN}" y="24">{_text(title)}</text>',
        f'<text class="muted" x="{MARGIN}" y="43">{_text(scale)}</text>',
    ]
    for power in _ticks(axis):
        x = left + BAR_WIDTH * (power - axis[0]) / (axis[1] - axis[0])
        label = _power_text(power)
        parts += [
            f'<line class="line" x1="{x:.1f}" y1="{HEAD - 2}" x2="{x:.1f}" y2="{bottom}"/>',
            f'<text class="muted" x="{x:.1f}" y="{HEAD - 8}" text-anchor="middle">{label}</text>',
        ]
    for row, ((name, value, stderr), label, number) in enumerate(zip(rows, labels, numbers, strict=True)):
        middle = HEAD + ROW * row + ROW / 2
        parts += [
            f"<g><title>{_text(name)}: {number}</title>",
            f'<text x="{left - 8:.1f}" y="{middle + 4:.1f}" text-anchor="end">{html.escape(label)}</text>',
            *_bar(value, stderr, axis, (left, middle)),
            f'<text class="muted" x="{right + 12:.1f}" y="{middle + 4:.1f}">{number}</text></g>',
        ]
    return "\n".join([*parts, "</svg>"]) + "\n"


def decades(values: Iterable[float]) -> tuple[int, int] | None:
    """The powers of ten around all positive values, with space below the smallest; None where there are none."""
    logs = [math.log10(value) for value in values if 0 < value < math.inf]
    if not logs:
        return None
    return math.floor(min(logs) - SPACE), max(math.ceil(max(logs)), math.floor(min(logs) - SPACE) + 1)


def share(value: float, axis: tuple[int, int]) -> float:
    """Where a positive value lies on a logarithmic axis: 0 at its start, 1 at its end."""
    return (math.log10(value) - axis[0]) / (axis[1] - axis[0])


@dataclass(frozen=True, slots=True)
class Dot:
    """A point of a curve.

    Attributes:
        y: None where there is no value: a cross below the curve stands for it.
        label: Beside it.
        title: On hover.
        is_good: Whether it passed.
    """

    x: float
    y: float | None
    label: str
    title: str
    is_good: bool


def curve_svg(title: str, axes: tuple[str, str], dots: Sequence[Dot], levels: Sequence[tuple[float, str]]) -> str:
    """A line through the dots that have a value, and horizontal lines to compare with.

    Args:
        axes: What x and y are.
        dots: By ascending x; one or more.
        levels: Value of y and name of each horizontal line.
    """
    left, top, right, bottom = 70.0, 18.0, 560.0, 262.0
    across = _ends([dot.x for dot in dots])
    up = _ends([*(dot.y for dot in dots if dot.y is not None), *(value for value, _ in levels)] or [0.0])

    def x_of(value: float) -> float:
        return left + (right - left) * (value - across[0]) / (across[1] - across[0])

    def y_of(value: float) -> float:
        return bottom - (bottom - top) * (value - up[0]) / (up[1] - up[0])

    parts = [f'<svg class="chart" viewBox="0 0 720 316" role="img"><title>{_text(title)}</title>']
    for value in even_ticks(*up):
        parts += [
            f'<line class="grid" x1="{left}" y1="{y_of(value):.1f}" x2="{right}" y2="{y_of(value):.1f}"/>',
            f'<text x="{left - 8}" y="{y_of(value) + 4:.1f}" text-anchor="end">{value:g}</text>',
        ]
    for value in even_ticks(*across):
        parts.append(f'<text x="{x_of(value):.1f}" y="{bottom + 20}" text-anchor="middle">{value:g}</text>')
    turned = f'transform="translate(16 {(top + bottom) / 2}) rotate(-90)"'
    parts += [
        f'<text x="{(left + right) / 2}" y="{bottom + 44}" text-anchor="middle">{_text(axes[0])}</text>',
        f'<text {turned} text-anchor="middle">{_text(axes[1])}</text>',
    ]
    for (value, name), shift in zip(levels, _apart([y_of(value) for value, _ in levels]), strict=True):
        parts += [
            f'<line class="level" x1="{left}" y1="{y_of(value):.1f}" x2="{right}" y2="{y_of(value):.1f}"/>',
            f'<text x="{right + 8}" y="{shift + 4:.1f}">{_text(name)}</text>',
        ]
    places = [f"{x_of(dot.x):.1f} {y_of(dot.y):.1f}" for dot in dots if dot.y is not None]
    parts.append(f'<path class="curve" d="M{"L".join(places)}"/>' if places else "")
    values = [dot.y for dot in dots if dot.y is not None]
    is_rising = bool(values) and values[-1] > values[0]
    for dot in dots:
        x, y = x_of(dot.x), bottom - 6 if dot.y is None else y_of(dot.y)
        mark = f'<circle class="dot {"good" if dot.is_good else "bad"}" cx="{x:.1f}" cy="{y:.1f}" r="4"/>'
        if dot.y is None:
            mark = f'<path class="missing" d="M{x - 5:.1f} {y - 5:.1f}l10 10m0 -10l-10 10"/>'
        # Where the curve doesn't go on: above it where it falls, below it where it rises.
        side, anchor, shift = (-9, "end", 4) if dot.y is None else (7, "start", 16 if is_rising else -6)
        place = f'x="{x + side:.1f}" y="{y + shift:.1f}" text-anchor="{anchor}"'
        label = f'<text class="label" {place}>{_text(dot.label)}</text>'
        parts.append(f"<g><title>{_text(dot.title)}</title>{mark}{label}</g>")
    return "\n".join([*filter(None, parts), "</svg>"])


def histogram_svg(
    title: str, axis: str, low: float, step: float, series: Mapping[str, Sequence[tuple[int, str]]]
) -> str:
    """Bars over a logarithmic axis; those of several series stand on one another.

    Args:
        axis: What the values are.
        low: Base-ten logarithm of the first bin's lower end; the first bin counts what lies below as well.
        step: Decades of a bin.
        series: By name, which is the style of the bars: what each bin counts, and its words on hover.
    """
    left, top, right, bottom = 70.0, 12.0, 700.0, 142.0
    num_bins = max(map(len, series.values()), default=0)
    most = max((sum(own[place][0] for own in series.values()) for place in range(num_bins)), default=0) or 1
    wide = (right - left) / max(num_bins, 1)
    parts = [f'<svg class="chart" viewBox="0 0 720 194" role="img"><title>{_text(title)}</title>']
    for value in even_ticks(0, most, 3):
        y = bottom - (bottom - top) * value / most
        parts += [
            f'<line class="grid" x1="{left}" y1="{y:.1f}" x2="{right}" y2="{y:.1f}"/>',
            f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{value:,.0f}</text>',
        ]
    end = low + step * num_bins
    powers = range(math.ceil(low), math.floor(end) + 1)
    for power in powers[:: math.ceil(len(powers) / NUM_TICKS) or 1]:
        x = left + (power - low) / step * wide
        label = _power_text(power)
        parts.append(f'<text x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{label}</text>')
    parts.append(f'<text x="{(left + right) / 2}" y="{bottom + 42}" text-anchor="middle">{_text(axis)}</text>')
    for place in range(num_bins):
        y = bottom
        for name, own in series.items():
            count, words = own[place]
            if count:
                height = max(1.0, (bottom - top) * count / most)  # a few among millions are still seen
                y -= height
                parts.append(
                    f'<rect class="{name}" x="{left + place * wide + 0.5:.1f}" y="{y:.1f}" width="{wide - 1:.1f}" '
                    f'height="{height:.1f}"><title>{_text(words)}</title></rect>'
                )
    return "\n".join([*parts, "</svg>"])


@dataclass(frozen=True, slots=True)
class Spot:
    """A point of a scatter plot.

    Attributes:
        title: On hover.
    """

    x: float
    y: float
    title: str


def scatter_svg(title: str, axes: tuple[str, str], spots: Sequence[Spot]) -> str:
    """A dot for each pair of values, both axes logarithmic; one that has no logarithm stands at the axis' start.

    Args:
        axes: What x and y are.
    """
    left, top, right, bottom = 70.0, 18.0, 560.0, 322.0
    across = decades(spot.x for spot in spots) or (0, 1)
    up = decades(spot.y for spot in spots) or (0, 1)
    parts = [f'<svg class="chart" viewBox="0 0 720 376" role="img"><title>{_text(title)}</title>']
    for power in _ticks(up):
        y = bottom - (bottom - top) * (power - up[0]) / (up[1] - up[0])
        parts += [
            f'<line class="grid" x1="{left}" y1="{y:.1f}" x2="{right}" y2="{y:.1f}"/>',
            f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{_power_text(power)}</text>',
        ]
    for power in _ticks(across):
        x = left + (right - left) * (power - across[0]) / (across[1] - across[0])
        parts += [
            f'<line class="grid" x1="{x:.1f}" y1="{top}" x2="{x:.1f}" y2="{bottom}"/>',
            f'<text x="{x:.1f}" y="{bottom + 20}" text-anchor="middle">{_power_text(power)}</text>',
        ]
    turned = f'transform="translate(16 {(top + bottom) / 2}) rotate(-90)"'
    parts += [
        f'<text x="{(left + right) / 2}" y="{bottom + 44}" text-anchor="middle">{_text(axes[0])}</text>',
        f'<text {turned} text-anchor="middle">{_text(axes[1])}</text>',
    ]
    for spot in spots:
        x = left + (right - left) * (share(spot.x, across) if spot.x > 0 else 0.0)
        y = bottom - (bottom - top) * (share(spot.y, up) if spot.y > 0 else 0.0)
        mark = f'<circle class="dot good" cx="{x:.1f}" cy="{y:.1f}" r="4"/>'
        parts.append(f"<g><title>{_text(spot.title)}</title>{mark}</g>")
    return "\n".join([*parts, "</svg>"])


def even_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers from ``low`` to ``high``, evenly spaced, ``most`` or fewer."""
    raw = (high - low) / most
    scale: float = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * scale for factor in (1, 2, 5, 10) if factor * scale >= raw * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{number * step:.12g}") for number in range(first, last + 1)]


def _ends(values: Sequence[float]) -> tuple[float, float]:
    """Ends of an axis that has room around its values."""
    low, high = min(values), max(values)
    room = 0.08 * (high - low) or 0.05 * max(abs(high), 1.0)
    return low - room, high + room


def _apart(places: Sequence[float], room: float = 15.0) -> list[float]:
    """The places of labels, moved down where one would cover another."""
    moved = list(places)
    order = sorted(range(len(moved)), key=lambda number: moved[number])
    for above, below in itertools.pairwise(order):
        moved[below] = max(moved[below], moved[above] + room)
    return moved


def _text(value: str) -> str:
    return html.escape(escape(value))


def _ticks(axis: tuple[int, int]) -> range:
    """Powers of ten, as many as have room."""
    return range(axis[0], axis[1] + 1, math.ceil((axis[1] - axis[0] + 1) / NUM_TICKS))


def _bar(value: float, stderr: float, axis: tuple[int, int], start: tuple[float, float]) -> list[str]:
    """The bar and its whisker, which the axis cuts off where it reaches below it."""
    if not 0 < value < math.inf:
        return []
    left, middle = start
    length = BAR_WIDTH * share(value, axis)
    bar = f'<rect class="bar" x="{left:.1f}" y="{middle - BAR_HEIGHT / 2:.1f}" width="{length:.1f}" '
    parts = [f'{bar}height="{BAR_HEIGHT}" rx="1.5"/>']
    if 0 < stderr < math.inf:
        low = left + BAR_WIDTH * max(0.0, share(value - stderr, axis)) if stderr < value else left
        high = left + BAR_WIDTH * min(1.0, share(value + stderr, axis))
        caps = "".join(f"M{x:.1f} {middle - WHISKER:.1f}v{2 * WHISKER}" for x in (low, high) if x > left)
        parts.append(f'<path class="whisker" d="M{low:.1f} {middle:.1f}H{high:.1f}{caps}"/>')
    return parts


def _power_text(power: int) -> str:
    return f"{10.0**power:g}" if abs(power) < 5 else f"1e{power}"
