"""``hcompress prune``."""

from __future__ import annotations

from pathlib import Path

import click

from . import method_run
from .options import checkpoint_argument, command, force_option, setting_options

EXAMPLES = """\
hcompress prune model.pt --model net.py:make --data calibration.npz --eval test.npz --sparsity 0.5 --out pruned
hcompress prune model.pt --model net.py:make --data calibration.npz --eval test.npz --max-drop 0.5 --out small
hcompress prune model.pt --model net.py:make --data calibration.npz --eval test.npz --sparsity 0.5,0.7,0.9 --out sweep
hcompress prune model.pt --model net.py:make --data calibration.npz --eval test.npz --pattern 2:4 --out pruned
hcompress prune model.pt --model net.py:make --data calibration.npz --eval test.npz --sparsity 0.5 --pattern 4x1
hcompress prune model.pt --model net.py:make --data calibration.npz --eval test.npz --budget 25% --for safetensors
hcompress prune model.pt --model net.py:make --data calib.npz --eval test.npz --method structured-obs --budget macs=50%
hcompress prune model.pt --model net.py:make --data calib.npz --eval test.npz --train train.npz --recover-steps 250
hcompress prune model.pt --model net.py:make --input-shape 3,32,32 --method magnitude --sparsity 0.9 --dry-run
hcompress prune nightly.pt --model net.py:make --data calibration.npz --eval test.npz --plan pruned --out nightly"""


@command("prune", examples=EXAMPLES)
@checkpoint_argument
@setting_options(
    "method", "budget", "sparsity", "scope", "pattern", "exclude", "multiple_of", "rounds", "fisher", "for", "cache"
)
@setting_options("fisher_batch", "clip_gradients", "block_size", "memory")
@setting_options("train", "recover_steps", "recover_epochs", "optimizer", "lr", "schedule", "batch_size", "augment")
@setting_options("distill", "distill_features", "patience")
@setting_options(
    *method_run.FILE_SETTINGS, *method_run.DATA_SETTINGS, *method_run.GATE_SETTINGS, *method_run.RUN_SETTINGS
)
@click.option("--preset", metavar="NAME", help="Start from a preset; hcompress presets lists them.")
@click.option("--plan", type=click.Path(path_type=Path), help="Keep the decisions of a plan.json or run folder.")
@force_option
@click.option("--resume", is_flag=True, help="Go on with an interrupted training or sweep.")
@click.option("--dry-run", is_flag=True, help="Decide and predict; write nothing.")
def prune(
    checkpoint: Path,
    preset: str | None,
    plan: Path | None,
    force: bool,
    resume: bool,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Zero weights of CHECKPOINT, or cut channels out of it, within a budget, and prove the result in the runtime.

    A factory named by --model, and data or a task named as FILE.py:FN, run as your code.
    """
    method_run.run_job(
        "prune",
        checkpoint,
        preset=preset,
        plan=plan,
        force=force,
        resume=resume,
        dry_run=dry_run,
        as_json=as_json,
        quiet=quiet,
    )
