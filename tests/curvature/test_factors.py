"""Rows as sums of outer products against the rows themselves, in float64, and what is made of either."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close
from zoo import Network, named

from compress.curvature import controls, factors
from compress.curvature import network as networks
from compress.curvature.controls import Known, gauss_newton_blocks
from compress.curvature.factors import UseGradients, factored, factors_of
from compress.curvature.gradient_rules import Use
from compress.curvature.loss_factor import Draw, period
from compress.curvature.network import open_network
from compress.curvature.recording import Recorder
from compress.curvature.sample_gradients import layer_rows
from compress.curvature.traces import ggn_traces
from compress.data import Data
from compress.errors import NumericsError
from compress.graph.trace import trace_graph
from compress.task import Classification, Regression, Task

CPU = torch.device("cpu")
FLOAT32_INSIDE = {"IntegerInputs", "Recurrent"}  # their traces hold a dtype
PROBES, SKETCHED = 5, 2


def opened(network: Network, count: int) -> tuple[networks.Network, Data]:
    dtype = torch.float32 if network.name in FLOAT32_INSIDE else torch.float64
    inputs = network.inputs(count)
    found = open_network(trace_graph(network.make(), inputs), device=CPU)
    found.module.to(dtype)
    return found, Data(tuple(x.to(dtype) if x.is_floating_point() else x for x in inputs), None, "data")


def signs(network: networks.Network, tensor: str, numbers: range) -> Tensor:
    generator, d = torch.Generator().manual_seed(3), network.weights[tensor].numel()
    drawn = torch.randint(0, 2, (PROBES, d), generator=generator, dtype=network.dtype).mul(2).sub(1)
    return drawn[numbers.start : numbers.stop]


def blocks(network: networks.Network, task: Task, data: Data) -> dict[str, Known]:
    return gauss_newton_blocks(
        network,
        task,
        data,
        lambda tensor, numbers: signs(network, tensor, numbers),
        PROBES,
        num_sketched=SKETCHED,
        seed=1,
        progress=lambda *_: None,
    )


@pytest.fixture
def wherever_possible(monkeypatch: pytest.MonkeyPatch) -> None:
    """Factors whatever they cost."""
    monkeypatch.setattr(factors, "_is_cheaper", lambda *_, **__: True)


@pytest.mark.usefixtures("wherever_possible")
def test_factors_are_the_rows_that_are_not_made(network: Network) -> None:
    if network.name == "unaffine_batch_norm":
        pytest.skip("statistics of the batch: examples have no gradients of their own")
    found, data = opened(network, 4)
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if network.name in FLOAT32_INSIDE else {"rtol": 1e-9, "atol": 1e-11}
    outputs, uses = Recorder(found).record(data.inputs)
    rows: dict[str, list[Tensor]] = {}
    gradients: dict[str, list[UseGradients]] = {tensor: [] for tensor in factored(uses)}
    for probe in range(2):
        draw = Draw(5, range(len(data)), probe, "data")
        for receivers in ({}, {tensor: draws.append for tensor, draws in gradients.items()}):
            layer_rows(
                found,
                Regression(),
                data,
                outputs,
                uses,
                draw,
                lambda tensor, value, of=receivers: None if of else rows.setdefault(tensor, []).append(value),
                mode="ggn",
                is_last=False,
                factored=receivers,
            )
    for tensor, draws in gradients.items():
        exact = torch.stack(rows[tensor], 1)  # [n, k, d]
        if not draws:
            assert not exact.any()
            continue
        made, weight = factors_of(draws), found.weights[tensor]
        vectors = torch.randn(3, *weight.flatten(1).shape, dtype=weight.dtype)
        numbers = torch.randn(len(data), 2, dtype=weight.dtype)
        assert_close(made.squared_norms(), exact.double().square().sum(2), **tolerance)
        assert_close(made.times(vectors), torch.einsum("nkd,vd->nvk", exact, vectors.flatten(1)), **tolerance)
        assert_close(made.summed(numbers).flatten(), torch.einsum("nkd,nk->d", exact, numbers), **tolerance)


class Twice(nn.Module):
    """One weight at two places, of which the loss may see one; a convolution whose norm is folded; a wide layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 6, 3, 2, 1), nn.BatchNorm2d(6)
        self.same, self.last = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = F.gelu(self.norm(self.conv(x))).mean((2, 3))
        return self.last(torch.tanh(self.same(torch.tanh(self.same(y)))))


TWICE = Network("twice", Twice, {"x": (2, 5, 5)})


@pytest.mark.parametrize("example", [TWICE, named("plain_cnn"), named("transformer_encoder")], ids=lambda n: n.name)
def test_blocks_are_the_same_with_rows_and_without_and_are_those_of_the_dense_rows(
    example: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, data = opened(example, 7)
    task = Classification() if example is TWICE else Regression()
    outputs, uses = Recorder(found).record(data.inputs)
    made = min(period(task, outputs) or controls.MOST, controls.MOST)
    dense: dict[str, list[Tensor]] = {}
    for probe in range(made):
        draw = Draw(1, range(len(data)), probe, "data")

        def receive(tensor: str, rows: Tensor) -> None:
            dense.setdefault(tensor, []).append(rows)

        layer_rows(found, task, data, outputs, uses, draw, receive, mode="ggn", is_last=False)
    for is_factored in (True, False):
        monkeypatch.setattr(factors, "_is_cheaper", lambda *_, flag=is_factored, **__: flag)
        monkeypatch.setattr(controls, "HELD_BYTES", 1)  # passes of few examples
        for tensor, known in blocks(found, task, data).items():
            rows = torch.cat(dense[tensor])
            block, drawn = rows.T @ rows / (made * len(data)), signs(found, tensor, range(PROBES))
            assert known.control.trace == pytest.approx(float(block.trace()))
            assert_close(torch.tensor(known.control.values, dtype=torch.float64), (drawn @ block * drawn).sum(1))
            assert_close(known.sketch, drawn[:SKETCHED] @ block)


def test_traces_are_the_same_with_rows_and_without(monkeypatch: pytest.MonkeyPatch) -> None:
    found, data = opened(TWICE, 5)
    means = []
    for is_factored in (True, False):
        monkeypatch.setattr(factors, "_is_cheaper", lambda *_, flag=is_factored, **__: flag)
        generator = torch.Generator().manual_seed(0)
        estimates = ggn_traces(
            found, Classification(), data, rtol=0.0, max_passes=2, generator=generator, progress=lambda *_: None
        )
        means.append({tensor: estimate.mean for tensor, estimate in estimates.items()})
    assert means[0] == pytest.approx(means[1], rel=1e-12)


@pytest.mark.usefixtures("wherever_possible")
@pytest.mark.parametrize("takes_blocks", [True, False])
def test_a_gradient_that_is_not_finite_is_named_though_no_row_is_made(takes_blocks: bool) -> None:
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return torch.sqrt(self.layer(x))

    inputs = torch.ones(4, 3)
    module = Root().eval()
    nn.init.ones_(module.layer.weight)
    network = open_network(trace_graph(module, (inputs,)), device=CPU)
    inputs[2] = 0  # the root's derivative there is infinite
    data = Data((inputs,), None, "calib.npz")
    with pytest.raises(NumericsError, match=r"gradient of layer\.weight isn't finite on example 2 of calib\.npz"):
        if takes_blocks:
            blocks(network, Regression(), data)
        else:
            generator = torch.Generator().manual_seed(0)
            ggn_traces(
                network, Regression(), data, rtol=0.0, max_passes=2, generator=generator, progress=lambda *_: None
            )


def uses_of(module: nn.Module, inputs: Tensor) -> Sequence[Use]:
    return Recorder(open_network(trace_graph(module.eval(), (inputs,)), device=CPU)).record((inputs,))[1]


def test_rows_are_made_where_positions_are_many_for_their_length() -> None:
    wide = nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 10))
    assert factored(uses_of(wide, torch.zeros(2, 784)), draws=10, vectors=8) == {"0.weight", "2.weight"}
    early, late = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(512, 512, 3, padding=1)
    assert factored(uses_of(early, torch.zeros(2, 16, 32, 32)), draws=10, vectors=8) == frozenset()
    assert factored(uses_of(late, torch.zeros(2, 512, 7, 7)), draws=10, vectors=8) == {"weight"}
    depthwise = nn.Conv2d(64, 64, 3, padding=1, groups=64)
    assert factored(uses_of(depthwise, torch.zeros(2, 64, 2, 2))) == frozenset()
