"""The examples of each training step, which follow from the seed and the number of the step alone.

So a run that goes on where another stopped needs no state of a generator, and no example is left out or comes twice
before all others have come.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..data import Data
from .augment import CROP, augmented, black, require_images

CPU = torch.device("cpu")
EPOCH, AUGMENT, DROPOUT = range(3)  # streams of random numbers that have nothing to do with each other


def step_seed(seed: int, number: int, stream: int) -> int:
    """The seed of a stream in a step; near seeds of one generator would be less independent than hashes."""
    digest = hashlib.sha256(f"{seed}:{number}:{stream}".encode()).digest()
    return int.from_bytes(digest[:7], "big")


def batch_of(data: Data, number: int, size: int, seed: int) -> Data:
    """The batch of a step, ``size`` examples: each epoch is a shuffle of its own, and batches run on into the next."""
    first, chosen = number * size, list[Tensor]()
    while (missing := size - sum(map(len, chosen))) > 0:
        epoch, place = divmod(first, len(data))
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(step_seed(seed, epoch, EPOCH)))
        chosen.append(order[place : place + missing])
        first += len(chosen[-1])
    rows = torch.cat(chosen)
    return Data(tuple(x[rows] for x in data.inputs), None if data.targets is None else data.targets[rows], data.name)


@dataclass(frozen=True, slots=True)
class Batches:
    """The batches of a training.

    Attributes:
        augment: Of the first input, which holds the images.
        padding: Of each channel, for crops.
    """

    data: Data
    size: int
    augment: tuple[str, ...]
    padding: Tensor | None
    seed: int
    device: torch.device

    def at(self, number: int) -> Data:
        """The batch of a step, on the device."""
        batch = batch_of(self.data, number, self.size, self.seed)
        first, *others = (x.to(self.device) for x in batch.inputs)
        generator = torch.Generator().manual_seed(step_seed(self.seed, number, AUGMENT))
        targets = None if batch.targets is None else batch.targets.to(self.device)
        return Data((augmented(first, self.augment, generator, padding=self.padding), *others), targets, batch.name)


def training_batches(
    data: Data, size: int, *, augment: Sequence[str], seed: int, device: torch.device = CPU
) -> Batches:
    """Batches of ``size`` examples.

    Raises:
        UsageError: Augmentation of what are no images, or an unknown one.
    """
    images = data.inputs[0]
    require_images(images, augment)
    return Batches(data, size, tuple(augment), black(images) if CROP in augment else None, seed, device)
