"""The measure of curvature traces: its record, and that it says when it isn't certain."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from zoo import named

from compress.context import Context
from compress.data import Data
from compress.graph.trace import Graph, trace_graph
from compress.measure import hessian_trace
from compress.model import Source
from compress.sensitivity import Sensitivity, read_sensitivity
from compress.task import Calibration, Classification

GGN = {"trace": "ggn", "rtol": 0.05, "passes": 20}
HESSIAN = {"trace": "hessian", "estimator": "hutchinson", "rtol": 0.2, "passes": 12}


def context(seed: int = 0) -> Context:
    generator = torch.Generator().manual_seed(seed)
    return Context(generator, torch.device("cpu"), lambda *_: None, lambda _: 0, [])


@cache
def setting(count: int = 8) -> tuple[Source, Graph, Calibration]:
    network = named("plain_cnn")
    module, inputs = network.make(), network.inputs(count)
    source = Source(Path("model.pt"), "0" * 64, module, "torch", None, {}, {}, ())
    labels = torch.arange(count) % 5
    return source, trace_graph(module, network.inputs(2)), Calibration(Classification(), Data(inputs, labels, "x.npz"))


def run(options: dict[str, Any], *, seed: int = 0, count: int = 8) -> tuple[Sensitivity, list[str]]:
    surroundings = context(seed)
    record, sidecar = hessian_trace.measure(*setting(count), options, surroundings)
    assert sidecar == {}
    return record, surroundings.notes


@pytest.mark.parametrize("options", [GGN, HESSIAN])
def test_every_layer_has_a_trace(options: dict[str, Any]) -> None:
    record, _ = run(options)
    _, graph, calibration = setting()
    assert list(record.entries) == [(layer.tensor, "") for layer in graph.layers]
    assert (record.method, record.unit) == ("hessian-trace", "loss per squared weight")
    assert (record.source_sha256, record.task_sha256) == ("0" * 64, calibration.sha256())
    assert all(e.stderr >= 0 and e.value == e.value for e in record.entries.values())


def test_the_passes_recorded_are_those_made() -> None:
    exact, notes = run({**GGN, "rtol": 0.0})
    assert exact.options == {"trace": "ggn", "rtol": 0.0, "passes": 5}
    assert {e.stderr for e in exact.entries.values()} == {0.0}
    assert notes == []
    assert run({**HESSIAN, "rtol": 1e9})[0].options["passes"] == 8


@pytest.mark.parametrize("options", [{**GGN, "rtol": 1e-6, "passes": 2}, {**HESSIAN, "rtol": 1e-6}])
def test_an_uncertain_trace_is_noted(options: dict[str, Any]) -> None:
    _, (note,) = run(options)
    passes = options["passes"]
    assert note == f"3 traces are less certain than --rtol 1e-06 after {passes} passes; raise --passes for closer ones"


@pytest.mark.parametrize("options", [{**GGN, "passes": 3}, HESSIAN])
def test_a_seed_gives_the_same_record(options: dict[str, Any]) -> None:
    assert run(options) == run(options)
    assert run(options)[0].entries != run(options, seed=1)[0].entries


def test_the_record_survives_a_file(tmp_path: Path) -> None:
    record, _ = run(GGN)
    path = tmp_path / "sensitivity.json"
    path.write_text(json.dumps(record.to_json()), encoding="utf-8")
    assert read_sensitivity(path) == record


def test_one_example_and_a_network_without_layers_are_measured() -> None:
    assert len(run(GGN, count=1)[0].entries) == 3
    module = nn.Sequential(nn.LayerNorm(4)).eval()
    source = Source(Path("model.pt"), "0" * 64, module, "torch", None, {}, {}, ())
    data = Calibration(Classification(), Data((torch.randn(3, 4),), None, "x.npz"))
    for options in (GGN, HESSIAN):
        record, _ = hessian_trace.measure(source, trace_graph(module, data.data.inputs), data, options, context())
        assert record.entries == {}


class OfTheBatch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.norm(self.conv(x))).mean((2, 3))


def test_without_gradients_of_single_examples_there_is_no_control_and_a_note() -> None:
    torch.manual_seed(0)
    module, inputs = OfTheBatch().eval(), torch.randn(6, 3, 5, 5)
    source = Source(Path("model.pt"), "0" * 64, module, "torch", None, {}, {}, ())
    calibration = Calibration(Classification(), Data((inputs,), torch.arange(6) % 4, "x.npz"))
    surroundings, options = context(), {**HESSIAN, "estimator": "control"}
    record, _ = hessian_trace.measure(source, trace_graph(module, (inputs[:2],)), calibration, options, surroundings)
    assert record.options["estimator"] == "xtrace" and len(record.entries) == 1
    assert surroundings.notes[0].startswith(
        "traces are estimated by xtrace alone, without a Gauss-Newton matrix: batch_norm takes its"
    )
