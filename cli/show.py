"""``hcompress show``."""

from __future__ import annotations

import math
import shlex
from bisect import bisect_left
from collections import defaultdict
from pathlib import Path
from typing import Any

import click

from ..errors import InputError, UsageError, escape
from ..frontier import NAME as FRONTIER
from ..frontier import UNITS, FrontierRecord, read_frontier
from ..manifest import SWEEP
from . import preflight
from .figures import NOTHING, count, print_report, print_sweep, read_report, share
from .options import command, run_argument
from .output import print_json, print_line, print_table

EXAMPLES = """\
hcompress show small
hcompress show small --why layer1.0.conv1
hcompress show small --frontier
hcompress show small.rejected
hcompress show small --json"""
SCHEMA = "hcompress.why/1"
NUM_ROWS = 20  # Points of a frontier in a table, and those that have a name.


@command("show", examples=EXAMPLES)
@run_argument
@click.option("--why", metavar="LAYER", help="Why this layer got its decision: its name, or a part that only it has.")
@click.option("--frontier", is_flag=True, help="What each budget is expected to lose: the points that no other beats.")
def show(run: Path, why: str | None, frontier: bool, as_json: bool, quiet: bool) -> None:
    """Print the figures and the layers of RUN, a run folder or a rejected one; of a sweep, its points."""
    preflight.check_run(run)
    if (run / SWEEP).is_file():
        if frontier or why is not None:
            raise UsageError(f"{run} is a sweep, not one run", hint=f"pass one of its points: hcompress show {run}")
        show_sweep(run, as_json=as_json)
        return
    if frontier:
        if why is not None:
            raise UsageError("--why and --frontier are two questions", hint="ask them one at a time")
        show_frontier(run, as_json=as_json)
        return
    report = read_report(run)
    if why is not None:
        layer = find_layer(report["layers"], why)
        lines = why_lines(layer, report)
        if as_json:
            print_json({"schema": SCHEMA, "layer": layer, "text": lines})
        for line in () if as_json else lines:
            print_line(line)
    elif as_json:
        print_json(report)
    else:
        print_line(f"{run}: {report['method'] or 'no method'}, seed {report['seed']}")
        print_report(report)
        print_table(("layer", "op", "shape", "bits", "sparsity", "error", "decision"), layer_rows(report["layers"]))


def show_sweep(folder: Path, *, as_json: bool) -> None:
    """Print the points of a sweep."""
    from ..sweep_report import read_sweep

    record = read_sweep(folder)
    if as_json:
        print_json(record)
        return
    print_sweep(record)
    for point in record["points"]:
        if point["folder"] is not None:
            print_line(f"run folder: {folder / point['folder']}")


def layer_rows(layers: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """The table's cells, a row a layer."""
    return [
        (
            layer["tensor"],
            layer["op"],
            " x ".join(map(str, layer["shape"])),
            _number(layer["bits"]),
            f"{100 * layer['sparsity']:.4g} %",
            _number(layer["relative_error"]),
            layer["decision"],
        )
        for layer in layers
    ]


def _number(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.3g}"


def find_layer(layers: list[dict[str, Any]], name: str) -> dict[str, Any]:
    """The layer whose tensor or module is ``name``, or the only one whose name holds it.

    Raises:
        UsageError: None or several do; lists them, or the closest names.
    """
    by_name = {layer["tensor"]: layer for layer in layers}
    for exact in (name, f"{name}.weight"):
        if exact in by_name:
            return by_name[exact]
    holding = [tensor for tensor in by_name if name in tensor]
    if len(holding) == 1:
        return by_name[holding[0]]
    if holding:
        raise UsageError(f"--why {name} fits {len(holding)} layers", hint=f"one of {_listed(holding)}")
    import difflib

    close = difflib.get_close_matches(name, by_name, n=5, cutoff=0.4) or list(by_name)
    raise UsageError(f"--why {name}: no such layer", hint=f"one of {_listed(close)}")


def _listed(names: list[str], limit: int = 8) -> str:
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest


def why_lines(layer: dict[str, Any], report: dict[str, Any]) -> list[str]:
    """The decision, its reason, its alternatives, and what the other layers got instead, in sentences."""
    from ..report import brief

    layers = report["layers"]
    weights = sum(other["elements"] for other in layers)
    lines = [
        f"{layer['tensor']}: {_decided(layer)}.",
        f"Why: {brief(layer['why']) or 'the method gave no reason'}.",
        f"It is a {layer['op']} of {' x '.join(map(str, layer['shape']))} with {count(layer['elements'])} weights, "
        f"{share(layer['elements'], weights)} of all, at {_number(layer['bits'])} bits and "
        f"{100 * layer['sparsity']:.4g} % zeros.",
    ]
    errors = [other["relative_error"] for other in layers if other["relative_error"] is not None]
    if layer["relative_error"] is not None:
        lines.append(f"Its relative error is {layer['relative_error']:.3g}: {_rank(layer['relative_error'], errors)}.")
    lines += [*_sensitivity_lines(layer, layers), *_alternative_lines(layer, report.get("frontier"))]
    lines += _activation_lines(layer, report)
    groups: dict[str, list[str]] = defaultdict(list)
    for other in layers:
        if other is not layer:
            groups[_decided(other)].append(other["tensor"])
    alike = groups.pop(_decided(layer), [])
    lines.append(f"{len(alike)} of {len(layers) - 1} other layers got the same decision.")
    return lines + [f"Instead, {decided}: {_listed(tensors, 3)}." for decided, tensors in groups.items()]


def _rank(value: float, values: list[float]) -> str:
    above = sum(other > value for other in values)
    return f"{above} of {len(values)} layers have a larger one" if above else f"no other of {len(values)} is larger"


def _sensitivity_lines(layer: dict[str, Any], layers: list[dict[str, Any]]) -> list[str]:
    own = layer.get("sensitivity")
    if not own:
        return []
    from ..report import sensitivity_text

    others = [other["sensitivity"] for other in layers if other.get("sensitivity")]
    rank = _rank(own["value"], [other["value"] for other in others if other["measure"] == own["measure"]])
    return [f"Its sensitivity is {sensitivity_text(own)} {own['unit']} ({own['measure']}): {rank}."]


def _alternative_lines(layer: dict[str, Any], frontier: dict[str, Any] | None) -> list[str]:
    """The chosen option, and what each other would cost and lose."""
    entries = layer.get("alternatives") or []
    if not entries:
        return []
    from ..report import amount_text, loss_amount, times_text

    unit = frontier["loss_unit"] if frontier else ""
    chosen = next((entry for entry in entries if entry["chosen"]), None)
    lines = []
    if chosen is not None:
        cost, loss = amount_text(chosen["cost"], chosen["unit"]), loss_amount(chosen["loss"], unit)
        lines.append(
            f"Chosen: {chosen['option']} costs {cost}; if no other layer changed, the loss would rise by {loss}."
        )
    for entry in entries:
        if entry is not chosen:
            cost, loss = amount_text(entry["cost"], entry["unit"]), loss_amount(entry["loss"], unit)
            times = "" if chosen is None else times_text(entry["loss"], chosen["loss"])
            lines.append(f"{entry['option']} would cost {cost} and lose {loss}{f', {times}' if times else ''}.")
    return lines


def _activation_lines(layer: dict[str, Any], report: dict[str, Any]) -> list[str]:
    """At how many bits the layer reads, what that is expected to lose, and what other widths would."""
    from ..report import amount_text, loss_amount, sensitivity_text

    unit = report["frontier"]["loss_unit"] if report.get("frontier") else ""
    lines = []
    for entry in report.get("activations") or ():
        if layer["tensor"] not in entry["read_by"]:
            continue
        chosen = next((other for other in entry["alternatives"] if other["chosen"]), None)
        expected = "" if chosen is None else f", which is expected to lose {loss_amount(chosen['loss'], unit)}"
        lines.append(f"It reads {escape(entry['tensor'])} at {entry['bits']} bits{expected}.")
        if entry["sensitivity"]:
            own = entry["sensitivity"]
            lines.append(f"That activation's trace is {sensitivity_text(own)} {own['unit']} ({own['measure']}).")
        for other in entry["alternatives"]:
            if other is not chosen:
                cost, loss = amount_text(other["cost"], other["unit"]), loss_amount(other["loss"], unit)
                lines.append(f"At {other['option']} what reads it would cost {cost}, and it would lose {loss}.")
    return lines


def _decided(layer: dict[str, Any]) -> str:
    """The decision in words; how many weights a mask keeps differs by layer, and does not make another decision."""
    return f"quantize to {layer['bits']:.4g} bits" if layer["decision"] == "quantize" else str(layer["decision"])


def show_frontier(run: Path, *, as_json: bool) -> None:
    """Print the frontier that a run chose from, thinned to a page, and how to take another point of it.

    Raises:
        InputError: The run has no frontier, or one that isn't whole.
    """
    if not (run / FRONTIER).is_file():
        hint = "only a method that weighs each layer's options has one; hcompress show prints what the run has"
        raise InputError(f"{run}: the run has no {FRONTIER}", hint=hint)
    record = read_frontier(run / FRONTIER)
    if as_json:
        print_json(record)
        return
    print_line(f"{run}: {record.method}, point {record.index:,} of {len(record.costs):,}, counted from 0")
    unit = UNITS.get(record.quantity, escape(record.quantity))
    print_table(("point", unit, f"loss ({escape(record.loss_unit)})", ""), frontier_rows(record, unit))
    print_line(f"another point: hcompress quantize CHECKPOINT --plan {shlex.quote(str(run))} --pick N --out DIR")


def frontier_rows(record: FrontierRecord, unit: str) -> list[tuple[str, str, str, str]]:
    """The table's cells by rising cost: some points, the chosen one, and one width everywhere, point or not."""
    from ..report import cost_label, loss_amount, thinned

    points = list(zip(record.costs, record.losses, strict=True))
    names: dict[int, list[str]] = defaultdict(list, {record.index: ["chosen"]})
    rivals = []
    for name, (cost, loss) in record.rivals().items():
        place = bisect_left(record.costs, cost)
        if place < len(points) and points[place][0] == cost and math.isclose(points[place][1], loss, rel_tol=1e-9):
            names[place].append(f"{name} everywhere")
        else:
            rivals.append((cost, loss, NOTHING, f"{name} everywhere"))
    shown = sorted({*thinned(range(len(points)), NUM_ROWS), *names})
    rows = [(*points[index], str(index), ", ".join(names.get(index, ()))) for index in shown]
    return [
        (number, cost_label(record.amount(cost), unit), loss_amount(loss, ""), mark)
        for cost, loss, number, mark in sorted([*rows, *rivals], key=lambda row: row[:2])
    ]
