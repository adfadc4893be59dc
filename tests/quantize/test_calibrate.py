"""Ranges of activations: chosen by what they do to the network's outputs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from zoo import named

from compress.apply import float_module, grid_of
from compress.context import Context
from compress.data import Data
from compress.errors import UsageError
from compress.graph.rewrite import is_read, operand, rounded_to
from compress.graph.trace import Graph, trace_graph
from compress.numerics.activation_ranges import RULES
from compress.quantize import calibrate
from compress.quantize.calibrate import activation_ranges, calibrated, ranges_at
from compress.task import Calibration, Classification, divergence, floating

CPU = torch.device("cpu")


def context() -> Context:
    return Context(torch.Generator().manual_seed(0), CPU, lambda *_: None, lambda _: 0, [])


def spiky(n: int = 2048, seed: int = 0) -> Tensor:
    """``[n, 8]``: of the last two columns one value in 509 is 40 times as large as the others."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(n, 8, generator=generator)
    x[7::509, 6:] = 40.0
    return x


class Readout(nn.Module):
    """A hidden layer that passes its inputs on, and a readout that heeds the last columns, or doesn't."""

    def __init__(self, spikes: float) -> None:
        super().__init__()
        self.hidden, self.readout = nn.Linear(8, 8, bias=False), nn.Linear(8, 4, bias=False)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            self.hidden.weight.copy_(torch.eye(8))
            self.readout.weight.copy_(torch.randn(4, 8, generator=generator))
            self.readout.weight[:, 6:] *= spikes

    def forward(self, x: Tensor) -> Tensor:
        return self.readout(torch.relu(self.hidden(x)))


def readout(spikes: float) -> tuple[Graph, Calibration]:
    x = spiky()
    return trace_graph(Readout(spikes).eval(), (x[:2],)), Calibration(Classification(), Data((x,), None, "spiky"))


def chosen(
    graph: Graph, calibration: Calibration, rule: str = "auto", bits: str = "8"
) -> dict[str, tuple[float, float]]:
    return calibrated(graph, calibration, {"activations": bits, "activation_range": rule}, context())


@pytest.mark.parametrize("bits", ["8", "4"])
@pytest.mark.parametrize("spikes", [1.0, 0.0])
def test_the_chosen_range_is_the_best_of_the_candidates_by_the_outputs(bits: str, spikes: float) -> None:
    graph, calibration = readout(spikes)
    module, x = float_module(graph), calibration.data.inputs[0]
    (dense,) = floating(module(x))
    weight = Readout(spikes).readout.weight.detach()

    def loss(rule: str) -> float:
        low, high = chosen(graph, calibration, rule, bits)["relu"]
        rounded = rounded_to(torch.relu(x), grid_of(low, high, int(bits)))
        return divergence(dense.detach(), rounded @ weight.T, are_logits=True)

    assert loss("auto") <= 1.1 * min(map(loss, RULES))


def test_a_rule_by_name_is_the_same_for_all() -> None:
    graph, calibration = readout(1.0)
    module = float_module(graph)
    extremes = activation_ranges(module, ["x", "relu"], calibration.data, lambda *_: None)
    assert chosen(graph, calibration, "minmax") == extremes
    assert chosen(graph, calibration, "p99.9")["relu"][1] < 2
    assert chosen(graph, calibration, "mse", "4") == ranges_at(graph, 4, extremes, calibration, "mse", context()) | {
        "x": chosen(graph, calibration, "mse")["x"]
    }


def test_what_layers_read_of_a_clipped_value_is_within_its_range() -> None:
    network = named("padded_residual")
    inputs = network.inputs(64)
    graph = trace_graph(network.make(), network.inputs(2))
    calibration = Calibration(Classification(), Data(inputs, None, "zoo"))
    found = chosen(graph, calibration, "p99.9", "4")
    reads = [node for node in float_module(graph).graph.nodes if node.name in found and is_read(node)]
    assert reads
    for node in reads:
        low, high = found[operand(node, 0).name]
        slack = 1 + 1 / 15
        assert slack * low <= found[node.name][0] <= found[node.name][1] <= slack * high


def test_ranges_are_measured_once_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    graph, calibration = readout(1.0)
    runs, plain = [], calibrate.loss_changes
    monkeypatch.setattr(calibrate, "loss_changes", lambda *args, **rest: runs.append(1) or plain(*args, **rest))
    same = context()
    first, second = (
        calibrated(graph, calibration, {"activations": "8", "activation_range": "auto"}, same) for _ in range(2)
    )
    assert first == second
    assert len(runs) == 2


def test_without_data_it_says_what_to_pass() -> None:
    graph, _ = readout(1.0)
    with pytest.raises(UsageError, match="8-bit activations are calibrated on data"):
        calibrated(graph, None, {"activations": "8", "activation_range": "auto"}, context())
    assert calibrated(graph, None, {"activations": "float", "activation_range": "auto"}, context()) == {}


def test_constant_activations_keep_their_range() -> None:
    graph, _ = readout(1.0)
    constant = Calibration(Classification(), Data((torch.zeros(32, 8),), None, "zeros"))
    assert chosen(graph, constant) == {"x": (0.0, 0.0), "relu": (0.0, 0.0)}
