"""Batches: shuffles that leave none out, from the seed and the step's number alone."""

from __future__ import annotations

import pytest
import torch

from compress.data import Data
from compress.errors import UsageError
from compress.train.batches import batch_of, training_batches

DATA = Data((torch.arange(10), torch.arange(10) * 2), torch.arange(10) * 3, "numbers")


def drawn(size: int, steps: int, seed: int = 0) -> list[int]:
    return [int(x) for number in range(steps) for x in batch_of(DATA, number, size, seed).inputs[0]]


@pytest.mark.parametrize("size", [1, 3, 5, 10, 25])
def test_every_epoch_holds_every_example_once(size: int) -> None:
    found = drawn(size, 30)
    assert len(found) == 30 * size
    for start in range(0, len(found) - 9, 10):
        assert sorted(found[start : start + 10]) == list(range(10))


def test_epochs_and_seeds_differ() -> None:
    assert drawn(10, 1) != drawn(10, 2)[10:]
    assert drawn(10, 1) != drawn(10, 1, seed=1)
    assert drawn(4, 9)[16:24] == [int(x) for n in (4, 5) for x in batch_of(DATA, n, 4, 0).inputs[0]]


def test_rows_stay_together() -> None:
    batch = batch_of(DATA, 3, 4, 0)
    assert batch.targets is not None
    assert torch.equal(batch.inputs[1], 2 * batch.inputs[0])
    assert torch.equal(batch.targets, 3 * batch.inputs[0])


def test_the_images_alone_are_augmented() -> None:
    x = torch.randn(6, 3, 8, 8)
    data = Data((x, torch.arange(6.0)), None, "pairs")
    plain, changed = (training_batches(data, 6, augment=names, seed=0).at(0) for names in ((), ("crop",)))
    assert torch.equal(plain.inputs[1], changed.inputs[1])
    assert torch.equal(plain.inputs[0], x[plain.inputs[1].long()])
    assert not torch.equal(plain.inputs[0], changed.inputs[0])


def test_crops_are_padded_with_black() -> None:
    data = Data((torch.rand(6, 1, 8, 8) + torch.tensor([3.0]),), None, "images")
    assert float(training_batches(data, 6, augment=("crop",), seed=0).at(0).inputs[0].min()) == float(
        data.inputs[0].min()
    )


def test_what_are_no_images_is_refused_at_the_start() -> None:
    with pytest.raises(UsageError, match="--augment needs images"):
        training_batches(DATA, 2, augment=("flip",), seed=0)
