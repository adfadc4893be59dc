"""Gradual pruning: what a step does to weights that are there and to weights that are gone, against the formula."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from compress.numerics.units import Units
from compress.pattern import Pattern
from compress.prune.gradual import HELD, RAMP, SHARE, SoftMasks
from compress.prune.masks import num_removed
from compress.prune.removal import Removal, remaining, squares

LR = 0.1


def chosen(values: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """Half of the weights go in the end."""
    units = {name: Units((len(value), 1), 0, 1, Pattern()) for name, value in values.items()}
    whole = sum(map(len, values.values()))
    removal = Removal(num_removed(0.5 * share, whole), whole)
    return {n: mask.flatten() for n, mask in remaining(units, squares(units, values), removal, "global").items()}


def opened(steps: int) -> tuple[nn.Parameter, SoftMasks, torch.optim.Optimizer]:
    weight = nn.Parameter(torch.tensor([4.0, -3.0, 2.0, 1.0]))
    return weight, SoftMasks({"w": weight}, chosen, steps), torch.optim.SGD([weight], lr=LR)


def run(weight: nn.Parameter, soft: SoftMasks, optimizer: torch.optim.Optimizer, numbers: range, slope: Tensor) -> None:
    for number in numbers:
        weight.grad = slope.clone()
        soft.step(optimizer, number)
        soft.put()


def test_a_weight_that_is_gone_moves_by_a_share_of_its_gradient() -> None:
    weight, soft, optimizer = opened(1000)
    soft.masks = {"w": torch.tensor([True, True, True, False])}
    soft.put()
    assert weight.tolist() == [4.0, -3.0, 2.0, 0.0]
    run(weight, soft, optimizer, range(1), torch.tensor([1.0, 2.0, 3.0, 4.0]))
    torch.testing.assert_close(soft.values["w"], torch.tensor([3.9, -3.2, 1.7, 1.0 - LR * SHARE * 4.0]))
    torch.testing.assert_close(weight.detach(), torch.tensor([3.9, -3.2, 1.7, 0.0]))


def test_the_share_that_is_gone_rises_along_a_cubic() -> None:
    weight, asked = nn.Parameter(torch.ones(4)), []

    def recorded(values: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
        asked.append(share)
        return chosen(values, share)

    steps = 200
    soft = SoftMasks({"w": weight}, recorded, steps)
    run(weight, soft, torch.optim.SGD([weight], lr=LR), range(steps), torch.zeros(4))
    every = round(0.0125 * steps)
    expected = [1 - (1 - min(1.0, n / (RAMP * steps))) ** 3 for n in range(every, round(HELD * steps) + 1, every)]
    torch.testing.assert_close(torch.tensor(asked), torch.tensor(expected))
    assert asked[-1] == 1.0


def test_a_weight_that_grows_comes_back_until_the_masks_hold() -> None:
    steps = 100
    weight, soft, optimizer = opened(steps)
    run(weight, soft, optimizer, range(40), torch.zeros(4))
    assert soft.masks["w"].tolist() == [True, True, False, False]
    run(weight, soft, optimizer, range(40, 70), torch.tensor([0.0, 0.0, 0.0, -20.0]))
    assert soft.masks["w"].tolist() == [True, False, False, True]
    run(weight, soft, optimizer, range(70, steps), torch.tensor([0.0, -20.0, -20.0, 0.0]))
    assert soft.is_held()
    assert soft.masks["w"].tolist() == [True, False, False, True]
    assert weight[1] == weight[2] == 0


def test_a_run_that_goes_on_gives_what_one_in_a_piece_gives() -> None:
    steps, slope = 60, torch.tensor([0.5, -1.0, -2.0, 0.3])
    weight, soft, optimizer = opened(steps)
    run(weight, soft, optimizer, range(steps), slope)
    other, first, optimizer = opened(steps)
    run(other, first, optimizer, range(23), slope)
    state = copy.deepcopy(first.state())
    again, second, optimizer = opened(steps)
    with torch.no_grad():
        again.copy_(other)
    second.restore(state)
    run(again, second, optimizer, range(23, steps), slope)
    assert torch.equal(again, weight)
    assert torch.equal(second.values["w"], soft.values["w"])


def test_gradients_that_are_differentiated_again_stay_what_they_are() -> None:
    weight = nn.Parameter(torch.tensor([2.0, 1.0]))
    soft = SoftMasks({"w": weight}, chosen, 100)
    soft.masks = {"w": torch.tensor([True, False])}
    soft.put()
    found = []

    class Twice(torch.optim.SGD):
        def step(self, closure: None = None) -> None:  # type: ignore[override]
            assert weight.grad is not None
            found.append(torch.autograd.grad(weight.grad.sum(), weight)[0])

    torch.autograd.backward((weight**4).sum(), create_graph=True)
    soft.step(Twice([weight], lr=LR), 0)
    weight.grad = None
    torch.testing.assert_close(found[0], torch.tensor([12 * 2.0**2, 0.0]))
