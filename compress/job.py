"""A network opened for a run: settings looked up, checkpoint and calibration data read, graph traced."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .budget import parse_budget
from .context import Progress
from .data import Data, check_forward, read_data
from .errors import UsageError
from .graph.rewrite import convolutional
from .graph.trace import Graph, trace_graph
from .model import Source, guess_inputs, load_source
from .settings import Settings
from .task import Calibration, Task, load_task
from .verdict import Gates


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


def open_job(
    checkpoint: Path, settings: Settings, progress: Progress, *, needs_data: bool, example: str | None = None
) -> Job:
    """Read and trace a network; ``example`` names data that give the shape of an input where ``data`` doesn't."""
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
        check_forward(source.module, prepared, "--data")
        sample = prepared.sample(int(settings["num_calibration"].value), int(settings["seed"].value))
        calibration = Calibration(task, sample)
    if data is None and example is not None and settings[example].value is not None:
        data = load_task(settings["task"].value, shaped := read_named(settings, example)).prepare(shaped)
        check_forward(source.module, data, f"--{example}")
        inputs = two_of(data)
    else:
        inputs = _example_inputs(source, calibration, settings, notes)
    progress("trace", 0, None)
    graph = trace_graph(source.module, inputs)
    return Job(source, graph, task, calibration, settings, progress, notes, started)


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


def _example_inputs(
    source: Source, calibration: Calibration | None, settings: Settings, notes: list[str]
) -> tuple[Tensor, ...]:
    if calibration is not None:
        return two_of(calibration.data)
    if source.example_inputs is not None and all(len(x) >= 2 for x in source.example_inputs if x.dim()):
        return source.example_inputs
    example, note = guess_inputs(source.module, settings["input_shape"].value)
    notes.append(note)
    return example


def two_of(data: Data) -> tuple[Tensor, ...]:
    """Two examples; copies, as a slice would be saved with all of its data."""
    return tuple(x.clone() for x in data.first(2).inputs)


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


def method_options(job: Job, names: tuple[str, ...]) -> dict[str, Any]:
    options = {name: job.value(name) for name in names}
    if "activations" in options and options["activations"] is None:
        options["activations"] = "8" if convolutional(job.graph.program) else "float"
    return options
