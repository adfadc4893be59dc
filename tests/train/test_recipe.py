"""The schedule's values, and what a recipe refuses."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

from compress.errors import UsageError
from compress.train.recipe import Recipe


def rates(**options: Any) -> list[float]:
    recipe = Recipe(100, **options)
    return [recipe.rate(number) for number in range(100)]


def test_one_cycle_rises_for_a_tenth_and_falls_to_zero() -> None:
    found = rates(schedule="one-cycle")
    assert found[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert max(found) == 1.0
    assert found[55] == pytest.approx(0.5)  # half of the way down
    assert all(a > b for a, b in pairwise(found[10:]))
    assert 0 < found[-1] < 1e-3


def test_cosine_is_torchs() -> None:
    import torch

    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100)
    expected = []
    for _ in range(100):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates(schedule="cosine") == pytest.approx(expected, abs=1e-9)


def test_constant_may_rise_first() -> None:
    assert set(rates(schedule="constant")) == {1.0}
    assert rates(schedule="constant", warm_up=0.02)[:3] == [0.5, 1.0, 1.0]


def test_one_step_is_made_at_the_full_rate() -> None:
    assert Recipe(1).rate(0) == 1.0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"steps": -1}, "steps of a training is -1"),
        ({"batch_size": 0}, "batch size of a training is 0"),
        ({"distill": 1.5}, "share of distillation of a training is 1.5"),
        ({"lr": 0.0}, "learning rate of a training is 0.0"),
        ({"lr": float("nan")}, "learning rate of a training is nan"),
        ({"temperature": -1.0}, "temperature of a training is -1.0"),
        ({"schedule": "step"}, "schedule 'step' is unknown"),
        ({"precision": "float16"}, "precision 'float16' is unknown"),
        ({"warm_up": 2.0}, "warm-up of a training is 2.0"),
        ({"momentum": 1.0}, "momentum of a training is 1.0"),
        ({"patience": 0}, "patience of a training is 0"),
    ],
)
def test_values_out_of_range_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        Recipe(**{"steps": 10, **options})
    assert caught.value.hint
