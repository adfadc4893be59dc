"""A bar for each layer on a logarithmic axis, as one SVG file that needs no script and nothing from the network.

Names of layers come from untrusted checkpoints: every text is escaped on its way out.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence

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
        label = f"{10.0**power:g}" if abs(power) < 5 else f"1e{power}"
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
