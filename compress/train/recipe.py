"""How a network is trained, in plain values."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from ..data import Data
from ..errors import UsageError

SCHEDULES = ("one-cycle", "cosine", "constant")
WARM_UP = 0.1  # of the steps, for one-cycle
MOST_MOMENTUM = 0.999
MOST_WEIGHT = 1e6
PRECISIONS = ("float32", "bfloat16")


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a network is trained.

    Attributes:
        steps: Batches.
        optimizer: ``sgd``, ``adam``, ``adamw``, ``adahessian`` or ``mfac``.
        lr: Largest learning rate; the optimizer's own default where None.
        schedule: ``one-cycle``: up in a straight line, then down to zero along a cosine; ``cosine`` down alone;
            ``constant``.
        batch_size: Examples of a step.
        augment: ``crop`` and ``flip``, of images.
        distill: Share of the loss that is the distance from the dense network's outputs; the rest is the task's.
        temperature: By which the logits of both are divided where that distance is taken.
        features: Weight of the distance between what the layers of both networks read, each in units of its mean square
            (``train.features``); counts where the outputs do.
        patience: Checks on the calibration data, ten in a run, that may pass without an improvement before it stops;
            the weights of the best check are kept. With None it runs to the end, which is kept unless a check was
            better by more than noise.
        momentum: Of ``sgd`` and ``mfac``.
        weight_decay: Of weights with two dimensions or more: neither biases nor norms.
        warm_up: Share of the steps in which the learning rate rises; where None, a tenth for one-cycle and none else.
        precision: ``float32`` or ``bfloat16`` for what torch's autocast takes to be safe; where None, bfloat16 on CUDA
            and float32 elsewhere.

    Raises:
        UsageError: A value is out of range; names it.
    """

    steps: int
    optimizer: str = "sgd"
    lr: float | None = None
    schedule: str = "one-cycle"
    batch_size: int = 128
    augment: tuple[str, ...] = ()
    distill: float = 0.9
    temperature: float = 4.0
    features: float = 100.0
    patience: int | None = None
    momentum: float = 0.9
    weight_decay: float = 1e-4
    warm_up: float | None = None
    precision: str | None = None

    def __post_init__(self) -> None:
        for name, value, low, high in (
            ("steps", self.steps, 0, math.inf),
            ("batch size", self.batch_size, 1, math.inf),
            ("share of distillation", self.distill, 0, 1),
            ("weight of the features", self.features, 0, MOST_WEIGHT),
            ("momentum", self.momentum, 0, MOST_MOMENTUM),
            ("patience", 1 if self.patience is None else self.patience, 1, math.inf),
            ("weight decay", self.weight_decay, 0, math.inf),
            ("warm-up", self.warm_up or 0, 0, 1),
        ):
            if not low <= value <= high:
                allowed = f"{low} to {high}" if high < math.inf else f"{low} or more"
                raise UsageError(f"{name} of a training is {value}", hint=f"it is {allowed}")
        for name, positive in (("learning rate", self.lr), ("temperature", self.temperature)):
            if positive is not None and not 0 < positive < math.inf:
                raise UsageError(f"{name} of a training is {positive}", hint="it is above zero")
        for name, word, choices in (
            ("schedule", self.schedule, SCHEDULES),
            ("precision", self.precision, (None, *PRECISIONS)),
        ):
            if word not in choices:
                shown = ", ".join(choice for choice in choices if choice)
                raise UsageError(f"{name} {word!r} is unknown", hint=f"choices: {shown}")

    def rate(self, number: int) -> float:
        """The share of the largest learning rate in step ``number``, counted from zero."""
        default = WARM_UP if self.schedule == "one-cycle" else 0.0
        share = default if self.warm_up is None else self.warm_up
        warm_up = max(1, round(share * self.steps)) if share else 0
        if number < warm_up:
            return (number + 1) / warm_up
        if self.schedule == "constant":
            return 1.0
        return 0.5 * (1 + math.cos(math.pi * (number - warm_up) / max(1, self.steps - warm_up)))


@dataclass(frozen=True, slots=True)
class Training:
    """What a method that trains is handed.

    Attributes:
        journal: Where its state is kept while it runs.
        resume: Whether it goes on from there.
    """

    data: Data
    recipe: Recipe
    seed: int
    journal: Path | None = None
    resume: bool = False
