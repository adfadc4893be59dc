"""``hcompress verify``."""

from __future__ import annotations

from pathlib import Path

from . import method_run, options, preflight
from .figures import check_line, parity_line
from .options import command, run_argument, setting_options
from .output import print_json, print_line
from .progress import Progress

EXAMPLES = """\
hcompress verify small --eval test.npz --max-drop 1
hcompress verify small --model net.py:make --eval test.npz --max-latency 5ms --json"""


@command("verify", examples=EXAMPLES)
@run_argument
@setting_options("model", "model_args", "data", "eval", "mean", "std", "layout", "task", "threads")
@setting_options(*method_run.GATE_SETTINGS)
def verify(run: Path, as_json: bool, quiet: bool) -> None:
    """Measure the models of RUN again: hashes, parity, metric and gates. Exit 4 if a check fails."""
    settings = options.resolve()
    preflight.check_run(run)

    from ..pipeline import verify_run

    with Progress(quiet=quiet) as progress:
        record = verify_run(run, settings, progress=progress)
    if as_json:
        print_json(record)
        return
    metric = record["metric"]
    if metric is not None:
        unit = metric["unit"]
        print_line(f"{metric['name']}: {metric['compressed']:.4g} {unit} (dense {metric['dense']:.4g} {unit})")
    for line in [parity_line(entry) for entry in record["parity"]] + [check_line(check) for check in record["checks"]]:
        print_line(line)
