"""Checks of a command line that need no torch, so that a wrong one is answered at once."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from ..errors import InputError, UsageError
from ..plan import read_plan
from ..registry import COMPARED, MEASURES, Method, find_measure, find_method, methods_for
from ..settings import BY_NAME, Settings, chosen_budget

LENGTHS = {"recover_steps", "recover_epochs"}
TRAINING = {"train", *(name for name, setting in BY_NAME.items() if setting.key.startswith("recover."))} - LENGTHS


def check_inputs(path: Path, settings: Settings) -> None:
    """The checkpoint is there, and so are the files that the settings name."""
    if not path.exists():
        raise InputError(
            f"{path}: no such file", hint="pass a checkpoint: .pt, .pth, .safetensors, .pt2 or a run folder"
        )
    check_files(settings)


def check_files(settings: Settings) -> None:
    """The files that ``model``, ``data``, ``train`` and ``eval`` name are there; ``pkg.mod:fn`` names none."""
    for name in ("model", "data", "train", "eval"):
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


def check_gathered(folder: Path, *, force: bool, resume: bool) -> None:
    """The folder of a sweep can be made, gone on with or replaced, and no other run has it."""
    from ..store import check_gathered as check
    from ..store import check_unlocked

    check_unlocked(folder)
    check(folder, force=force, resume=resume)


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


def check_effects(job: str, given: Collection[str], settings: Settings, *, plan: bool, resume: bool) -> None:
    """Every option of the command line has something to act on: none is left out in silence.

    Args:
        given: Names of the settings that are flags.
        plan: Whether the decisions are those of a plan.
    """
    method = find_method(job, settings["method"].value or methods_for(job)[0].name)
    compared = _measured(COMPARED) if settings["configurations"].value else set[str]()
    for name in sorted(set(given) & {option for known in methods_for(job) for option in _options(known)}):
        flag = BY_NAME[name].flag
        if name in compared:
            continue
        if plan:
            raise UsageError(
                f"{flag} has no effect with --plan, which keeps a plan's decisions", hint=f"leave {flag} out"
            )
        if name not in _options(method):
            takers = ", ".join(known.name for known in methods_for(job) if name in _options(known))
            raise UsageError(f"method {method.name} has no {flag}", hint=f"methods that take it: {takers}")
    if "memory" in given and not plan and not method.holds_gradients:
        takers = ", ".join(known.name for known in methods_for(job) if known.holds_gradients)
        raise UsageError(f"method {method.name} has no --memory", hint=f"methods that take it: {takers}")
    check_estimator(given, settings)
    asked = any(settings[name].value for name in LENGTHS)
    unused = [BY_NAME[name].flag for name in sorted(set(given) & TRAINING)] + ["--resume"] * resume
    if unused and not asked and (plan or not method.trains):
        raise UsageError(
            f"{unused[0]} has no effect without training", hint="pass --recover-steps N or --recover-epochs X as well"
        )


def check_measured(given: Collection[str], settings: Settings, names: Collection[str]) -> None:
    """Every option of the command line that is some measure's is one of those that are taken.

    Args:
        names: Of the measures; what is none is the record of one that was taken before.
    """
    taken = {measure.name for measure in MEASURES} & set(names)
    if settings["configurations"].value:
        taken |= {*COMPARED, "output-change"}
    for name in sorted(set(given) & _measured([measure.name for measure in MEASURES]) - _measured(taken)):
        takers = ", ".join(measure.name for measure in MEASURES if name in measure.options)
        raise UsageError(f"{', '.join(names)} has no {BY_NAME[name].flag}", hint=f"measures that take it: {takers}")
    check_estimator(given, settings)


def check_estimator(given: Collection[str], settings: Settings) -> None:
    """An estimator needs a matrix that is estimated by products."""
    if "estimator" in given and settings["trace"].value != "hessian":
        raise UsageError(
            "--estimator has no effect on Gauss-Newton traces", hint="pass --trace hessian as well, or leave it out"
        )


def _options(method: Method) -> set[str]:
    """Settings that act on what a method decides, but for the goal."""
    return {*method.options, *_measured(method.measures)} - {"sparsity"}


def _measured(names: Collection[str]) -> set[str]:
    return {option for name in names for option in find_measure(name).options}


def plan_file(path: Path) -> Path:
    """The plan.json meant by a file or a run folder, read once so that a wrong one is refused here."""
    found = path / "plan.json" if path.is_dir() else path
    read_plan(found)
    return found
