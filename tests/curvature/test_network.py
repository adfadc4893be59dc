"""An opened network: its weights are its own, and the caller's model stays as it was."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from zoo import named

from compress.curvature.network import (
    Network,
    batches,
    differentiable,
    open_network,
    outputs_of,
    predict,
    require_finite,
)
from compress.curvature.recording import record
from compress.data import Data
from compress.errors import InputError, NumericsError
from compress.graph.trace import trace_graph

CPU = torch.device("cpu")


def opened(name: str) -> tuple[nn.Module, Network, tuple[Tensor, ...]]:
    network = named(name)
    module, inputs = network.make(), network.inputs(5)
    return module, open_network(trace_graph(module, inputs), device=CPU), inputs


@pytest.mark.parametrize("name", ["plain_cnn", "Gpt", "TwoInputs", "DictOutput"])
def test_an_opened_network_computes_the_same(name: str) -> None:
    module, network, inputs = opened(name)
    expected = outputs_of(module(*inputs))
    outputs, uses = record(network, inputs)
    assert_close(outputs_of(network.module(*inputs)), expected)
    assert_close(outputs_of(outputs), expected)
    assert [use.site for use in uses] == [site for sites in network.sites.values() for site in sites]


def test_the_callers_model_is_left_as_found() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)).eval()
    module[0].weight.requires_grad_(False)
    module[3].weight.grad = torch.ones(3, 6)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    inputs = torch.randn(5, 4)
    network = open_network(trace_graph(module, (inputs,)), device=CPU)
    network.set_flat(torch.zeros(network.num_weights))
    with differentiable(network, network.weights):
        outputs_of(network.module(inputs))[0].sum().backward()
    assert not module.training
    assert [p.requires_grad for p in module.parameters()] == [False, True, True, True, True, True]
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    grads = [name for name, p in module.named_parameters() if p.grad is not None]
    assert grads == ["3.weight"]
    assert torch.equal(module[3].weight.grad, torch.ones(3, 6))


def test_a_buffer_that_forward_writes_to_stays_the_callers() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 2)
            self.register_buffer("calls", torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            self.calls.add_(1)
            return self.fc(x)

    module = Counting().eval()
    graph = trace_graph(module, (torch.randn(2, 3),))
    before = float(module.calls)
    network = open_network(graph, device=CPU)
    network.module(torch.randn(2, 3))
    assert float(module.calls) == before


def test_flat_weights_are_the_layers_in_order_and_can_be_replaced() -> None:
    module, network, inputs = opened("plain_cnn")
    state = module.state_dict()
    flat = torch.cat([state[layer.tensor].flatten() for layer in network.layers])
    assert torch.equal(network.flat(), flat)
    assert network.num_weights == len(flat)
    parts = network.split(torch.stack([flat, 2 * flat]))
    assert all(torch.equal(part[1], 2 * state[name]) for name, part in parts.items())
    network.set_flat(2 * flat)
    assert torch.equal(network.flat(), 2 * flat)
    for name in parts:
        state[name].mul_(2)
    assert_close(network.module(*inputs), module(*inputs))


def test_a_tied_weight_is_replaced_in_all_its_uses() -> None:
    _, network, inputs = opened("Gpt")
    network.set_flat(torch.zeros(network.num_weights))
    assert not outputs_of(network.module(*inputs))[0].any()


def test_chosen_layers_alone_have_weights() -> None:
    network = named("plain_cnn")
    graph = trace_graph(network.make(), network.inputs(2))
    chosen = open_network(graph, layers=graph.layers[1:2], device=CPU)
    assert list(chosen.weights) == [graph.layers[1].tensor]
    assert chosen.num_weights == graph.layers[1].elements


def test_weights_ask_for_gradients_inside_the_block_only() -> None:
    _, network, _ = opened("plain_cnn")
    with pytest.raises(KeyError), differentiable(network, list(network.weights)[:1]) as weights:
        assert weights[0].requires_grad
        raise KeyError
    assert not any(w.requires_grad for w in network.module.parameters())


def test_batches_cover_the_data_once() -> None:
    _, network, _ = opened("plain_cnn")
    data = Data((torch.arange(7.0).unsqueeze(1),), torch.arange(7), "x.npz")
    found = list(batches(network, data, 3))
    assert [len(batch) for batch in found] == [3, 3, 1]
    assert torch.equal(torch.cat([batch.inputs[0] for batch in found]), data.inputs[0])
    assert [batch.targets.tolist() for batch in found if batch.targets is not None] == [[0, 1, 2], [3, 4, 5], [6]]


def test_predictions_are_the_first_output_of_every_example() -> None:
    module, network, inputs = opened("TupleOutput")
    assert_close(predict(network, Data(inputs, None, "x.npz"), batch=2), module(*inputs)[0])


def test_a_prediction_that_is_not_finite_names_its_examples() -> None:
    _, network, inputs = opened("plain_cnn")
    inputs[0][3] = float("nan")
    with pytest.raises(NumericsError, match=r"the output isn't finite on example 3 of x.npz"):
        predict(network, Data(inputs, None, "x.npz"), batch=2)


def test_a_network_without_floating_outputs_is_an_error() -> None:
    with pytest.raises(InputError, match="the network has no floating-point output"):
        outputs_of({"classes": torch.arange(3)})


def test_many_examples_are_listed_in_part() -> None:
    values = torch.zeros(20, 2)
    values[3:15, 1] = float("inf")
    with pytest.raises(NumericsError, match=r"x isn't finite on examples 3, 4, 5, 6, 7, 8, 9, 10 and 4 more of y"):
        require_finite(values, "x", range(20), "y")


def test_large_finite_values_pass() -> None:
    require_finite(torch.full((4, 3), 3e38), "x", range(4), "y")
