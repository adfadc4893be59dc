"""``hcompress sensitivity``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .. import registry
from . import options, preflight
from .figures import NOTHING, count, print_predictors
from .options import checkpoint_argument, command, force_option, setting_options
from .output import print_json, print_line, print_table
from .progress import Progress

BAR = 24  # characters of the longest bar
LINEAR_RATIO = 100.0  # of the largest to the smallest value that bars of one linear scale can show
EXAMPLES = """\
hcompress sensitivity model.pt --model net.py:make --data calibration.npz
hcompress sensitivity model.pt --model net.py:make --data calibration.npz --rtol 0.02 --out traces
hcompress sensitivity model.pt --model net.py:make --data calibration.npz --measure fisher --fisher labels
hcompress sensitivity model.pt --model net.py:make --data calibration.npz --measure output-change --compare 50
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
@setting_options("trace", "estimator", "fisher", "rtol", "passes", "reconstruction", "compare")
@setting_options("model", "model_args", "input_shape", "data", "num_calibration", "mean", "std", "layout", "task")
@setting_options("seed", "threads", "device", "cache", "out")
@force_option
def sensitivity(checkpoint: Path, measure: str, force: bool, as_json: bool, quiet: bool) -> None:
    """Measure how the loss of CHECKPOINT reacts to a change of each layer's weights, with standard errors.

    A factory named by --model, and data or a task named as FILE.py:FN, run as your code.
    """
    settings = options.resolve()
    registry.find_measure(measure)
    preflight.check_estimator(options.given_flags(), settings)
    preflight.check_inputs(checkpoint, settings)
    if settings["out"].value is not None:
        preflight.check_out(Path(settings["out"].value), force=force)

    from ..pipeline import measure_sensitivity

    with Progress(quiet=quiet) as progress:
        record = measure_sensitivity(
            checkpoint, settings, measure, force=force, command=options.command_line(), progress=progress
        )
    if as_json:
        print_json(record)
    else:
        _print(record)
        if settings["out"].value is not None:
            print_line(f"written to {settings['out'].value}")


def _print(record: dict[str, Any]) -> None:
    entries = sorted(record["entries"], key=lambda entry: -entry["value"])
    lengths, scale = _bars([entry["value"] for entry in entries])
    rows = [
        (
            entry["layer"],
            *((entry["option"],) if entry["option"] else ()),
            f"{entry['value']:.4g} +- {entry['stderr']:.2g}" if entry["stderr"] else f"{entry['value']:.4g}",
            *_per_weight(entry, record["elements"].get(entry["layer"])),
            "#" * length,
        )
        for entry, length in zip(entries, lengths, strict=True)
    ]
    by_option = any(entry["option"] for entry in entries)
    origin = ", from the cache" if record["cached"] else ""
    print_line(f"{record['method']}, {record['unit']}; {record['num_examples']} calibration examples{origin}{scale}")
    print_table(("layer", *(("option",) if by_option else ()), "value", "weights", "per weight", ""), rows)
    if record["predictors"] is not None:
        print_predictors(record["predictors"])
    for note in record["notes"]:
        print_line(f"note: {note}")


def _per_weight(entry: dict[str, Any], elements: int | None) -> tuple[str, str]:
    """Weights of a layer, and its value for each; an activation has none."""
    return (NOTHING, NOTHING) if elements is None else (count(elements), f"{entry['value'] / elements:.3g}")


def _bars(values: list[float]) -> tuple[list[int], str]:
    """The length of each value's bar, and what the header says where their scale is logarithmic."""
    from ..plot import decades, share

    positive = [value for value in values if value > 0]
    axis = decades(positive)
    if axis is None or max(positive) <= LINEAR_RATIO * min(positive):
        largest = max(map(abs, values), default=0.0) or 1.0
        return [round(BAR * abs(value) / largest) for value in values], ""
    lengths = [round(BAR * share(value, axis)) if value > 0 else 0 for value in values]
    return lengths, f"; bars on a logarithmic scale, 1e{axis[0]} to 1e{axis[1]}"
