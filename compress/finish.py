"""From files to a run folder: verify, report, manifest, publish or reject."""

from __future__ import annotations

import os
import platform
import resource
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import canonical, figures, report, store, summary
from .apply import float_module
from .bench import Latency, measure_latency
from .budget import Budget
from .build import (
    ONNX,
    Built,
    Dense,
    delivered_name,
)
from .context import Progress
from .data import Data, check_forward
from .errors import DiskError, GateError, InputError, UsageError
from .formats.checkpoint import read_checkpoint
from .formats.onnx_sizes import onnx_sizes
from .formats.packed import QuantizedTensor, decode
from .frontier import FrontierRecord
from .job import Job, check_shapes, read_named
from .manifest import NAME as MANIFEST
from .manifest import Manifest, check_files, describe_files, read_manifest
from .model import WEIGHTS
from .plan import Plan
from .saliencies import Saliencies
from .sensitivity import Sensitivity
from .settings import Settings
from .task import Task, check_targets, divergence_words, has_logits, load_task
from .train.batches import CPU
from .train.distill import divergences_from, run
from .verdict import Check, Gates, Verdict, limit_check, metric_checks
from .verify import (
    Session,
    evaluate,
    measure_parity,
    open_session,
    require_targets,
    runtime_forward,
)

DENSE = "dense.onnx"
EVALUATION, DENSE_METRIC = "evaluation data", "dense metric"  # in the memo of a job
LATENCY_REPEATS = 150
LATENCY_TIME_S = 4.0
LATENCY_TRIES = 3
LOSS_BATCH = 32
LEAST_UNSEEN = 64  # of the evaluation data's examples, where fewer calibrate
LATENCY_THREADS = 1  # a second session's idle threads spin, and would slow the first on a machine with few cores


@dataclass(frozen=True, slots=True)
class Target:
    """Where a run goes and what it has to pass.

    Attributes:
        out: None where nothing is published.
        is_alone: Whether it is no point of a sweep, which writes the summary of all.
    """

    stage: Path
    out: Path | None
    job: str
    gates: Gates
    command: list[str]
    budget: Budget | None
    frontier: FrontierRecord | None = None
    sensitivities: Mapping[str, Sensitivity] = field(default_factory=dict)
    resume: bool = False
    predictors: Mapping[str, Any] | None = None
    saliencies: Saliencies | None = None
    is_alone: bool = True

    def journal(self) -> Path | None:
        """Where the state of a training is kept while it runs: beside the run folder."""
        return None if self.out is None else store.journal_path(self.out)


def finish(job: Job, built: Built, plan: Plan | None, dense: Dense, target: Target) -> dict[str, Any]:
    """Verify the staged files, write the report and the manifest, and put the folder in its place.

    Raises:
        GateError: A check failed: the report goes to ``OUT.rejected``, the models are thrown away.
    """
    stage, settings, out = target.stage, job.settings, target.out
    assert out is not None
    _reread_weights(built, stage)
    if plan is not None:
        store.write_file(stage / DENSE, dense.onnx)
    record = _measure(job, built, plan, dense, target)
    verdict = Verdict(tuple(Check(**check) for check in record["checks"]))
    _write_report(stage, record)
    if not verdict.ok:
        _reject(target, out, record, settings)
    write_manifest(stage, target.command, job.parents(), int(job.value("seed")))
    check_files(stage, read_manifest(stage))
    job.progress("publish", 0, None)
    store.publish(stage, out)
    if target.is_alone:
        publish_summary(record, settings)
    return record


def _reread_weights(built: Built, stage: Path) -> None:
    """Open the written weights again and compare them to the bit with what was to be written."""
    checkpoint = read_checkpoint(stage / WEIGHTS)
    read = decode(checkpoint.state, checkpoint.metadata)
    for key, value in built.compressed.tensors.items():
        found = read.get(key)
        same = (
            isinstance(found, QuantizedTensor)
            and torch.equal(found.levels, value.levels)
            and torch.equal(found.scale, value.scale)
            if isinstance(value, QuantizedTensor)
            else isinstance(found, Tensor) and torch.equal(found, value)
        )
        if not same:
            raise DiskError(f"{stage / WEIGHTS}: {key} was read back different", hint="check the disk")


def _measure(job: Job, built: Built, plan: Plan | None, dense: Dense, target: Target) -> dict[str, Any]:
    settings, progress, task = job.settings, job.progress, job.task
    threads = settings["threads"].value
    session = open_session(target.stage / ONNX, threads)
    dense_session = session if plan is None else open_session(dense.onnx, threads)
    data = None
    if settings["eval"].value is not None:
        data, task = read_evaluation(job)
    examples = data.first(8).inputs if data is not None else _examples(job)
    integer = figures.has_integers(plan)
    parity = measure_parity(built.module, session, examples)
    checks = figures.parity_checks(parity, integer)
    metric = None
    if data is not None:
        compressed_metric = evaluate(runtime_forward(session), data, task, "evaluate compressed", progress)
        dense_metric = compressed_metric
        if plan is not None:
            dense_metric = _dense_metric(job, dense_session, data, task)
        metric = figures.metric_record(task, dense_metric, compressed_metric, data)
        checks += metric_checks(
            target.gates,
            unit=task.unit,
            higher_is_better=task.higher_is_better,
            dense=dense_metric,
            compressed=compressed_metric,
        )
    elif target.gates.max_drop is not None or target.gates.min_metric is not None:
        raise UsageError("--max-drop and --min-metric need evaluation data", hint="pass --eval")
    models = {"compressed": built.onnx} if plan is None else {"dense": dense.onnx, "compressed": built.onnx}
    sessions = {name: open_session(model, threads or LATENCY_THREADS) for name, model in models.items()}
    single = tuple(x[:1] for x in examples)
    latency = timed(sessions, single, target.budget, progress)
    delivered = delivered_name(settings)
    shapes = {layer.tensor: layer.shape for layer in job.graph.layers}
    layers = figures.layer_records(
        built.original, built.graph, built.compressed.tensors, plan, target.frontier, target.sensitivities, shapes
    )
    totals = figures.totals(layers)
    checks += limit_check("max_bytes", built.sizes[delivered], target.gates.max_bytes, "bytes")
    checks += limit_check("max_latency", latency["compressed"].median, target.gates.max_latency, "ms")
    milliseconds = {name: latency.get(name, latency["compressed"]).median for name in ("dense", "compressed")}
    parameters, state = dict(job.source.module.named_parameters()), job.source.module.state_dict()
    left = {name: built.original.get(name, parameter) for name, parameter in parameters.items()}
    params = {"dense": _num_elements(parameters), "compressed": _num_elements(left)}
    macs = {"dense": job.graph.macs, "compressed": built.graph.macs}
    reached = {**totals, "bytes": built.sizes[delivered], "latency": milliseconds["compressed"]}
    whole = {"bytes": len(dense.onnx), "latency": milliseconds["dense"]}
    nonzero = {name: int(torch.count_nonzero(state[name])) for name in shapes if name in state}
    nonzero_macs = {"dense": job.graph.nonzero_macs(nonzero), "compressed": figures.nonzero_macs(built.graph, layers)}
    is_masked = plan is not None and bool(plan.masks())
    reached |= {"params": params["compressed"], "macs": (nonzero_macs if is_masked else macs)["compressed"]}
    if built.group_sparsity is not None:
        reached["sparsity"] = built.group_sparsity
    whole |= {"params": params["dense"], "macs": macs["dense"]}
    checks += figures.budget_checks(target.budget, reached, whole, target.frontier)
    origin = figures.origin(job.source.path)
    if origin is not None:
        job.notes.append(f"'dense' is {job.source.path.name}, itself a run; {figures.describe_origin(origin)}")
    job.notes.extend([*built.notes, *figures.warnings(layers)])
    return {
        "schema": figures.REPORT_SCHEMA,
        "command": target.job,
        "method": None if plan is None else plan.method,
        "seed": int(settings["seed"].value),
        "source": {"name": job.source.path.name, "sha256": job.source.sha256},
        "origin": origin,
        "budget": None if target.budget is None else str(target.budget),
        "delivered": delivered,
        "metric": metric,
        "files": dict(built.sizes),
        "onnx_bytes": onnx_sizes(built.onnx),
        "dense_bytes": len(dense.onnx),
        "average_bits": totals["average_bits"],
        "sparsity": totals["sparsity"],
        "params": params,
        "macs": macs,
        "nonzero_macs": nonzero_macs,
        "latency_ms": milliseconds,
        "latency_threads": threads or LATENCY_THREADS,
        "parity": [figures.parity_record(p) for p in parity],
        "checks": canonical.plain(checks),
        "layers": layers,
        "activations": figures.activation_records(built.graph, plan, target.frontier, target.sensitivities),
        "groups": [] if plan is None else figures.group_records(plan),
        "frontier": None if target.frontier is None else figures.frontier_figures(target.frontier),
        "loss": None if plan is None else _loss(job, built, plan, data),
        "saliencies": canonical.plain(target.saliencies),
        "predictors": None if target.predictors is None else dict(target.predictors),
        "notes": job.notes,
        "versions": figures.versions(),
        "time_s": time.monotonic() - job.started,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def _dense_metric(job: Job, session: Session, data: Data, task: Task) -> float:
    """The dense network's figure, measured once."""
    if DENSE_METRIC not in job.memo:
        job.memo[DENSE_METRIC] = evaluate(runtime_forward(session), data, task, "evaluate dense", job.progress)
    return float(job.memo[DENSE_METRIC])


def _num_elements(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors.values())


def timed(
    sessions: Mapping[str, Session], inputs: tuple[Tensor, ...], budget: Budget | None, progress: Progress
) -> dict[str, Latency]:
    """Latencies in turns; where they miss a budget, again: other work only makes them longer."""
    best: dict[str, Latency] | None = None
    for _ in range(LATENCY_TRIES):
        found = measure_latency(sessions, inputs, LATENCY_REPEATS, progress, max_time_s=LATENCY_TIME_S)
        if best is None or found["compressed"].median < best["compressed"].median:
            best = found
        if budget is None or budget.quantity != "latency":
            break
        dense = best.get("dense", best["compressed"]).median
        if best["compressed"].median <= budget.absolute(dense):
            break
    assert best is not None
    return best


def _loss(job: Job, built: Built, plan: Plan, evaluation: Data | None) -> dict[str, Any] | None:
    """What the compressed network loses on the calibration data, what the method expected, and what others show.

    On the calibration data, which layers were fitted to, it can be far less than on examples that nothing has seen: so
    many of the evaluation data's, at even steps, are measured as well.
    """
    if job.calibration is None:
        return None
    data, dense = job.calibration.data, float_module(job.graph)

    def measured(some: Data, what: str) -> float:
        def progress(done: int) -> None:
            job.progress(f"loss on {what} data", done, len(some))

        return divergences_from(dense, [built.module], some, job.task, CPU, batch_size=LOSS_BATCH, progress=progress)[0]

    found, unseen = measured(data, "calibration"), None
    if evaluation is not None:
        some = evaluation.every(-(-len(evaluation) // max(len(data), LEAST_UNSEEN)))
        unseen = {"measured": measured(some, "evaluation"), "num_examples": len(some)}
    with torch.no_grad():
        outputs = run(dense, data.first(1), CPU)
    words, unit = divergence_words(outputs, are_logits=has_logits(job.task))
    return {
        # Of another checkpoint, what was predicted says nothing about this one.
        "predicted": plan.predicted.get("loss") if plan.source_sha256 == job.source.sha256 else None,
        "measured": found,
        "unit": unit,
        "what": f"{words} the dense network, calibration data",
        "num_examples": len(data),
        "evaluation": unseen,
    }


def read_evaluation(job: Job) -> tuple[Data, Task]:
    """The evaluation data, checked against the network, and the task that scores them; kept for a sweep's points."""
    if not job.is_swept:
        return _read_evaluation(job)
    if EVALUATION not in job.memo:
        job.memo[EVALUATION] = _read_evaluation(job)
    found: tuple[Data, Task] = job.memo[EVALUATION]
    return found


def _read_evaluation(job: Job) -> tuple[Data, Task]:
    job.progress("read evaluation data", 0, None)
    data, task = read_named(job.settings, "eval"), job.task
    if job.settings["task"].value is None and job.calibration is None:
        task = load_task(None, data)
    data = task.prepare(data)
    require_targets(data)
    check_targets(task, check_forward(job.source.module, data, "--eval"), data)
    check_shapes(data, job.graph.example_inputs)
    return data, task


def _examples(job: Job) -> tuple[Tensor, ...]:
    return job.graph.example_inputs if job.calibration is None else job.calibration.data.first(8).inputs


def _write_report(stage: Path, record: dict[str, Any]) -> None:
    store.write_file(stage / "report.json", canonical.dumps(record))
    store.write_file(stage / "report.md", report.render_markdown(record))
    store.write_file(stage / "report.html", report.render_html(record))


def write_manifest(stage: Path, command: list[str], parents: Mapping[str, str], seed: int) -> None:
    """The last file of a run folder."""
    manifest = Manifest(
        files=describe_files(stage),
        parents=dict(parents),
        versions=figures.versions(),
        command=command,
        seed=seed,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        host={
            "machine": platform.machine(),
            "system": platform.system(),
            "processors": os.cpu_count(),
            "threads": torch.get_num_threads(),
        },
    )
    store.write_file(stage / MANIFEST, canonical.dumps(manifest))


def _reject(target: Target, out: Path, record: dict[str, Any], settings: Settings) -> None:
    """Publish the report without the models, then fail."""
    rejected = out.with_name(f"{out.name}.rejected")
    for path in list(target.stage.iterdir()):
        if path.name not in store.REJECTED_FILES:
            path.unlink()
    store.check_target(rejected, force=True)
    store.publish(target.stage, rejected)
    if target.is_alone:
        publish_summary(record, settings)
    verdict = Verdict(tuple(Check(**check) for check in record["checks"]))
    raise_if_failed(verdict, f"no model was published; the report is in {rejected}", record)


def raise_if_failed(verdict: Verdict, hint: str, record: dict[str, Any]) -> None:
    if verdict.ok:
        return
    failures = "; ".join(report.check_text(check) for check in verdict.failures())
    raise GateError(failures, hint=hint, report=record)


def publish_summary(record: dict[str, Any], settings: Settings) -> None:
    paths = {name: settings[name].value for name in ("summary", "junit")}
    lines = summary.publish(
        record,
        summary=None if paths["summary"] is None else Path(str(paths["summary"])),
        junit=None if paths["junit"] is None else Path(str(paths["junit"])),
        environment=os.environ,
    )
    for line in lines:
        sys.stderr.write(line + "\n")


def read_run(run: Path) -> dict[str, Any]:
    """A complete run folder's report, its files checked."""
    if not run.is_dir():
        raise InputError(f"{run}: no such run folder", hint="pass the --out folder of a finished run")
    check_files(run, read_manifest(run))
    return canonical.read_record(run / "report.json", figures.REPORT_SCHEMA)
