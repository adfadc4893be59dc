"""``hcompress inspect``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from . import options, preflight
from .figures import NOTHING, count, size
from .options import checkpoint_argument, command, setting_options
from .output import print_json, print_line, print_table
from .progress import Progress

EXAMPLES = """\
hcompress inspect model.pt
hcompress inspect model.pt --model net.py:make --input-shape 3,32,32
hcompress inspect model.pt --model net.py:make --input-shape 3,32,32 --channels
hcompress inspect model.safetensors --json"""


@command("inspect", examples=EXAMPLES)
@checkpoint_argument
@click.option("--channels", is_flag=True, help="Also list the groups of channels that can be cut out, and what can't.")
@setting_options("model", "model_args", "input_shape", "data", "mean", "std", "layout", "task")
def inspect(checkpoint: Path, channels: bool, as_json: bool, quiet: bool) -> None:
    """Show what CHECKPOINT holds: tensors, sizes, tied weights, and what stands in the way of compressing it."""
    settings = options.resolve()
    preflight.check_inputs(checkpoint, settings)

    from ..pipeline import inspect_checkpoint

    with Progress(quiet=quiet) as progress:
        record = inspect_checkpoint(checkpoint, settings, progress=progress, channels=channels)
    if as_json:
        print_json(record)
    else:
        _print(record)


def _print(record: dict[str, Any]) -> None:
    print_line(f"{record['path']}: {record['format']}, sha256 {record['sha256']}")
    macs = "MACs unknown" if record["macs"] is None else f"{count(record['macs'])} MACs"
    dtypes = ", ".join(f"{number} {name}" for name, number in sorted(record["dtypes"].items()))
    print_line(f"{count(record['parameters'])} parameters, {macs}; tensors: {dtypes}")
    rows = [
        (
            layer["name"],
            layer["op"],
            " x ".join(map(str, layer["shape"])),
            count(layer["parameters"]),
            NOTHING if layer["macs"] is None else count(layer["macs"]),
            layer["dtype"],
        )
        for layer in record["layers"]
    ]
    costs = record.get("costs")
    if costs and record["layers"]:
        weights = ", ".join(f"{size(costs['bytes'][bits])} at {bits}" for bits in ("32", "8", "4"))
        outputs = size(costs["activation_bits"]["8"] / 8)
        print_line(f"weights: {weights} bits; outputs of all layers: {outputs} an example at 8 bits")
    print_table(("layer", "op", "shape", "parameters", "MACs", "dtype"), rows)
    for names in record["tied"]:
        print_line(f"tied: {', '.join(names)}")
    for blocker in record["blockers"]:
        print_line(f"blocked: {blocker['layer']}: {blocker['reason']}")
    if "groups" in record:
        _print_channels(record)
    for note in record["notes"]:
        print_line(f"note: {note}")


def _print_channels(record: dict[str, Any]) -> None:
    rows = [
        (
            group["name"],
            count(group["channels"]),
            count(len({member["tensor"] for member in group["members"]})),
            count(group["saved_by_one"]["params"]),
            count(group["saved_by_one"]["macs"]),
        )
        for group in record["groups"]
    ]
    print_table(("channel group", "channels", "tensors", "parameters a channel", "MACs a channel"), rows)
    for kept in record["frozen"]:
        where = f" ({kept['node']} at {kept['source']})" if kept["source"] else f" ({kept['node']})"
        places = f"{count(kept['places'])} of {kept['tensor']} along dimension {kept['dim']}"
        print_line(f"stays: {places}: {kept['reason']}{where}")
