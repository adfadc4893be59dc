"""A sweep: one run for each of several sparsities, on a network that is read, traced and measured once.

The folder holds a whole run folder for each point, and sweep.json with its pages, written anew after each: what is
finished stays, however the sweep ends. A point that fails a gate or is out of reach has its status; the others run.
Cost: that of the points, less what they share through ``Job.memo``: the dense files, the calibration and evaluation
data, the dense network's metric, and what a method measures of the dense network.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from . import cache, canonical, store, summary
from .build import ONNX, PLAN, delivered_name
from .context import Progress
from .errors import (
    BudgetError,
    GateError,
    HCompressError,
    InputError,
    NumericsError,
    OutOfMemoryError,
    UsageError,
    out_of_memory,
)
from .figures import REPORT_SCHEMA
from .finish import Target, read_evaluation
from .job import Job, gates_of, open_job, out_folder
from .manifest import NAME as MANIFEST
from .manifest import SWEEP, check_files, read_manifest
from .measuring import network_sha256
from .pipeline import checked_goal, run_opened
from .recovery import is_asked, training_data
from .registry import Method
from .settings import Settings, swept
from .sweep_report import PASSED, PENDING, SCHEMA, messages, read_sweep, render_sweep, sweep_text
from .train.journal import delete_journals
from .verdict import Gates

JOB = "prune"
DRY_RUN = "hcompress.sweep-dry-run/1"
OF_A_POINT: tuple[type[HCompressError], ...] = (
    GateError,
    BudgetError,
    NumericsError,
    OutOfMemoryError,
)  # that other points need not share
CAUGHT: tuple[type[Exception], ...] = (*OF_A_POINT, MemoryError, RuntimeError)  # of the last two, a lack of memory
NOT_IN_KEY = {"out", "summary", "junit", "cache", "sparsity", "budget"}
REJECTED = ".rejected"


@dataclass(frozen=True, slots=True)
class _Sweep:
    """What the points share.

    Attributes:
        opened: The network.
        folder: Of the sweep.
        argv: The command line.
    """

    opened: Job
    method: Method
    folder: Path
    argv: list[str]
    started: float


def run_sweep(
    checkpoint: Path,
    settings: Settings,
    *,
    force: bool,
    resume: bool,
    dry_run: bool,
    command: list[str],
    progress: Progress,
) -> dict[str, Any]:
    """``hcompress prune --sparsity 0.5,0.7,0.9``: a run folder for each sparsity, and what they come to together.

    Args:
        resume: Keep the points that are finished, and whose inputs, settings and program are the same.

    Returns:
        The sweep's record; with ``dry_run``, what would be decided at each point.

    Raises:
        HCompressError: Points failed: the kind is that of the largest exit code. All others are finished.
    """
    started, points = time.monotonic(), swept(settings)
    for point in points:
        method, _ = checked_goal(JOB, point, dry_run=dry_run, plan=None)
    folder = Path() if dry_run else out_folder(settings)

    def sweep() -> _Sweep:
        opened = open_job(checkpoint, settings, progress, needs_data=method.needs_data)
        return _Sweep(replace(opened, is_swept=True), method, folder, command, started)

    if dry_run:
        return _dry_run(sweep(), points)
    with store.gathered(folder, force=force, resume=resume, inputs=[checkpoint]):
        known = _known(folder)
        asked = {float(point["sparsity"].value) for point in points}
        others = sorted(known.keys() - asked)
        if others and resume:
            listed = ",".join(repr(sparsity) for sparsity in sorted(asked | known.keys()))
            raise UsageError(
                f"{folder} has a point at sparsity {others[0]!r}, which isn't asked for",
                hint=f"pass --sparsity {listed}, or choose another --out",
            )
        made = sweep()
        key = _key(made)
        for sparsity in others:
            _clear(folder / _name(sparsity))
        return _run(made, points, known if resume else {}, key)


def _known(folder: Path) -> dict[float, dict[str, Any]]:
    """The points of a sweep in the folder, by sparsity."""
    if not (folder / SWEEP).is_file():
        return {}
    return {float(entry["sparsity"]): entry for entry in read_sweep(folder)["points"]}


def _run(sweep: _Sweep, points: Sequence[Settings], known: Mapping[float, dict[str, Any]], key: str) -> dict[str, Any]:
    """Run what isn't finished, and write the sweep's own files before the first point and after each.

    Args:
        known: What an earlier sweep says of the points.
        key: Of this one.
    """
    entries = [_entry(sweep.folder, float(point["sparsity"].value), key, known) for point in points]
    record = _write(sweep, entries)
    for number, point in enumerate(points):
        entry = entries[number]
        if entry["status"] != PENDING:
            sweep.opened.progress(f"sparsity {entry['sparsity']!r} is finished already", 1, 1)
            continue
        is_begun = known.get(entry["sparsity"], {}).get("key") == key
        try:
            entries[number] = entry | _run_point(sweep, point, is_begun=is_begun)
        except HCompressError as error:
            if finished := sum(other["status"] != PENDING for other in entries):
                go_on = f"the same command with --resume keeps the finished points ({finished}) in {sweep.folder}"
                error.hint = f"{error.hint}; {go_on}" if error.hint else go_on
            raise
        record = _write(sweep, entries)
    _publish_summary(sweep, record)
    if record["code"]:
        worst = next(kind for kind in OF_A_POINT if kind.exit_code == record["code"])
        raise worst(
            "; ".join([sweep_text(record), *messages(record)]),
            hint=f"the other points are whole; hcompress show {sweep.folder} lists all",
            report=record,
        )
    return record


def _entry(folder: Path, sparsity: float, key: str, known: Mapping[float, dict[str, Any]]) -> dict[str, Any]:
    """A point as it is known, if it is finished, unchanged and whole; else one that is to be run."""
    found = known.get(sparsity)
    if found is not None and found["key"] == key and _is_whole(folder, found):
        return found
    figures = dict.fromkeys(("folder", "sha256", "plan_sha256", "model_sha256", "reached", "bytes", "metric", "drop"))
    return {"sparsity": sparsity, "status": PENDING, "code": 0, "message": "", "key": key, "time_s": 0.0, **figures}


def _is_whole(folder: Path, entry: Mapping[str, Any]) -> bool:
    """Whether a point has its folder, as it was written."""
    if entry["folder"] not in (name := _name(entry["sparsity"]), name + REJECTED):
        return False
    run = folder / str(entry["folder"])
    sealed = run / ("report.json" if run.name.endswith(REJECTED) else MANIFEST)
    if not sealed.is_file() or canonical.sha256_of_file(sealed) != entry["sha256"]:
        return False
    try:
        if sealed.name == MANIFEST:
            check_files(run, read_manifest(run))
    except InputError:
        return False
    return True


def _run_point(sweep: _Sweep, point: Settings, *, is_begun: bool) -> dict[str, Any]:
    """One run, and what the sweep's record says of it.

    Args:
        is_begun: Whether a training of it may have been interrupted.
    """
    sparsity, started = float(point["sparsity"].value), time.monotonic()
    out = sweep.folder / _name(sparsity)
    found: dict[str, Any] = {"status": PASSED, "code": 0, "message": ""}
    report: dict[str, Any] | None
    try:
        with store.staged(out, True) as stage:
            _, budget = checked_goal(JOB, point, dry_run=False, plan=None)
            target = Target(stage, out, JOB, gates_of(point), sweep.argv, budget, is_alone=False)
            journal = target.journal()
            resume = is_begun and journal is not None and journal.is_file()
            report = run_opened(_of_point(sweep.opened, point), sweep.method, replace(target, resume=resume))
        store.remove(out.with_name(out.name + REJECTED))
    except CAUGHT as raised:
        error = raised if isinstance(raised, HCompressError) else out_of_memory(raised)
        if error is None:
            raise
        report = error.report
        message = f"{error.message} ({error.hint})" if error.hint and report is None else error.message
        found = {"status": error.title, "code": error.exit_code, "message": message}
        store.remove(out)
        if report is None:
            store.remove(out.with_name(out.name + REJECTED))
    found["time_s"] = time.monotonic() - started
    return found if report is None else found | _figures(out, report)


def _of_point(opened: Job, point: Settings) -> Job:
    """The network with the settings, the notes and the clock of one of its runs."""
    name, progress = repr(point["sparsity"].value), opened.progress

    def shown(stage: str, done: int, total: int | None) -> None:
        progress(f"sparsity {name}: {stage}", done, total)

    return replace(opened, settings=point, notes=list(opened.notes), progress=shown, started=time.monotonic())


def _figures(out: Path, report: Mapping[str, Any]) -> dict[str, Any]:
    """What the sweep's record says of a run that was measured."""
    is_published = out.is_dir()
    run = out if is_published else out.with_name(out.name + REJECTED)
    metric, checks = report["metric"], report["checks"]
    drop = metric["dense"] - metric["compressed"]
    reached = [check["value"] for check in checks if check["name"] == "budget" and check["unit"] == "sparsity"]
    return {
        "folder": run.name,
        "sha256": canonical.sha256_of_file(run / (MANIFEST if is_published else "report.json")),
        "plan_sha256": canonical.sha256_of_file(run / PLAN),
        "model_sha256": canonical.sha256_of_file(run / ONNX) if is_published else None,
        "reached": reached[0] if reached else report["sparsity"],  # channels of methods that cut them
        "bytes": report["files"][report["delivered"]],
        "metric": metric["compressed"],
        "drop": drop if metric["higher_is_better"] else -drop,
    }


def _write(sweep: _Sweep, entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """sweep.json and its pages, as they are now."""
    opened, report = sweep.opened, None
    for entry in entries:
        if entry["folder"] is not None:
            report = canonical.read_record(sweep.folder / str(entry["folder"]) / "report.json", REPORT_SCHEMA)
            break
    record: dict[str, Any] = {
        "schema": SCHEMA,
        "command": JOB,
        "argv": sweep.argv,
        "method": sweep.method.name,
        "seed": int(opened.value("seed")),
        "source": {"name": opened.source.path.name, "sha256": opened.source.sha256},
        "metric": None if report is None else _dense_metric(report, gates_of(opened.settings)),
        "dense_bytes": None if report is None else report["dense_bytes"],
        "delivered": delivered_name(opened.settings),
        "points": [dict(entry) for entry in entries],
        "code": max(int(entry["code"]) for entry in entries),
        "time_s": time.monotonic() - sweep.started,
    }
    page, text = render_sweep(record)
    store.write_file(sweep.folder / "report.html", page)
    store.write_file(sweep.folder / "report.md", text)
    store.write_file(sweep.folder / SWEEP, canonical.dumps(record))
    return record


def _publish_summary(sweep: _Sweep, record: Mapping[str, Any]) -> None:
    """What --summary, --junit and GitHub get, as ``finish.publish_summary`` gives them a single run."""
    paths = {name: sweep.opened.value(name) for name in ("summary", "junit")}
    run_folders = [entry["folder"] for entry in record["points"] if entry["folder"] is not None]
    lines = summary.publish_sweep(
        (sweep.folder / "report.md").read_text(encoding="utf-8"),
        [canonical.read_record(sweep.folder / name / "report.json", REPORT_SCHEMA) for name in run_folders],
        [f"sparsity {entry['sparsity']!r}: {entry['message']}" for entry in record["points"] if not entry["folder"]],
        summary=None if paths["summary"] is None else Path(str(paths["summary"])),
        junit=None if paths["junit"] is None else Path(str(paths["junit"])),
        environment=os.environ,
    )
    for line in lines:
        sys.stderr.write(line + "\n")


def _dense_metric(report: Mapping[str, Any], gates: Gates) -> dict[str, Any]:
    """What the points are compared with; ``limit`` is the worst value that the gates let pass, or None."""
    metric = report["metric"]
    sign = 1 if metric["higher_is_better"] else -1
    limits = [] if gates.min_metric is None else [gates.min_metric]
    limits += [] if gates.max_drop is None else [metric["dense"] - sign * gates.max_drop]
    names = ("name", "unit", "higher_is_better", "dense", "num_examples", "runtime")
    return {**{name: metric[name] for name in names}, "limit": max(limits, key=lambda x: sign * x, default=None)}


def _key(sweep: _Sweep) -> str:
    """Hash of all that a point follows from, but for its sparsity: settings, contents of what they name, programs."""
    opened, settings = sweep.opened, sweep.opened.settings
    trains = sweep.method.trains or is_asked(settings)
    named = {str(value.value).partition(":")[0] for value in settings.values() if isinstance(value.value, str)}
    calibration = opened.calibration
    return canonical.sha256_of(
        {
            "settings": {name: value.value for name, value in settings.items() if name not in NOT_IN_KEY},
            "code": {name: canonical.sha256_of_file(Path(name)) for name in sorted(named) if name.endswith(".py")},
            "method": sweep.method.name,
            "source_sha256": opened.source.sha256,
            "network_sha256": network_sha256(opened.graph),
            "calibration_sha256": None if calibration is None else calibration.sha256(),
            "evaluation_sha256": read_evaluation(opened)[0].sha256(),
            "training_sha256": training_data(opened).sha256() if trains else None,
            **cache.versions(),
        }
    )


def _name(sparsity: float) -> str:
    """Of a point's folder."""
    return f"sparsity-{sparsity!r}"


def _clear(out: Path) -> None:
    """Take away what a point left: its run, a rejected one, and its journals."""
    for path in (out, out.with_name(out.name + REJECTED)):
        store.remove(path)
    delete_journals(store.journal_path(out))


def _dry_run(sweep: _Sweep, points: Sequence[Settings]) -> dict[str, Any]:
    """What would be decided at each point, or why nothing can be."""
    found: list[dict[str, Any]] = []
    for point in points:
        entry: dict[str, Any] = {"sparsity": float(point["sparsity"].value), "code": 0, "message": "", "plan": None}
        with tempfile.TemporaryDirectory() as nowhere:
            _, budget = checked_goal(JOB, point, dry_run=True, plan=None)
            target = Target(Path(nowhere), None, JOB, gates_of(point), sweep.argv, budget)
            try:
                entry["plan"] = run_opened(_of_point(sweep.opened, point), sweep.method, target)
            except OF_A_POINT as error:
                entry |= {"code": error.exit_code, "message": error.message}
        found.append(entry)
    return {"schema": DRY_RUN, "method": sweep.method.name, "points": found}
