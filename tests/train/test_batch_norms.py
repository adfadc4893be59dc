"""Statistics taken anew are the means over the batches, and nothing else changes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from compress.data import Data
from compress.errors import NumericsError
from compress.graph.rewrite import unlift
from compress.graph.trace import trace_graph
from compress.train.batch_norms import reestimate_batch_norms
from compress.train.batches import batch_of


def quiet(*_: Any) -> None:
    pass


def module(kind: str) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(4, 2, 3)).eval()
    if kind == "module":
        return net
    graph = trace_graph(net, (torch.randn(2, 3, 8, 8),))
    return copy.deepcopy(unlift(graph.program, graph.tied))


DATA = Data((2 * torch.randn(40, 3, 8, 8, generator=torch.Generator().manual_seed(1)) + 1,), None, "images")


@pytest.mark.parametrize("kind", ["module", "exported"])
def test_statistics_are_means_over_batches(kind: str) -> None:
    net = module(kind)
    before = copy.deepcopy(net.state_dict())
    conv = nn.Conv2d(3, 4, 3)
    conv.load_state_dict({"weight": before["0.weight"], "bias": before["0.bias"]})
    done: list[int] = []
    reestimate_batch_norms(net, DATA, batch_size=10, seed=3, progress=lambda _, number, total: done.append(number))
    assert done == [1, 2, 3, 4]
    with torch.no_grad():
        outputs = [conv(batch_of(DATA, number, 10, 3).inputs[0]).transpose(0, 1).flatten(1) for number in range(4)]
    after = net.state_dict()
    torch.testing.assert_close(after["1.running_mean"], torch.stack([y.mean(1) for y in outputs]).mean(0))
    torch.testing.assert_close(after["1.running_var"], torch.stack([y.var(1) for y in outputs]).mean(0))
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert set(before) - same <= {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    assert not any(part.training for part in net.modules() if isinstance(part, nn.BatchNorm2d))


def test_the_augmentation_is_part_of_the_statistics() -> None:
    plain, cropped = module("exported"), module("exported")
    reestimate_batch_norms(plain, DATA, progress=quiet)
    reestimate_batch_norms(cropped, DATA, augment=("crop",), progress=quiet)
    assert not torch.equal(plain.state_dict()["1.running_mean"], cropped.state_dict()["1.running_mean"])
    again = module("exported")
    reestimate_batch_norms(again, DATA, augment=("crop",), progress=quiet)
    assert torch.equal(again.state_dict()["1.running_mean"], cropped.state_dict()["1.running_mean"])


def test_an_interrupted_estimate_changes_nothing() -> None:
    net = module("exported")
    before = copy.deepcopy(net.state_dict())

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reestimate_batch_norms(net, DATA, progress=interrupt)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


def test_a_statistic_that_is_not_finite_is_named() -> None:
    net = module("exported")
    wrong = Data((DATA.inputs[0] * 1e30,), None, "images")
    with pytest.raises(NumericsError, match=r"1.running_var isn't finite"):
        reestimate_batch_norms(net, wrong, progress=quiet)
    assert bool(torch.isfinite(net.state_dict()["1.running_var"]).all())
