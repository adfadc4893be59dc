"""NaN and infinity in a state dict are an error at the door: every later number would be one too.

An attention mask, zeros and ``-Inf`` alone, is not: it is what was saved.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..errors import InputError, escape

NUM_NAMED = 3


DIVERGED = "the training diverged or the file is damaged; use an earlier checkpoint"


def check_finite(state: Mapping[str, Tensor], path: Path, *, hint: str = DIVERGED) -> None:
    """Refuse tensors with NaN or infinite values.

    Raises:
        InputError: Names the first few keys with their counts.
    """
    counts = [(key, count) for key, tensor in state.items() if (count := _count(tensor))]
    if counts:
        named = "; ".join(f"{escape(key)} has {count}" for key, count in counts[:NUM_NAMED])
        more = f"; and {len(counts) - NUM_NAMED} more tensors" if len(counts) > NUM_NAMED else ""
        raise InputError(f"{path}: {named}{more}", hint=hint)


def _count(tensor: Tensor) -> str:
    """Such as ``3 NaN of 2304 values``; empty where all are finite."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return ""
    # isfinite has no kernel for the 8-bit floats.
    values = tensor.float() if tensor.element_size() == 1 else tensor
    if bool(torch.isfinite(values).all()) or bool(((values == 0) | (values == -torch.inf)).all()):
        return ""
    num_nan, num_inf = int(torch.isnan(values).sum()), int(torch.isinf(values).sum())
    found = [f"{count} {name}" for count, name in ((num_nan, "NaN"), (num_inf, "Inf")) if count]
    return f"{' and '.join(found)} of {tensor.numel()} values"
