"""What a method is handed besides its inputs: randomness, progress, and what a decision costs on disk."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from .frontier import FrontierRecord
from .saliencies import Saliencies
from .sensitivity import CostTable
from .widths import Width

Progress = Callable[[str, int, int | None], None]


@dataclass(frozen=True, slots=True)
class Storage:
    """How a weight would be stored: ``kept`` nonzero values of ``bits`` bits each (32 for floats)."""

    kept: int
    bits: Width


@dataclass(frozen=True, slots=True)
class Context:
    """The surroundings of a planner.

    Attributes:
        generator: The only source of randomness.
        device: Where forward and backward passes run.
        progress: Called with stage, done and total (None where unknown).
        model_bytes: Bytes of the delivered file if the weights named were stored so, and all others as they are.
        notes: What the user should know about the plan; a method appends sentences.
        costs: Measured tables by quantity, such as ``latency``.
        training: The ``train.recipe.Training`` of a method that trains.
        latency: Measures a network, exported as the delivered file is: milliseconds at batch 1.
        memo: What a method may keep from one plan to the next of a run, such as saliencies.
        overhead: Bytes that a written file of this run was found to have beyond what was predicted of it.
        memory: Bytes that the gradients of a method may take; more of them lie in a file.
        frontiers: The frontier that the plan is a point of; a method that has one appends it.
        saliencies: Those of what the plan keeps and removes; a method that has any appends them.
        is_swept: Whether plans for other goals follow: what a method measured of the dense network goes into ``memo``
            however large it is.
    """

    generator: torch.Generator
    device: torch.device
    progress: Progress
    model_bytes: Callable[[Mapping[str, Storage]], int]
    notes: list[str]
    costs: Mapping[str, CostTable] = field(default_factory=dict)
    frontiers: list[FrontierRecord] = field(default_factory=list)
    overhead: int = 0
    memory: int = sys.maxsize
    training: Any = None
    latency: Callable[[fx.GraphModule], float] | None = None
    memo: dict[str, Any] = field(default_factory=dict)
    saliencies: list[Saliencies] = field(default_factory=list)
    is_swept: bool = False
