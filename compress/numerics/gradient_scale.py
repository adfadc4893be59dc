"""What single gradients count for in a Fisher matrix: rows of ``G`` scaled.

Norms of gradients have heavy tails: a few examples can hold nearly all of ``tr(F)``. ``clipped`` scales down the rows
whose norm is above a quantile of all, to it (Abadi et al. 2016, arXiv:1607.00133, clip single gradients so). ``F`` is
then no estimate of the curvature any more, but of that of examples of which none counts for more than the bound.
Cost: a product with each gradient.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .gradient_file import ChunkedGradients


@dataclass(frozen=True, slots=True)
class Clipping:
    """What was clipped.

    Attributes:
        norm: The largest that a gradient has after it.
        rows: Gradients that had a larger one.
        share: Of the Fisher matrix's trace, what went.
    """

    norm: float
    rows: int
    share: float


def scale_rows(gradients: Tensor | ChunkedGradients, factors: Tensor) -> None:
    """Multiply the gradients ``[m, d]`` by ``factors`` ``[m]`` where they lie."""
    for part in gradients.chunks if isinstance(gradients, ChunkedGradients) else (gradients,):
        part.mul_(factors.to(part).unsqueeze(1))


def clipped(squares: Tensor, quantile: float) -> tuple[Tensor, Clipping]:
    """Factors ``[m]`` that bound the gradients' norms by a quantile of them, and what they take away.

    Args:
        squares: Of the norms, ``[m]``.
        quantile: Above 0 and at most 1: of the gradients that aren't zero, the share that stay as they are.
    """
    norms = squares.sqrt()
    bound = torch.quantile(norms[norms > 0] if norms.any() else norms, quantile, interpolation="lower")
    factors = torch.where(norms > bound, bound / norms, 1.0)
    total = float(squares.sum())
    share = 1 - float((squares * factors.square()).sum()) / total if total > 0 else 0.0
    return factors, Clipping(float(bound), int((norms > bound).sum()), share)
