"""A measure of an opened network: read from the cache where the same one was taken before, and drawn."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch
from torch import Tensor, fx

from . import cache, plot
from .comparison import option_text, shown_option
from .context import Context, Storage
from .errors import UsageError
from .graph.trace import Graph
from .job import Job, device_of, input_specs, method_options
from .quantize.predictors import compare_predictors
from .registry import COMPARED, Measure, find_measure, load_module
from .sensitivity import Sensitivity, sensitivity_from
from .task import BUILT_IN

KIND = "sensitivity"
NETWORK = "network sha256"  # in the memo of a job


@dataclass(frozen=True, slots=True)
class Taken:
    """What a measure gave.

    Attributes:
        tensors: What it holds for each weight, by tensor; may be empty.
        is_cached: Whether it was read from the cache.
    """

    record: Sensitivity
    tensors: dict[str, Tensor]
    is_cached: bool


def take(job: Job, name: str, context: Context) -> Taken:
    """A measure by its registered name.

    Raises:
        UsageError: It needs calibration data, and there are none.
    """
    measure = find_measure(name)
    if measure.needs_data and job.calibration is None:
        raise UsageError(
            f"measure {name} needs calibration data", hint="pass --data FILE.npz, FILE.safetensors or FILE.py:fn(args)"
        )
    key = f"measure {name}"
    if key not in job.memo:
        # The same for every file that is delivered, and so may be kept.
        context = replace(context, model_bytes=_no_model_bytes, notes=[])
        taken = _recall(job, measure, context) if _may_keep(job, measure) else _measure(job, measure, context)
        job.memo[key] = (taken, context.notes)
    found: tuple[Taken, list[str]] = job.memo[key]
    job.notes.extend(note for note in found[1] if note not in job.notes)
    return found[0]


def is_kept(job: Job, name: str) -> bool:
    """Whether the cache has this measure; what was read of it is what ``take`` then gives."""
    measure, key = find_measure(name), f"measure {name}"
    if key not in job.memo and job.calibration is not None and _may_keep(job, measure):
        context = replace(measure_context(job), notes=[])
        taken = _read(job, measure, context, [])  # a damaged entry is for ``take`` to say
        if taken is not None:
            job.memo[key] = (taken, context.notes)
    return key in job.memo


def num_configurations(job: Job) -> int:
    """How many random configurations predictors are to be compared on; 0 for no comparison.

    Raises:
        UsageError: One, which leaves nothing to rank.
    """
    count = int(job.value("configurations"))
    if count == 1:
        raise UsageError("--configurations 1 leaves nothing to rank", hint="pass 2 or more; 50 tell predictors apart")
    return count


def compare(job: Job, count: int) -> dict[str, Any]:
    """Predictors of what rounding costs, on ``count`` random configurations of widths.

    Raises:
        UsageError: There are no calibration data.
    """
    trace, diagonal = COMPARED
    traces = take(job, trace, measure_context(job)).record
    assert job.calibration is not None
    try:
        diagonals = take(job, diagonal, measure_context(job)).tensors
    except UsageError as error:
        job.notes.append(f"{diagonal} is left out of the comparison: {error.message}")
        diagonals = {}
    return compare_predictors(
        job.source,
        job.graph,
        job.calibration,
        count,
        measure_context(job),
        traces=traces,
        diagonals=diagonals,
        by_outputs=job.value("reconstruction") == "gptq",
    )


def measure_context(job: Job) -> Context:
    """What a measure is handed."""
    generator = torch.Generator().manual_seed(int(job.value("seed")))
    return Context(generator, device_of(job.settings), job.progress, _no_model_bytes, [])


def sensitivity_svg(record: Sensitivity, network: str) -> str:
    """The plot of a record: a bar a layer, of one option where there are many."""
    shown = shown_option(record)
    title = f"{record.method} of {network}" + (f", {option_text(shown)} for every layer" if shown else "")
    bars = [(layer, e.value, e.stderr) for (layer, option), e in record.entries.items() if option == shown]
    return plot.bars_svg(title, record.unit, bars)


def network_sha256(graph: Graph) -> str:
    """Hash of the traced operators and of every tensor: a checkpoint fits many architectures, whose code may change."""
    program = graph.program
    digest = hashlib.sha256(str([layer.tensor for layer in graph.layers]).encode())
    digest.update(str(program.graph_signature).encode())
    for module in program.graph_module.modules():
        if isinstance(module, fx.GraphModule):
            digest.update(str(module.graph).encode())
    for name, value in sorted({**program.constants, **program.state_dict}.items()):
        if isinstance(value, Tensor):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _no_model_bytes(choices: Mapping[str, Storage]) -> NoReturn:
    raise RuntimeError("a measure delivers no file, so that it has no size")


def options_of(job: Job, measure: Measure) -> dict[str, Any]:
    """Those settings that a measure depends on: Gauss-Newton traces need no estimator."""
    options = method_options(job, measure.options)
    if options.get("trace") == "ggn":
        options.pop("estimator", None)
    return options


def _may_keep(job: Job, measure: Measure) -> bool:
    """Whether it is worth a file, and its key tells all: not the loss of a task that is the user's code."""
    return measure.needs_data and job.value("cache") == "on" and type(job.task) in BUILT_IN.values()


def _measure(job: Job, measure: Measure, context: Context) -> Taken:
    options = options_of(job, measure)
    record, tensors = load_module(measure).measure(job.source, job.graph, job.calibration, options, context)
    return Taken(record, tensors, False)


def _recall(job: Job, measure: Measure, context: Context) -> Taken:
    """The measure from the cache, with the notes that it made; measured and kept where it isn't there."""
    found = _read(job, measure, context, job.notes)
    if found is not None:
        return found
    taken = _measure(job, measure, context)
    entry = {"sensitivity": taken.record.to_json(), "notes": context.notes}
    cache.write(KIND, _key(job, measure, context), entry, taken.tensors, notes=job.notes)
    return taken


def _read(job: Job, measure: Measure, context: Context, notes: list[str]) -> Taken | None:
    """The measure from the cache, if it is there; its notes go to ``context``, one on a damaged entry to ``notes``."""
    found = cache.read(KIND, _key(job, measure, context), notes)
    if found is None:
        return None
    kept, tensors = found
    job.progress(f"{measure.name} from the cache", 1, 1)
    context.notes.extend(kept["notes"])
    return Taken(sensitivity_from(kept["sensitivity"], f"the cached {measure.name}"), tensors, True)


def _network_sha256(job: Job) -> str:
    """Of the job's network, hashed once for all that is asked of the cache."""
    if NETWORK not in job.memo:
        job.memo[NETWORK] = network_sha256(job.graph)
    return str(job.memo[NETWORK])


def _key(job: Job, measure: Measure, context: Context) -> dict[str, Any]:
    """All that a measure's figures depend on."""
    return {
        "measure": measure.name,
        "options": options_of(job, measure),
        "source_sha256": job.source.sha256,
        "network_sha256": _network_sha256(job),
        "calibration_sha256": None if job.calibration is None else job.calibration.sha256(),
        "inputs": input_specs(job.graph.example_inputs),
        "seed": int(job.value("seed")),
        "device": context.device.type,
        **cache.versions(),
    }
