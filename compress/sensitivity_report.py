"""A measure of the layers as a person reads it: bars with errors, a table, and the saliencies of single weights."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from .comparison import comparison_cells, comparison_text, estimate_text, measure_text
from .plot import histogram_svg
from .report import render_page, render_text
from .saliency_plot import part_text, range_text

NOTHING, NOT_POSITIVE = "-", "zero or below"


def render_sensitivity(record: Mapping[str, Any], bars: str, network: str, command: list[str]) -> tuple[str, str]:
    """The page and the Markdown of a measure.

    Args:
        record: As ``hcompress sensitivity --json`` prints it.
        bars: The plot of it, as SVG.
        network: The checkpoint's name.
    """
    saliencies = record["saliencies"]
    view = {
        "title": f"{record['method']} of {network}",
        "lead": f"{record['unit']}; {record['num_examples']} calibration examples",
        "bars": Markup(bars),
        "scatter": "",
        "histogram": Markup(histogram(saliencies)) if saliencies else "",
        "saliency": saliency_sentence(saliencies) if saliencies else "",
        "head": table_head(record),
        "rows": table_rows(record),
        **_shared(record, command),
    }
    return render_page("sensitivity", view), render_text("sensitivity", view)


def render_comparison(record: Mapping[str, Any], scatter: str, network: str, command: list[str]) -> tuple[str, str]:
    """The page and the Markdown of two measures side by side.

    Args:
        scatter: The plot of it, as SVG.
    """
    units = "; ".join(f"{measure['name']} in {measure['unit']}" for measure in record["measures"])
    view = {
        "title": comparison_text(record),
        "lead": f"{network}; {units}",
        "bars": "",
        "scatter": Markup(scatter),
        "histogram": "",
        "saliency": "",
        "head": comparison_head(record),
        "rows": comparison_cells(record),
        **_shared(record, command),
    }
    return render_page("sensitivity", view), render_text("sensitivity", view)


def comparison_head(record: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of a comparison's columns."""
    return ("layer", *(cell for measure in record["measures"] for cell in (measure_text(measure), "rank")))


def table_head(record: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of a measure's columns."""
    return ("layer", *(("option",) if _by_option(record) else ()), "value", "weights", "per weight")


def table_rows(record: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """A measure's cells, the largest value first."""
    entries = sorted(record["entries"], key=lambda entry: -entry["value"])
    rows = []
    for entry in entries:
        elements = record["elements"].get(entry["layer"])
        per = (NOTHING, NOTHING) if elements is None else (f"{elements:,}", f"{entry['value'] / elements:.3g}")
        option = (entry["option"],) if _by_option(record) else ()
        rows.append((entry["layer"], *option, estimate_text(entry["value"], entry["stderr"]), *per))
    return rows


def saliency_sentence(record: Mapping[str, Any]) -> str:
    """What single weights cost, in a sentence."""
    return f"Saliency: {record['what']} ({record['unit']}): {part_text(record['kept'], record['of'], NOT_POSITIVE)}"


def histogram(record: Mapping[str, Any]) -> str:
    """The saliencies of single weights as SVG."""
    low, step = float(record["low"]), float(record["step"])
    bars = [
        (count, f"{range_text(low, step, number)}: {count:,} {record['of']}")
        for number, count in enumerate(record["kept"]["bins"])
    ]
    axis = f"saliency ({record['unit']}), logarithmic; the bars count {record['of']}"
    return histogram_svg(saliency_sentence(record), axis, low, step, {"kept": bars})


def _shared(record: Mapping[str, Any], command: list[str]) -> dict[str, Any]:
    return {"notes": record["notes"], "time_s": record["time_s"], "command": shlex.join(command)}


def _by_option(record: Mapping[str, Any]) -> bool:
    return any(entry["option"] for entry in record["entries"])
