"""``hcompress verify``."""

from __future__ import annotations

from pathlib import Path

from . import method_run, options, preflight
from .figures import print_measured
from .options import command, run_argument, setting_options
from .output import print_json
from .progress import Progress

EXAMPLES = """\
hcompress verify small --eval test.npz --max-drop 1
hcompress verify small --model net.py:make --eval test.npz --max-latency 5ms --json"""


@command("verify", examples=EXAMPLES)
@run_argument
@setting_options("model", "model_args", "data", "eval", "mean", "std", "layout", "task", "threads")
@setting_options(*method_run.GATE_SETTINGS, "summary", "junit")
def verify(run: Path, as_json: bool, quiet: bool) -> None:
    """Measure the models of RUN again: hashes, parity, metric and gates. Exit 4 if a check fails."""
    settings = options.resolve()
    preflight.check_run(run)
    preflight.check_files(settings)

    from ..pipeline import verify_run

    with Progress(quiet=quiet) as progress:
        record = verify_run(run, settings, progress=progress)
    if as_json:
        print_json(record)
    else:
        print_measured(record)
