"""``hcompress sensitivity``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .. import registry
from . import options, preflight
from .figures import count
from .options import checkpoint_argument, command, force_option, setting_options
from .output import print_json, print_line, print_table
from .progress import Progress

BAR = 24  # characters of the longest bar
EXAMPLES = """\
hcompress sensitivity model.pt --model net.py:make --data calibration.npz
hcompress sensitivity model.pt --model net.py:make --data calibration.npz --rtol 0.02 --out traces
hcompress sensitivity model.pt --model net.py:make --data calibration.npz --measure fisher --fisher labels
hcompress sensitivity model.pt --model net.py:make --measure weight-error --input-shape 3,32,32 --json"""


@command("sensitivity", examples=EXAMPLES)
@checkpoint_argument
@click.option(
    "--measure",
    default=registry.MEASURES[0].name,
    show_default=True,
    metavar="NAME",
    help=f"One of {', '.join(measure.name for measure in registry.MEASURES)}.",
)
@setting_options("trace", "fisher", "rtol", "passes")
@setting_options("model", "model_args", "input_shape", "data", "num_calibration", "mean", "std", "layout", "task")
@setting_options("seed", "threads", "device", "out")
@force_option
def sensitivity(checkpoint: Path, measure: str, force: bool, as_json: bool, quiet: bool) -> None:
    """Measure how the loss of CHECKPOINT reacts to a change of each layer's weights, with standard errors.

    A factory named by --model, and data or a task named as FILE.py:FN, run as your code.
    """
    settings = options.resolve()
    registry.find_measure(measure)
    preflight.check_inputs(checkpoint, settings)

    from ..pipeline import measure_sensitivity

    with Progress(quiet=quiet) as progress:
        record = measure_sensitivity(checkpoint, settings, measure, force=force, progress=progress)
    if as_json:
        print_json(record)
    else:
        _print(record)
        if settings["out"].value is not None:
            print_line(f"written to {settings['out'].value}")


def _print(record: dict[str, Any]) -> None:
    entries = sorted(record["entries"], key=lambda entry: -entry["value"])
    largest = max((abs(entry["value"]) for entry in entries), default=0.0) or 1.0
    rows = [
        (
            entry["layer"],
            *((entry["option"],) if entry["option"] else ()),
            f"{entry['value']:.4g} +- {entry['stderr']:.2g}" if entry["stderr"] else f"{entry['value']:.4g}",
            count(record["elements"][entry["layer"]]),
            f"{entry['value'] / record['elements'][entry['layer']]:.3g}",
            "#" * round(BAR * abs(entry["value"]) / largest),
        )
        for entry in entries
    ]
    by_option = any(entry["option"] for entry in entries)
    print_line(f"{record['method']}, {record['unit']}; {record['num_examples']} calibration examples")
    print_table(("layer", *(("option",) if by_option else ()), "value", "weights", "per weight", ""), rows)
    for note in record["notes"]:
        print_line(f"note: {note}")
