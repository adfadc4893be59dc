"""``hcompress quantize``."""

from __future__ import annotations

from pathlib import Path

import click

from . import method_run
from .options import checkpoint_argument, command, force_option, setting_options

EXAMPLES = """\
hcompress quantize model.pt --model net.py:make --data calibration.npz --eval test.npz --budget 4bit --out small
hcompress quantize model.pt --model net.py:make --data calibration.npz --eval test.npz --budget 0.3MB
hcompress quantize pruned --model net.py:make --data calibration.npz --eval test.npz --preset ci-gate
hcompress quantize model.pt --model net.py:make --data calibration.npz --budget 25% --dry-run
hcompress quantize model.pt --model net.py:make --data calibration.npz --eval test.npz --max-drop 0.5
hcompress quantize model.pt --model net.py:make --data calibration.npz --eval test.npz --budget latency=2ms
hcompress quantize model.pt --model net.py:make --data calibration.npz --eval test.npz --budget 4bit --keep 'conv1*=8'
hcompress quantize model.pt --model net.py:make --data calibration.npz --eval test.npz --plan small --pick 3.5bit
hcompress quantize nightly.pt --model net.py:make --eval test.npz --plan small/plan.json --out nightly"""


@command("quantize", examples=EXAMPLES)
@checkpoint_argument
@setting_options(
    "method", "budget", "activations", "activation_range", "range", "exclude", "keep", "tie", "for", "cache"
)
@setting_options(
    "channel_widths",
    "equalization",
    "group_size",
    "reconstruction",
    "bias_correction",
    "trace",
    "estimator",
    "rtol",
    "passes",
    "configurations",
)
@setting_options("train", "recover_steps", "recover_epochs", "optimizer", "lr", "schedule", "batch_size", "augment")
@setting_options("distill", "distill_features", "patience")
@setting_options(
    *method_run.FILE_SETTINGS, *method_run.DATA_SETTINGS, *method_run.GATE_SETTINGS, *method_run.RUN_SETTINGS
)
@click.option("--preset", metavar="NAME", help="Start from a preset; hcompress presets lists them.")
@click.option("--plan", type=click.Path(path_type=Path), help="Keep the decisions of a plan.json or run folder.")
@click.option("--pick", metavar="POINT", help="With --plan: another point of its frontier, by number or by budget.")
@force_option
@click.option("--resume", is_flag=True, help="Go on with the training of an interrupted run.")
@click.option("--dry-run", is_flag=True, help="Decide and predict; write nothing.")
def quantize(
    checkpoint: Path,
    preset: str | None,
    plan: Path | None,
    pick: str | None,
    force: bool,
    resume: bool,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Round the weights and activations of CHECKPOINT within a budget, and prove the result in the runtime.

    A factory named by --model, and data or a task named as FILE.py:FN, run as your code.
    """
    method_run.run_job(
        "quantize",
        checkpoint,
        preset=preset,
        plan=plan,
        pick=pick,
        force=force,
        resume=resume,
        dry_run=dry_run,
        as_json=as_json,
        quiet=quiet,
    )
