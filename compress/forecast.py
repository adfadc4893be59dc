"""What a measure will take, before it is made: its time and memory, from trials of the measure itself on few examples.

Four trials: few examples and a batch of them, each with few passes and with twice as many. Time is taken for a
constant, a part by the passes, one by the examples, and one by their product; memory for that of a batch.
Cost: about one part in ``WORTH / BATCH`` of the measure, or less.
"""

from __future__ import annotations

import resource
import time
from dataclasses import dataclass, replace
from typing import Any

import torch

from .curvature.network import PASS_BATCH
from .job import Job
from .measuring import measure_context, options_of
from .registry import Measure, find_measure, load_module
from .sensitivity import Repeats, repeats_once
from .task import Calibration

FEW = 2  # examples of the shortest trial
WORTH = 16 * PASS_BATCH  # examples times passes below which a trial would be a good part of the measure
BYTES_HELD = 8  # of a number of the vectors that a block's products are kept in


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a measure is expected to take.

    Attributes:
        least_s: Seconds if ``rtol`` is met at once.
        most_s: Seconds of all passes.
        memory_bytes: Peak of the process, or of the device's tensors where that isn't the CPU.
    """

    least_s: float
    most_s: float
    memory_bytes: int

    def to_json(self) -> dict[str, float]:
        """As plain JSON."""
        return {"least_s": self.least_s, "most_s": self.most_s, "memory_bytes": self.memory_bytes}


def forecast(job: Job, name: str, *, always: bool = False) -> Forecast | None:
    """Try a measure; None where there are no data, or so few that trials would take as long.

    Args:
        always: Whether to try it however few they are.
    """
    measure = find_measure(name)
    if not measure.needs_data or job.calibration is None:
        return None
    total, options = len(job.calibration.data), options_of(job, measure)
    repeats: Repeats = getattr(load_module(measure), "repeats", repeats_once)(options, total)
    once, more = repeats.counts
    if not always and total * repeats.most < WORTH * once:
        return None
    num_few, num_many = min(FEW, total), min(PASS_BATCH, total)
    _trial(job, measure, num_few, repeats.options[0])  # loads code
    took = {
        (count, number): _trial(job, measure, count, repeats.options[number])
        for count in sorted({num_few, num_many})
        for number in range(1 if more == once else 2)
    }
    few, many = ([took.get((count, number), took[count, 0]) for number in range(2)] for count in (num_few, num_many))
    steps, examples = max(1, more - once), max(1, num_many - num_few)
    by_repeat = max(0.0, few[1] - few[0]) / steps
    by_example = max(0.0, many[0] - few[0]) / examples
    by_both = max(0.0, many[1] - many[0] - few[1] + few[0]) / steps / examples

    def time_of(count: int) -> float:
        repeated, further = count - once, max(0, repeats.examples - num_few)
        return few[0] + repeated * by_repeat + further * (by_example + repeated * by_both)

    return Forecast(time_of(repeats.least), time_of(repeats.most), _peak_bytes(job) + _held_bytes(job, options))


def _trial(job: Job, measure: Measure, num_examples: int, options: dict[str, Any]) -> float:
    """Seconds of the measure on so many examples."""
    assert job.calibration is not None
    calibration = Calibration(job.calibration.task, job.calibration.data.first(num_examples))
    context = replace(measure_context(job), progress=lambda stage, done, total: None)
    started = time.monotonic()
    load_module(measure).measure(job.source, job.graph, calibration, options, context)
    took = time.monotonic() - started
    job.progress("estimate time and memory", 0, None)
    return took


def _peak_bytes(job: Job) -> int:
    device = measure_context(job).device
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _held_bytes(job: Job, options: dict[str, Any]) -> int:
    """Of the vectors that products of one block after the other are kept in."""
    sizes = [layer.elements for layer in job.graph.layers]
    if "eigenvalues" in options:
        return BYTES_HELD * int(options["passes"]) * sum(sizes)
    if options.get("trace") == "hessian":
        return BYTES_HELD * int(options["passes"]) * max(sizes, default=0)
    return 0
