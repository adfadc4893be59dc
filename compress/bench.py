"""Latency in ONNX Runtime: dense and compressed interleaved in one process, threads pinned, median and spread."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnxruntime
from torch import Tensor

from .context import Progress
from .errors import UsageError
from .verify import Session, run_session

WARM_UP = 5
MIN_REPEATS = 15
INNER_TIME_MS = 2.0  # a sample repeats the call until it lasts about this long


@dataclass(frozen=True, slots=True)
class Latency:
    """Milliseconds of one call."""

    median: float
    p10: float
    p90: float


def measure_latency(
    sessions: Mapping[str, Session],
    inputs: tuple[Tensor, ...],
    repeats: int,
    progress: Progress,
    *,
    max_time_s: float | None = None,
) -> dict[str, Latency]:
    """Time each session on the same inputs, in turns, so that a busy machine slows all alike.

    Args:
        repeats: Samples of each session; 1 or more.
        max_time_s: Fewer samples are taken, but ``MIN_REPEATS``, once this much time is spent.

    Raises:
        UsageError: No samples, or a session doesn't take the inputs.
    """
    if repeats < 1:
        raise UsageError(f"{repeats} repeats measure nothing", hint="--repeats is 1 or more")
    feeds = {}
    for name, session in sessions.items():
        run_session(session, inputs)  # says what is wrong where the inputs don't fit
        names = [value.name for value in session.get_inputs()]
        feeds[name] = {
            key: onnxruntime.OrtValue.ortvalue_from_numpy(x.detach().numpy())
            for key, x in zip(names, inputs, strict=True)
        }
    start = time.perf_counter()
    calls = {name: _calls_per_sample(session, feeds[name]) for name, session in sessions.items()}
    samples: dict[str, list[float]] = {name: [] for name in sessions}
    for done in range(repeats):
        if max_time_s is not None and done >= MIN_REPEATS and time.perf_counter() - start > max_time_s:
            break
        progress("measure latency", done, repeats)
        for name, session in sessions.items():
            samples[name].append(_time(session, feeds[name], calls[name]))
    progress("measure latency", repeats, repeats)
    return {name: _summary(values) for name, values in samples.items()}


def _calls_per_sample(session: Session, feed: Mapping[str, onnxruntime.OrtValue]) -> int:
    for _ in range(WARM_UP):
        session.run_with_ort_values(None, feed)
    return max(1, round(INNER_TIME_MS / max(_time(session, feed, 3), 1e-3)))


def _time(session: Session, feed: Mapping[str, onnxruntime.OrtValue], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        session.run_with_ort_values(None, feed)
    return (time.perf_counter() - start) * 1e3 / calls


def _summary(values: list[float]) -> Latency:
    low, median, high = (float(v) for v in np.percentile(values, (10, 50, 90)))
    return Latency(median, low, high)
