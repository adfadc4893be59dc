"""The optimizers that training knows, by name, each with a learning rate that needs no tuning for recovery."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..errors import UsageError
from .adahessian import AdaHessian
from .mfac_optimizer import MFAC

RATES = {"sgd": 0.03, "adam": 1e-3, "adamw": 1e-3, "adahessian": 0.05, "mfac": 0.03}


def make_optimizer(
    name: str,
    parameters: Iterable[nn.Parameter],
    lr: float | None,
    *,
    momentum: float = 0.9,
    weight_decay: float = 1e-4,
) -> torch.optim.Optimizer:
    """An optimizer whose groups hold their largest learning rate as ``initial_lr``.

    Args:
        lr: That of ``RATES`` where None.
        momentum: Of ``sgd`` and ``mfac``, Nesterov's.
        weight_decay: Of parameters with two dimensions or more.

    Raises:
        UsageError: Unknown name.
    """
    if name not in RATES:
        raise UsageError(f"optimizer {name!r} is unknown", hint=f"choices: {', '.join(RATES)}")
    rate, found = RATES[name] if lr is None else lr, list(parameters)
    parts: list[tuple[list[nn.Parameter], float]] = [
        ([p for p in found if p.dim() > 1], weight_decay),
        ([p for p in found if p.dim() <= 1], 0.0),
    ]
    groups: list[dict[str, Any]] = [
        {"params": held, "weight_decay": decay, "initial_lr": rate} for held, decay in parts if held
    ]
    if name == "sgd":
        return torch.optim.SGD(groups, lr=rate, momentum=momentum, nesterov=momentum > 0)
    if name == "adam":
        return torch.optim.Adam(groups, lr=rate)
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=rate)
    if name == "mfac":
        return MFAC(groups, lr=rate, momentum=momentum)
    return AdaHessian(groups, lr=rate)
