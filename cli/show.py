"""``hcompress show``."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import click

from ..errors import UsageError
from . import preflight
from .figures import NOTHING, count, print_report, read_report, share
from .options import command, run_argument
from .output import print_json, print_line, print_table

EXAMPLES = """\
hcompress show small
hcompress show small --why layer1.0.conv1
hcompress show small.rejected
hcompress show small --json"""
SCHEMA = "hcompress.why/1"


@command("show", examples=EXAMPLES)
@run_argument
@click.option("--why", metavar="LAYER", help="Why this layer got its decision: its name, or a part that only it has.")
def show(run: Path, why: str | None, as_json: bool, quiet: bool) -> None:
    """Print the figures and the layers of RUN, a run folder or a rejected one."""
    preflight.check_run(run)
    report = read_report(run)
    if why is not None:
        layer = find_layer(report["layers"], why)
        lines = why_lines(layer, report["layers"])
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


def why_lines(layer: dict[str, Any], layers: list[dict[str, Any]]) -> list[str]:
    """The decision, its reason, and what the other layers got instead, in sentences."""
    weights = sum(other["elements"] for other in layers)
    lines = [
        f"{layer['tensor']}: {_decided(layer)}.",
        f"Why: {layer['why'] or 'the method gave no reason'}.",
        f"It is a {layer['op']} of {' x '.join(map(str, layer['shape']))} with {count(layer['elements'])} weights, "
        f"{share(layer['elements'], weights)} of all, at {_number(layer['bits'])} bits and "
        f"{100 * layer['sparsity']:.4g} % zeros.",
    ]
    errors = [other["relative_error"] for other in layers if other["relative_error"] is not None]
    if layer["relative_error"] is not None:
        above = sum(error > layer["relative_error"] for error in errors)
        rank = f"{above} of {len(errors)} layers have a larger one" if above else f"no other of {len(errors)} is larger"
        lines.append(f"Its relative error is {layer['relative_error']:.3g}: {rank}.")
    groups: dict[str, list[str]] = defaultdict(list)
    for other in layers:
        if other is not layer:
            groups[_decided(other)].append(other["tensor"])
    alike = groups.pop(_decided(layer), [])
    lines.append(f"{len(alike)} of {len(layers) - 1} other layers got the same decision.")
    return lines + [f"Instead, {decided}: {_listed(tensors, 3)}." for decided, tensors in groups.items()]


def _decided(layer: dict[str, Any]) -> str:
    """The decision in words; how many weights a mask keeps differs by layer, and does not make another decision."""
    return f"quantize to {layer['bits']:g} bits" if layer["decision"] == "quantize" else str(layer["decision"])
