"""Affine grids: the scale of a weight channel or an activation, and rounding to it.

Weights are symmetric (zero point 0) with one scale a channel: ``w ~ scale * level``. Eight bits use levels -127..127,
as runtimes multiply them fastest; fewer bits use the whole ``-2**(b-1) .. 2**(b-1) - 1``, and the sign of the scale
says which side of zero has the extra level. Source: Jacob et al. 2018 (arXiv:1712.05877); Nagel et al. 2021
(arXiv:2106.08295), 2.2.

A scale is found from the channel's weights alone, in one of the ways that ``plan.RANGES`` names: a plan that holds the
names is applied without data. ``choose_ranges`` picks them by what they do to a layer's outputs.

A row of a linear weight may have a scale for each group of so many inputs, in order; the last group may be shorter.
Such scales are rounded to bfloat16 before their levels are found, so that they take 16 bits without a loss.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from ..errors import NumericsError
from ..plan import CLIPS, RANGES
from ..widths import BY_CHANNEL, WIDTHS, Width, is_mixed, letters_of, levels_of, mean_bits

NUM_CANDIDATES = 40  # clipping ratios tried by the mse search
SMALLEST_RATIO = 0.3
SMALLEST_PEAK = 1e-30  # what is smaller counts as zeros: its scale would be no normal float32
STAGED_STEPS = 14  # of the search for the scale of a code by stages
LEAST_REACH = 1 / 16  # of what covers the largest magnitude: no such scale is smaller
BLOCK = 2**17  # weights that a range is searched over at a time, so that they stay in the cache
LARGEST_CHANGE = 2**22  # weights whose change is held at a time while ranges are chosen
COLUMNS = 256  # of a moment, multiplied at a time


def level_range(width: Width) -> tuple[int, int]:
    """Lowest and highest level of a symmetric weight: of its bits, or of a letter of ``widths.WIDTHS``."""
    levels = levels_of(width)
    return levels.low, levels.high


def level_ranges(width: Width, axis: int | None, dims: int) -> tuple[Tensor | int, Tensor | int]:
    """The same for each channel, float32, shaped to compare with a weight; two ints where all have one width."""
    if not is_mixed(width):
        return level_range(width)
    low, high = (torch.tensor(ends) for ends in zip(*map(level_range, letters_of(width)), strict=True))
    return broadcast_scale(low.float(), axis, dims), broadcast_scale(high.float(), axis, dims)


def level_bounds(values: Tensor, width: Width, axis: int | None) -> tuple[Tensor, Tensor]:
    """Lowest and highest level of each of some values, in units of their scales, so that a row keeps to its bits.

    In a code by stages those are the first stage's for the smallest values that would need another one, if there are
    too many.
    """
    low, high = (torch.as_tensor(end).to(values) for end in level_ranges(width, axis, values.dim()))
    if not any(levels_of(letter).stages for letter in letters_of(width)):
        return low, high
    moved = values.movedim(axis or 0, 0)
    flat = moved.reshape(len(moved), -1)
    bounds = rows(high.expand(values.shape), axis or 0).clone()
    for letter, places in rows_by_width(width, len(flat)):
        if levels_of(letter).stages:
            bounds[places] = _staged_bounds(flat[places], letter)
    bound = bounds.reshape(moved.shape).movedim(0, axis or 0)
    return torch.maximum(-bound, low), bound


def _staged_bounds(values: Tensor, width: Width) -> Tensor:
    stages, (low, high) = levels_of(width).stages, level_range(width)
    levels = values.round().clamp(low, high)
    first = float(levels_of(width).largest_at_first())
    saved = (stored_bits(levels, width, 1) - levels_of(width).bits * values.shape[1]).clamp_min(0)
    is_later = levels.abs() > first
    # Each saves at least the bits of the second stage.
    count = (saved / stages[1]).ceil().long().minimum(is_later.sum(1))
    magnitude = torch.where(is_later, values.abs(), math.inf)
    last = magnitude.sort(1).values.gather(1, (count - 1).clamp_min(0)[:, None])
    clamped = (count[:, None] > 0) & (magnitude <= last) & torch.isfinite(magnitude)
    return torch.where(clamped, first, float(high))


def rows(weight: Tensor, axis: int | None) -> Tensor:
    """``[c, n]``: a row for each index of ``axis``; one row where ``axis`` is None."""
    return weight.reshape(1, -1) if axis is None else weight.movedim(axis, 0).reshape(weight.shape[axis], -1)


def broadcast_scale(scale: Tensor, axis: int | None, dims: int) -> Tensor:
    """``scale`` (``[c]``, or ``[]`` where ``axis`` is None) shaped to multiply a weight of ``dims`` dimensions."""
    if axis is None:
        return scale
    return scale.reshape([-1 if dim == axis else 1 for dim in range(dims)])


def spread_scale(scale: Tensor, axis: int | None, shape: Sequence[int], group_size: int | None = None) -> Tensor:
    """``scale`` shaped to multiply a weight of ``shape``; ``[c, m]`` where ``group_size`` inputs share one."""
    if group_size is None:
        return broadcast_scale(scale, axis, len(shape))
    return scale.repeat_interleave(group_size, 1)[:, : shape[1]]


def in_16_bits(scale: Tensor) -> Tensor:
    """The nearest values that bfloat16 holds, as they were: its range is that of float32."""
    return scale.to(torch.bfloat16).to(scale.dtype)


def in_groups(flat: Tensor, group_size: int) -> Tensor:
    """``[c, m, group_size]``: the groups of each row of ``[c, k]``, the last one filled up with zeros."""
    filled = functional.pad(flat, (0, -flat.shape[1] % group_size))
    return filled.reshape(len(flat), -1, group_size)


def round_weight(
    weight: Tensor, bits: Width, *, axis: int | None, search: str, group_size: int | None = None
) -> tuple[Tensor, Tensor]:
    """Round a weight to its symmetric grid.

    Args:
        weight: Any shape, floating.
        bits: 2 to 8, or a letter of ``widths.WIDTHS`` for each channel.
        axis: Dimension with one scale an index; None for one scale in all.
        search: ``minmax`` covers the largest magnitude; ``mse`` clips to the ratio with the least squared error;
            ``p99`` covers that percentile of the magnitudes, zeros left out; ``clip0.80`` that share of the largest.
            ``channels:`` and a letter of ``plan.RANGES`` for each channel gives each its own.
        group_size: Of a weight ``[c, k]`` with axis 0: inputs that share a scale, each found by itself.

    Returns:
        Levels (int8, the weight's shape) and scale (float32, ``[c]`` or ``[]``; ``[c, m]`` of ``m`` groups, which
        bfloat16 holds). A channel or group of zeros has scale 1.

    Raises:
        ValueError: ``search`` is no range, or hasn't one letter for each scale.
    """
    flat = rows(weight.detach().to(torch.float32), axis)
    letters = _letters(search, len(flat))
    if group_size is not None:
        groups = in_groups(flat, group_size)
        many = [letter for letter in letters for _ in range(groups.shape[1])]
        levels, scale = _round_rows(groups.flatten(0, 1), bits, many, in_half=True)
        return levels.reshape(len(flat), -1)[:, : flat.shape[1]].contiguous(), scale.reshape(len(flat), -1)
    scale, levels = torch.ones_like(flat[:, 0]), torch.zeros_like(flat, dtype=torch.int8)
    for width, places in rows_by_width(bits, len(flat)):
        levels[places], scale[places] = _round_rows(flat[places], width, [letters[place] for place in places])
    if axis is None:
        return levels.reshape(weight.shape), scale.reshape(())
    moved = weight.movedim(axis, 0).shape
    return levels.reshape(moved).movedim(0, axis).contiguous(), scale


def rows_by_width(width: Width, count: int) -> list[tuple[Width, list[int]]]:
    """The indices of the rows that have each width; those without levels are left out."""
    if not is_mixed(width):
        return [(width, list(range(count)))]
    letters = letters_of(width)
    if len(letters) != count:
        raise ValueError(f"{width!r} has widths for {len(letters)} channels of {count}")
    found = {letter: [place for place, own in enumerate(letters) if own == letter] for letter in WIDTHS}
    return [(letter, places) for letter, places in found.items() if places and letter != "0"]


def _round_rows(flat: Tensor, width: Width, letters: Sequence[str], *, in_half: bool = False) -> tuple[Tensor, Tensor]:
    """Levels and scale of rows of one width, each with a range of its own; scales that 16 bits hold if ``in_half``."""
    scale = torch.ones_like(flat[:, 0])
    for name, letter in RANGES.items():
        if letter in letters:
            # Searched over all channels: the scale of one doesn't depend on the ranges of the others.
            chosen = torch.tensor([own == letter for own in letters], device=flat.device)
            scale = torch.where(chosen, _scale(flat, width, name), scale)
    scale = in_16_bits(scale) if in_half else scale
    return _to_levels(flat, scale, width).to(torch.int8), scale


def range_candidates(
    weight: Tensor,
    bits: Width,
    *,
    axis: int | None,
    among: Sequence[str] = tuple(RANGES),
    group_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The weight rounded in each of the ways that ``among`` names, all of ``plan.RANGES`` by default.

    Returns:
        Levels (int8, ``[r, c, n]``, the channels as in ``rows``) and scales (float32, ``[r, c]``; ``[r, c, m]`` of
        groups) of the ``r`` ranges.
    """
    flat = rows(weight.detach().to(torch.float32), axis)
    if group_size is not None:
        found = [round_weight(flat, bits, axis=0, search=name, group_size=group_size) for name in among]
        return torch.stack([levels for levels, _ in found]), torch.stack([scale for _, scale in found])
    scales = torch.stack([_scale(flat, bits, name) for name in among])
    return torch.stack([_to_levels(flat, scale, bits).to(torch.int8) for scale in scales]), scales


def choose_ranges(
    weight: Tensor,
    bits: Width,
    moment: Tensor | None,
    *,
    axis: int | None,
    among: Sequence[str] = tuple(RANGES),
    group_size: int | None = None,
) -> tuple[str, float]:
    """The range of each channel that changes the layer's outputs least.

    Rounding moves a row ``w`` of the weight by ``d``, its output by ``d . x``, and in the mean square by ``d A d^T``,
    where ``A = E[x x^T]`` is the second moment of the inputs.

    Args:
        weight: Any shape, floating.
        bits: 2 to 8, or one letter of ``widths.WIDTHS`` but ``0``.
        moment: ``[k, k]``, symmetric, in the order of ``rows(weight, axis)``; ``[g, k, k]`` where the channels are
            ``g`` groups, one after another, with inputs of their own; None for the identity. A row of several times
            ``k`` weights counts as so many rows: one scale in all is chosen over all channels of a linear weight.
        axis: Dimension with one scale an index; None for one scale in all.
        among: Ranges to choose from, of ``plan.RANGES``.
        group_size: As for ``round_weight``: all groups of a channel have the same range.

    Returns:
        The range, for ``round_weight`` and a plan, and the sum of ``d A d^T`` over all rows. Of equal errors, the first
        of ``among`` is taken; where all channels agree, the range is that name.

    Raises:
        NumericsError: The weight or the moment isn't finite.
        ValueError: The moment's shape doesn't fit the weight's.

    Example:
        >>> choose_ranges(torch.tensor([[1.0, -1.0, 0.0], [2.0, -1.0, 0.0]]), 2, None, axis=0)
        ('channels:ms', 0.0)
    """
    flat = rows(weight.detach().to(torch.float32), axis)
    levels, scales = range_candidates(weight, bits, axis=axis, among=among, group_size=group_size)
    if group_size is not None:
        scales = torch.stack([spread_scale(scale, 0, flat.shape, group_size) for scale in scales])
    least, chosen = _output_errors(flat, levels, scales, moment).min(0)
    error = float(least.sum())
    if not math.isfinite(error):
        raise NumericsError(
            "the output error of rounding isn't finite", hint="check the checkpoint and the data for NaN"
        )
    names = [among[index] for index in chosen.tolist()]
    if len(set(names)) == 1:
        return names[0], error
    return BY_CHANNEL + "".join(RANGES[name] for name in names), error


def _letters(search: str, channels: int) -> str:
    letters = RANGES[search] * channels if search in RANGES else search.removeprefix(BY_CHANNEL)
    if letters == search or len(letters) != channels or not set(letters) <= set(RANGES.values()):
        raise ValueError(f"{search!r} is no range of {channels} channels")
    return letters


def _to_levels(flat: Tensor, scale: Tensor, bits: Width) -> Tensor:
    """Nearest levels, in floats."""
    return (flat / scale[:, None]).round_().clamp_(*level_range(bits))


def stored_bits(levels: Tensor, width: Width, dim: int) -> Tensor:
    """Bits that levels take, summed along a dimension, in a code by stages."""
    code = levels_of(width)
    numbers = 2 * levels.abs() - (levels > 0).to(levels)
    total = torch.full_like(levels, code.stages[0]).sum(dim)
    for first, bits in zip(code.firsts()[1:], code.stages[1:], strict=True):
        total += bits * (numbers >= first).sum(dim)
    return total


def mean_stored_bits(levels: Tensor, width: Width, axis: int | None) -> float:
    """Bits of a weight in a file, on average: of a code by stages, those that its levels take."""
    if not is_mixed(width):
        return mean_bits(width)
    flat, total = rows(levels, axis).int(), 0.0
    for letter, places in rows_by_width(width, len(flat)):
        of_one = levels_of(letter)
        part = flat[places]
        total += float(stored_bits(part, letter, 1).sum()) if of_one.stages else of_one.bits * part.numel()
    return total / max(1, flat.numel())


def staged_scale(flat: Tensor, width: Width) -> Tensor:
    """``[c]``: nearly the least scale whose nearest levels take no more than the width's bits, in a code by stages."""
    high = level_range(width)[1]
    limit = levels_of(width).bits * flat.shape[1]
    reach = _peak(flat, high) / high
    least, most = torch.full_like(reach, LEAST_REACH), torch.full_like(reach, 4 * high)
    for _ in range(STAGED_STEPS):
        middle = (least * most).sqrt()
        fits = stored_bits(_to_levels(flat, middle * reach, width), width, 1) <= limit
        least, most = torch.where(fits, least, middle), torch.where(fits, middle, most)
    return most * reach


def _scale(flat: Tensor, bits: Width, name: str) -> Tensor:
    if levels_of(bits).stages:  # what the levels take follows from the scale, so that there is nothing to choose
        return staged_scale(flat, bits)
    # No block of a single row, nor of rows that aren't contiguous: torch may sum those in another order, and the mse
    # search of a plan that was written before must find the same scale to the last bit.
    blocks = min(flat.numel() // BLOCK, len(flat) // 2) if flat.is_contiguous() else 1
    return torch.cat([_block_scale(part, bits, name) for part in flat.tensor_split(max(blocks, 1))])


def _block_scale(flat: Tensor, bits: Width, name: str) -> Tensor:
    if name == "minmax":
        return _minmax_scale(flat, bits)
    if name == "mse":
        return _mse_scale(flat, bits)
    if name in CLIPS:
        return _clip_scale(flat, bits, float(name.removeprefix("clip")))
    return _percentile_scale(flat, bits, float(name.removeprefix("p")))


def _minmax_scale(flat: Tensor, bits: Width) -> Tensor:
    # The levels used are -high..high: nothing is clipped, and zero stays zero.
    return _peak(flat, level_range(bits)[1]) / level_range(bits)[1]


def _peak(flat: Tensor, zero: int) -> Tensor:
    """Largest magnitude of each row; ``zero``, for a scale of 1, where the row counts as zeros."""
    peak = flat.abs().amax(1)
    return torch.where(peak < SMALLEST_PEAK, zero, peak)


def _sign(flat: Tensor) -> Tensor:
    """Of each row's scale: -1 where the positive side reaches further, which gives that side the extra level."""
    return torch.where(flat.amax(1) > -flat.amin(1), -1.0, 1.0)


def _mse_scale(flat: Tensor, bits: Width) -> Tensor:
    low = level_range(bits)[0]
    peak, sign = _peak(flat, -low), _sign(flat)
    best_scale = _minmax_scale(flat, bits)
    best_error = _squared_error(flat, best_scale, bits)
    for ratio in torch.linspace(SMALLEST_RATIO, 1.0, NUM_CANDIDATES):
        scale = sign * ratio * peak / -low
        error = _squared_error(flat, scale, bits)
        better = error < best_error
        best_scale = torch.where(better, scale, best_scale)
        best_error = torch.where(better, error, best_error)
    return best_scale


def _squared_error(flat: Tensor, scale: Tensor, bits: Width) -> Tensor:
    return _to_levels(flat, scale, bits).mul_(scale[:, None]).sub_(flat).square_().sum(1)


def _clip_scale(flat: Tensor, bits: Width, ratio: float) -> Tensor:
    low = level_range(bits)[0]
    scale = _sign(flat) * ratio * _peak(flat, -low) / -low
    return torch.where(flat.abs().amax(1) < SMALLEST_PEAK, 1.0, scale)


def _percentile_scale(flat: Tensor, bits: Width, percent: float) -> Tensor:
    low = level_range(bits)[0]
    peak, magnitude = _peak(flat, -low), flat.abs()
    # The percentile's place among the magnitudes, counted down from the largest. Masked weights don't move it.
    place = (magnitude.count_nonzero(1).double() - 1).clamp_min(0) * (1 - percent / 100)
    reach = int((flat.shape[1] - 1) * (1 - percent / 100)) + 2
    largest = magnitude.topk(min(reach, flat.shape[1]), dim=1).values
    above = place.long()
    below = (above + 1).clamp_max(largest.shape[1] - 1)
    ends = largest.gather(1, torch.stack([above, below], 1))
    bound = torch.lerp(ends[:, 0], ends[:, 1], (place - above).float())
    # A peak that isn't finite must reach the scale, where it is refused.
    usable = (bound >= SMALLEST_PEAK) & torch.isfinite(peak)
    return _sign(flat) * torch.where(usable, bound, peak) / -low


def _output_errors(flat: Tensor, levels: Tensor, scales: Tensor, moment: Tensor | None) -> Tensor:
    """``d A d^T`` for every range and channel, float64 ``[r, c]``; a scale for each channel or for each weight."""
    size = flat.shape[1] if moment is None else moment.shape[-1]
    groups = len(moment) if moment is not None and moment.dim() == 3 else 1
    if flat.shape[1] % size or flat.numel() % (groups * size):
        raise ValueError(f"{groups} moments of {size} inputs don't fit a weight of {list(flat.shape)}")
    # Float32 is enough to compare errors; without the units, the squares of small weights would leave its range.
    unit = float(flat.abs().max()) or 1.0
    power, relative = (1.0, None) if moment is None else _relative(moment.reshape(groups, size, size))
    step = max(1, LARGEST_CHANGE // (groups * size))
    wide = flat.reshape(groups, -1, size)
    errors = []
    for level, scale in zip(levels, scales, strict=True):
        each = scale if scale.dim() == 2 else scale[:, None].expand(-1, flat.shape[1] // size)
        each = each.reshape(*wide.shape[:2], -1)
        parts = zip(*(x.split(step, 1) for x in (level.reshape(wide.shape), each, wide)), strict=True)
        error = torch.cat([_squares((a * b - w) / unit, relative) for a, b, w in parts], 1)
        errors.append(error.reshape(len(flat), -1).sum(1))
    return torch.stack(errors) * (power * unit**2)


def _relative(moment: Tensor) -> tuple[float, Tensor]:
    """The largest element, which lies on the diagonal, and the moment in units of it, float32."""
    power = float(moment.diagonal(dim1=1, dim2=2).max()) or 1.0
    return power, (moment / power).float()


def _squares(change: Tensor, moment: Tensor | None) -> Tensor:
    """``d A d^T`` of each row ``d`` of ``[g, m, k]``, float64 ``[g, m]``."""
    if moment is None:
        return change.square().sum(2, dtype=torch.float64)
    total = torch.zeros(change.shape[:2], dtype=torch.float64, device=change.device)
    for start in range(0, change.shape[2], COLUMNS):
        product = change[..., start : start + COLUMNS] @ moment[:, start : start + COLUMNS, start:]
        product[..., COLUMNS:] *= 2  # stands for the blocks below the diagonal
        total += product.mul_(change[..., start:]).sum(2, dtype=torch.float64)
    return total.clamp_min(0)


def activation_grid(low: float, high: float, bits: int) -> tuple[float, int]:
    """Scale and zero point of an unsigned grid of ``2**bits`` levels over ``[low, high]``, widened to hold zero."""
    low, high = min(low, 0.0), max(high, 0.0)
    top = 2**bits - 1
    scale = (high - low) / top if high - low > SMALLEST_PEAK else 1.0
    return scale, min(max(round(-low / scale), 0), top)
