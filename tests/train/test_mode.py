"""Training mode: switches are flipped inside, and everything is as it was outside, whatever happens."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from compress.graph.rewrite import unlift
from compress.graph.trace import aten, trace_graph
from compress.train.mode import batch_statistics, training_mode, unguarded


class Switches(nn.Module):
    """One of everything that has a mode."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.instance = nn.InstanceNorm2d(4, track_running_stats=True)
        self.cumulative = nn.BatchNorm2d(4, momentum=None)
        self.drop, self.drop2d = nn.Dropout(0.5), nn.Dropout2d(0.5)
        self.alpha = nn.AlphaDropout(0.5)
        self.rnn = nn.LSTM(4, 4, num_layers=2, dropout=0.5, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.drop2d(self.cumulative(self.instance(self.norm(self.conv(x)))))
        out: Tensor = self.rnn(self.alpha(self.drop(y.flatten(2).transpose(1, 2))))[0]
        return out


def exported(module: nn.Module, *inputs: Tensor) -> fx.GraphModule:
    graph = trace_graph(module.eval(), inputs)
    return copy.deepcopy(unlift(graph.program, graph.tied))


@functools.cache
def traced() -> fx.GraphModule:
    return exported(Switches(), torch.randn(3, 3, 4, 4))


def switches() -> fx.GraphModule:
    return copy.deepcopy(traced())


def listed(module: fx.GraphModule) -> list[tuple[str, Any, Any]]:
    return [(str(n.target), n.args, n.kwargs) for n in module.graph.nodes]


def draw(module: nn.Module, seed: int) -> Tensor:
    torch.manual_seed(seed)
    x = torch.ones(3, 3, 4, 4) * torch.arange(3).reshape(3, 1, 1, 1)
    out: Tensor = module(x)
    return out.detach()


def test_an_exported_network_trains_and_comes_back() -> None:
    module = switches()
    before, outside = listed(module), draw(module, 0)
    statistics = {k: v.clone() for k, v in module.state_dict().items() if "running" in k}
    with training_mode(module):
        assert not torch.equal(draw(module, 0), draw(module, 1))  # dropouts drop
        assert torch.equal(draw(module, 0), draw(module, 0))
        assert listed(module) != before
    assert listed(module) == before
    changed = [k for k, v in statistics.items() if not torch.equal(v, module.state_dict()[k])]
    assert len(changed) == 6, "batch norms, also those of momentum None, and instance norms update their statistics"
    for key, value in statistics.items():
        module.state_dict()[key].copy_(value)
    assert torch.equal(draw(module, 1), outside)


def test_the_mode_comes_back_after_an_exception() -> None:
    module = switches()
    before = listed(module)
    with pytest.raises(KeyboardInterrupt), training_mode(module):
        raise KeyboardInterrupt
    assert listed(module) == before
    assert torch.equal(draw(module, 0), draw(module, 1))


def test_a_batch_norm_learns_as_in_the_users_module() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    x = torch.randn(5, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    graph = exported(net, x)
    with training_mode(graph):
        found = graph(x)
    torch.testing.assert_close(found, net.train()(x))
    for key in ("1.running_mean", "1.running_var"):
        torch.testing.assert_close(graph.state_dict()[key], net.state_dict()[key])


class Nested(nn.Module):
    """A block with autocast is a graph in the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y: Tensor = F.dropout(self.norm(self.first(x)), 0.5, self.training)
        return y * 2


def test_a_graph_in_the_graph_trains_too() -> None:
    module = exported(Nested(), torch.randn(6, 4))
    assert sum(isinstance(part, fx.GraphModule) for part in module.modules()) == 2
    before = module.state_dict()["norm.running_mean"].clone()
    with training_mode(module):
        module(torch.randn(6, 4))
    assert not torch.equal(module.state_dict()["norm.running_mean"], before)
    x = torch.randn(6, 4)
    assert torch.equal(module(x), module(x))


def test_an_ordinary_module_gets_back_each_flag() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Dropout(), nn.BatchNorm1d(3)))
    net.eval()
    net[1][1].train()  # of one layer alone
    before = [part.training for part in net.modules()]
    with training_mode(net):
        assert all(part.training for part in net.modules())
    assert [part.training for part in net.modules()] == before


def test_a_users_own_train_is_called() -> None:
    class Held(nn.Sequential):
        def train(self, mode: bool = True) -> Held:
            super().train(mode)
            self[0].training = False  # its statistics are held
            return self

    net = Held(nn.BatchNorm1d(3), nn.Dropout()).eval()
    with training_mode(net):
        assert (net[0].training, net[1].training) == (False, True)


def test_an_exported_network_inside_a_module_trains() -> None:
    net = nn.Sequential(exported(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)), torch.randn(3, 4)))
    x = torch.randn(64, 4)
    with training_mode(net):
        assert not torch.equal(net(x), net(x))
    assert torch.equal(net(x), net(x))


def test_asserts_of_dtypes_are_lifted() -> None:
    class Cast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x).to(torch.float32)

    module = exported(Cast(), torch.randn(4, 3))
    assert any(n.target is aten._assert_tensor_metadata.default for n in module.graph.nodes)
    before = listed(module)
    with unguarded(module), torch.autocast("cpu", torch.bfloat16):
        assert module(torch.randn(4, 3)).dtype is torch.float32
    assert listed(module) == before


@pytest.mark.parametrize("is_exported", [True, False])
def test_batch_statistics_are_those_of_the_last_batch_alone(is_exported: bool) -> None:
    net: nn.Module = nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(0.5)).eval()
    module = exported(net, torch.randn(6, 4)) if is_exported else net
    x = torch.randn(50, 4, generator=torch.Generator().manual_seed(0)) * 3 + 1
    with batch_statistics(module):
        assert torch.equal(module(x), module(x)), "dropout stays off"
    torch.testing.assert_close(module.state_dict()["0.running_mean"], x.mean(0))
    torch.testing.assert_close(module.state_dict()["0.running_var"], x.var(0))
    assert not net.training
    assert net[0].momentum == 0.1  # type: ignore[index]


def test_a_norm_used_twice_gets_the_mean_of_its_statistics() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(4)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.norm(x[:, :4]) + self.norm(x[:, 4:])
            return out

    module = exported(Twice(), torch.randn(6, 8))
    x = torch.randn(50, 8, generator=torch.Generator().manual_seed(0)) + torch.arange(8)
    with batch_statistics(module):
        module(x)
    torch.testing.assert_close(module.state_dict()["norm.running_mean"], (x[:, :4].mean(0) + x[:, 4:].mean(0)) / 2)
