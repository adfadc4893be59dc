"""Masks that hold while a network trains."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn


def hold_masks(module: nn.Module, masks: Mapping[str, Tensor]) -> Callable[[], None]:
    """What puts masked weights back to zero, to be called after each step.

    Args:
        masks: By the name of a parameter, of its shape: true where a weight stays.
    """
    parameters = dict(module.named_parameters(remove_duplicate=False))
    held = [(parameters[name], ~mask.bool()) for name, mask in masks.items()]

    def put_back() -> None:
        with torch.no_grad():
            for parameter, gone in held:
                parameter.masked_fill_(gone.to(parameter.device), 0)

    return put_back
