"""The order of the steps: read, trace, plan, apply, export, verify, report, publish. The only file that knows it."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from . import canonical, equalizing, figures, inspection, measuring, planning, store
from .bench import measure_latency
from .budget import Budget
from .build import (
    ONNX,
    PLAN,
    Dense,
    build,
    dense_files,
    dry_run_record,
    planning_context,
    read_plan_files,
    sealed,
    with_program,
    write_plan,
    write_sensitivities,
)
from .context import Context, Progress
from .data import Data
from .errors import GateError, InputError, UsageError, escape
from .finish import (
    DENSE,
    LATENCY_REPEATS,
    LATENCY_THREADS,
    Target,
    finish,
    publish_summary,
    raise_if_failed,
    read_evaluation,
    read_run,
    write_manifest,
)
from .formats import compressed_tensors
from .formats.checkpoint import read_checkpoint
from .formats.packed import decode
from .job import Job, check_shapes, gates_of, memory_of, open_job, out_folder, read_named
from .manifest import NAME as MANIFEST
from .model import PROGRAM, WEIGHTS
from .plan import Plan, read_plan
from .recovery import is_asked, recipe_of, training_data
from .registry import METHODS, TASKS, Method, find_method, load_module, methods_for
from .sensitivity import Sensitivity
from .settings import Settings, Value, chosen_budget
from .task import Task, load_task
from .train.journal import delete_journals
from .verdict import Verdict, limit_check, metric_checks
from .verify import (
    evaluate,
    measure_parity,
    open_session,
    runtime_forward,
)

CONFIG = "config.json"  # of a Hugging Face folder
DENSE_FILES = "dense files"  # in the memo of a job


def run_method(
    job: str,
    checkpoint: Path,
    settings: Settings,
    *,
    force: bool,
    dry_run: bool,
    plan: Path | None,
    pick: str | None = None,
    resume: bool = False,
    command: list[str],
    progress: Progress,
) -> dict[str, Any]:
    """``hcompress prune`` and ``hcompress quantize``: plan, apply, verify and publish a run folder.

    Args:
        plan: A run folder or plan.json whose decisions are kept.
        pick: Another point of that run's frontier: its number, or a budget.
        resume: Go on with the training of an interrupted run into the same folder.

    Returns:
        The report record; with ``dry_run``, what would be decided.

    Raises:
        GateError: A check failed; the report is in ``OUT.rejected``.
        BudgetError: The budget is out of reach.
    """
    out = None if dry_run else out_folder(settings)
    method, budget = checked_goal(job, settings, dry_run=dry_run, plan=plan)
    if pick is not None and plan is None:
        raise UsageError("--pick needs the run whose frontier it means", hint="pass --plan RUN as well")
    if out is None:
        with tempfile.TemporaryDirectory() as nowhere:
            target = Target(Path(nowhere), None, job, gates_of(settings), command, budget)
            return _plan_and_finish(method, checkpoint, settings, plan, pick, target, progress)
    with store.staged(out, force, [checkpoint]) as stage:
        target = Target(stage, out, job, gates_of(settings), command, budget)
        return _plan_and_finish(method, checkpoint, settings, plan, pick, replace(target, resume=resume), progress)


def checked_goal(job: str, settings: Settings, *, dry_run: bool, plan: Path | None) -> tuple[Method, Budget | None]:
    """The method and the budget of a run, checked against the settings before any work.

    Raises:
        UsageError: They don't fit, or evaluation data are missing.
    """
    method = find_method(job, settings["method"].value or methods_for(job)[0].name)
    budget = chosen_budget(settings)
    gates_of(settings)
    memory_of(settings)
    recipe_of(settings, 1, usual_optimizer="sgd", default=1)  # what is wrong with it is said before any work
    if settings["eval"].value is None and (
        not dry_run or (plan is None and planning.is_searched(method, budget, settings))
    ):
        raise UsageError(
            "no evaluation data", hint="pass --eval FILE.npz, FILE.safetensors or FILE.py:fn(args), or set [data] eval"
        )
    if budget is not None and budget.quantity not in method.budgets and plan is None:
        raise UsageError(
            f"method {method.name} has no {budget.quantity} budget", hint=f"it takes {', '.join(method.budgets)}"
        )
    if plan is None:
        planning.require_counted_activations(method, budget, settings)
    return method, budget


def _plan_and_finish(
    method: Method,
    checkpoint: Path,
    settings: Settings,
    plan: Path | None,
    pick: str | None,
    target: Target,
    progress: Progress,
) -> dict[str, Any]:
    """Read the network, plan into the stage and finish it; stop at the plan where nothing is published."""
    given = None if plan is None else read_plan_files(plan)
    if given is not None:
        _require_job(given[0], method, plan)
    opened = open_job(
        checkpoint,
        settings,
        progress,
        needs_data=plan is None and method.needs_data,
        inputs=() if given is None else given[0].inputs,
    )
    return run_opened(opened, method, target, plan=plan, given=given, pick=pick)


def run_opened(
    opened: Job,
    method: Method,
    target: Target,
    *,
    plan: Path | None = None,
    given: tuple[Plan, dict[str, Tensor]] | None = None,
    pick: str | None = None,
) -> dict[str, Any]:
    """A run of a network that was read: plan into the stage and finish it.

    Args:
        given: What ``plan`` holds.

    Returns:
        As for ``run_method``.
    """
    settings = opened.settings
    _check_before_work(opened, target, trains=is_asked(settings) or (plan is None and method.trains))
    if plan is None:
        planning.require_groups(opened, method)
    if DENSE_FILES not in opened.memo:
        opened.memo[DENSE_FILES] = dense_files(opened)
    dense: Dense = opened.memo[DENSE_FILES]
    if given is not None:
        opened = equalizing.as_planned(opened, given[0])
    elif target.job == "quantize":
        opened = equalizing.chosen(opened, planning.planner_options(opened, method), dense)
    sensitivities: dict[str, Sensitivity] = {}
    if given is None or plan is None:
        gates = planning.search_gates(method, target.budget, target.gates, settings, opened.task)
        target = replace(target, gates=gates)
        goal = planning.Goal(method, target.budget, gates, dense, target.stage, target.journal(), target.resume)
        decided, built, sensitivities = planning.make_plan(opened, goal)
    else:
        if pick is not None:
            _note_other_source(opened, given[0])
            folder = plan if plan.is_dir() else plan.parent
            decided, built = planning.pick(opened, given[0], folder, pick, dense, target.stage)
            if is_asked(opened.settings):
                decided = planning.recovered(opened, decided, target.journal(), resume=target.resume)
                decided, built = planning.publish(opened, decided, target.stage)
        else:
            fitted = planning.Decided(*_fitted(opened, given, planning_context(opened, dense, 0)))
            if is_asked(opened.settings):
                fitted = planning.recovered(opened, fitted, target.journal(), resume=target.resume)
            decided, built = planning.publish(opened, fitted, target.stage)
    built = with_program(opened, built, target.stage)
    if target.out is None:
        return dry_run_record(opened, decided.plan, built)
    write_sensitivities(target.stage, sensitivities)
    budget = target.budget or decided.plan.budget
    predictors = _compared(opened) if target.job == "quantize" else None
    target = replace(
        target, budget=budget, frontier=decided.frontier, sensitivities=sensitivities, predictors=predictors
    )
    if target.job == "prune":
        target = replace(target, saliencies=planning.saliencies_of(opened, decided))
    try:
        record = finish(opened, built, decided.plan, dense, target)
    except GateError:
        _delete_journals(target)
        raise
    _delete_journals(target)
    return record


def _check_before_work(job: Job, target: Target, *, trains: bool) -> None:
    """What else would be found wrong after an hour: globs, training data, and evaluation data, which nothing keeps."""
    job.graph.without(tuple(job.value("exclude") or ()))
    compares = target.job == "quantize" and measuring.num_configurations(job) > 0
    if compares and target.out is None:
        raise UsageError(
            "--configurations goes into the report, and --dry-run writes none",
            hint="use hcompress sensitivity --configurations N, or leave --dry-run out",
        )
    if compares and job.calibration is None:
        raise UsageError(
            "--configurations runs the network on calibration data, and there are none",
            hint="pass --data FILE.npz, FILE.safetensors or FILE.py:fn(args), or leave --configurations out",
        )
    if trains:
        training_data(job)
    if job.value("eval") is not None:
        read_evaluation(job)


def _delete_journals(target: Target) -> None:
    """A run that is published or rejected has nothing to go on with."""
    if (journal := target.journal()) is not None:
        delete_journals(journal)


def _require_job(plan: Plan, method: Method, path: Path | None) -> None:
    """A plan is followed by the command that makes such plans.

    Raises:
        UsageError: It is the other command's.
    """
    jobs = {known.name: known.job for known in METHODS}
    job = jobs.get(plan.method, method.job)
    if job != method.job:
        raise UsageError(
            f"{path}: a plan of {escape(plan.method)}, which is a method of hcompress {job}",
            hint=f"use hcompress {job} --plan {path}, or hcompress apply",
        )


def _fitted(job: Job, given: tuple[Plan, dict[str, Tensor]], context: Context) -> tuple[Plan, dict[str, Tensor]]:
    """A plan made on another checkpoint of the architecture: its decisions, with weights of this one."""
    plan, sidecar = given
    _note_other_source(job, plan)
    if plan.source_sha256 == job.source.sha256 or not plan.has_values():
        return given
    untrained = plan.untrained()
    if untrained.options != plan.options and not is_asked(job.settings):
        job.notes.append("the plan's network was trained; this one isn't: pass --recover-steps")
    if plan.makes_up_for_rounding():
        return sealed(*planning.corrected(job, untrained, {}, context))
    method = find_method("prune", plan.method)
    if job.calibration is None:
        raise UsageError(
            "the plan's weights are another checkpoint's, and computing them anew needs calibration data",
            hint="pass --data FILE.npz, FILE.safetensors or FILE.py:fn(args)",
        )
    refit = load_module(method).refit
    refitted, tensors = refit(untrained, sidecar, job.source, job.graph, job.calibration, context)
    return sealed(replace(refitted, seed=plan.seed, inputs=plan.inputs), tensors)


def _note_other_source(job: Job, plan: Plan) -> None:
    """A plan may have been made on another checkpoint of the same architecture."""
    if plan.source_sha256 != job.source.sha256:
        job.notes.append("the plan was made on another checkpoint: its decisions are kept, the weights recomputed")


def apply_plan(
    checkpoint: Path, plan: Path, settings: Settings, *, force: bool, command: list[str], progress: Progress
) -> dict[str, Any]:
    """``hcompress apply``: a plan's decisions on a checkpoint; no data needed, the metric only with ``--eval``."""
    out = out_folder(settings)
    with store.staged(out, force, [checkpoint, plan]) as stage:
        decided, sidecar = read_plan_files(plan)
        opened = open_job(checkpoint, settings, progress, needs_data=False, inputs=decided.inputs)
        if decided.makes_up_for_rounding() and decided.source_sha256 != opened.source.sha256:
            opened.notes.append(
                "levels are the nearest, and biases the checkpoint's own: making up for rounding needs data"
            )
            decided, sidecar = decided.without_corrections(), {}
        if decided.has_values() and decided.source_sha256 != opened.source.sha256:
            raise InputError(
                f"{plan}: the plan's weights are another checkpoint's",
                hint="hcompress prune CHECKPOINT --plan PLAN --data DATA keeps its decisions and computes them anew",
            )
        _note_other_source(opened, decided)
        dense = dense_files(opened)
        opened = equalizing.as_planned(opened, decided)
        write_plan(stage, decided, sidecar)
        built = with_program(opened, build(opened, decided, sidecar, stage), stage)
        target = Target(stage, out, "apply", gates_of(settings), command, decided.budget)
        return finish(opened, built, decided, dense, target)


def export_dense(
    checkpoint: Path, settings: Settings, *, force: bool, command: list[str], progress: Progress
) -> dict[str, Any]:
    """``hcompress export``: the network as it is, in the formats that runtimes load, proved equal to torch's."""
    out = out_folder(settings)
    with store.staged(out, force, [checkpoint]) as stage:
        opened = open_job(checkpoint, settings, progress, needs_data=False, example="eval", may_guess=True)
        built = with_program(opened, build(opened, None, {}, stage), stage)
        dense = Dense(built.onnx, built.sizes)
        target = Target(stage, out, "export", gates_of(settings), command, None)
        return finish(opened, built, None, dense, target)


def export_layout(
    run: Path, config: Path | None, out: Path, *, force: bool, command: list[str], progress: Progress
) -> dict[str, Any]:
    """``hcompress export --format compressed-tensors``: a run's weights in the layout of Hugging Face folders.

    Args:
        config: The network's config.json, to which the quantization is added; None for a new one with nothing else.

    Raises:
        UsageError: The run rounds activations, or a weight has no place in the layout.
    """
    record, started = read_run(run), time.monotonic()
    progress("read weights", 0, None)
    plan = read_plan(run / PLAN) if (run / PLAN).is_file() else None
    if figures.has_integers(plan):
        raise UsageError(
            f"{run}: its activations are rounded, and {compressed_tensors.NAME} is written for weights alone",
            hint="quantize again with --activations float",
        )
    checkpoint = read_checkpoint(run / WEIGHTS)
    linear = {str(layer["tensor"]) for layer in record["layers"] if layer["op"] == "linear"}
    layout = compressed_tensors.lay_out(decode(checkpoint.state, checkpoint.metadata), linear)
    hint = f"pass the {CONFIG} of the network's own folder"
    given = {} if config is None else canonical.read_object(config, missing=hint, damaged=hint)
    with store.staged(out, force, [run, *([] if config is None else [config])]) as stage:
        progress("write", 0, None)
        store.write_file(stage / WEIGHTS, safetensors.torch.save(layout.tensors, {"format": "pt"}))
        store.write_file(stage / CONFIG, canonical.dumps({**given, "quantization_config": layout.config}))
        files = {path.name: path.stat().st_size for path in sorted(stage.iterdir())}
        write_manifest(stage, command, {"source": canonical.sha256_of_file(run / MANIFEST)}, int(record["seed"]))
        store.publish(stage, out)
    return {
        "schema": "hcompress.export/1",
        "format": compressed_tensors.NAME,
        "files": files,
        "packed": list(layout.packed),
        "floats": list(layout.floats),
        "tied": list(layout.tied),
        "time_s": time.monotonic() - started,
    }


def _compared(job: Job) -> dict[str, Any] | None:
    """Predictors of the loss on random widths, where that is asked for."""
    count = measuring.num_configurations(job)
    return measuring.compare(job, count) if count else None


def inspect_checkpoint(
    checkpoint: Path, settings: Settings, *, progress: Progress, channels: bool = False
) -> dict[str, Any]:
    """``hcompress inspect``: what a checkpoint holds and what blocks its compression.

    Args:
        channels: Whether to find the groups of channels that can be cut out, which takes an architecture.
    """
    if settings["model"].value is None and checkpoint.is_file():
        read = read_checkpoint(checkpoint)
        if read.program is None:
            _require_no_channels(checkpoint, asked=channels)
            return inspection.describe_tensors(read)
    if settings["model"].value is None and checkpoint.is_dir():
        _require_no_channels(checkpoint, asked=channels)
        return inspection.describe_run(checkpoint, read_run(checkpoint))
    opened = open_job(checkpoint, settings, progress, needs_data=False, may_guess=True)
    record = inspection.describe_network(checkpoint, opened.source, opened.graph, opened.notes)
    if channels:
        progress("find channels", 0, None)
        record |= inspection.describe_channels(opened.graph)
    return record


def _require_no_channels(checkpoint: Path, *, asked: bool) -> None:
    if asked:
        raise UsageError(f"{checkpoint}: channels are those of an architecture", hint="pass --model FILE.py:FN as well")


def verify_run(run: Path, settings: Settings, *, progress: Progress) -> dict[str, Any]:
    """``hcompress verify``: measure a run folder's files again, on any evaluation data.

    Raises:
        GateError: A check failed.
    """
    gates = gates_of(settings)
    record = read_run(run)
    threads = settings["threads"].value
    session = open_session(run / ONNX, threads)
    program = read_checkpoint(run / PROGRAM).program
    assert program is not None and program.example_inputs is not None
    inputs, metric, checks = program.example_inputs[0], None, []
    if settings["eval"].value is not None:
        data = read_named(settings, "eval")
        task = load_task(settings["task"].value or _recorded_task(record), data)
        data = task.prepare(data)
        check_shapes(data, inputs)
        inputs = data.first(8).inputs
        compressed = evaluate(runtime_forward(session), data, task, "evaluate compressed", progress)
        dense = _dense_metric(run, record, data, task, compressed, threads, progress)
        metric = figures.metric_record(task, dense, compressed, data)
        checks = metric_checks(
            gates, unit=task.unit, higher_is_better=task.higher_is_better, dense=dense, compressed=compressed
        )
    elif gates.max_drop is not None or gates.min_metric is not None:
        raise UsageError("--max-drop and --min-metric need evaluation data", hint="pass --eval")
    integer = figures.has_integers(read_plan(run / PLAN) if (run / PLAN).is_file() else None)
    parity = measure_parity(program.module(check_guards=False), session, inputs)
    checks += [
        *limit_check("max_bytes", (run / record["delivered"]).stat().st_size, gates.max_bytes, "bytes"),
        *figures.parity_checks(parity, integer),
    ]
    if gates.max_latency is not None:
        timed = {"compressed": open_session(run / ONNX, threads or LATENCY_THREADS)}
        latency = measure_latency(timed, tuple(x[:1] for x in inputs), LATENCY_REPEATS, progress)
        checks += limit_check("max_latency", latency["compressed"].median, gates.max_latency, "ms")
    result = {
        "schema": "hcompress.verify/1",
        "run": str(run),
        "metric": metric,
        "parity": [figures.parity_record(p) for p in parity],
        "checks": canonical.plain(checks),
    }
    full = {**record, "metric": result["metric"], "parity": result["parity"], "checks": result["checks"]}
    publish_summary(full, settings)
    raise_if_failed(Verdict(tuple(checks)), "the run folder is as it was", result)
    return result


def _recorded_task(record: Mapping[str, Any]) -> str | None:
    """The built-in task whose metric a report carries; None where it isn't one, or there is no metric."""
    name = (record.get("metric") or {}).get("name")
    return next((task.name for task in TASKS if task.metric == name), None)


def _dense_metric(
    run: Path,
    record: Mapping[str, Any],
    data: Data,
    task: Task,
    compressed: float,
    threads: int | None,
    progress: Progress,
) -> float:
    """The dense network's figure: as recorded where the data are the same, measured again where they aren't."""
    recorded = record.get("metric") or {}
    if recorded.get("data_sha256") == data.sha256() and recorded.get("name") == task.name:
        return float(recorded["dense"])
    if not (run / DENSE).is_file():  # an exported run: the model is the dense one
        return compressed
    return evaluate(runtime_forward(open_session(run / DENSE, threads)), data, task, "evaluate dense", progress)


def bench_run(run: Path, settings: Settings, *, repeats: int, batch: int, progress: Progress) -> dict[str, Any]:
    """``hcompress bench``: latency of a run's model beside the dense one, in ONNX Runtime."""
    read_run(run)
    threads = int(settings["threads"].value or LATENCY_THREADS)
    sessions = {"compressed": open_session(run / ONNX, threads)}
    if (run / DENSE).is_file():
        sessions = {"dense": open_session(run / DENSE, threads), **sessions}
    program = read_checkpoint(run / PROGRAM).program
    assert program is not None and program.example_inputs is not None
    inputs = tuple(torch.cat([x[:1]] * batch) for x in program.example_inputs[0])
    latency = measure_latency(sessions, inputs, repeats, progress)
    ratio = latency["compressed"].median / latency["dense"].median if "dense" in latency else 1.0
    return {
        "schema": "hcompress.bench/1",
        "run": str(run),
        "batch": batch,
        "threads": threads,
        "repeats": repeats,
        "latency_ms": canonical.plain(latency),
        "ratio": ratio,
    }


def run_demo(out: Path, settings: Settings, *, force: bool, command: list[str], progress: Progress) -> dict[str, Any]:
    """``hcompress demo``: prune, then quantize, the shipped network on the shipped data."""
    started = time.monotonic()
    if not force:
        store.check_target(out, force=False)
    folder = resources.files("compress.demo")
    given = {
        "model": "compress.demo.network:fashion_net",
        "data": str(folder / "calibration.npz"),
        "eval": str(folder / "evaluation.npz"),
        "mean": (0.286,),
        "std": (0.353,),
        "task": "classification",
        "model_args": None,
        "layout": None,
    }
    base = {**settings, **{name: Value(value, "demo") for name, value in given.items()}}

    def with_out(name: str, **more: Any) -> dict[str, Value]:
        return {**base, "out": Value(str(out / name), "demo"), **{k: Value(v, "demo") for k, v in more.items()}}

    checkpoint = Path(str(folder / "fashion_net.safetensors"))
    pruned = run_method(
        "prune",
        checkpoint,
        with_out("pruned", method="layerwise", sparsity=0.5, budget=None),
        force=force,
        dry_run=False,
        plan=None,
        command=command,
        progress=progress,
    )
    quantized = run_method(
        "quantize",
        out / "pruned",
        with_out("quantized", method="hawq", budget="8bit", sparsity=None),
        force=force,
        dry_run=False,
        plan=None,
        command=command,
        progress=progress,
    )
    rows = [
        _demo_row("dense", pruned, "dense", pruned["dense_bytes"], 0.0, 32.0),
        _demo_row("pruned", pruned, "compressed", _delivered_bytes(pruned), pruned["sparsity"], pruned["average_bits"]),
        _demo_row(
            "pruned + quantized",
            quantized,
            "compressed",
            _delivered_bytes(quantized),
            quantized["sparsity"],
            quantized["average_bits"],
        ),
    ]
    return {
        "schema": "hcompress.demo/1",
        "metric_name": "accuracy",
        "rows": rows,
        "runs": {"pruned": str(out / "pruned"), "quantized": str(out / "quantized")},
        "num_examples": pruned["metric"]["num_examples"],
        "time_s": time.monotonic() - started,
    }


def _demo_row(name: str, record: dict[str, Any], side: str, size: int, sparsity: float, bits: float) -> dict[str, Any]:
    return {
        "name": name,
        "metric": record["metric"][side],
        "bytes": size,
        "macs": record["macs"][side],
        "latency_ms": record["latency_ms"][side],
        "sparsity": sparsity,
        "average_bits": bits,
    }


def _delivered_bytes(record: dict[str, Any]) -> int:
    return int(record["files"][record["delivered"]])
