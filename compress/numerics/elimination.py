"""Units of a layer that go one after another, so that its outputs move least: optimal brain surgery, band by band.

A row ``w`` of a weight that becomes ``v`` moves its output in the mean square by ``(w - v) H (w - v)^T``, where ``H``
is the second moment of the layer's inputs. Removing the columns ``Q`` of those that are left, with the best move of all
others, costs ``w_Q ([H^-1]_QQ)^-1 w_Q^T``: of single weights, ``w_i^2 / [H^-1]_ii``. The unit that costs least for each
of its weights goes first, a few units at a time, and ``H^-1`` shrinks to what is left. Rows of a band, which lose the
same columns, share it, and their costs add up. Each band ends with an order in which its units go, and with what each
of them costs.
Source: Hassibi and Stork 1993, Optimal Brain Surgeon; Frantar, Singh, Alistarh 2022, Optimal Brain Compression
(arXiv:2208.11580), for rows, their orders and blocks; the steps of several units are ours. Cost: ``k^3`` products for
each band of ``k`` columns. Where that is too much, ``MOST_PRODUCTS``, units go in the order of what each costs alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..pattern import Pattern
from .units import Units

STEP = 8  # of the units that a band has left, one in so many goes at once
ELEMENTS = 2**26  # of the inverses of bands that are worked on at once
MOST_PRODUCTS = 2**42  # of an elimination: about a minute on two cores


@dataclass(frozen=True, slots=True)
class Elimination:
    """The order in which the units of each band go.

    Attributes:
        place: int64 ``[b, n]``: a unit is the so-manieth of its band that goes; the number of steps where it stays.
        costs: float ``[b, steps]``: what the next removal costs for each of its weights; never less than the last one.
        sizes: int32 ``[b, steps]``: how many weights go with it.
    """

    place: Tensor
    costs: Tensor
    sizes: Tensor

    def kept(self, removed: Tensor) -> Tensor:
        """bool ``[b, n]``: what is left of each band after so many removals, ``[b]``."""
        return self.place >= removed[:, None]


def eliminate(weight: Tensor, moment: Tensor, steps: int, *, units: Units | None = None) -> Elimination:
    """Find the order in which ``steps`` units of each band go.

    Args:
        weight: ``[r, k]``, the rows that minimise their error where nothing is gone.
        moment: ``[k, k]``, positive definite; ``[g, k, k]`` where each ``r / g`` rows have one of their own.
        steps: As many as a band has units, or fewer.
        units: Of the weight, whose rows come first; None for single weights.

    Raises:
        torch.linalg.LinAlgError: The moment isn't positive definite.
    """
    units = units or Units(tuple(weight.shape), 0, 1, Pattern())
    blocks = units.blocks(weight)
    b, n, r, c = blocks.shape
    left = blocks.transpose(1, 2).reshape(b, r, n * c)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(_padded(moment, units)))
    band = _Bands(units.sizes().to(weight.device), c, units.pattern.quota)
    place = torch.full((b, n), steps, dtype=torch.long, device=weight.device)
    costs = torch.zeros(b, steps, dtype=weight.dtype, device=weight.device)
    owners = _owners(len(weight), len(inverse), r).to(weight.device)
    q = owners.shape[1]  # moments that the rows of a band have
    is_ranked = b * q * (n * c) ** 3 > MOST_PRODUCTS
    for chunk in _chunks(b, q * (n * c) ** 2):
        own = inverse.expand(len(owners[chunk]), -1, -1) if len(inverse) == 1 else inverse[owners[chunk].flatten()]
        parts = left[chunk].reshape(-1, r // q, n * c)
        sized = _Bands(band.sizes[chunk], c, band.quota)
        (_rank if is_ranked else _eliminate)(parts, own, place[chunk], costs[chunk], sized)
    ordered = torch.zeros(b, steps + 1, dtype=torch.int32, device=weight.device).scatter_(1, place, band.sizes)
    return Elimination(place, costs.cummax(1).values if steps else costs, ordered[:, :steps])


@dataclass(frozen=True, slots=True)
class _Bands:
    """What some bands are made of: sizes of their units ``[b, n]``, columns of a unit, and of which m how many stay."""

    sizes: Tensor
    columns: int
    quota: tuple[int, int] | None


def _padded(moment: Tensor, units: Units) -> Tensor:
    """Moments ``[g, n c, n c]`` of the units' columns; what pads a unit is an input of its own, without weights."""
    moments = moment if moment.dim() == 3 else moment[None]
    columns = units.columns_of().flatten().to(moment.device)
    if torch.equal(columns, torch.arange(moments.shape[-1], device=moment.device)):
        return moments
    is_real = columns >= 0
    picked = moments[:, columns.clamp(min=0)][:, :, columns.clamp(min=0)] * (is_real[:, None] & is_real)
    picked.diagonal(dim1=1, dim2=2).add_((~is_real).to(picked.dtype))
    return picked


def _owners(num_rows: int, num_moments: int, rows: int) -> Tensor:
    """Which moments the rows of each band have, ``[b, 1]`` where they all have the same, else ``[b, rows]``."""
    bands = -(-num_rows // rows)
    each = num_rows // num_moments
    if num_moments == 1 or each % rows == 0:
        return (torch.arange(bands) * rows // each)[:, None]
    return (torch.arange(bands * rows).clamp(max=num_rows - 1) // each).reshape(bands, rows)


def _chunks(count: int, elements: int) -> Iterator[slice]:
    size = max(1, ELEMENTS // max(1, elements))
    return (slice(start, start + size) for start in range(0, count, size))


def _eliminate(left: Tensor, inverse: Tensor, place: Tensor, costs: Tensor, bands: _Bands) -> None:
    """Fill ``place`` and ``costs`` of some bands; all of them have as many units left at any time.

    Args:
        left: ``[b q, rows / q, n c]``: rows that share an inverse are one behind another.
        inverse: ``[b q, n c, n c]``.
    """
    (b, n), steps, c = place.shape, costs.shape[1], bands.columns
    q = len(left) // b
    alive, gone = torch.arange(n, device=left.device).expand(b, n), 0
    room = None
    if bands.quota is not None:
        room = torch.full((b, n // bands.quota[1]), bands.quota[1] - bands.quota[0], device=left.device)
    while gone < steps:
        scores = _alone(left, inverse, c, b) / bands.sizes.gather(1, alive)
        most = min(max(1, alive.shape[1] // STEP), steps - gone)
        if bands.quota is None or room is None:
            order = scores.argsort(dim=1, stable=True)
        else:
            order, open_groups = _by_groups(scores, alive, room, bands.quota[1])
            most = min(most, open_groups)
        goes, stays = order[:, :most], order[:, most:].sort(1).values
        units = alive.gather(1, goes)
        if room is not None and bands.quota is not None:
            room.scatter_add_(1, units // bands.quota[1], -torch.ones_like(goes))
        place.scatter_(1, units, gone + torch.arange(most, device=left.device).expand(b, most))
        out, rest = (_columns(index, c, q) for index in (goes, stays))
        rows = _taken(inverse, out, 1)
        factor = torch.linalg.cholesky(_taken(rows, out, 2))
        across = _taken(rows, rest, 2)
        lost = _taken(left, out, 2)
        moved = torch.cholesky_solve(lost.transpose(1, 2), factor)
        joint = (lost @ moved).diagonal(dim1=1, dim2=2).sum(1).reshape(b, q).sum(1)
        costs[:, gone : gone + most] = (joint / bands.sizes.gather(1, units).sum(1))[:, None]
        left = _taken(left, rest, 2) - (across.transpose(1, 2) @ moved).transpose(1, 2)
        half = torch.linalg.solve_triangular(factor, across, upper=False)
        inverse = _between(inverse, rest).baddbmm_(half.transpose(1, 2), half, alpha=-1)
        alive, gone = alive.gather(1, stays), gone + most


def _rank(left: Tensor, inverse: Tensor, place: Tensor, costs: Tensor, bands: _Bands) -> None:
    """Fill ``place`` and ``costs`` by what each unit costs alone."""
    b, n = place.shape
    scores = _alone(left, inverse, bands.columns, b) / bands.sizes
    ranked = scores
    if bands.quota is not None:  # those that stay last
        order = scores.reshape(b, -1, bands.quota[1]).argsort(dim=2, stable=True).argsort(dim=2, stable=True)
        ranked = torch.where(order.reshape(b, n) < bands.quota[1] - bands.quota[0], scores, float("inf"))
    order = ranked.argsort(dim=1, stable=True)[:, : costs.shape[1]]
    place.scatter_(1, order, torch.arange(costs.shape[1], device=place.device).expand(b, -1))
    costs.copy_(scores.gather(1, order))


def _alone(left: Tensor, inverse: Tensor, columns: int, bands: int) -> Tensor:
    """What each unit costs alone, ``[b, n]``: ``w_Q ([H^-1]_QQ)^-1 w_Q^T`` over its rows."""
    if columns == 1:
        found = (left.square() / inverse.diagonal(dim1=1, dim2=2)[:, None]).sum(1)
    else:
        shape = (len(left), -1, columns)
        own = inverse.reshape(*shape, left.shape[2] // columns, columns).diagonal(dim1=1, dim2=3)  # [b q, c, c, n]
        factor = torch.linalg.cholesky(own.permute(0, 3, 1, 2))
        wanted = left.transpose(1, 2).reshape(*shape, left.shape[1])
        found = torch.linalg.solve_triangular(factor, wanted, upper=False).square_().sum((2, 3))
    return found.reshape(bands, -1, found.shape[1]).sum(1)


def _columns(units: Tensor, columns: int, repeats: int) -> Tensor:
    """Columns ``[b q, n c]`` of units ``[b, n]``, once for each of a band's inverses."""
    if columns > 1:
        units = (units[:, :, None] * columns + torch.arange(columns, device=units.device)).flatten(1)
    return units.repeat_interleave(repeats, 0) if repeats > 1 else units


def _by_groups(scores: Tensor, alive: Tensor, room: Tensor, m: int) -> tuple[Tensor, int]:
    """Units in the order in which they may go, at most one of a group, and how many of them may."""
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

    Of rows that keep more than half, what is taken away is solved for: ``v = w - x H^-1``, where ``x`` is zero where a
    row is kept, and such that ``v`` is zero elsewhere.

    Args:
        weight: ``w``, ``[r, k]``.
        moment: ``H``, ``[k, k]``, positive definite; ``[g, k, k]`` where each ``r / g`` rows have one of their own.
        kept: bool ``[r, k]``.
    """
    r, k = weight.shape
    moments = moment if moment.dim() == 3 else moment[None]
    owners = torch.arange(r, device=weight.device) * len(moments) // max(1, r)
    many = 2 * kept.sum(1) > k
    fitted = torch.where(kept, weight, 0)
    if not bool(many.all()):
        slopes = _multiplied(weight, moments)
        fitted[~many] = _solved(slopes[~many], moments, owners[~many], kept[~many])
    if bool((many & ~kept.all(1)).any()):
        inverses = torch.cholesky_inverse(torch.linalg.cholesky(moments))
        taken = torch.zeros_like(weight)
        taken[many] = _solved(weight[many], inverses, owners[many], ~kept[many])
        changed = (weight - _multiplied(taken, inverses)).masked_fill_(~kept, 0)
        fitted[many] = changed[many]
    return fitted


def _multiplied(rows: Tensor, moments: Tensor) -> Tensor:
    """Rows ``[r, k]`` by the matrix of each, ``[g, k, k]``."""
    return (rows.reshape(len(moments), -1, rows.shape[1]) @ moments).reshape(rows.shape)


def _solved(right: Tensor, moments: Tensor, owners: Tensor, chosen: Tensor) -> Tensor:
    """Rows ``x``, zero where they aren't ``chosen``, whose product with their matrix is ``right`` where they are."""
    found = torch.zeros_like(right)
    for rows in _chunks(len(right), int(chosen.sum(1).max()) ** 2):
        mask = chosen[rows]
        # As many columns as the fullest row has; what pads the others reads nothing, and gets zero.
        index = (~mask).to(torch.int8).argsort(dim=1, stable=True)[:, : int(mask.sum(1).max())]
        is_real = mask.gather(1, index)
        own = moments[owners[rows, None, None], index[:, :, None], index[:, None]]
        own.mul_(is_real[:, :, None] & is_real[:, None])
        own.diagonal(dim1=1, dim2=2).add_((~is_real).to(own.dtype))
        wanted = right[rows].gather(1, index) * is_real
        solved = torch.cholesky_solve(wanted[..., None], torch.linalg.cholesky(own))[..., 0]
        found[rows] = torch.zeros_like(found[rows]).scatter_(1, index, solved)
    return found


def _between(moment: Tensor, index: Tensor) -> Tensor:
    return _taken(_taken(moment, index, 1), index, 2)
