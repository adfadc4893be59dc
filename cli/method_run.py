"""What ``prune`` and ``quantize`` share, and how any run ends: check the command line, run, print before and after."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..settings import Value, swept
from . import failure, options, preflight
from .figures import print_report, print_sweep, size
from .output import print_json, print_line
from .progress import Progress

SUFFIXES = {"prune": "pruned", "quantize": "quantized", "apply": "applied", "export": "dense"}
RUN_SETTINGS = ("seed", "threads", "device", "out", "summary", "junit")
FILE_SETTINGS = ("runtime", "float_storage")
GATE_SETTINGS = ("max_drop", "min_metric", "max_bytes", "max_latency")
DATA_SETTINGS = (
    "model",
    "model_args",
    "input_shape",
    "data",
    "eval",
    "mean",
    "std",
    "layout",
    "num_calibration",
    "task",
)


def run_job(
    job: str,
    checkpoint: Path,
    *,
    preset: str | None,
    plan: Path | None,
    pick: str | None = None,
    force: bool,
    resume: bool = False,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """One ``hcompress prune`` or ``hcompress quantize``."""
    settings = with_out(options.resolve(preset), job, checkpoint)
    preflight.check_method(job, settings)
    if job == "prune" and plan is None and (points := swept(settings)):
        preflight.check_effects(job, options.given_flags(), settings, plan=False, resume=False)
        for point in points:
            preflight.check_budget(job, point)
        preflight.check_inputs(checkpoint, settings)
        _run_sweep(checkpoint, settings, force=force, resume=resume, dry_run=dry_run, as_json=as_json, quiet=quiet)
        return
    preflight.check_effects(job, options.given_flags(), settings, plan=plan is not None, resume=resume)
    if plan is None:
        preflight.check_budget(job, settings)
    else:
        plan = preflight.plan_file(plan)
    preflight.check_inputs(checkpoint, settings)
    if not dry_run:
        out = Path(settings["out"].value)
        preflight.check_out(out, force=force)
        failure.note_journal(preflight.journal_of(out))

    from ..pipeline import run_method

    with Progress(quiet=quiet) as progress:
        record = run_method(
            job,
            checkpoint,
            settings,
            force=force,
            dry_run=dry_run,
            plan=plan,
            pick=pick,
            resume=resume,
            command=options.command_line(),
            progress=progress,
        )
    if as_json:
        print_json(record)
    elif dry_run:
        _print_dry_run(record)
    else:
        print_run(record, settings)


def _run_sweep(
    checkpoint: Path,
    settings: dict[str, Value],
    *,
    force: bool,
    resume: bool,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """``hcompress prune`` with a list of sparsities."""
    if not dry_run:
        out = Path(settings["out"].value)
        preflight.check_gathered(out, force=force, resume=resume)
        failure.note_sweep(out)

    from ..sweep import run_sweep

    with Progress(quiet=quiet) as progress:
        record = run_sweep(
            checkpoint,
            settings,
            force=force,
            resume=resume,
            dry_run=dry_run,
            command=options.command_line(),
            progress=progress,
        )
    if as_json:
        print_json(record)
    elif dry_run:
        for point in record["points"]:
            print_line(f"sparsity {point['sparsity']!r}: {point['message'] or 'within reach'}")
            if point["plan"] is not None:
                _print_dry_run(point["plan"])
    else:
        print_sweep(record)
        print_line(f"sweep folder: {settings['out'].value}")


def with_out(settings: dict[str, Value], job: str, checkpoint: Path) -> dict[str, Value]:
    """The settings with a run folder: ``model-pruned`` in the current folder for ``model.pt``, unless one was given."""
    if settings["out"].value is not None:
        return settings
    return settings | {"out": Value(f"{checkpoint.absolute().stem}-{SUFFIXES[job]}", "default")}


def print_run(report: dict[str, Any], settings: dict[str, Value]) -> None:
    """The end of a run: its figures and its folder."""
    print_report(report)
    print_line(f"run folder: {settings['out'].value}")


def _print_dry_run(record: dict[str, Any]) -> None:
    print_line(f"method {record['method']}: {len(record['decisions'])} decisions; nothing was written")
    for name, value in record["predicted"].items():
        print_line(f"predicted {name}: {value:.6g}")
    click.echo(f"memory needed: about {size(record['memory_bytes'])}")
    for note in record["notes"]:
        print_line(f"note: {note}")
