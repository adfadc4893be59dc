"""Checks of a command line that need no torch, so that a wrong one is answered at once."""

from __future__ import annotations

from pathlib import Path

from ..errors import InputError, UsageError
from ..plan import read_plan
from ..registry import find_method, methods_for
from ..settings import BY_NAME, Settings, chosen_budget


def check_inputs(path: Path, settings: Settings) -> None:
    """The checkpoint is there, and so are the files that the settings name."""
    if not path.exists():
        raise InputError(
            f"{path}: no such file", hint="pass a checkpoint: .pt, .pth, .safetensors, .pt2 or a run folder"
        )
    check_files(settings)


def check_files(settings: Settings) -> None:
    """The files that ``model``, ``data`` and ``eval`` name are there; ``pkg.mod:fn`` names none."""
    for name in ("model", "data", "eval"):
        text = settings[name].value or ""
        head, _, function = text.partition(":")
        is_file = head.endswith(".py") or (name != "model" and not function)
        if head and is_file and not Path(head).exists():
            hint = f"{BY_NAME[name].help} Name a file as seen from here."
            raise InputError(f"{BY_NAME[name].flag} {text}: {head} does not exist", hint=hint)


def check_run(folder: Path) -> None:
    """The run folder is there, or its name says what it is not."""
    if folder.is_dir():
        return
    rejected = folder.with_name(folder.name + ".rejected")
    if rejected.is_dir():
        raise InputError(f"{folder}: the run failed a gate", hint=f"hcompress show {rejected} prints its figures")
    reason = "is a file, not a run folder" if folder.exists() else "no such run folder"
    raise InputError(f"{folder}: {reason}", hint="pass the --out folder of a finished run")


def check_out(folder: Path, *, force: bool) -> None:
    """The run folder can be made: it isn't there or may be replaced, its parent takes files, no other run has it."""
    from ..store import check_target, check_unlocked

    check_unlocked(folder)
    check_target(folder, force)


def journal_of(folder: Path) -> Path:
    """Where a run into the folder keeps the state of its training."""
    from ..store import journal_path

    return journal_path(folder)


def check_method(job: str, settings: Settings) -> None:
    """The method, if one is named, is one of the job's."""
    if settings["method"].value:
        find_method(job, settings["method"].value)


def check_budget(job: str, settings: Settings) -> None:
    """The budget is of a quantity that the method can meet."""
    name = settings["method"].value
    offered = (find_method(job, name),) if name else methods_for(job)
    budget = chosen_budget(settings)
    met = sorted({quantity for method in offered for quantity in method.budgets})
    if budget is not None and budget.quantity not in met:
        who = f"method {name}" if name else f"hcompress {job}"
        raise UsageError(f"{who} has no {budget.quantity} budget", hint=f"it takes {', '.join(met)}")


def plan_file(path: Path) -> Path:
    """The plan.json meant by a file or a run folder, read once so that a wrong one is refused here."""
    found = path / "plan.json" if path.is_dir() else path
    read_plan(found)
    return found
