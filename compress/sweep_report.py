"""A sweep as a person reads it: the table of its points, and the curve of the metric over the sparsity.

sweep.json is the record; it is written anew after each point, and so are the pages.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from markupsafe import Markup

from . import canonical
from .errors import InputError, escape
from .manifest import SWEEP
from .plot import Dot, curve_svg
from .report import Figure, amount_text, render_page, render_text

SCHEMA = "hcompress.sweep/1"
PASSED, PENDING = "passed", "not run yet"
HEAD = ("sparsity", "reached", "bytes", "of dense", "metric", "drop", "verdict")
NOTHING = "-"


def read_sweep(folder: Path) -> dict[str, Any]:
    """The record of a sweep's folder.

    Raises:
        InputError: There is none, or it lacks a key; names it.
    """
    record = canonical.read_record(folder / SWEEP, SCHEMA)
    try:
        for point in record["points"]:
            _ = (
                float(point["sparsity"]),
                point["status"],
                point["code"],
                point["key"],
                point["folder"],
                point["sha256"],
            )
            _ = [point[name] for name in ("reached", "bytes", "metric", "drop", "message")]
        _ = [record[name] for name in ("command", "method", "source", "metric", "dense_bytes", "delivered", "time_s")]
    except KeyError as error:
        raise InputError(f"{folder / SWEEP}: key {error} is missing", hint="make the sweep again") from None
    except (TypeError, ValueError) as error:
        raise InputError(f"{folder / SWEEP}: bad value ({error})", hint="make the sweep again") from None
    return record


def render_sweep(record: dict[str, Any]) -> tuple[str, str]:
    """The page and the Markdown of a sweep."""
    view = {
        "record": record,
        "title": sweep_text(record),
        "is_passed": all(point["status"] == PASSED for point in record["points"]),
        "head": sweep_head(record),
        "rows": sweep_rows(record),
        "points": record["points"],
        "curve": Markup(sweep_svg(record)) if record["metric"] else "",
        "messages": messages(record),
        "command": shlex.join(record["argv"]),
    }
    return render_page("sweep", view), render_text("sweep", view)


def sweep_text(record: dict[str, Any]) -> str:
    """The outcome in a line: ``4 of 5 points passed; 1 infeasible budget``."""
    statuses = [point["status"] for point in record["points"]]
    others = [f"{statuses.count(status)} {status}" for status in dict.fromkeys(statuses) if status != PASSED]
    return "; ".join([f"{statuses.count(PASSED)} of {len(statuses)} points passed", *others])


def messages(record: dict[str, Any]) -> list[str]:
    """What each point without a model says, in a sentence."""
    return [f"Sparsity {point['sparsity']!r}: {point['message']}" for point in record["points"] if point["message"]]


def sweep_head(record: dict[str, Any]) -> tuple[str, ...]:
    """The names of the table's columns."""
    metric = record["metric"]
    named = "metric" if metric is None else metric["name"]
    return tuple(named if name == "metric" else name for name in HEAD)


def sweep_rows(record: dict[str, Any]) -> list[tuple[Figure | str, ...]]:
    """The table's cells, a row a point, and before them the dense network's."""
    dense, metric = record["dense_bytes"], record["metric"]
    rows: list[tuple[Figure | str, ...]] = []
    if metric is not None:
        rows.append(("dense", NOTHING, _bytes(dense), NOTHING, _metric(metric["dense"], metric), NOTHING, NOTHING))
    for point in record["points"]:
        rows.append(
            (
                Figure(point["sparsity"], repr(point["sparsity"])),
                _percent(point["reached"]),
                _bytes(point["bytes"]),
                _percent(point["bytes"] / dense if point["bytes"] and dense else None),
                _metric(point["metric"], metric),
                _drop(point["drop"], metric),
                point["status"],
            )
        )
    return rows


def sweep_svg(record: dict[str, Any]) -> str:
    """The metric over the sparsity that was asked for; points without a figure stand below, as crosses."""
    metric = record["metric"]
    unit = metric["unit"]
    dots = []
    for point in record["points"]:
        value, asked = point["metric"], repr(point["sparsity"])
        figure = "" if value is None else _text(_metric(value, metric))
        title = f"sparsity {asked}: {figure or point['message'] or point['status']}"
        if value is not None and point["message"]:
            title += f"; {point['message']}"
        dots.append(Dot(point["sparsity"], value, figure or point["status"], title, point["status"] == PASSED))
    levels = [(metric["dense"], f"dense {_text(_metric(metric['dense'], metric))}")]
    values = [metric["dense"], *(dot.y for dot in dots if dot.y is not None)]
    span = max(values) - min(values)
    # A limit far from all that was measured would press the curve flat.
    if metric["limit"] is not None and min(values) - span <= metric["limit"] <= max(values) + span:
        levels.append((metric["limit"], f"limit {_text(_metric(metric['limit'], metric))}"))
    return curve_svg(f"{metric['name']} over sparsity", ("sparsity", f"{metric['name']} ({unit})"), dots, levels)


def plain_rows(record: dict[str, Any]) -> list[tuple[str, ...]]:
    """``sweep_rows`` as text."""
    return [tuple(_text(cell) for cell in row) for row in sweep_rows(record)]


def _text(cell: Figure | str) -> str:
    return cell.text if isinstance(cell, Figure) else escape(cell)


def _bytes(value: float | None) -> Figure | str:
    return NOTHING if value is None else Figure(value, amount_text(value, "bytes"))


def _percent(share: float | None) -> Figure | str:
    return NOTHING if share is None else Figure(share, f"{100 * share:.2f} %")


def _metric(value: float | None, metric: dict[str, Any] | None) -> Figure | str:
    if value is None or metric is None:
        return NOTHING
    return Figure(value, f"{value:.2f} %" if metric["unit"] == "%" else f"{value:.4g}")


def _drop(value: float | None, metric: dict[str, Any] | None) -> Figure | str:
    if value is None or metric is None:
        return NOTHING
    return Figure(value, f"{value:z.2f} points" if metric["unit"] == "%" else f"{value:z.3g}")
