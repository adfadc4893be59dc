"""The order of the steps: read, trace, plan, apply, export, verify, report, publish. The only file that knows it."""

from __future__ import annotations

import os
import platform
import resource
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, fx

from . import canonical, figures, inspection, report, store, summary
from .apply import Compressed, assemble
from .apply import apply_plan as apply_decisions
from .bench import measure_latency
from .budget import Budget, parse_budget
from .context import Context, Progress, Storage
from .errors import BudgetError, DiskError, GateError, InputError, UsageError
from .export import onnx_model, safetensors_bytes, serialize, write_program
from .formats.checkpoint import read_checkpoint
from .formats.packed import QuantizedTensor, decode
from .formats.planes import packed_size
from .graph.rewrite import convolutional
from .graph.trace import Graph, trace_graph
from .manifest import NAME as MANIFEST
from .manifest import Manifest, check_files, describe_files, read_manifest
from .model import PROGRAM, WEIGHTS, Source, guess_inputs, load_source
from .plan import Plan, read_plan
from .registry import TASKS, find_measure, find_method, load_module, methods_for
from .sensitivity import Sensitivity
from .settings import Settings, Value, chosen_budget
from .task import Calibration, Data, Task, check_forward, load_task, read_data
from .verdict import Check, Gates, Verdict, limit_check, metric_checks
from .verify import (
    evaluate,
    measure_parity,
    open_session,
    runtime_forward,
)

ONNX, DENSE, PLAN, SIDECAR = "model.onnx", "dense.onnx", "plan.json", "plan.safetensors"
LATENCY_REPEATS = 60
LATENCY_TIME_S = 4.0
LATENCY_THREADS = 1  # a second session's idle threads spin, and would slow the first on a machine with few cores
SPARSITY_SLACK = 1e-4  # rounding to whole weights


@dataclass(frozen=True, slots=True)
class Job:
    """A network read and traced, with what the settings say about it."""

    source: Source
    graph: Graph
    task: Task
    calibration: Calibration | None
    settings: Settings
    progress: Progress
    notes: list[str]
    started: float

    def value(self, name: str) -> Any:
        """A setting's value."""
        return self.settings[name].value


# -- opening ---------------------------------------------------------------------------------------------------------


def _open(
    checkpoint: Path, settings: Settings, progress: Progress, *, needs_data: bool, example: str | None = None
) -> Job:
    """Read and trace a network; ``example`` names data that give the shape of an input where ``data`` doesn't."""
    started = time.monotonic()
    threads = settings["threads"].value
    if threads is not None:
        torch.set_num_threads(int(threads))
    _device(settings)
    progress("read checkpoint", 0, None)
    source = load_source(checkpoint, settings["model"].value, settings["model_args"].value)
    notes = list(source.notes)
    data = None
    if settings["data"].value is not None:
        progress("read data", 0, None)
        data = _read(settings, "data")
    elif needs_data:
        raise UsageError(
            "no calibration data",
            hint="pass --data FILE.npz, FILE.safetensors or FILE.py:fn(args), or set [data] calibration",
        )
    task = load_task(settings["task"].value, data)
    calibration = None
    if data is not None:
        prepared = task.prepare(data)
        check_forward(source.module, prepared, "--data")
        sample = prepared.sample(int(settings["num_calibration"].value), int(settings["seed"].value))
        calibration = Calibration(task, sample)
    if data is None and example is not None and settings[example].value is not None:
        data = load_task(settings["task"].value, shaped := _read(settings, example)).prepare(shaped)
        check_forward(source.module, data, f"--{example}")
        inputs = _two_of(data)
    else:
        inputs = _example_inputs(source, calibration, settings, notes)
    progress("trace", 0, None)
    graph = trace_graph(source.module, inputs)
    return Job(source, graph, task, calibration, settings, progress, notes, started)


def _device(settings: Settings) -> torch.device:
    name = str(settings["device"].value)
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"--device {name!r} is unknown", hint="cpu, cuda or cuda:0") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"--device {name}: torch sees no CUDA device", hint="use --device cpu")
    return device


def _read(settings: Settings, name: str) -> Data:
    value = settings[name].value
    if not isinstance(value, str):
        raise UsageError(
            "no evaluation data" if name == "eval" else "no calibration data",
            hint=f"pass --{name} FILE.npz, FILE.safetensors or FILE.py:fn(args)",
        )
    return read_data(
        value,
        f"--{name}",
        mean=settings["mean"].value,
        std=settings["std"].value,
        layout=settings["layout"].value,
    )


def _example_inputs(
    source: Source, calibration: Calibration | None, settings: Settings, notes: list[str]
) -> tuple[Tensor, ...]:
    if calibration is not None:
        return _two_of(calibration.data)
    if source.example_inputs is not None and all(len(x) >= 2 for x in source.example_inputs if x.dim()):
        return source.example_inputs
    example, note = guess_inputs(source.module, settings["input_shape"].value)
    notes.append(note)
    return example


def _two_of(data: Data) -> tuple[Tensor, ...]:
    """Two examples; copies, as a slice would be saved with all of its data."""
    return tuple(x.clone() for x in data.first(2).inputs)


# -- commands --------------------------------------------------------------------------------------------------------


def run_method(
    job: str,
    checkpoint: Path,
    settings: Settings,
    *,
    force: bool,
    dry_run: bool,
    plan: Path | None,
    command: list[str],
    progress: Progress,
) -> dict[str, Any]:
    """``hcompress prune`` and ``hcompress quantize``: plan, apply, verify and publish a run folder.

    Returns:
        The report record; with ``dry_run``, what would be decided.

    Raises:
        GateError: A check failed; the report is in ``OUT.rejected``.
        BudgetError: The budget is out of reach.
    """
    out = None if dry_run else _out(settings)
    method = find_method(job, settings["method"].value or methods_for(job)[0].name)
    budget = chosen_budget(settings)
    _gates(settings)
    if not dry_run and settings["eval"].value is None:
        raise UsageError(
            "no evaluation data", hint="pass --eval FILE.npz, FILE.safetensors or FILE.py:fn(args), or set [data] eval"
        )
    if budget is not None and budget.quantity not in method.budgets and plan is None:
        raise UsageError(
            f"method {method.name} has no {budget.quantity} budget", hint=f"it takes {', '.join(method.budgets)}"
        )
    if out is None:
        with tempfile.TemporaryDirectory() as nowhere:
            return _plan_and_finish(job, checkpoint, settings, plan, command, progress, (Path(nowhere), None))
    with store.staged(out, force, [checkpoint]) as stage:
        return _plan_and_finish(job, checkpoint, settings, plan, command, progress, (stage, out))


def _plan_and_finish(
    job: str,
    checkpoint: Path,
    settings: Settings,
    plan: Path | None,
    command: list[str],
    progress: Progress,
    target: tuple[Path, Path | None],
) -> dict[str, Any]:
    """Plan into the stage ``target[0]`` and finish it as ``target[1]``; stop at the plan where that is None."""
    stage, out = target
    method = find_method(job, settings["method"].value or methods_for(job)[0].name)
    budget, gates = chosen_budget(settings), _gates(settings)
    opened = _open(checkpoint, settings, progress, needs_data=plan is None and method.needs_data)
    sensitivities: dict[str, Sensitivity] = {}
    if plan is None:
        sensitivities = {
            name: load_module(find_measure(name)).measure(opened.source, opened.graph, job) for name in method.measures
        }
    dense = _dense_bytes(opened)

    def decide(overhead: int) -> tuple[Plan, dict[str, Tensor]]:
        if plan is not None:
            return _given_plan(plan, opened)
        progress("plan", 0, None)
        context = _context(opened, dense, overhead)
        chosen, tensors = load_module(method).plan(
            opened.source,
            opened.graph,
            sensitivities,
            opened.calibration,
            _absolute(budget, dense),
            _options(opened, method.options),
            context,
        )
        opened.notes.extend(note for note in context.notes if note not in opened.notes)
        return _sealed(replace(chosen, budget=budget, seed=int(settings["seed"].value)), tensors)

    decided, sidecar = decide(0)
    if out is None:
        return _dry_run(opened, decided, dense)
    _write_plan(stage, decided, sidecar)
    built = _build(opened, decided, sidecar, stage)
    while plan is None and (overhead := _overhead(opened, built, decided, budget, dense)) is not None:
        before = decided.decisions
        decided, sidecar = decide(overhead)
        if decided.decisions == before:
            raise _infeasible(opened, built, budget)
        _write_plan(stage, decided, sidecar)
        built = _build(opened, decided, sidecar, stage)
    _write_sensitivities(stage, sensitivities)
    return _finish(opened, built, decided, dense, _Target(stage, out, job, gates, command, budget))


def _given_plan(path: Path, job: Job) -> tuple[Plan, dict[str, Tensor]]:
    """A plan that was made before, perhaps on another checkpoint of the same architecture."""
    plan, sidecar = _read_plan(path)
    if plan.source_sha256 != job.source.sha256:
        job.notes.append(f"{path} was made on another checkpoint: its decisions are kept, the weights recomputed")
    return plan, sidecar


def apply_plan(
    checkpoint: Path, plan: Path, settings: Settings, *, force: bool, command: list[str], progress: Progress
) -> dict[str, Any]:
    """``hcompress apply``: a plan's decisions on a checkpoint; no data needed, the metric only with ``--eval``."""
    out = _out(settings)
    with store.staged(out, force, [checkpoint, plan]) as stage:
        opened = _open(checkpoint, settings, progress, needs_data=False)
        decided, sidecar = _given_plan(plan, opened)
        dense = _dense_bytes(opened)
        _write_plan(stage, decided, sidecar)
        built = _build(opened, decided, sidecar, stage)
        target = _Target(stage, out, "apply", _gates(settings), command, decided.budget)
        return _finish(opened, built, decided, dense, target)


def export_dense(
    checkpoint: Path, settings: Settings, *, force: bool, command: list[str], progress: Progress
) -> dict[str, Any]:
    """``hcompress export``: the network as it is, in the formats that runtimes load, proved equal to torch's."""
    out = _out(settings)
    with store.staged(out, force, [checkpoint]) as stage:
        opened = _open(checkpoint, settings, progress, needs_data=False, example="eval")
        built = _build(opened, None, {}, stage)
        dense = _Dense(built.onnx, (stage / WEIGHTS).stat().st_size)
        target = _Target(stage, out, "export", _gates(settings), command, None)
        return _finish(opened, built, None, dense, target)


def inspect_checkpoint(checkpoint: Path, settings: Settings, *, progress: Progress) -> dict[str, Any]:
    """``hcompress inspect``: what a checkpoint holds and what blocks its compression."""
    if settings["model"].value is None and checkpoint.is_file():
        read = read_checkpoint(checkpoint)
        if read.program is None:
            return inspection.describe_tensors(read)
    if settings["model"].value is None and checkpoint.is_dir():
        return inspection.describe_run(checkpoint, _read_run(checkpoint))
    opened = _open(checkpoint, settings, progress, needs_data=False)
    return inspection.describe_network(checkpoint, opened.source, opened.graph, opened.notes)


def verify_run(run: Path, settings: Settings, *, progress: Progress) -> dict[str, Any]:
    """``hcompress verify``: measure a run folder's files again, on any evaluation data.

    Raises:
        GateError: A check failed.
    """
    gates = _gates(settings)
    record = _read_run(run)
    threads = settings["threads"].value
    session = open_session(run / ONNX, threads)
    program = read_checkpoint(run / PROGRAM).program
    assert program is not None and program.example_inputs is not None
    inputs, metric, checks = program.example_inputs[0], None, []
    if settings["eval"].value is not None:
        data = _read(settings, "eval")
        task = load_task(settings["task"].value or _recorded_task(record), data)
        data = task.prepare(data)
        inputs = data.first(8).inputs
        compressed = evaluate(runtime_forward(session), data, task, "evaluate compressed", progress)
        dense = _dense_metric(run, record, data, task, compressed, threads, progress)
        metric = figures.metric_record(task, dense, compressed, data)
        checks = metric_checks(
            gates, unit=task.unit, higher_is_better=task.higher_is_better, dense=dense, compressed=compressed
        )
    elif gates.max_drop is not None or gates.min_metric is not None:
        raise UsageError("--max-drop and --min-metric need evaluation data", hint="pass --eval")
    integer = bool(read_plan(run / PLAN).quantized("activation")) if (run / PLAN).is_file() else False
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
    _publish_summary(full, settings)
    _raise_if_failed(Verdict(tuple(checks)), "the run folder is as it was", result)
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
    _read_run(run)
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
        with_out("pruned", method="magnitude", sparsity=0.5, budget=None),
        force=force,
        dry_run=False,
        plan=None,
        command=command,
        progress=progress,
    )
    quantized = run_method(
        "quantize",
        out / "pruned",
        with_out("quantized", method="uniform", budget="8bit", sparsity=None),
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


# -- settings --------------------------------------------------------------------------------------------------------


def _out(settings: Settings) -> Path:
    out = settings["out"].value
    if out is None:
        raise UsageError("no output folder", hint="pass --out DIR, or set [output] out")
    return Path(str(out))


def _gates(settings: Settings) -> Gates:
    def size(name: str, quantity: str) -> float | None:
        text = settings[name].value
        if text is None:
            return None
        budget = parse_budget(f"{quantity}={text}" if quantity == "latency" else str(text))
        if budget.quantity != quantity or budget.of != "absolute":
            raise UsageError(
                f"--{name.replace('_', '-')} {text!r} is not a {quantity} limit", hint="300KB or 0.3MB; 5ms"
            )
        return budget.limit

    return Gates(
        max_drop=settings["max_drop"].value,
        min_metric=settings["min_metric"].value,
        max_bytes=size("max_bytes", "bytes"),
        max_latency=size("max_latency", "latency"),
    )


def _options(job: Job, names: tuple[str, ...]) -> dict[str, Any]:
    options = {name: job.value(name) for name in names}
    if "activations" in options and options["activations"] is None:
        options["activations"] = "8" if convolutional(job.graph.program) else "float"
    return options


# -- planning --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Dense:
    """The dense network's files: ONNX bytes, and the size of its safetensors file."""

    onnx: bytes
    safetensors_size: int


def _dense_bytes(job: Job) -> _Dense:
    job.progress("export dense", 0, None)
    compressed = Compressed(dict(job.source.module.state_dict()), None)
    module = assemble(job.graph, compressed)
    onnx = serialize(onnx_model(job.graph, compressed, module))
    return _Dense(onnx, len(safetensors_bytes(compressed)))


def _delivered(settings: Settings) -> str:
    return WEIGHTS if settings["for"].value == "safetensors" else ONNX


def _context(job: Job, dense: _Dense, overhead: int) -> Context:
    """What planners are handed; sizes follow from the dense file, each weight's storage and a measured overhead."""
    elements = {layer.tensor: layer.elements for layer in job.graph.layers}
    channels = {layer.tensor: 1 if layer.axis is None else layer.shape[layer.axis] for layer in job.graph.layers}
    state = job.source.module.state_dict()
    is_safetensors = _delivered(job.settings) == WEIGHTS
    base = dense.safetensors_size if is_safetensors else len(dense.onnx)

    def stored(name: str, storage: Storage) -> int:
        whole = 4 * elements[name] if storage.bits == 32 else packed_size(elements[name], storage.bits)
        scales = 0 if storage.bits == 32 else 4 * channels[name]
        if not is_safetensors and storage.bits < 32:
            return whole + scales
        kept = 4 * storage.kept if storage.bits == 32 else packed_size(storage.kept, storage.bits)
        return min(whole, kept + packed_size(elements[name], 1)) + scales

    def model_bytes(choices: Mapping[str, Storage]) -> int:
        now = sum(stored(name, Storage(int(torch.count_nonzero(state[name])), 32)) for name in choices)
        return base + (overhead if choices else 0) - now + sum(stored(n, storage) for n, storage in choices.items())

    generator = torch.Generator().manual_seed(int(job.value("seed")))
    return Context(generator, _device(job.settings), job.progress, model_bytes, [])


def _absolute(budget: Budget | None, dense: _Dense) -> Budget | None:
    """A byte budget relative to the dense ONNX file, whatever file is delivered, as an absolute one."""
    if budget is None or budget.quantity != "bytes":
        return budget
    return Budget("bytes", budget.absolute(len(dense.onnx)))


def _overhead(job: Job, built: _Built, plan: Plan, budget: Budget | None, dense: _Dense) -> int | None:
    """None if the written file keeps a byte budget; else the bytes that it has beyond what its weights predict."""
    limit = _absolute(budget, dense)
    written = built.sizes[_delivered(job.settings)]
    if limit is None or limit.quantity != "bytes" or written <= limit.limit:
        return None
    return written - _predicted_bytes(job, plan, dense)


def _predicted_bytes(job: Job, plan: Plan, dense: _Dense) -> int:
    """Bytes of the delivered file as the storage of the weights predicts them."""
    state = job.source.module.state_dict()
    choices = {name: Storage(mask.kept, 32) for name, mask in plan.masks().items()}
    for name, choice in plan.quantized("weight").items():
        choices[name] = Storage(int(torch.count_nonzero(state[name])), choice.bits)
    return _context(job, dense, 0).model_bytes(choices)


def _infeasible(job: Job, built: _Built, budget: Budget | None) -> BudgetError:
    """The method has no smaller plan: what it wrote is the feasible minimum."""
    name = _delivered(job.settings)
    size = built.sizes[name]
    return BudgetError(
        f"{budget} is out of reach: the smallest {name} of this method has {size} bytes",
        hint=f"raise --budget to at least {size}B, or combine methods: a run folder is a checkpoint like any other",
    )


def _sealed(plan: Plan, tensors: dict[str, Tensor]) -> tuple[Plan, dict[str, Tensor]]:
    """The plan with the hash of its sidecar."""
    if not tensors:
        return plan, {}
    return replace(plan, sidecar=canonical.sha256_of_bytes(_sidecar_bytes(tensors))), tensors


def _sidecar_bytes(tensors: dict[str, Tensor]) -> bytes:
    return safetensors.torch.save({name: tensors[name] for name in sorted(tensors)})


def _write_plan(stage: Path, plan: Plan, sidecar: dict[str, Tensor]) -> None:
    if sidecar:
        store.write_file(stage / SIDECAR, _sidecar_bytes(sidecar))
    store.write_file(stage / PLAN, canonical.dumps(plan))


def _read_plan(path: Path) -> tuple[Plan, dict[str, Tensor]]:
    path = path / PLAN if path.is_dir() else path
    plan = read_plan(path)
    if plan.sidecar is None:
        return plan, {}
    sidecar = path.parent / SIDECAR
    if not sidecar.is_file():
        raise InputError(f"{sidecar}: no such file, though {path.name} names it", hint="keep the two files together")
    if canonical.sha256_of_file(sidecar) != plan.sidecar:
        raise InputError(
            f"{sidecar}: not the sidecar that {path.name} was written with", hint="keep the two files together"
        )
    return plan, read_checkpoint(sidecar).state


def _dry_run(job: Job, plan: Plan, dense: _Dense) -> dict[str, Any]:
    parameters = sum(t.numel() * t.element_size() for t in job.source.module.state_dict().values())
    calibration = (
        0 if job.calibration is None else sum(x.numel() * x.element_size() for x in job.calibration.data.inputs)
    )
    activations = sum(
        4 * value.numel() // len(job.graph.example_inputs[0]) * 64
        for node in job.graph.program.graph.nodes
        if isinstance(value := node.meta.get("val"), Tensor) and not isinstance(value.numel(), torch.SymInt)
    )
    return {
        "schema": "hcompress.dry-run/1",
        "method": plan.method,
        "predicted": {**plan.predicted, f"{_delivered(job.settings)}_bytes": _predicted_bytes(job, plan, dense)},
        "decisions": canonical.plain(plan.decisions),
        # Weights: source, trace, compressed copy, ONNX twice. torch and onnxruntime themselves take about 400 MB.
        "memory_bytes": 400_000_000 + 5 * parameters + calibration + activations,
        "notes": job.notes,
    }


# -- building --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Built:
    """A compressed network with its files written."""

    compressed: Compressed
    module: fx.GraphModule
    onnx: bytes
    sizes: dict[str, int]


def _build(job: Job, plan: Plan | None, sidecar: Mapping[str, Tensor], stage: Path) -> _Built:
    """Apply the plan and write the model files into the stage."""
    job.progress("apply", 0, None)
    if plan is None:
        compressed = Compressed(dict(job.source.module.state_dict()), None)
    else:
        compressed = apply_decisions(job.source.module, job.graph.tied, plan, sidecar)
    module = assemble(job.graph, compressed)
    job.progress("export", 0, None)
    onnx = serialize(onnx_model(job.graph, compressed, module))
    store.write_file(stage / ONNX, onnx)
    store.write_file(stage / WEIGHTS, safetensors_bytes(compressed))
    try:
        write_program(module, job.graph.example_inputs, stage / PROGRAM)
    except OSError as error:
        raise store.disk_error(stage / PROGRAM, error) from error
    sizes = {name: (stage / name).stat().st_size for name in (ONNX, WEIGHTS, PROGRAM)}
    return _Built(compressed, module, onnx, sizes)


def _write_sensitivities(stage: Path, sensitivities: Mapping[str, Sensitivity]) -> None:
    for record in sensitivities.values():
        store.write_file(stage / "sensitivity.json", canonical.dumps(record.to_json()))


# -- finishing -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Target:
    """Where a run goes and what it has to pass."""

    stage: Path
    out: Path
    job: str
    gates: Gates
    command: list[str]
    budget: Budget | None


def _finish(job: Job, built: _Built, plan: Plan | None, dense: _Dense, target: _Target) -> dict[str, Any]:
    """Verify the staged files, write the report and the manifest, and put the folder in its place.

    Raises:
        GateError: A check failed: the report goes to ``OUT.rejected``, the models are thrown away.
    """
    stage, settings = target.stage, job.settings
    _reread_weights(built, stage)
    if plan is not None:
        store.write_file(stage / DENSE, dense.onnx)
    record = _measure(job, built, plan, dense, target)
    verdict = Verdict(tuple(Check(**check) for check in record["checks"]))
    _write_report(stage, record)
    if not verdict.ok:
        _reject(target, record, settings)
    _write_manifest(job, stage, target)
    check_files(stage, read_manifest(stage))
    job.progress("publish", 0, None)
    store.publish(stage, target.out)
    _publish_summary(record, settings)
    return record


def _reread_weights(built: _Built, stage: Path) -> None:
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


def _measure(job: Job, built: _Built, plan: Plan | None, dense: _Dense, target: _Target) -> dict[str, Any]:
    settings, progress, task = job.settings, job.progress, job.task
    threads = settings["threads"].value
    session = open_session(target.stage / ONNX, threads)
    dense_session = session if plan is None else open_session(dense.onnx, threads)
    data = None
    if settings["eval"].value is not None:
        progress("read evaluation data", 0, None)
        data = _read(settings, "eval")
        if settings["task"].value is None and job.calibration is None:
            task = load_task(None, data)
        data = task.prepare(data)
        check_forward(job.source.module, data, "--eval")
        _check_shapes(job, data)
    examples = data.first(8).inputs if data is not None else _examples(job)
    integer = plan is not None and bool(plan.quantized("activation"))
    parity = measure_parity(built.module, session, examples)
    checks = figures.parity_checks(parity, integer)
    metric = None
    if data is not None:
        compressed_metric = evaluate(runtime_forward(session), data, task, "evaluate compressed", progress)
        dense_metric = compressed_metric
        if plan is not None:
            dense_metric = evaluate(runtime_forward(dense_session), data, task, "evaluate dense", progress)
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
    timed = {"compressed": built.onnx} if plan is None else {"dense": dense.onnx, "compressed": built.onnx}
    latency = measure_latency(
        {name: open_session(model, threads or LATENCY_THREADS) for name, model in timed.items()},
        tuple(x[:1] for x in examples),
        LATENCY_REPEATS,
        progress,
        max_time_s=LATENCY_TIME_S,
    )
    delivered = _delivered(settings)
    layers = figures.layer_records(job.source, job.graph, built.compressed.tensors, plan)
    totals = figures.totals(layers)
    checks += limit_check("max_bytes", built.sizes[delivered], target.gates.max_bytes, "bytes")
    checks += limit_check("max_latency", latency["compressed"].median, target.gates.max_latency, "ms")
    checks += figures.budget_checks(target.budget, built.sizes[delivered], len(dense.onnx), totals)
    origin = figures.origin(job.source.path)
    if origin is not None:
        job.notes.append(f"'dense' is {job.source.path.name}, itself a run; {figures.describe_origin(origin)}")
    job.notes.extend(figures.warnings(layers))
    parameters = sum(p.numel() for p in job.source.module.parameters())
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
        "dense_bytes": len(dense.onnx),
        "average_bits": totals["average_bits"],
        "sparsity": totals["sparsity"],
        "params": {"dense": parameters, "compressed": parameters},
        "macs": {"dense": job.graph.macs, "compressed": job.graph.macs},
        "latency_ms": {name: latency.get(name, latency["compressed"]).median for name in ("dense", "compressed")},
        "latency_threads": threads or LATENCY_THREADS,
        "parity": [figures.parity_record(p) for p in parity],
        "checks": canonical.plain(checks),
        "layers": layers,
        "notes": job.notes,
        "versions": figures.versions(),
        "time_s": time.monotonic() - job.started,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def _check_shapes(job: Job, data: Data) -> None:
    """The traced network has a dynamic batch; every other size is fixed.

    Raises:
        UsageError: The evaluation data have another shape than the network was traced with.
    """
    traced = [list(x.shape[1:]) for x in job.graph.example_inputs]
    found = [list(x.shape[1:]) for x in data.inputs]
    if found != traced:
        raise UsageError(
            f"--eval: examples of {data.name} have shape {found}, the network was traced with {traced}",
            hint="give --data and --eval of one shape; where there are no --data, pass --input-shape",
        )


def _examples(job: Job) -> tuple[Tensor, ...]:
    return job.graph.example_inputs if job.calibration is None else job.calibration.data.first(8).inputs


def _write_report(stage: Path, record: dict[str, Any]) -> None:
    store.write_file(stage / "report.json", canonical.dumps(record))
    store.write_file(stage / "report.md", report.render_markdown(record))
    store.write_file(stage / "report.html", report.render_html(record))


def _write_manifest(job: Job, stage: Path, target: _Target) -> None:
    manifest = Manifest(
        files=describe_files(stage),
        parents={"source": job.source.sha256, **job.source.parents},
        versions=figures.versions(),
        command=target.command,
        seed=int(job.value("seed")),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        host={
            "machine": platform.machine(),
            "system": platform.system(),
            "processors": os.cpu_count(),
            "threads": torch.get_num_threads(),
        },
    )
    store.write_file(stage / MANIFEST, canonical.dumps(manifest))


def _reject(target: _Target, record: dict[str, Any], settings: Settings) -> None:
    """Publish the report without the models, then fail."""
    rejected = target.out.with_name(f"{target.out.name}.rejected")
    for path in list(target.stage.iterdir()):
        if path.name not in store.REJECTED_FILES:
            path.unlink()
    store.check_target(rejected, force=True)
    store.publish(target.stage, rejected)
    _publish_summary(record, settings)
    verdict = Verdict(tuple(Check(**check) for check in record["checks"]))
    _raise_if_failed(verdict, f"no model was published; the report is in {rejected}", record)


def _raise_if_failed(verdict: Verdict, hint: str, record: dict[str, Any]) -> None:
    if verdict.ok:
        return
    failures = "; ".join(report.check_text(check) for check in verdict.failures())
    raise GateError(failures, hint=hint, report=record)


def _publish_summary(record: dict[str, Any], settings: Settings) -> None:
    paths = {name: settings[name].value for name in ("summary", "junit")}
    lines = summary.publish(
        record,
        summary=None if paths["summary"] is None else Path(str(paths["summary"])),
        junit=None if paths["junit"] is None else Path(str(paths["junit"])),
        environment=os.environ,
    )
    for line in lines:
        sys.stderr.write(line + "\n")


def _read_run(run: Path) -> dict[str, Any]:
    """A complete run folder's report, its files checked."""
    if not run.is_dir():
        raise InputError(f"{run}: no such run folder", hint="pass the --out folder of a finished run")
    check_files(run, read_manifest(run))
    return canonical.read_record(run / "report.json", figures.REPORT_SCHEMA)
