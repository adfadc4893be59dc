"""Second moments of layer inputs: what a change of a weight does to the outputs, measured on the layer itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close
from zoo import named

from compress.curvature import moments
from compress.curvature import network as networks
from compress.curvature.moments import input_moments
from compress.curvature.network import open_network
from compress.data import Data
from compress.graph.trace import trace_graph
from compress.numerics.rounding import rows

WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def quiet(stage: str, done: int, total: int | None) -> None:
    """Progress of a test."""


def opened(module: nn.Module, inputs: tuple[Tensor, ...], dtype: torch.dtype = torch.float64) -> networks.Network:
    network = open_network(trace_graph(module.eval(), inputs), device=torch.device("cpu"))
    network.module.to(dtype)
    return network


def found_for(module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    network = opened(module, (x[:2],))
    return input_moments(network, Data((x.double(),), None, "data"), progress=quiet)


def moved_outputs(module: nn.Module, changes: dict[str, Tensor], x: Tensor) -> dict[str, float]:
    """Mean over examples and positions of the squared change of each layer's output, summed over its channels."""
    module = module.double()
    squares: dict[str, list[Tensor]] = {name: [] for name in changes}

    def watch(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            weight = layer.weight + changes[name]
            if isinstance(layer, nn.Linear):
                change = F.linear(inputs[0], weight, layer.bias) - output
            else:
                change = layer._conv_forward(inputs[0], weight, layer.bias) - output
            channels = -1 if isinstance(layer, nn.Linear) else 1
            squares[name].append(change.square().sum(channels).flatten())

        return hook

    weighted = [(name, layer) for name, layer in module.named_modules() if isinstance(layer, WEIGHTED)]
    layers = {f"{name}.weight".removeprefix("."): layer for name, layer in weighted}
    handles = [layers[name].register_forward_hook(watch(name)) for name in changes]
    with torch.no_grad():
        module(x.double())
    for handle in handles:
        handle.remove()
    return {name: float(torch.cat(parts).mean()) for name, parts in squares.items()}


def predicted(change: Tensor, moment: Tensor) -> float:
    """The sum of ``d A d^T`` over a layer's rows."""
    flat = rows(change, 0)
    stack = moment if moment.dim() == 3 else moment[None]
    parts = flat.reshape(len(stack), -1, flat.shape[1])
    return float(torch.einsum("gmi,gij,gmj->", parts, stack, parts))


def compare(module: nn.Module, x: Tensor) -> None:
    found = found_for(module, x)
    generator = torch.Generator().manual_seed(3)
    state = module.state_dict()
    changes = {name: torch.randn(state[name].shape, generator=generator, dtype=torch.float64) for name in found}
    measured = moved_outputs(module, changes, x)
    assert measured.keys() == found.keys()
    for name, change in changes.items():
        assert predicted(change, found[name]) == pytest.approx(measured[name], rel=1e-10), name


class Twice(nn.Module):
    """A convolution at two resolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.out = nn.Conv2d(3, 3, 3, padding=1), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.a(F.avg_pool2d(torch.tanh(self.a(x)), 2)).mean((2, 3)))


def layers() -> dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]]:
    conv1, conv2, conv3 = nn.Conv1d, nn.Conv2d, nn.Conv3d
    return {
        "linear": (lambda: nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3, bias=False)), (5,)),
        "linear on sequences": (lambda: nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)), (6, 5)),
        "conv1d": (lambda: conv1(3, 4, 3, 2, 1), (3, 9)),
        "conv2d": (lambda: nn.Sequential(conv2(3, 4, 3), nn.ReLU(), conv2(4, 2, 1)), (3, 6, 5)),
        "conv3d": (lambda: conv3(2, 4, (2, 1, 3), (1, 2, 1), (1, 0, 2)), (2, 5, 4, 5)),
        "strided, padded, dilated": (lambda: conv2(3, 4, (3, 2), (2, 3), (1, 2), (1, 2)), (3, 9, 8)),
        "grouped": (lambda: conv2(4, 6, (2, 3), 1, 1, groups=2), (4, 7, 6)),
        "depthwise": (lambda: conv2(4, 8, 3, 2, groups=4), (4, 7, 6)),
        "grouped 1d": (lambda: conv1(6, 3, 4, groups=3, dilation=2), (6, 11)),
        "grouped 3d": (lambda: conv3(4, 4, 2, groups=2), (4, 3, 4, 3)),
        "same, even kernel": (lambda: conv2(3, 4, (4, 2), padding="same"), (3, 7, 6)),
        "same, dilated, 1d": (lambda: conv1(3, 4, 4, padding="same", dilation=3), (3, 11)),
        "valid": (lambda: conv2(3, 4, 3, padding="valid"), (3, 7, 6)),
        "used twice": (Twice, (3, 6, 8)),
    }


@pytest.mark.parametrize("case", layers())
def test_a_change_moves_the_outputs_as_the_moment_says(case: str) -> None:
    torch.manual_seed(0)
    make, shape = layers()[case]
    compare(make().requires_grad_(False), torch.randn(4, *shape))


def test_batches_count_by_their_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    module, x = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 2, 2)), torch.randn(11, 2, 5, 4)
    whole = found_for(module, x)
    monkeypatch.setattr("compress.curvature.network.batches.__defaults__", (4,))
    parts = found_for(module, x)
    for name, moment in whole.items():
        assert_close(parts[name], moment, rtol=1e-12, atol=1e-14)
    compare(module, x)


def test_moments_are_float64_symmetric_and_not_negative() -> None:
    network = named("grouped")
    opened_network = opened(network.make(), network.inputs(2), torch.float32)
    found = input_moments(opened_network, Data(network.inputs(16), None, "data"), progress=quiet)
    assert len(found) == len(opened_network.layers)
    for moment in found.values():
        assert moment.dtype == torch.float64
        assert_close(moment, moment.mT, rtol=1e-5, atol=1e-7)
        assert torch.linalg.eigvalsh(moment).min() > -1e-5 * moment.abs().max()


@pytest.mark.parametrize("name", ["transposed_2d", "padded_residual", "same_padding", "Gpt", "InplaceResidual"])
def test_each_layer_but_transposed_ones_has_a_moment_that_fits_its_rows(name: str) -> None:
    network = named(name)
    opened_network = opened(network.make(), network.inputs(2), torch.float32)
    found = input_moments(opened_network, Data(network.inputs(3), None, "data"), progress=quiet)
    for layer in opened_network.layers:
        if layer.op.startswith("conv_transpose"):
            assert layer.tensor not in found
            continue
        moment = found[layer.tensor]
        assert moment.shape[-1] == layer.elements // layer.shape[0]
        assert layer.shape[0] % (len(moment) if moment.dim() == 3 else 1) == 0


def test_the_caller_s_network_is_left_as_it_was() -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 2)).eval()
    before = {key: value.clone() for key, value in module.state_dict().items()}
    x = torch.randn(5, 3)
    input_moments(opened(module, (x[:2],), torch.float32), Data((x,), None, "data"), progress=quiet)
    assert all(torch.equal(before[key], value) for key, value in module.state_dict().items())
    assert all(parameter.requires_grad for parameter in module.parameters())


def test_a_layer_with_too_many_inputs_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments, "LARGEST_MOMENT", 5)
    module = nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 2))
    assert list(found_for(module, torch.randn(4, 5))) == ["0.weight"]


def test_a_sample_of_the_positions_takes_every_column_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of positions sampled is no divisor of the width: else borders would be seen too often, or never."""
    module, x = nn.Conv2d(1, 1, (1, 3), padding=(0, 1), bias=False), torch.ones(8, 1, 16, 16)
    exact = found_for(module, x)["weight"]
    monkeypatch.setattr(moments, "MAX_POSITIONS", 8 * 16 * 16 // 16)  # every fourth of 8 examples
    sampled = found_for(module, x)["weight"]
    assert_close(sampled, exact, rtol=0.02, atol=0.02)


def test_progress_ends_at_all_examples() -> None:
    calls: list[Any] = []
    network = opened(nn.Linear(3, 2), (torch.randn(2, 3),))
    data = Data((torch.randn(40, 3).double(),), None, "data")
    input_moments(network, data, progress=lambda *call: calls.append(call))
    assert calls[0] == ("input moments", 0, 40)
    assert calls[-1] == ("input moments", 40, 40)
