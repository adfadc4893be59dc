"""Rounding to a grid that moves a layer's outputs least, rather than its weights.

A row ``w`` of a weight that becomes ``s q``, a scale times integers, moves its output in the mean square by
``(w - s q) H (w - s q)^T``, where ``H`` is the second moment of the layer's inputs. Columns are rounded one after
another, those with the largest moment first, and what is left over is made up for by the columns still to come; then
single levels are moved as long as the error falls, and the scale is set to its best for the levels. All of it is done
for several scales of each row at once, and the best one is taken.

Where each group of a row's inputs has a scale of its own, what is tried are shares of the scales whose nearest levels
fit their groups best, and after each sweep one scale after another is set to its best. In a code by stages
(``widths``) what the levels take depends on the scale: of those that are tried, the best one that keeps to the width's
bits is taken.
Source: Frantar et al. 2022, GPTQ (arXiv:2210.17323), for the columns; Behdin et al. 2023, QuantEase
(arXiv:2309.01885), for the moves of single levels. Cost: ``(2 + 3 SWEEPS) r c k^2`` products for ``r`` scales of ``c``
rows of ``k`` weights, one more a sweep with groups, and ``k^3``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import NumericsError
from ..widths import Width, is_mixed, levels_of
from .rounding import SMALLEST_PEAK, in_16_bits, in_groups, level_range, rows_by_width, staged_scale, stored_bits

BLOCK = 64  # columns whose error is carried to the rest at once
SWEEPS = 3  # over the levels; after each the scales are set anew
RATIOS = tuple(1.05 - 0.05 * step for step in range(17))  # of the scale that reaches the largest weight
SHARES = (
    1.0,
    0.9,
    0.8,
    1.1,
    0.95,
    0.85,
    0.7,
)  # of the scales that fit their groups best; fewer of them, the first ones
QUICK_RATIOS = RATIOS[1:14:3]  # one in three, and none that clips more than half
APART = (1.0, 1.15, 1.35, 1.6, 2.0, 2.6, 3.5)  # scales by stages, of those whose nearest levels take their bits
NEAR = (1.0, 0.96, 0.91, 1.03, 0.98, 0.94, 0.88, 1.08)  # of the best one of those
QUICK_STAGED = (1.05, 1.2, 1.0, 1.1, 1.5, 2.2)  # where they are all that is tried: a quick look, or a large weight
AHEAD = math.log(4) / 24  # of a scale, for each bit of the next stage: how far a level has to go before it is in it
DAMPING = 0.01  # of the mean of the diagonal
MOST_WEIGHTS = 2**25  # of all scales together; beyond, fewer of them are tried


def round_rows(
    weight: Tensor,
    moment: Tensor,
    width: Width,
    *,
    is_shared: bool = False,
    zeros: Tensor | None = None,
    group_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """``round_to_outputs`` of rows that may have widths of their own.

    Args:
        width: Bits of all rows, or a letter of ``widths.WIDTHS`` for each, in the order of the groups' rows.
    """
    if not is_mixed(width):
        return round_to_outputs(weight, moment, width, is_shared=is_shared, zeros=zeros, group_size=group_size)
    groups, count, _ = weight.shape
    factored = factor_of(moment)
    levels = torch.zeros(weight.shape, dtype=torch.int8, device=weight.device)
    scales = torch.ones(groups, count, dtype=torch.float32, device=weight.device)
    for letter, places in rows_by_width(width, groups * count):
        chosen = torch.zeros(groups * count, dtype=torch.bool, device=weight.device)
        chosen[places] = True
        chosen = chosen.reshape(groups, count)
        columns = chosen.any(0)  # rows of other groups in the same places are rounded too, and dropped
        some = None if zeros is None else zeros[:, columns]
        found, units = round_to_outputs(weight[:, columns], factored, letter, zeros=some)
        kept = chosen[:, columns]
        levels[chosen], scales[chosen] = found[kept], units[kept]
    return levels, scales


@dataclass(frozen=True, slots=True)
class Factored:
    """Damped moments of several roundings.

    Attributes:
        h: ``[g, k, k]``, float32, in units of the mean of its diagonal, its columns in ``order``.
        order: int64 ``[g, k]``: the columns by what their inputs are, the largest first.
        power: ``[g, k]``, float32: the diagonal, in the columns' own order.
        factor: ``[g, k, k]``, float32, upper triangular: ``factor^T factor`` is the inverse of ``h``.
    """

    h: Tensor
    order: Tensor
    power: Tensor
    factor: Tensor


def factor_of(moment: Tensor, damping: float = DAMPING) -> Factored:
    """The moments ``[g, k, k]`` as ``round_to_outputs`` needs them.

    Raises:
        NumericsError: They aren't finite.
    """
    if not bool(torch.isfinite(moment).all()):
        raise NumericsError("the moment of a layer's inputs isn't finite", hint="check the checkpoint and data")
    h = damped(moment.double(), damping)
    h = h / h.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    order = h.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True, stable=True)
    power = h.diagonal(dim1=1, dim2=2).float()
    h = torch.stack([one[places][:, places] for one, places in zip(h, order, strict=True)])
    factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True).float()
    return Factored(h.float(), order, power, factor)


def round_to_outputs(
    weight: Tensor,
    moment: Tensor | Factored,
    bits: Width,
    *,
    damping: float = DAMPING,
    is_shared: bool = False,
    zeros: Tensor | None = None,
    is_quick: bool = False,
    sweeps: int = SWEEPS,
    group_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Levels and scale of each row.

    Args:
        weight: ``[g, c, k]``: the rows of ``g`` groups, each with inputs of its own.
        moment: ``[g, k, k]``, symmetric: the sum or the mean of ``x x^T`` over positions; or ``factor_of`` it.
        bits: 2 to 8, or a letter, as for ``rounding.level_range``.
        damping: Added to the moments' diagonals, in units of their mean.
        is_shared: One scale for all rows of all groups.
        zeros: bool, of the weight's shape: whose level is 0 in any case.
        is_quick: Fewer scales are tried.
        sweeps: Over the levels.
        group_size: So many inputs of a row share a scale, rather than the whole row.

    Returns:
        Levels (int8, ``[g, c, k]``), and float32 scales ``[g, c]``; ``[g, c, m]`` where rows have ``m`` groups, in 16
        bits (``rounding.in_16_bits``). A negative one gives the positive side the extra level.

    Raises:
        NumericsError: The weight or the moment isn't finite.
    """
    factored = moment if isinstance(moment, Factored) else factor_of(moment, damping)
    (found,) = round_at_all(
        weight,
        factored,
        (bits,),
        is_shared=is_shared,
        zeros=zeros,
        is_quick=is_quick,
        sweeps=sweeps,
        group_size=group_size,
    )
    return found


def round_at_all(
    weight: Tensor,
    factored: Factored,
    widths: Sequence[Width],
    *,
    is_shared: bool = False,
    zeros: Tensor | None = None,
    is_quick: bool = False,
    sweeps: int = SWEEPS,
    group_size: int | None = None,
) -> list[tuple[Tensor, Tensor]]:
    """``round_to_outputs`` at each of several widths, all of their scales at once."""
    if not bool(torch.isfinite(weight).all()):
        raise NumericsError("a weight isn't finite", hint="check the checkpoint")
    groups, count, k = weight.shape
    h, order, power, factor = factored.h, factored.order, factored.power, factored.factor
    unit = float(weight.abs().max()) or 1.0  # or the squares of small weights would leave the range of floats
    if group_size is not None:
        unit = 2.0 ** math.frexp(unit)[1]  # leaves scales of 16 bits what they are
    flat = (weight / unit).float()
    w = flat.gather(2, order[:, None].expand_as(weight)).transpose(1, 2)
    kept = _kept(zeros, order)
    parts = torch.zeros_like(order) if group_size is None else order // group_size
    starts = []
    for bits in widths:
        if levels_of(bits).stages:
            starts.append(_staged_scales(w, flat, bits, h, factor, kept, is_quick=is_quick))
        elif group_size is None:
            ratios = QUICK_RATIOS if is_quick else RATIOS
            starts.append(_scales(w, bits, ratios, is_shared=is_shared)[:, :, None])
        else:
            starts.append(_group_scales(flat, power, bits, QUICK_RATIOS if is_quick else RATIOS, group_size))
    start = torch.cat(starts)
    columns, scales = w.repeat(1, 1, len(start)), start.permute(1, 2, 0, 3).flatten(2)
    grid = _grid_of_all([(bits, len(own)) for bits, own in zip(widths, starts, strict=True)], kept, w)
    levels = _by_columns(columns, _steps(scales, parts), factor, grid)
    for _ in range(sweeps):
        levels = _swept(columns, levels, _steps(scales, parts), h, grid)
        if group_size is not None:
            scales = _fitted_in_turn(columns, levels, scales, h, parts)
        elif not is_shared:
            scales = _fitted(columns, levels, scales[:, 0], h)[:, None]
    found, end = [], 0
    for bits, own in zip(widths, starts, strict=True):
        end, begin = end + len(own) * count, end
        one = levels[..., begin:end], scales[..., begin:end]
        if levels_of(bits).stages:  # one that takes no more than its bits in any case
            one[1][..., -count:] = own[-1]
            one[0][..., -count:] = replace(_grid(bits, kept, 1), ahead=0.0).nearest(w, own[-1], slice(None))
        error = _errors(columns[..., begin:end], one[0], _steps(one[1], parts), h).reshape(groups, len(own), count)
        if levels_of(bits).stages:
            error = torch.where(_keeps(one[0], bits).reshape(error.shape), error, math.inf)
        total = error.sum((0, 2), keepdim=True).expand_as(error) if is_shared else error
        place = (total.argmin(1) * count + torch.arange(count, device=w.device))[:, None]
        chosen = one[0].gather(2, place.expand(-1, k, -1)).transpose(1, 2)
        back = order.argsort(dim=1)[:, None].expand_as(chosen)
        units = one[1].gather(2, place.expand(-1, scales.shape[1], -1)).transpose(1, 2) * unit
        units = units.contiguous() if group_size is not None else units[..., 0]
        found.append((chosen.gather(2, back).to(torch.int8), units))
    return found


def damped(moment: Tensor, damping: float) -> Tensor:
    """Moments ``[g, k, k]`` with ``damping`` times the mean of their diagonal added; the identity for one of zeros."""
    mean = moment.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    eye = torch.eye(moment.shape[-1], dtype=moment.dtype, device=moment.device)
    return moment + torch.where(mean > 0, damping * mean, 1.0) * eye


# In what follows weights and levels are [g, k, r c]: what is done to a column of all rows is done to neighbours. Scales
# are [g, m, r c], m of a row; ``parts``, int64 [g, k], says which of them a column has, and steps are its scale.


def _steps(scales: Tensor, parts: Tensor) -> Tensor:
    """``[g, k, r c]``: the scale of each weight."""
    if scales.shape[1] == 1:
        return scales.expand(-1, parts.shape[1], -1)
    return scales.gather(1, parts[:, :, None].expand(-1, -1, scales.shape[2]))


def _errors(columns: Tensor, levels: Tensor, steps: Tensor, moment: Tensor) -> Tensor:
    change = columns - steps * levels
    return ((moment @ change) * change).sum(1, dtype=torch.float64)


def _scales(columns: Tensor, bits: Width, ratios: Sequence[float], *, is_shared: bool) -> Tensor:
    """Those that are tried, ``[r, g, c]``: shares of what reaches the largest magnitude."""
    low, high = level_range(bits)
    dims = (0, 1, 2) if is_shared else (1,)
    most, least = columns.amax(dims, keepdim=True), columns.amin(dims, keepdim=True)
    peak = torch.maximum(most, -least)
    peak = torch.where(peak < SMALLEST_PEAK, float(-low), peak)
    sign = torch.where(most > -least, -1.0, 1.0) if low != -high else torch.ones_like(peak)
    ratios = ratios[:: max(1, min(len(ratios), len(ratios) * columns.numel() // MOST_WEIGHTS))]
    return torch.stack([(sign * ratio * peak / -low)[:, 0].expand(len(columns), columns.shape[2]) for ratio in ratios])


def _keeps(levels: Tensor, bits: Width) -> Tensor:
    """``[g, r c]``: whether a row's levels take no more than the bits of their code by stages."""
    return stored_bits(levels, bits, 1) <= levels_of(bits).bits * levels.shape[1]


def _staged_scales(
    columns: Tensor, weight: Tensor, bits: Width, h: Tensor, factor: Tensor, kept: Tensor | None, *, is_quick: bool
) -> Tensor:
    """Those that are tried in a code by stages, ``[r, g, 1, c]``; the nearest levels of the last keep to its bits.

    They lie about the best one of some, far apart, whose levels keep to the bits once errors are made up for.

    Args:
        columns: Of ``weight``, in their order.
        weight: ``[g, c, k]``.
    """
    groups, count, k = weight.shape
    own = staged_scale(weight.reshape(-1, k), bits).reshape(groups, 1, count)
    found = own
    ratios: Sequence[float] = QUICK_STAGED
    if not is_quick and columns.numel() * len(APART) <= MOST_WEIGHTS:
        scales = torch.cat([ratio * own for ratio in APART], 2)
        grid = _grid(bits, kept, len(APART))
        every, steps = columns.repeat(1, 1, len(APART)), scales.expand(-1, k, -1)
        levels = _by_columns(every, steps, factor, grid)
        error = torch.where(_keeps(levels, bits), _errors(every, levels, steps, h), math.inf)
        error[..., -count:].clamp_(max=torch.finfo(error.dtype).max)  # of none that keeps to them, the last one
        place = error.reshape(groups, len(APART), count).argmin(1, keepdim=True)
        found, ratios = scales.reshape(groups, len(APART), count).gather(1, place), NEAR
    ratios = ratios[: max(1, MOST_WEIGHTS // columns.numel())]
    return torch.stack([*(ratio * found for ratio in ratios), own])


def _group_scales(weight: Tensor, power: Tensor, bits: Width, ratios: Sequence[float], group_size: int) -> Tensor:
    """Those that are tried, ``[r, g, m, c]``: shares of what rounds a group to its nearest levels with the least error.

    Args:
        weight: ``[g, c, k]``.
        power: ``[g, k]``, of the inputs: what an error of a weight counts.
    """
    low, high = level_range(bits)
    groups, count, k = weight.shape
    parts = in_groups(weight.reshape(-1, k), group_size)
    counts = in_groups(power, group_size).repeat_interleave(count, 0)
    most, least = parts.amax(2), parts.amin(2)
    peak = torch.maximum(most, -least)
    sign = torch.where(most > -least, -1.0, 1.0) if low != -high else torch.ones_like(peak)
    reach = in_16_bits(torch.where(peak < SMALLEST_PEAK, 1.0, sign * peak / -low))
    best, error = reach, torch.full_like(reach, math.inf)
    for ratio in ratios:
        scale = in_16_bits(ratio * reach)
        levels = (parts / scale[..., None]).round_().clamp_(low, high)
        found = (levels.mul_(scale[..., None]).sub_(parts).square_() * counts).sum(2)
        best, error = torch.where(found < error, scale, best), torch.minimum(found, error)
    shares = SHARES[: max(1, MOST_WEIGHTS // weight.numel())]
    best = best.reshape(groups, count, -1).transpose(1, 2)
    return torch.stack([in_16_bits(share * best) for share in shares])


@dataclass(frozen=True, slots=True)
class _Grid:
    """Levels, and where they may be others than 0: floats ``[g, k, r c]``, or None for everywhere.

    Attributes:
        first: The largest level of the first stage, in a code by stages.
        ahead: How far beyond the middle, in scales, a value has to be for the next level, whose stage takes more bits:
            what the square of the error grows by is then worth them, at the rate at which errors fall by 4 for a bit.
    """

    low: int | Tensor
    high: int | Tensor
    kept: Tensor | None
    first: int | Tensor = 0
    ahead: float | Tensor = 0.0

    def nearest(self, values: Tensor, step: Tensor, k: int | slice) -> Tensor:
        """Of a column, or of several."""
        ratio = values / step
        levels = torch.clamp(ratio.round(), self.low, self.high)  # type: ignore[arg-type]
        if isinstance(self.ahead, Tensor) or self.ahead:
            stays = (levels.abs() == self.first + 1) & (ratio.abs() < self.first + 0.5 + self.ahead)
            levels -= torch.where(stays, levels.sign(), 0)
        return levels if self.kept is None else levels.mul_(self.kept[:, k])


def _grid(bits: Width, kept: Tensor | None, count: int) -> _Grid:
    """For so many scales of each row; ``kept`` is that of one."""
    everywhere = None if kept is None else kept.repeat(1, 1, count)
    code = levels_of(bits)
    if not code.stages:
        return _Grid(*level_range(bits), everywhere)
    return _Grid(*level_range(bits), everywhere, code.largest_at_first(), AHEAD * code.stages[1])


def _grid_of_all(widths: Sequence[tuple[Width, int]], kept: Tensor | None, like: Tensor) -> _Grid:
    """For so many scales of each row at each of several widths."""
    if len(widths) == 1:
        return _grid(widths[0][0], kept, widths[0][1])
    count = like.shape[2]
    every = [(_grid(bits, None, 1), size * count) for bits, size in widths]
    low, high, first, ahead = (
        torch.cat([torch.full((size,), float(getattr(grid, name))) for grid, size in every]).to(like)
        for name in ("low", "high", "first", "ahead")
    )
    everywhere = None if kept is None else kept.repeat(1, 1, sum(size for _, size in widths))
    return _Grid(low, high, everywhere, first, ahead)


def _kept(zeros: Tensor | None, order: Tensor) -> Tensor | None:
    return None if zeros is None else (~zeros).float().gather(2, order[:, None].expand_as(zeros)).transpose(1, 2)


def _by_columns(columns: Tensor, steps: Tensor, factor: Tensor, grid: _Grid) -> Tensor:
    """Levels column by column, each one's error made up for by those after it.

    Args:
        factor: Upper triangular, ``factor^T factor`` the inverse of the moment.
    """
    left, levels = columns.clone(), torch.empty_like(columns)
    for start in range(0, columns.shape[1], BLOCK):
        end = min(start + BLOCK, columns.shape[1])
        errors = torch.empty_like(columns[:, start:end])
        for k in range(start, end):
            levels[:, k] = grid.nearest(left[:, k], steps[:, k], k)
            errors[:, k - start] = (left[:, k] - steps[:, k] * levels[:, k]) / factor[:, k, k, None]
            left[:, k + 1 : end].addcmul_(factor[:, k, k + 1 : end, None], errors[:, k - start, None], value=-1)
        left[:, end:].baddbmm_(factor[:, start:end, end:].transpose(1, 2), errors, alpha=-1)
    return levels


def _swept(columns: Tensor, levels: Tensor, steps: Tensor, moment: Tensor, grid: _Grid) -> Tensor:
    """Each level in turn at its best, given all others."""
    levels = levels.clone()
    slope = moment @ (columns - steps * levels)
    for start in range(0, columns.shape[1], BLOCK):
        end = min(start + BLOCK, columns.shape[1])
        moves = torch.empty_like(columns[:, start:end])
        for k in range(start, end):
            wanted = steps[:, k] * levels[:, k] + slope[:, k] / moment[:, k, k, None]
            chosen = grid.nearest(wanted, steps[:, k], k)
            moves[:, k - start] = steps[:, k] * (chosen - levels[:, k])
            slope[:, k:end].addcmul_(moment[:, k, k:end, None], moves[:, k - start, None], value=-1)
            levels[:, k] = chosen
        slope[:, end:].baddbmm_(moment[:, end:, start:end], moves, alpha=-1)
    return levels


def _fitted(columns: Tensor, levels: Tensor, scales: Tensor, moment: Tensor) -> Tensor:
    """The best scale of each row for its levels; as it was where all levels are zero."""
    product = moment @ levels
    power = (product * levels).sum(1)
    best = (product * columns).sum(1) / torch.where(power > 0, power, 1.0)
    return torch.where((power > 0) & (best.abs() > SMALLEST_PEAK), best, scales)


def _fitted_in_turn(columns: Tensor, levels: Tensor, scales: Tensor, moment: Tensor, parts: Tensor) -> Tensor:
    """The best scale of each group of columns for its levels, given those of the other groups; in 16 bits."""
    scales = scales.clone()
    change = columns - _steps(scales, parts) * levels
    for part in range(scales.shape[1]):
        for group in range(len(scales)):
            own = (parts[group] == part).nonzero()[:, 0]
            level, rows = levels[group, own], moment[group, own]
            power = ((rows[:, own] @ level) * level).sum(0)
            moved = ((rows @ change[group]) * level).sum(0) / torch.where(power > 0, power, 1.0)
            before = scales[group, part]
            best = in_16_bits(before + moved)
            best = torch.where((power > 0) & (best.abs() > SMALLEST_PEAK), best, before)
            change[group, own] -= (best - before) * level
            scales[group, part] = best
    return scales
