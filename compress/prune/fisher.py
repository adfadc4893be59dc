"""The Fisher matrix of the weights that are left, whole or in blocks: what units of them cost, and how the others move.

With blocks of B, ``F`` is taken to be zero between each B consecutive weights and all others. With B gradients or more
a block has a curvature in every direction, where the whole matrix of m gradients has one in m of d. Blocks come in
spans, each worked on alone, so that beside the gradients there is never more than a span's matrices. A unit of several
blocks costs what its parts in each do.
Cost: of the whole matrix ``m^2 d`` products for each query, of blocks ``m B d``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..numerics.mfac import Gradients, gram_matrix, inverse_fisher, joint_saliency, joint_update, squared_norms

SALIENCY_ROWS = 256  # gradients that weights are ranked by with the whole matrix, whose update is what matters
SALIENCY_DAMPING = 1e-3  # of the mean curvature
SPAN = 2**24  # elements of the gradients whose blocks are worked on at once


@dataclass(frozen=True, slots=True, eq=False)
class Fisher:
    """``F`` without its damping, of gradients at the weights as they are; made by ``fisher_of``.

    Attributes:
        gradients: ``[m, d]``.
        mean: The mean curvature, ``tr(F) / d``: the unit of dampings.
        block_size: None for the whole matrix; it may be more than d.
        gram: ``[m, m]``, of the whole matrix.
    """

    gradients: Gradients
    mean: float
    block_size: int | None
    gram: Tensor | None


def fisher_of(gradients: Gradients, block_size: int | None = None) -> Fisher:
    """``F`` of these gradients.

    Raises:
        NumericsError: A gradient isn't finite.
    """
    if block_size is None:
        gram = gram_matrix(gradients)
        return Fisher(gradients, float(gram.diagonal().sum()) / gradients.numel(), None, gram)
    return Fisher(gradients, float(squared_norms(gradients).sum()) / gradients.numel(), block_size, None)


def unit_saliencies(fisher: Fisher, weights: Tensor, units: Tensor) -> Tensor:
    """What each unit ``Q`` costs with the best move of all others, ``w_Q^T ([F^-1]_QQ)^-1 w_Q / 2``, float64 ``[u]``.

    Without any curvature, the sum of the squared weights.

    Args:
        weights: ``[d]``.
        units: int64 ``[u, s]``, the weights of each; -1 where a unit has fewer.
    """
    if fisher.mean <= 0:
        return torch.where(units < 0, 0.0, weights.double()[units]).square().sum(1)
    damping = SALIENCY_DAMPING * fisher.mean
    if fisher.gram is not None:
        step = -(-len(fisher.gradients) // SALIENCY_ROWS)
        gram = fisher.gram[::step, ::step].contiguous()
        inverse = inverse_fisher(fisher.gradients[::step], damping, gram=gram)
        return joint_saliency(inverse, weights, units).cpu().double()
    found = torch.zeros(len(units), dtype=torch.float64)
    for span, gradients in _spans(fisher):
        inside = (units >= span.start) & (units < span.stop)
        some = torch.nonzero(inside.any(1))[:, 0]
        if len(some):
            inverse = inverse_fisher(gradients, damping, blocks=fisher.block_size)
            places = torch.where(inside[some], units[some] - span.start, -1)
            found[some] += joint_saliency(inverse, weights[span], places).cpu().double()
    return found


def updates(fisher: Fisher, weights: Tensor, keep: Tensor, dampings: Sequence[float]) -> Tensor:
    """The changes ``[k, d]`` that remove all weights with ``keep`` False, with the best move of the others.

    Args:
        dampings: ``k`` of them, in units of the mean curvature, which must be above zero.
    """
    dampings = [damping * fisher.mean for damping in dampings]
    device = fisher.gradients.device
    weights, keep = weights.to(device), keep.to(device)
    if fisher.gram is not None:
        update = joint_update(fisher.gradients, weights, keep, gram=fisher.gram)
        return update.solve_each(dampings, refinements=1).cpu()
    changes = torch.empty(len(dampings), len(weights), dtype=weights.dtype)
    for span, gradients in _spans(fisher):
        update = joint_update(gradients, weights[span], keep[span], blocks=fisher.block_size)
        changes[:, span] = update.solve_each(dampings, refinements=1).cpu()
    return changes


def _spans(fisher: Fisher) -> Iterator[tuple[slice, Tensor]]:
    """Columns of whole blocks, and the gradients of them ``[m, k]``."""
    m, d = fisher.gradients.shape
    size = min(fisher.block_size or d, d)
    width = max(1, SPAN // (m * size)) * size
    for start in range(0, d, width):
        stop = min(d, start + width)
        yield slice(start, stop), fisher.gradients.narrow(1, start, stop - start)
