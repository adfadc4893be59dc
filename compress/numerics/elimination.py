"""Weights of a layer that go one after another, so that its outputs move least: optimal brain surgery, row by row.

A row ``w`` of a weight that becomes ``v`` moves its output in the mean square by ``(w - v) H (w - v)^T``, where ``H``
is the second moment of the layer's inputs. Removing weight ``i`` of those that are left, with the best move of all
others, costs ``w_i^2 / [H^-1]_ii``: the cheapest go first, a few at a time, and ``H^-1`` shrinks to those that are
left. Each row ends with an order in which its weights go, and with what each of them costs.
Source: Hassibi and Stork 1993, Optimal Brain Surgeon; Frantar, Singh, Alistarh 2022, Optimal Brain Compression
(arXiv:2208.11580), for rows and their orders; the steps of several weights are ours. Cost: ``k^3`` products for each
row of ``k`` weights. Where that is too much, ``MOST_PRODUCTS``, weights go in the order of what each costs alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

STEP = 8  # of the weights that a row has left, one in so many goes at once
ELEMENTS = 2**26  # of the inverses of rows that are worked on at once
MOST_PRODUCTS = 2**42  # of an elimination: about a minute on two cores


@dataclass(frozen=True, slots=True)
class Elimination:
    """The order in which the weights of each row go.

    Attributes:
        place: int64 ``[r, k]``: a weight is the so-manieth of its row that goes; the number of steps where it stays.
        costs: float ``[r, steps]``: what the next removal costs, never less than the one before.
    """

    place: Tensor
    costs: Tensor

    def kept(self, removed: Tensor) -> Tensor:
        """bool ``[r, k]``: what is left of each row after so many removals, ``[r]``."""
        return self.place >= removed[:, None]


def eliminate(weight: Tensor, moment: Tensor, steps: int, *, pattern: tuple[int, int] | None = None) -> Elimination:
    """Find the order in which ``steps`` weights of each row go.

    Args:
        weight: ``[r, k]``, the rows that minimise their error where nothing is gone.
        moment: ``[k, k]``, positive definite; ``[r, k, k]`` where each row has one of its own.
        steps: Fewer than ``k``, or ``k``.
        pattern: ``n`` and ``m``: of ``m`` neighbours, ``n`` stay.

    Raises:
        torch.linalg.LinAlgError: The moment isn't positive definite.
    """
    r, k = weight.shape
    place = torch.full((r, k), steps, dtype=torch.long, device=weight.device)
    costs = torch.zeros(r, steps, dtype=weight.dtype, device=weight.device)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(moment))
    if r * k**3 > MOST_PRODUCTS:
        _rank(weight, inverse, place, costs, pattern)
        return Elimination(place, costs)
    for rows in _chunks(r, k):
        own = inverse if inverse.dim() == 2 else inverse[rows]
        _eliminate(weight[rows], own, place[rows], costs[rows], pattern)
    return Elimination(place, costs.cummax(1).values if steps else costs)


def _chunks(r: int, k: int) -> Iterator[slice]:
    size = max(1, ELEMENTS // (k * k))
    return (slice(start, start + size) for start in range(0, r, size))


def _eliminate(weight: Tensor, inverse: Tensor, place: Tensor, costs: Tensor, pattern: tuple[int, int] | None) -> None:
    """Fill ``place`` and ``costs`` of some rows; all of them have as many weights left at any time."""
    (r, k), steps = weight.shape, costs.shape[1]
    alive = torch.arange(k, device=weight.device).expand(r, k)
    inverse, left, gone = inverse.expand(r, k, k), weight, 0
    room = None if pattern is None else torch.full((r, k // pattern[1]), pattern[1] - pattern[0], device=weight.device)
    while gone < steps:
        scores = left.square() / inverse.diagonal(dim1=1, dim2=2)
        most = min(max(1, alive.shape[1] // STEP), steps - gone)
        if pattern is None or room is None:
            order = scores.argsort(dim=1, stable=True)
        else:
            order, open_groups = _by_groups(scores, alive, room, pattern[1])
            most = min(most, open_groups)
        goes, stays = order[:, :most], order[:, most:].sort(1).values
        if room is not None and pattern is not None:
            room.scatter_add_(1, alive.gather(1, goes) // pattern[1], -torch.ones_like(goes))
        place.scatter_(1, alive.gather(1, goes), gone + torch.arange(most, device=weight.device).expand(r, most))
        rows = _taken(inverse, goes, 1)
        factor = torch.linalg.cholesky(_taken(rows, goes, 2))
        across = _taken(rows, stays, 2)
        moved = torch.cholesky_solve(left.gather(1, goes)[..., None], factor)
        costs[:, gone : gone + most] = (left.gather(1, goes)[:, None] @ moved)[..., 0] / most
        left = left.gather(1, stays) - (across.transpose(1, 2) @ moved)[..., 0]
        half = torch.linalg.solve_triangular(factor, across, upper=False)
        inverse = _between(inverse, stays).baddbmm_(half.transpose(1, 2), half, alpha=-1)
        alive, gone = alive.gather(1, stays), gone + most


def _rank(weight: Tensor, inverse: Tensor, place: Tensor, costs: Tensor, pattern: tuple[int, int] | None) -> None:
    """Fill ``place`` and ``costs`` by what each weight costs alone."""
    r, k = weight.shape
    scores = weight.square() / inverse.diagonal(dim1=-2, dim2=-1)
    ranked = scores
    if pattern is not None:  # those that stay last
        order = scores.reshape(r, -1, pattern[1]).argsort(dim=2, stable=True).argsort(dim=2, stable=True)
        ranked = torch.where(order.reshape(r, k) < pattern[1] - pattern[0], scores, float("inf"))
    order = ranked.argsort(dim=1, stable=True)[:, : costs.shape[1]]
    place.scatter_(1, order, torch.arange(costs.shape[1], device=weight.device).expand(r, -1))
    costs.copy_(scores.gather(1, order))


def _by_groups(scores: Tensor, alive: Tensor, room: Tensor, m: int) -> tuple[Tensor, int]:
    """Columns in the order in which they may go, at most one of a group, and how many of them may."""
    r, groups = room.shape
    whole = torch.full((r, groups * m), float("inf"), dtype=scores.dtype, device=scores.device)
    whole.scatter_(1, alive, scores)
    least, winner = whole.reshape(r, groups, m).min(2)
    least = torch.where(room > 0, least, float("inf"))
    winners = winner + m * torch.arange(groups, device=scores.device)
    ranked = torch.full_like(whole, float("inf")).scatter_(1, winners, least)
    return ranked.gather(1, alive).argsort(dim=1, stable=True), int((room > 0).sum(1).min())


def _taken(values: Tensor, index: Tensor, dim: int) -> Tensor:
    """``values`` ``[r, a, b]`` at places ``[r, n]`` of a dimension, of each row its own."""
    if dim == 1:
        return values.gather(1, index[:, :, None].expand(-1, -1, values.shape[2]))
    return values.gather(2, index[:, None].expand(-1, values.shape[1], -1))


def fit_survivors(weight: Tensor, moment: Tensor, kept: Tensor) -> Tensor:
    """The rows ``v``, zero where they aren't ``kept``, with the least ``(w - v) H (w - v)^T``, ``[r, k]``.

    Args:
        weight: ``w``, ``[r, k]``.
        moment: ``H``, ``[k, k]`` or ``[r, k, k]``, positive definite.
        kept: bool ``[r, k]``.
    """
    slopes = weight @ moment if moment.dim() == 2 else (weight[:, None] @ moment)[:, 0]
    fitted = torch.zeros_like(weight)
    for rows in _chunks(len(weight), max(1, int(kept.sum(1).max()))):
        mask = kept[rows]
        # As many columns as the fullest row keeps; what pads the others reads nothing, and gets zero.
        index = (~mask).to(torch.int8).argsort(dim=1, stable=True)[:, : int(mask.sum(1).max())]
        is_real = mask.gather(1, index)
        own = moment[index[:, :, None], index[:, None]] if moment.dim() == 2 else _between(moment[rows], index)
        own = own * (is_real[:, :, None] & is_real[:, None])
        own.diagonal(dim1=1, dim2=2).add_((~is_real).to(own.dtype))
        wanted = slopes[rows].gather(1, index) * is_real
        solved = torch.cholesky_solve(wanted[..., None], torch.linalg.cholesky(own))[..., 0]
        fitted[rows] = torch.zeros_like(fitted[rows]).scatter_(1, index, solved)
    return fitted


def _between(moment: Tensor, index: Tensor) -> Tensor:
    return _taken(_taken(moment, index, 1), index, 2)
