"""The Fisher measure against squares of autograd's gradients, and against the Gauss-Newton traces."""

from __future__ import annotations

import copy
import json
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close
from zoo import named

from compress.context import Context
from compress.data import Data
from compress.errors import UsageError
from compress.graph.trace import Graph, trace_graph
from compress.measure import fisher, hessian_trace
from compress.model import Source
from compress.sensitivity import Sensitivity, read_sensitivity
from compress.task import Calibration, Classification


def context(seed: int = 0) -> Context:
    generator = torch.Generator().manual_seed(seed)
    return Context(generator, torch.device("cpu"), lambda *_: None, lambda _: 0, [])


@cache
def setting(count: int = 40) -> tuple[Source, Graph, Calibration]:
    network = named("plain_cnn")
    module, inputs = network.make(), network.inputs(count)
    source = Source(Path("model.pt"), "0" * 64, module, "torch", None, {}, {}, ())
    labels = torch.arange(count) % 5
    return source, trace_graph(module, network.inputs(2)), Calibration(Classification(), Data(inputs, labels, "x.npz"))


def run(mode: str, *, count: int = 40, seed: int = 0) -> tuple[Sensitivity, dict[str, Tensor]]:
    return fisher.measure(*setting(count), {"fisher": mode}, context(seed))


def test_the_empirical_fisher_is_the_mean_square_of_each_examples_gradient() -> None:
    source, graph, calibration = setting()
    record, sidecar = run("labels")
    module = copy.deepcopy(source.module).requires_grad_(True)
    parameters = [module.get_parameter(layer.tensor) for layer in graph.layers]
    (x,), y = calibration.data.inputs, calibration.data.targets
    assert y is not None
    gradients = [
        torch.autograd.grad(F.cross_entropy(module(x[i : i + 1]), y[i : i + 1]), parameters) for i in range(40)
    ]
    for layer, values in zip(graph.layers, zip(*gradients, strict=True), strict=True):
        squares = torch.stack(values).square()
        assert_close(sidecar[layer.tensor], squares.mean(0), rtol=1e-4, atol=1e-6)
        norms = squares.flatten(1).sum(1)
        entry = record.entries[layer.tensor, ""]
        assert entry.value == pytest.approx(float(norms.mean()), rel=1e-4)
        assert entry.stderr == pytest.approx(float(norms.std()) / 40**0.5, rel=1e-4)


@pytest.mark.parametrize("mode", ["ggn", "sampled"])
def test_the_true_fisher_has_the_gauss_newton_traces(mode: str) -> None:
    options = {"trace": "ggn", "rtol": 0.0, "passes": 20}
    exact, _ = hessian_trace.measure(*setting(), options, context())
    runs = [run(mode, seed=seed)[0] for seed in range(6)]
    for key, entry in exact.entries.items():
        found = [record.entries[key] for record in runs]
        error = (sum(e.stderr**2 for e in found) ** 0.5) / len(found)
        assert abs(sum(e.value for e in found) / len(found) - entry.value) < 4 * error


@pytest.mark.parametrize("mode", ["ggn", "sampled", "labels"])
def test_the_diagonals_add_up_to_the_traces(mode: str) -> None:
    record, sidecar = run(mode)
    _, graph, calibration = setting()
    assert list(record.entries) == [(layer.tensor, "") for layer in graph.layers]
    assert {name: tuple(t.shape) for name, t in sidecar.items()} == {la.tensor: la.shape for la in graph.layers}
    assert all(t.dtype is torch.float32 for t in sidecar.values())
    for (tensor, _), entry in record.entries.items():
        assert entry.value == pytest.approx(float(sidecar[tensor].sum()), rel=1e-5)
    assert (record.method, record.unit) == ("fisher", "loss per squared weight")
    assert (record.task_sha256, record.options) == (calibration.sha256(), {"fisher": mode})


@pytest.mark.parametrize("mode", ["ggn", "sampled"])
def test_a_seed_gives_the_same_record(mode: str) -> None:
    (first, tensors), (second, again) = run(mode), run(mode)
    assert first == second
    assert all(torch.equal(tensors[name], again[name]) for name in tensors)
    assert run(mode, seed=1)[0].entries != first.entries


def test_the_record_survives_a_file(tmp_path: Path) -> None:
    record, _ = run("ggn")
    path = tmp_path / "sensitivity.json"
    path.write_text(json.dumps(record.to_json()), encoding="utf-8")
    assert read_sensitivity(path) == record


def test_one_example_has_no_standard_error_and_says_so() -> None:
    surroundings = context()
    record, _ = fisher.measure(*setting(1), {"fisher": "ggn"}, surroundings)
    assert {e.stderr for e in record.entries.values()} == {0.0}
    (note,) = surroundings.notes
    assert note == "Fisher traces of one example have no standard error; pass more with --num-calibration"


def test_the_empirical_fisher_needs_labels() -> None:
    source, graph, calibration = setting()
    unlabelled = Calibration(calibration.task, Data(calibration.data.inputs, None, "x.npz"))
    with pytest.raises(UsageError, match="the empirical Fisher needs labels, and --data has none"):
        fisher.measure(source, graph, unlabelled, {"fisher": "labels"}, context())
