"""Two measures of one network's layers side by side: their ranks, and how far these agree.

Source: Spearman 1904, The proof and measurement of association between two things.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from .errors import UsageError
from .numerics.ranks import spearman
from .plot import Spot, scatter_svg
from .sensitivity import TOGETHER, Estimate, Sensitivity

SCHEMA = "hcompress.comparison/1"
SHOWN_OPTION = "4"  # of a measure that has a value for each of many options
FEWEST = 3  # layers that can be in an order that says something
DRAWS = 1000  # of values within their errors, for the spread of the correlation


def shown_option(record: Sensitivity) -> str:
    """The one of its options that stands for a layer: 4 bits where there are widths, else the first."""
    options = dict.fromkeys(option for _, option in record.entries)
    return SHOWN_OPTION if SHOWN_OPTION in options else next(iter(options), "")


def option_text(option: str) -> str:
    """What an option means: a bit width, a sparsity, or what it says."""
    if option.isdecimal():
        return f"{option} bits"
    return f"sparsity {option}" if option.replace(".", "", 1).isdecimal() else option


def require_common(names: Sequence[str], layers: Sequence[Collection[str]]) -> list[str]:
    """The layers that two measures have in common.

    Raises:
        UsageError: Fewer than 3.
    """
    common = [layer for layer in layers[0] if layer in layers[1]]
    if len(common) < FEWEST:
        raise UsageError(
            f"{names[0]} and {names[1]} have {len(common)} layers in common, and {FEWEST} are the fewest to compare",
            hint="compare measures of weights with each other; activation-trace is one of what layers read",
        )
    return common


def compare_records(names: Sequence[str], records: Sequence[Sensitivity]) -> dict[str, Any]:
    """The record of a comparison, layers by the first one's value, the largest first.

    Args:
        names: Of the two, as they were asked for.
        records: One value a layer is taken of each: of ``shown_option``.

    Raises:
        UsageError: They have fewer than 3 layers in common.
    """
    first, second = (by_layer(record) for record in records)
    layers = sorted(require_common(names, [first, second]), key=lambda layer: -first[layer].value)
    columns = [[values[layer] for layer in layers] for values in (first, second)]
    rho, ranks = spearman(*([e.value for e in column] for column in columns)), [_ranks(column) for column in columns]
    return {
        "schema": SCHEMA,
        "measures": [
            {
                "name": name,
                "method": record.method,
                "unit": record.unit,
                "option": shown_option(record),
                "options": dict(record.options),
                "source_sha256": record.source_sha256,
            }
            for name, record in zip(names, records, strict=True)
        ],
        "spearman": rho if math.isfinite(rho) else None,
        "spearman_stderr": _spread(columns),
        "entries": [
            {
                "layer": layer,
                "values": [column[place].value for column in columns],
                "stderrs": [column[place].stderr for column in columns],
                "ranks": [rank[place] for rank in ranks],
            }
            for place, layer in enumerate(layers)
        ],
        "left_out": sorted({*first, *second} - set(layers)),
    }


def comparison_text(record: Mapping[str, Any]) -> str:
    """``Spearman rho 0.981 +- 0.004 of fisher and hessian-trace over 19 layers``."""
    first, second = (measure_text(measure) for measure in record["measures"])
    rho, error = record["spearman"], record["spearman_stderr"]
    number = "undefined, as all values of one are equal," if rho is None else f"{rho:.3f}"
    if rho is not None and error:
        number += f" +- {error:.2g}"
    return f"Spearman rho {number} of {first} and {second} over {len(record['entries'])} layers"


def measure_text(measure: Mapping[str, Any]) -> str:
    """Its name, and what stands for a layer."""
    return f"{measure['name']} ({option_text(measure['option'])})" if measure["option"] else str(measure["name"])


def comparison_cells(record: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The table's cells, a row a layer."""
    return [
        (
            entry["layer"],
            *(
                cell
                for value, stderr, rank in zip(entry["values"], entry["stderrs"], entry["ranks"], strict=True)
                for cell in (estimate_text(value, stderr), str(rank))
            ),
        )
        for entry in record["entries"]
    ]


def estimate_text(value: float, stderr: float) -> str:
    """``4.035 +- 0.012``, or the number alone where it is exact."""
    if not stderr:
        return f"{value:.4g}"
    return f"{value:.4g} +- " + (f"{stderr:,.0f}" if 100 <= stderr < 1e6 else f"{stderr:.2g}")


def comparison_svg(record: Mapping[str, Any]) -> str:
    """A dot a layer, the first measure across and the second up."""
    axes = tuple(f"{measure_text(measure)}, {measure['unit']}" for measure in record["measures"])
    spots = [
        Spot(x=entry["values"][0], y=entry["values"][1], title=f"{entry['layer']}: ranks {entry['ranks']}")
        for entry in record["entries"]
    ]
    return scatter_svg(comparison_text(record), (axes[0], axes[1]), spots)


def by_layer(record: Sensitivity) -> dict[str, Estimate]:
    """What is compared of a record: each layer's value at ``shown_option``."""
    shown = shown_option(record)
    every = {layer: estimate for (layer, option), estimate in record.entries.items() if option == shown}
    every.pop(TOGETHER, None)
    return every


def _ranks(column: Sequence[Estimate]) -> list[int]:
    """1 for the largest."""
    return [1 + sum(other.value > one.value for other in column) for one in column]


def _spread(columns: Sequence[Sequence[Estimate]]) -> float:
    """Standard deviation of rho where every value is drawn from a normal distribution of its standard error."""
    if not any(e.stderr for column in columns for e in column):
        return 0.0
    generator = np.random.default_rng(0)
    drawn = [
        generator.normal([e.value for e in column], [e.stderr for e in column], (DRAWS, len(column))).tolist()
        for column in columns
    ]
    found = [rho for rho in map(spearman, *drawn) if math.isfinite(rho)]
    return statistics.pstdev(found) if found else 0.0
