"""Features: the distance is that of a plain sum, of the channels that stay alone, and training brings it down."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zoo import named, two_convolutions

from compress.data import Data
from compress.graph.cut import cut
from compress.graph.groups import Channels, find_channels
from compress.graph.trace import trace_graph
from compress.task import Classification
from compress.train.features import TAP, Features, tapped
from compress.train.loop import train
from compress.train.recipe import Recipe


class Residual(nn.Module):
    """A stem, a block and a head: the stem's output is read twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner, self.outer = (
            nn.Conv2d(3, 8, 3, padding=1),
            nn.Conv2d(8, 6, 3, padding=1),
            nn.Conv2d(6, 8, 1),
        )
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x).relu()
        z: Tensor = self.fc((y + self.outer(self.inner(y).relu())).relu().mean((2, 3)))
        return z


def quiet(*_: Any) -> None:
    pass


def channels_of(module: nn.Module, x: Tensor) -> Channels:
    return find_channels(trace_graph(module.eval(), (x,)))


def images(count: int = 2) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def test_compared_are_streams_and_what_the_last_layer_reads() -> None:
    torch.manual_seed(0)
    module = channels_of(Residual(), images()).module
    with tapped(module) as values:
        module(images())
    assert list(values) == ["inner.weight#0", "fc.weight#0"]


def test_without_a_stream_all_that_layers_read_is_compared() -> None:
    channels = channels_of(two_convolutions(), torch.randn(2, 3, 4, 4))
    with tapped(channels.module) as values:
        channels.module(torch.randn(2, 3, 4, 4))
    assert list(values) == ["3.weight#0", "6.weight#0"]


def test_the_network_is_put_back_as_it_was() -> None:
    module = channels_of(Residual(), images()).module
    code, keys = module.code, list(module.state_dict())
    with tapped(module):
        assert hasattr(module, TAP)
    assert module.code == code
    assert list(module.state_dict()) == keys
    assert not hasattr(module, TAP)


@pytest.mark.parametrize("is_cut", [True, False])
def test_the_distance_is_the_mean_relative_square_over_channels_that_stay(is_cut: bool) -> None:
    torch.manual_seed(0)
    channels = channels_of(Residual(), images())
    kept = torch.ones(channels.count, dtype=torch.bool)
    sizes = {group.name: group.size for group in channels.groups}
    assert sizes == {"stem.weight": 8, "inner.weight": 6}
    kept[[1, 4, 9]] = False  # two of the stream, one of the block
    other = copy.deepcopy(channels.module)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    small = cut(channels, other, kept) if is_cut else other
    features = Features(channels, lambda: kept)
    with tapped(channels.module) as dense, tapped(small) as found:
        channels.module(images())
        small(images())
        got = features.distance(dense, found)
    stays = kept[:8].nonzero().reshape(-1)
    expected = []
    for key in ("inner.weight#0", "fc.weight#0"):
        a, b = dense[key].index_select(1, stays).double(), found[key].double()
        b = b if is_cut else b.index_select(1, stays)
        expected.append(((a - b) ** 2).mean() / (a**2).mean())
    assert got is not None
    torch.testing.assert_close(got.double(), torch.stack(expected).mean(), rtol=1e-5, atol=0)


def test_channels_that_go_later_are_left_out_from_then_on() -> None:
    torch.manual_seed(0)
    channels = channels_of(Residual(), images())
    kept = torch.ones(channels.count, dtype=torch.bool)
    features = Features(channels, lambda: kept)
    dense = {"inner.weight#0": torch.ones(1, 8, 2, 2)}
    other = {"inner.weight#0": torch.ones(1, 8, 2, 2)}
    other["inner.weight#0"][:, 3] = 0.0
    assert float(features.distance(dense, other) or 0) == pytest.approx(1 / 8)
    kept[3] = False
    assert float(features.distance(dense, other) or 0) == 0


def test_nothing_is_compared_where_no_channel_is_or_the_network_is_no_graph() -> None:
    channels = channels_of(Residual(), images())
    none = torch.zeros(channels.count, dtype=torch.bool)
    with tapped(channels.module) as dense, tapped(Residual()) as nothing:
        channels.module(images())
    assert nothing == {}
    assert Features(channels, lambda: none).distance(dense, nothing) is None
    assert Features(channels, lambda: none).distance({"inner.weight#0": torch.ones(1, 8, 2, 2)}, dense) is None


@pytest.mark.parametrize("weight", [0.0, 100.0])
def test_training_brings_features_nearer(weight: float) -> None:
    torch.manual_seed(0)
    x = images(64)
    channels = channels_of(Residual(), x[:2])
    kept = torch.ones(channels.count, dtype=torch.bool)
    kept[[0, 5, 8, 10]] = False
    moved = copy.deepcopy(channels.module)
    with torch.no_grad():
        for parameter in moved.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    small = cut(channels, moved, kept)
    features = Features(channels, lambda: kept)

    def apart() -> float:
        with torch.no_grad(), tapped(channels.module) as dense, tapped(small) as found:
            channels.module(x)
            small(x)
            return float(features.distance(dense, found) or 0)

    before = apart()
    recipe = Recipe(60, lr=0.02, batch_size=16, distill=1.0, features=weight)
    data, teacher = Data((x,), None, "x"), channels.module
    train(small, data, Classification(), recipe, teacher=teacher, progress=quiet, features=features)
    assert (apart() < 0.3 * before) == (weight > 0)


def test_a_transformers_streams_are_compared() -> None:
    network = named("transformer_encoder")
    x = network.inputs(2)
    channels = find_channels(trace_graph(network.make(), x))
    with tapped(channels.module) as values:
        channels.module(*x)
    assert values
    assert all(value.is_floating_point() for value in values.values())
