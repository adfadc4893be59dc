"""``hcompress sensitivity``."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .. import registry
from ..errors import UsageError
from . import options, preflight
from .figures import print_predictors, size
from .options import checkpoint_argument, command, force_option, setting_options
from .output import print_json, print_line, print_table
from .progress import Progress

if TYPE_CHECKING:
    from ..forecast import Forecast

LONG = 100.0  # seconds that are printed whole
BAR = 24  # characters of the longest bar
LINEAR_RATIO = 100.0  # of the largest to the smallest value that bars of one linear scale can show
EXAMPLES = """\
hcompress sensitivity model.pt --model net.py:make --data calibration.npz
hcompress sensitivity model.pt --model net.py:make --data calibration.npz --rtol 0.02 --out traces
hcompress sensitivity model.pt --model net.py:make --data calibration.npz --measure fisher --fisher labels
hcompress sensitivity model.pt --model net.py:make --data calibration.npz --measure hessian-eigenvalues --dry-run
hcompress sensitivity model.pt --model net.py:make --data calibration.npz --compare hessian-trace fisher
hcompress sensitivity model.pt --model net.py:make --data calibration.npz --trace hessian --compare traces hessian-trace
hcompress sensitivity model.pt --model net.py:make --data calibration.npz --measure output-change --configurations 50
hcompress sensitivity model.pt --model net.py:make --measure weight-error --input-shape 3,32,32 --json"""


@command("sensitivity", examples=EXAMPLES)
@checkpoint_argument
@click.option(
    "--measure",
    metavar="NAME",
    help=f"One of {', '.join(measure.name for measure in registry.MEASURES)}.  [default: {registry.MEASURES[0].name}]",
)
@click.option(
    "--compare",
    nargs=2,
    metavar="A B",
    help="Two measures, or --out folders of earlier ones: how far they agree on the layers' order.",
)
@setting_options("trace", "estimator", "fisher", "rtol", "passes", "eigenvalues", "reconstruction", "configurations")
@setting_options("model", "model_args", "input_shape", "data", "num_calibration", "mean", "std", "layout", "task")
@setting_options("seed", "threads", "device", "cache", "out")
@force_option
@click.option("--dry-run", is_flag=True, help="Say what time and memory it would take; measure nothing.")
def sensitivity(
    checkpoint: Path,
    measure: str | None,
    compare: tuple[str, str] | None,
    force: bool,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Measure how the loss of CHECKPOINT reacts to a change of each layer's weights, with standard errors.

    A factory named by --model, and data or a task named as FILE.py:FN, run as your code.
    """
    settings = options.resolve()
    if compare is not None and measure is not None:
        raise UsageError("--measure and --compare contradict each other", hint="--compare names both measures itself")
    if compare is not None and "configurations" in options.given_flags():
        raise UsageError("--configurations has no effect with --compare", hint="leave one of them out")
    if measure is not None:
        registry.find_measure(measure)
    named = (measure or registry.MEASURES[0].name,) if compare is None else compare
    preflight.check_measured(options.given_flags(), settings, named)
    preflight.check_inputs(checkpoint, settings)
    if settings["out"].value is not None and not dry_run:
        preflight.check_out(Path(settings["out"].value), force=force)

    from ..sensing import compare_measures, measure_sensitivity

    with Progress(quiet=quiet) as progress:

        def announce(name: str, expected: Forecast) -> None:
            progress.say(f"{name} is expected to take {forecast_text(expected.to_json())}")

        if compare is not None:
            run = partial(compare_measures, checkpoint, settings, compare)
        else:
            run = partial(measure_sensitivity, checkpoint, settings, measure or registry.MEASURES[0].name)
        command_line = options.command_line()
        record = run(force=force, dry_run=dry_run, command=command_line, progress=progress, announce=announce)
    if as_json:
        print_json(record)
        return
    if dry_run:
        _print_forecast(record)
        return
    if compare is None:
        _print(record)
    else:
        _print_comparison(record)
    for note in record["notes"]:
        print_line(f"note: {note}")
    if settings["out"].value is not None:
        print_line(f"written to {settings['out'].value}")


def forecast_text(expected: dict[str, Any]) -> str:
    """``8.1 to 75 s, and 612 MB``."""
    least, most = (f"{expected[key]:.2g}" for key in ("least_s", "most_s"))
    if expected["most_s"] >= LONG:
        least, most = (f"{expected[key]:,.0f}" for key in ("least_s", "most_s"))
    return f"{least if least == most else f'{least} to {most}'} s, and {size(expected['memory_bytes'])}"


def _print_forecast(record: dict[str, Any]) -> None:
    found, names = record["forecast"], record["method"]
    each = {names: found} if isinstance(names, str) else found
    for name, expected in each.items():
        print_line(f"{name}: {'no time to speak of' if expected is None else forecast_text(expected)}")
    for note in record["notes"]:
        print_line(f"note: {note}")


def _print_comparison(record: dict[str, Any]) -> None:
    from ..comparison import comparison_cells, comparison_text
    from ..sensitivity_report import comparison_head

    print_line(comparison_text(record))
    print_table(comparison_head(record), comparison_cells(record))
    if record["left_out"]:
        print_line(f"in one of them only: {', '.join(record['left_out'])}")


def _print(record: dict[str, Any]) -> None:
    from ..sensitivity_report import table_head, table_rows

    lengths, scale = _bars(sorted((entry["value"] for entry in record["entries"]), reverse=True))
    rows = [(*row, "#" * length) for row, length in zip(table_rows(record), lengths, strict=True)]
    origin = ", from the cache" if record["cached"] else ""
    print_line(f"{record['method']}, {record['unit']}; {record['num_examples']} calibration examples{origin}{scale}")
    print_table((*table_head(record), ""), rows)
    if record["predictors"] is not None:
        print_predictors(record["predictors"])


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
