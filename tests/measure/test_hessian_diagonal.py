"""The measure of the Hessian's diagonal: its record and its tensors."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor
from zoo import named

from compress.context import Context
from compress.data import Data
from compress.graph.trace import Graph, trace_graph
from compress.measure import hessian_diagonal, hessian_trace
from compress.model import Source
from compress.sensitivity import Sensitivity, read_sensitivity
from compress.task import Calibration, Classification


def context(seed: int = 0) -> Context:
    generator = torch.Generator().manual_seed(seed)
    return Context(generator, torch.device("cpu"), lambda *_: None, lambda _: 0, [])


@cache
def setting() -> tuple[Source, Graph, Calibration]:
    network = named("plain_cnn")
    module, inputs = network.make(), network.inputs(8)
    source = Source(Path("model.pt"), "0" * 64, module, "torch", None, {}, {}, ())
    data = Data(inputs, torch.arange(8) % 5, "x.npz")
    return source, trace_graph(module, network.inputs(2)), Calibration(Classification(), data)


def run(*, passes: int = 3, seed: int = 0) -> tuple[Sensitivity, dict[str, Tensor]]:
    return hessian_diagonal.measure(*setting(), {"rtol": 0.0, "passes": passes}, context(seed))


def test_entries_are_the_means_of_the_diagonals() -> None:
    record, sidecar = run()
    _, graph, calibration = setting()
    assert list(record.entries) == [(layer.tensor, "") for layer in graph.layers]
    assert {name: tuple(t.shape) for name, t in sidecar.items()} == {la.tensor: la.shape for la in graph.layers}
    assert all(t.dtype is torch.float32 for t in sidecar.values())
    for (tensor, _), entry in record.entries.items():
        assert entry.value == pytest.approx(float(sidecar[tensor].double().mean()), rel=1e-5)
        assert entry.stderr > 0
    assert (record.method, record.unit) == ("hessian-diagonal", "loss per squared weight")
    assert (record.source_sha256, record.task_sha256) == ("0" * 64, calibration.sha256())
    assert record.options == {"rtol": 0.0, "passes": 3}


def test_kernels_share_an_average() -> None:
    _, sidecar = run()
    conv = next(t for t in sidecar.values() if t.dim() == 4)
    assert torch.equal(conv, conv[:, :, :1, :1].expand_as(conv))
    assert len(conv[:, :, 0, 0].unique()) > 1


def test_means_agree_with_the_traces() -> None:
    """Both estimate the exact Hessian: the mean of the diagonal is the trace by the number of weights."""
    traces, _ = hessian_trace.measure(
        *setting(), {"trace": "hessian", "estimator": "hutchinson", "rtol": 0.0, "passes": 60}, context()
    )
    found, sidecar = run(passes=60)
    for key, diagonal in found.entries.items():
        size, trace = sidecar[key[0]].numel(), traces.entries[key]
        error = ((diagonal.stderr * size) ** 2 + trace.stderr**2) ** 0.5
        assert abs(diagonal.value * size - trace.value) < 4 * error


def test_a_seed_gives_the_same_record() -> None:
    (first, tensors), (second, again) = run(), run()
    assert first == second
    assert all(torch.equal(tensors[name], again[name]) for name in tensors)
    assert run(seed=1)[0].entries != first.entries


def test_the_record_survives_a_file(tmp_path: Path) -> None:
    record, _ = run()
    path = tmp_path / "sensitivity.json"
    path.write_text(json.dumps(record.to_json()), encoding="utf-8")
    assert read_sensitivity(path) == record
