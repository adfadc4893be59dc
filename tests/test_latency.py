"""Latency tables: what is fixed and what layers add make up the networks that were timed; a kept table is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from zoo import named

from compress import latency
from compress.apply import apply_plan, assemble, float_module
from compress.bench import Latency, measure_latency
from compress.data import Data
from compress.demo.network import fashion_net
from compress.errors import InputError
from compress.export import onnx_model, serialize, to_onnx
from compress.graph.rewrite import points_for
from compress.graph.trace import Graph, trace_graph
from compress.plan import Plan, Quantize
from compress.quantize.calibrate import activation_ranges
from compress.sensitivity import CostTable, cost_table_from

WIDTHS = (4, 8, 32)


def silent(*_: object) -> None:
    """No progress."""


class Network:
    """A network that is built with the layers asked for as integers, and what was asked for."""

    def __init__(self, module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.module, self.inputs = module.eval().requires_grad_(False), inputs
        self.graph: Graph = trace_graph(self.module, inputs)
        self.choices: list[dict[str, int]] = []

    def build(self, choice: Mapping[str, int]) -> bytes:
        self.choices.append(dict(choice))
        integer = {tensor: bits for tensor, bits in choice.items() if bits < 32}
        dense = float_module(self.graph)
        points = [node.name for node in points_for(dense, integer)]
        ranges = activation_ranges(dense, points, Data(self.inputs, None, "examples"), silent)
        weights = [
            Quantize(layer.tensor, "weight", integer[layer.tensor], "symmetric_reduced", layer.axis, "minmax")
            for layer in self.graph.layers
            if layer.tensor in integer
        ]
        activations = [Quantize(name, "activation", 8, "asymmetric", None, ranges[name]) for name in points]
        plan = Plan("uniform", {}, 0, "0" * 64, None, None, (*weights, *activations), {})
        compressed = apply_plan(self.module, self.graph.tied, plan, {})
        return serialize(onnx_model(self.graph, compressed, assemble(self.graph, compressed)))


class Same(Network):
    """A small network that is built as it is, whatever was asked for."""

    def __init__(self) -> None:
        network = named("mlp")
        super().__init__(network.make(), network.inputs(4))

    def build(self, choice: Mapping[str, int]) -> bytes:
        self.choices.append(dict(choice))
        return dense_mlp()


@cache
def dense_mlp() -> bytes:
    network = named("mlp")
    return serialize(to_onnx(network.make(), network.inputs(4)))


def table_of(network: Network, *, integer_activations: bool = True) -> CostTable:
    return latency.latency_table(
        network.build,
        network.graph.layers,
        WIDTHS,
        tuple(x[:1] for x in network.inputs),
        threads=1,
        integer_activations=integer_activations,
        progress=silent,
    )


def cached(network: Network, notes: list[str], *, threads: int = 1, widths: Sequence[int] = WIDTHS) -> CostTable:
    return latency.cached_latency_table(
        network.build,
        network.graph,
        network.graph.layers,
        widths,
        tuple(x[:1] for x in network.inputs),
        threads=threads,
        activations="8",
        notes=notes,
        progress=silent,
    )


@pytest.fixture(autouse=True)
def few_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "REPEATS", 2)
    monkeypatch.setattr(latency, "NUM_MIXTURES", 2)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "hcompress"


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The medians of all networks that were timed."""
    medians: list[float] = []

    def watched(*arguments: Any, **options: Any) -> dict[str, Latency]:
        found = measure_latency(*arguments, **options)
        medians.extend(value.median for value in found.values())
        return found

    monkeypatch.setattr(latency, "measure_latency", watched)
    return medians


def test_the_demos_table_is_whole_and_adds_up_to_the_integer_network_that_was_timed(timed: list[float]) -> None:
    network = Network(fashion_net(), (torch.randn(4, 1, 28, 28),))
    table = table_of(network)
    tensors = [layer.tensor for layer in network.graph.layers]
    assert table.quantity == "latency"
    assert list(table.entries) == [(tensor, str(bits)) for tensor in tensors for bits in WIDTHS]
    assert all(value >= 0 for value in table.entries.values())
    assert all(table.entries[tensor, "4"] == table.entries[tensor, "8"] for tensor in tensors)
    assert network.choices[0] == dict.fromkeys(tensors, 8)
    assert all(set(choice.values()) == {8, 32} for choice in network.choices[1:])
    assert len(timed) == len(network.choices) == 3
    assert table.fixed + table.total("8") == pytest.approx(timed[0], rel=1e-9)


def test_with_float_activations_no_width_is_faster(timed: list[float]) -> None:
    table = table_of(Same(), integer_activations=False)
    assert set(table.entries.values()) == {0.0}
    assert [table.fixed] == timed


def test_latencies_that_are_sums_are_recovered() -> None:
    generator = np.random.default_rng(1)
    macs = generator.uniform(1, 3, 6)
    exact = 0.01 * macs
    mixtures = [(0, 1, 2), (3, 4, 5), (0, 3), (1, 2, 4, 5)]
    mixed = np.array([2.0 + exact[list(floats)].sum() for floats in mixtures])
    np.testing.assert_allclose(latency._added_by_floats(mixtures, mixed, 2.0, macs), exact, rtol=1e-9)


def test_a_layer_that_is_slower_as_integers_costs_nothing_as_floats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "_added_by_floats", lambda *_: np.array([0.5, -0.001, 0.25]))
    table = table_of(Same())
    assert [round(value, 6) for value in table.entries.values()] == [0, 0, 0.5, 0.001, 0.001, 0, 0, 0, 0.25]


def test_the_fit_leaves_the_macs_where_kernels_do() -> None:
    """One layer without multiply-accumulates takes all the time."""
    mixtures = [(0, 1), (1, 2), (2, 3), (0, 3), (1, 3), (0, 2)]
    mixed = np.array([1.0 + (0 in floats) for floats in mixtures])
    found = latency._added_by_floats(mixtures, mixed, 1.0, np.array([0.0, 1.0, 1.0, 1.0]))
    assert found.argmax() == 0 and found[0] > 3 * np.abs(found[1:]).max()


@pytest.mark.parametrize("num_layers", [0, 1, 2, 7, 54])
def test_mixtures_are_distinct_and_have_floats(num_layers: int) -> None:
    mixtures = latency._mixtures(num_layers)
    assert len(set(mixtures)) == len(mixtures) <= 2
    assert all(floats and set(floats) <= set(range(num_layers)) for floats in mixtures)
    assert mixtures == latency._mixtures(num_layers)
    assert bool(mixtures) == bool(num_layers)


def test_a_kept_table_is_read_without_building(folder: Path) -> None:
    notes: list[str] = []
    network = Same()
    first = cached(network, notes)
    assert len(network.choices) == 3
    again = Same()
    assert cached(again, notes) == first
    assert again.choices == [] and notes == []


def test_another_number_of_threads_or_other_widths_are_timed_again(folder: Path) -> None:
    notes: list[str] = []
    network = Same()
    cached(network, notes)
    cached(network, notes, threads=2)
    cached(network, notes, widths=(8, 32))
    assert len(network.choices) == 9 and notes == []


def test_a_damaged_entry_is_timed_again(folder: Path) -> None:
    notes: list[str] = []
    cached(Same(), notes)
    (path,) = folder.glob("latency-*.json")
    path.write_text(path.read_text().replace("fixed", "fixes"))
    network = Same()
    table = cached(network, notes)
    assert len(network.choices) == 3
    assert len(notes) == 1 and "damaged" in notes[0]
    assert cached(Same(), []) == table


def test_a_cost_table_survives_json() -> None:
    table = CostTable("latency", {("b", "8"): 0.0, ("a", "32"): 0.25}, 1.5)
    assert cost_table_from(table.to_json(), "there") == table
    with pytest.raises(InputError, match=r"there: bad entry \('fixed'\)"):
        cost_table_from({"quantity": "latency", "entries": []}, "there")


def test_the_processor_has_a_name() -> None:
    assert latency.cpu_name()
