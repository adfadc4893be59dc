"""Affine grids: the scale of a weight channel or an activation, and rounding to it.

Weights are symmetric (zero point 0) with one scale a channel: ``w ~ scale * level``. Eight bits use levels -127..127,
as runtimes multiply them fastest; fewer bits use the whole ``-2**(b-1) .. 2**(b-1) - 1``, and the sign of the scale
says which side of zero has the extra level. Source: Jacob et al. 2018 (arXiv:1712.05877); Nagel et al. 2021
(arXiv:2106.08295), 2.2.
"""

from __future__ import annotations

import torch
from torch import Tensor

NUM_CANDIDATES = 40  # clipping ratios tried by the mse search
SMALLEST_RATIO = 0.3
SMALLEST_PEAK = 1e-30  # what is smaller counts as zeros: its scale would be no normal float32


def level_range(bits: int) -> tuple[int, int]:
    """Lowest and highest level of a symmetric weight."""
    half = 2 ** (bits - 1)
    return (-(half - 1), half - 1) if bits == 8 else (-half, half - 1)


def rows(weight: Tensor, axis: int | None) -> Tensor:
    """``[c, n]``: a row for each index of ``axis``; one row where ``axis`` is None."""
    return weight.reshape(1, -1) if axis is None else weight.movedim(axis, 0).flatten(1)


def broadcast_scale(scale: Tensor, axis: int | None, dims: int) -> Tensor:
    """``scale`` (``[c]``, or ``[]`` where ``axis`` is None) shaped to multiply a weight of ``dims`` dimensions."""
    if axis is None:
        return scale
    return scale.reshape([-1 if dim == axis else 1 for dim in range(dims)])


def round_weight(weight: Tensor, bits: int, *, axis: int | None, search: str) -> tuple[Tensor, Tensor]:
    """Round a weight to its symmetric grid.

    Args:
        weight: Any shape, floating.
        bits: 2 to 8.
        axis: Dimension with one scale an index; None for one scale in all.
        search: ``minmax`` covers the largest magnitude; ``mse`` clips to the ratio with the least squared error.

    Returns:
        Levels (int8, the weight's shape) and scale (float32, ``[c]`` or ``[]``). A channel of zeros has scale 1.
    """
    flat = rows(weight.detach().to(torch.float32), axis)
    low, high = level_range(bits)
    scale = _minmax_scale(flat, bits) if search == "minmax" else _mse_scale(flat, bits)
    levels = _to_levels(flat, scale, low, high).to(torch.int8)
    if axis is None:
        return levels.reshape(weight.shape), scale.reshape(())
    moved = weight.movedim(axis, 0).shape
    return levels.reshape(moved).movedim(0, axis).contiguous(), scale


def _to_levels(flat: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
    return torch.clamp(torch.round(flat / scale[:, None]), low, high)


def _minmax_scale(flat: Tensor, bits: int) -> Tensor:
    # The levels used are -high..high: nothing is clipped, and zero stays zero.
    return _peak(flat, level_range(bits)[1]) / level_range(bits)[1]


def _peak(flat: Tensor, zero: int) -> Tensor:
    """Largest magnitude of each row; ``zero``, for a scale of 1, where the row counts as zeros."""
    peak = flat.abs().amax(1)
    return torch.where(peak < SMALLEST_PEAK, zero, peak)


def _mse_scale(flat: Tensor, bits: int) -> Tensor:
    low, high = level_range(bits)
    peak = _peak(flat, -low)
    # The side that reaches further gets the extra negative level, through a negative scale where it is the positive
    # one.
    sign = torch.where(flat.amax(1) > -flat.amin(1), -1.0, 1.0)
    best_scale = _minmax_scale(flat, bits)
    best_error = (_to_levels(flat, best_scale, low, high) * best_scale[:, None] - flat).square().sum(1)
    for ratio in torch.linspace(SMALLEST_RATIO, 1.0, NUM_CANDIDATES):
        scale = sign * ratio * peak / -low
        error = (_to_levels(flat, scale, low, high) * scale[:, None] - flat).square().sum(1)
        better = error < best_error
        best_scale = torch.where(better, scale, best_scale)
        best_error = torch.where(better, error, best_error)
    return best_scale


def activation_grid(low: float, high: float, bits: int) -> tuple[float, int]:
    """Scale and zero point of an unsigned grid of ``2**bits`` levels over ``[low, high]``, widened to hold zero."""
    low, high = min(low, 0.0), max(high, 0.0)
    top = 2**bits - 1
    scale = (high - low) / top if high - low > SMALLEST_PEAK else 1.0
    return scale, min(max(round(-low / scale), 0), top)
