"""Latency: samples are taken in turns, and the figures are their percentiles."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from compress import bench
from compress.errors import UsageError
from compress.export import serialize, to_onnx
from compress.verify import Session, open_session


@pytest.fixture(scope="module")
def session() -> Session:
    return open_session(serialize(to_onnx(nn.Linear(4, 3), (torch.randn(2, 4),))), 1)


def silent(*_: object) -> None:
    """No progress."""


X = torch.randn(1, 4)


def test_each_session_has_its_percentiles(session: Session) -> None:
    found = bench.measure_latency({"dense": session, "compressed": session}, (X,), 9, silent)
    assert list(found) == ["dense", "compressed"]
    for latency in found.values():
        assert 0 < latency.p10 <= latency.median <= latency.p90 < 100


def test_the_summary_is_of_percentiles() -> None:
    values = [float(v) for v in np.random.default_rng(0).permutation(101)]
    assert bench._summary(values) == bench.Latency(50.0, 10.0, 90.0)
    assert bench._summary([3.0]) == bench.Latency(3.0, 3.0, 3.0)


def test_samples_are_taken_in_turns(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[int] = []
    other = open_session(serialize(to_onnx(nn.Linear(4, 2), (torch.randn(2, 4),))), 1)
    monkeypatch.setattr(bench, "_calls_per_sample", lambda *_: 1)
    monkeypatch.setattr(bench, "_time", lambda session, *_: float(order.append(id(session)) or len(order)))
    found = bench.measure_latency({"dense": session, "compressed": other}, (X,), 3, silent)
    assert order == [id(session), id(other)] * 3
    assert found["dense"].median == 3.0 and found["compressed"].median == 4.0


def test_time_is_bounded_where_asked(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    samples: list[float] = []
    monkeypatch.setattr(bench, "_calls_per_sample", lambda *_: 1)
    monkeypatch.setattr(bench, "_time", lambda *_: float(samples.append(1.0) or 1.0))
    bench.measure_latency({"a": session}, (X,), 60, silent, max_time_s=0.0)
    assert len(samples) == bench.MIN_REPEATS
    bench.measure_latency({"a": session}, (X,), 5, silent, max_time_s=0.0)
    assert len(samples) == bench.MIN_REPEATS + 5
    bench.measure_latency({"a": session}, (X,), 60, silent)
    assert len(samples) == bench.MIN_REPEATS + 65


def test_progress_ends_at_the_number_of_repeats(session: Session) -> None:
    seen: list[tuple[str, int, int | None]] = []
    bench.measure_latency({"a": session}, (X,), 2, lambda *step: seen.append(step))
    assert seen[-1] == ("measure latency", 2, 2)


@pytest.mark.parametrize(
    ("inputs", "repeats", "words"),
    [
        ((X,), 0, "0 repeats measure nothing"),
        ((X, X), 3, "the data have 2 inputs"),
        ((torch.zeros(1, 5),), 3, r"the data are \[1, 5\] float32"),
    ],
)
def test_what_cant_be_timed_is_named(session: Session, inputs: tuple[Tensor, ...], repeats: int, words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        bench.measure_latency({"a": session}, inputs, repeats, silent)
    assert caught.value.hint
