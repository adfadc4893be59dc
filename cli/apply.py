"""``hcompress apply``."""

from __future__ import annotations

from pathlib import Path

import click

from . import method_run, options, preflight
from .options import checkpoint_argument, command, force_option, setting_options
from .output import print_json
from .progress import Progress

EXAMPLES = """\
hcompress apply model.pt --plan small/plan.json --model net.py:make --out again
hcompress apply model.pt --plan edited-plan.json --model net.py:make --eval test.npz --max-drop 1 --out edited"""


@command("apply", examples=EXAMPLES)
@checkpoint_argument
@click.option(
    "--plan", type=click.Path(path_type=Path), required=True, help="A plan.json, or a run folder that has one."
)
@setting_options(
    "for", *method_run.FILE_SETTINGS, *method_run.DATA_SETTINGS, *method_run.GATE_SETTINGS, *method_run.RUN_SETTINGS
)
@force_option
def apply(checkpoint: Path, plan: Path, force: bool, as_json: bool, quiet: bool) -> None:
    """Make the decisions of a plan on CHECKPOINT; the result is a run folder.

    No data decide anything here: the same checkpoint and plan give the same model.
    """
    settings = method_run.with_out(options.resolve(), "apply", checkpoint)
    preflight.check_inputs(checkpoint, settings)
    found = preflight.plan_file(plan)
    preflight.check_out(Path(settings["out"].value), force=force)

    from ..pipeline import apply_plan

    with Progress(quiet=quiet) as progress:
        report = apply_plan(checkpoint, found, settings, force=force, command=options.command_line(), progress=progress)
    if as_json:
        print_json(report)
    else:
        method_run.print_run(report, settings)
