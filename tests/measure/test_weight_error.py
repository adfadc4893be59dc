"""Weight errors against rounding and sorting by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from zoo import named

from compress.context import Context
from compress.graph.trace import trace_graph
from compress.measure import weight_error
from compress.model import Source
from compress.sensitivity import Sensitivity, read_sensitivity


def context() -> Context:
    generator = torch.Generator().manual_seed(0)
    return Context(generator, torch.device("cpu"), lambda *_: None, lambda _: 0, [])


def run(module: nn.Module, *inputs: torch.Tensor) -> Sensitivity:
    source = Source(Path("model.pt"), "0" * 64, module, "torch", None, {}, {}, ())
    record, sidecar = weight_error.measure(source, trace_graph(module, inputs), None, {}, context())
    assert sidecar == {}
    return record


def test_every_layer_has_an_error_for_every_bit_width_and_sparsity() -> None:
    network = named("plain_cnn")
    record = run(network.make(), *network.inputs(2))
    options = [str(bits) for bits in range(2, 9)] + [f"0.{tenth}" for tenth in range(1, 10)]
    assert len(record.entries) == 3 * len(options)
    assert {option for _, option in record.entries} == set(options)
    assert (record.method, record.unit, record.task_sha256) == ("weight-error", "squared weight", None)
    assert {e.stderr for e in record.entries.values()} == {0.0}


def test_sparsity_errors_are_sums_of_the_smallest_squares() -> None:
    network = named("plain_cnn")
    module = network.make()
    record, state = run(module, *network.inputs(2)), module.state_dict()
    for (tensor, option), entry in record.entries.items():
        if "." in option:
            squares = np.sort(state[tensor].double().numpy().ravel() ** 2)
            assert entry.value == pytest.approx(squares[: round(float(option) * squares.size)].sum(), rel=1e-12)


def test_bit_errors_are_those_of_the_nearest_levels() -> None:
    """Symmetric levels -(2^(b-1) - 1) to 2^(b-1) - 1, or with the one below: the largest weight is a level."""
    network = named("plain_cnn")
    module = network.make()
    record, state = run(module, *network.inputs(2)), module.state_dict()
    for tensor in {tensor for tensor, _ in record.entries}:
        weight = state[tensor].double().numpy().reshape(len(state[tensor]), -1)
        errors = [record.entries[tensor, str(bits)].value for bits in range(2, 9)]
        assert errors == sorted(errors, reverse=True)
        for bits in (4, 8):
            scale = np.abs(weight).max(1, keepdims=True) / (2 ** (bits - 1) - 1)
            expected = ((np.round(weight / scale) * scale - weight) ** 2).sum()
            assert 0.5 * expected < record.entries[tensor, str(bits)].value < 1.2 * expected


def test_a_layer_with_one_weight_loses_all_of_it_or_nothing() -> None:
    module = nn.Sequential(nn.Linear(1, 1)).eval()
    module[0].weight.data.fill_(0.5)
    record = run(module, torch.randn(2, 1))
    found = {option: entry.value for (_, option), entry in record.entries.items()}
    assert found["0.5"] == 0.0
    assert found["0.9"] == 0.25
    assert found["8"] < 1e-4


def test_a_layer_of_zeros_has_no_error() -> None:
    module = nn.Sequential(nn.Linear(3, 4)).eval()
    module[0].weight.data.zero_()
    assert {e.value for e in run(module, torch.randn(2, 3)).entries.values()} == {0.0}


def test_the_record_survives_a_file(tmp_path: Path) -> None:
    network = named("plain_cnn")
    record = run(network.make(), *network.inputs(2))
    path = tmp_path / "sensitivity.json"
    path.write_text(json.dumps(record.to_json()), encoding="utf-8")
    assert read_sensitivity(path) == record
