"""A network opened for a run: settings looked up, checkpoint and calibration data read, graph traced."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .budget import parse_budget
from .context import Progress
from .data import Data, check_forward, read_data
from .errors import UsageError
from .graph.rewrite import convolutional
from .graph.trace import Graph, batch_statistics, trace_graph
from .model import Source, guess_inputs, load_source
from .plan import InputSpec, read_plan
from .pruned import recorded_inputs
from .settings import Settings
from .task import Calibration, Task, check_targets, load_task
from .verdict import Gates

MOST_NAMED = 3  # parameters that a note names


@dataclass(frozen=True, slots=True)
class Job:
    """A network read and traced, with what the settings say about it.

    Attributes:
        memo: What a later step needs again: of a method, from one plan to the next; of a sweep, from point to point.
        is_swept: Whether plans for other goals follow.
        equalization: Exponents of two by which the network's channels were scaled, by weight (``equalizing``).
    """

    source: Source
    graph: Graph
    task: Task
    calibration: Calibration | None
    settings: Settings
    progress: Progress
    notes: list[str]
    started: float
    memo: dict[str, Any] = field(default_factory=dict)
    is_swept: bool = False
    equalization: Mapping[str, list[int]] = field(default_factory=dict)

    def value(self, name: str) -> Any:
        """A setting's value."""
        return self.settings[name].value

    def parents(self) -> dict[str, str]:
        """What a manifest says of where a run came from."""
        return {"source": self.source.sha256, **self.source.parents}


def open_job(
    checkpoint: Path,
    settings: Settings,
    progress: Progress,
    *,
    needs_data: bool,
    inputs: Sequence[InputSpec] = (),
    example: str | None = None,
    may_guess: bool = False,
) -> Job:
    """Read and trace a network.

    Args:
        needs_data: Whether missing calibration data are an error.
        inputs: What a plan was traced with; used where there are no data.
        example: Setting that names other data to take the shape of an input from.
        may_guess: Whether to try usual shapes where nothing says the shape of an input.
    """
    started = time.monotonic()
    threads = settings["threads"].value
    if threads is not None:
        torch.set_num_threads(int(threads))
    device_of(settings)
    progress("read checkpoint", 0, None)
    source = load_source(checkpoint, settings["model"].value, settings["model_args"].value)
    notes = list(source.notes)
    data = None
    if settings["data"].value is not None:
        progress("read data", 0, None)
        data = read_named(settings, "data")
    elif needs_data:
        raise UsageError(
            "no calibration data",
            hint="pass --data FILE.npz, FILE.safetensors or FILE.py:fn(args), or set [data] calibration",
        )
    task = load_task(settings["task"].value, data)
    calibration = None
    if data is not None:
        prepared = task.prepare(data)
        check_targets(task, check_forward(source.module, prepared, "--data"), prepared)
        sample = prepared.sample(int(settings["num_calibration"].value), int(settings["seed"].value))
        calibration = Calibration(task, sample)
    if data is None and example is not None and settings[example].value is not None:
        data = load_task(settings["task"].value, shaped := read_named(settings, example)).prepare(shaped)
        check_forward(source.module, data, f"--{example}")
        traced = two_of(data)
    else:
        inputs = inputs or _recorded_inputs(checkpoint)
        traced = _example_inputs(source, calibration, settings, inputs, notes if may_guess else None)
    progress("trace", 0, None)
    graph = trace_graph(source.module, traced)
    notes.extend(_surprises(graph))
    return Job(source, graph, task, calibration, settings, progress, notes, started)


def _surprises(graph: Graph) -> list[str]:
    """What a run leaves as it is, and outputs that depend on the batch."""
    named = [f"{blocker.layer} stays as it is: {blocker.reason}" for blocker in graph.blockers[:MOST_NAMED]]
    if len(graph.blockers) > MOST_NAMED:
        named.append(f"{len(graph.blockers) - MOST_NAMED} more stay as they are: hcompress inspect lists them")
    if mixing := batch_statistics(graph.program.graph):
        named.append(f"the outputs of an example depend on its batch: {mixing[0]} has no running statistics")
    return named


def device_of(settings: Settings) -> torch.device:
    name = str(settings["device"].value)
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"--device {name!r} is unknown", hint="cpu, cuda or cuda:0") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"--device {name}: torch sees no CUDA device", hint="use --device cpu")
    return device


def read_named(settings: Settings, name: str) -> Data:
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


def _recorded_inputs(checkpoint: Path) -> tuple[InputSpec, ...]:
    """What a run folder was traced with."""
    path = checkpoint / "plan.json"
    return read_plan(path).inputs if path.is_file() else ()


def _example_inputs(
    source: Source,
    calibration: Calibration | None,
    settings: Settings,
    inputs: Sequence[InputSpec],
    notes: list[str] | None,
) -> tuple[Tensor, ...]:
    """Two examples to trace with: of the data, of ``--input-shape``, as recorded, or (with ``notes``) guessed."""
    if calibration is not None:
        return two_of(calibration.data)
    shape = settings["input_shape"].value
    if shape is None and inputs:
        return recorded_inputs(inputs)
    if source.example_inputs is not None and all(len(x) >= 2 for x in source.example_inputs if x.dim()):
        return source.example_inputs
    if shape is None and notes is None:
        raise UsageError(
            "the shape of the network's inputs isn't known", hint="pass --data, or --input-shape 3,32,32 (no batch)"
        )
    example, note = guess_inputs(source.module, shape)
    if notes is not None:
        notes.append(note)
    return example


def input_specs(example_inputs: Sequence[Tensor]) -> tuple[InputSpec, ...]:
    """What a plan records of the inputs that a network was traced with."""
    return tuple(InputSpec(tuple(x.shape[1:]), str(x.dtype).removeprefix("torch.")) for x in example_inputs)


def check_shapes(data: Data, example_inputs: Sequence[Tensor]) -> None:
    """The traced network has a dynamic batch; every other size is fixed.

    Raises:
        UsageError: The evaluation data have another shape than the network was traced with.
    """
    traced, found = ([list(x.shape[1:]) for x in inputs] for inputs in (example_inputs, data.inputs))
    if found != traced:
        raise UsageError(
            f"--eval: examples of {data.name} have shape {found}, the network was traced with {traced}",
            hint="give --data and --eval of one shape; where there are no --data, pass --input-shape",
        )


def two_of(data: Data) -> tuple[Tensor, ...]:
    """Two examples to trace with, the same one twice where there is one: a batch of one would become a constant."""
    return tuple(torch.cat([x, x])[:2].clone() for x in data.first(2).inputs)


def out_folder(settings: Settings) -> Path:
    out = settings["out"].value
    if out is None:
        raise UsageError("no output folder", hint="pass --out DIR, or set [output] out")
    return Path(str(out))


def gates_of(settings: Settings) -> Gates:
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


def memory_of(settings: Settings) -> int:
    """Bytes that gradients may take.

    Raises:
        UsageError: Not a size.
    """
    text = str(settings["memory"].value)
    try:
        budget = parse_budget(text)
    except UsageError:
        budget = None
    if budget is None or budget.quantity != "bytes" or budget.of != "absolute":
        raise UsageError(f"--memory {text!r} is not a size", hint="512MB or 4GB")
    return int(budget.limit)


def method_options(job: Job, names: tuple[str, ...]) -> dict[str, Any]:
    options = {name: job.value(name) for name in names}
    if "activations" in options and options["activations"] is None:
        options["activations"] = "8" if convolutional(job.graph.program) else "float"
    return options
