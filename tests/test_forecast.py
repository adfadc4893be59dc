"""What a measure is expected to take, against a measure whose time is a formula."""

from __future__ import annotations

import types
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import nn

from compress import forecast as module
from compress.context import Context
from compress.data import Data
from compress.errors import UsageError
from compress.forecast import forecast
from compress.graph.trace import trace_graph
from compress.job import Job
from compress.registry import Measure, load_module
from compress.settings import resolve
from compress.task import Calibration, Classification


class Clock:
    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Time passes in measures alone, as ``took`` says."""
    clock = Clock()

    def measure(
        source: Any, graph: Any, calibration: Calibration, options: Mapping[str, Any], context: Context
    ) -> None:
        count = len(options["widths"]) if "widths" in options else options.get("passes", 1)
        if "eigenvalues" in options:
            count += options["eigenvalues"] + 1
        clock.now += took(count, len(calibration.data))

    monkeypatch.setattr(module, "time", clock)

    def loaded(which: Measure) -> Any:
        """The measure's own count of what it repeats, and the time above."""
        own = vars(load_module(which))
        return types.SimpleNamespace(measure=measure, **{name: own[name] for name in ("repeats",) if name in own})

    monkeypatch.setattr(module, "load_module", loaded)
    return clock


def job(count: int, **flags: Any) -> Job:
    net = nn.Linear(3, 2).eval()
    data = Data((torch.zeros(count, 3),), torch.zeros(count, dtype=torch.int64), "data")
    settings = resolve(flags, environment={}, folder=None)
    graph = trace_graph(net, (torch.zeros(2, 3),))
    task = Classification()
    return Job(None, graph, task, Calibration(task, data), settings, lambda *_: None, [], 0.0)  # type: ignore[arg-type]


def took(passes: float, examples: int) -> float:
    return 1 + 2e-3 * examples + 0.5 * passes + 1e-3 * examples * passes


def test_passes_are_counted_from_the_fewest_to_the_most(clock: Clock) -> None:
    found = forecast(job(512, passes=20), "hessian-trace")
    assert found is not None
    assert found.least_s == pytest.approx(took(2, 512)) and found.most_s == pytest.approx(took(20, 512))
    assert 10**7 < found.memory_bytes < 10**11
    assert clock.now < took(20, 512)


@pytest.mark.parametrize(("name", "flags"), [("hessian-diagonal", {}), ("hessian-trace", {"trace": "hessian"})])
def test_products_are_eight_or_more(name: str, flags: dict[str, str], clock: Clock) -> None:
    found = forecast(job(400, passes=20, **flags), name)
    assert found is not None
    assert found.least_s == pytest.approx(took(8, 400)) and found.most_s == pytest.approx(took(20, 400))


def test_a_measure_without_passes_goes_by_examples(clock: Clock) -> None:
    found = forecast(job(2000), "fisher")
    assert found is not None and found.most_s == pytest.approx(took(1, 2000))


def test_eigenvalues_have_a_short_and_a_long_search(clock: Clock) -> None:
    found = forecast(job(600, eigenvalues=2, passes=30), "hessian-eigenvalues")
    assert found is not None
    assert found.least_s == pytest.approx(took(10 + 3, 600)) and found.most_s == pytest.approx(took(43 + 3, 600))


def test_output_changes_go_by_widths_and_by_the_examples_that_are_looked_at(clock: Clock) -> None:
    found = forecast(job(600), "output-change")
    assert found is not None and found.most_s == pytest.approx(took(7, 128))


def test_short_measures_and_those_without_data_are_not_tried(clock: Clock) -> None:
    assert forecast(job(100), "fisher") is None
    assert forecast(job(2000), "weight-error") is None
    assert clock.now == 0
    assert forecast(job(100), "fisher", always=True) is not None


def test_vectors_of_products_count_as_memory(clock: Clock) -> None:
    short, long = (forecast(job(600, trace="hessian", passes=p), "hessian-trace") for p in (20, 10**6))
    assert short is not None and long is not None
    assert long.memory_bytes - short.memory_bytes >= 8 * 6 * 10**6 - 10**7


def test_more_eigenvalues_than_products_are_refused_before_any_trial(clock: Clock) -> None:
    with pytest.raises(UsageError, match="30 eigenvalues need 32 products or more"):
        forecast(job(600, eigenvalues=30), "hessian-eigenvalues", always=True)
    assert clock.now == 0
