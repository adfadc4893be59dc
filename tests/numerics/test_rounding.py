"""Affine grids against brute force, and their properties."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from compress.numerics.rounding import NUM_CANDIDATES, activation_grid, broadcast_scale, level_range, round_weight

BITS = st.integers(2, 8)
SEEDS = st.integers(0, 10_000)
SEARCHES = st.sampled_from(["minmax", "mse"])


def weight_of(seed: int, shape: tuple[int, ...] = (4, 3, 5)) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * 10 ** float(torch.randint(-6, 4, (1,), generator=generator))


def error(weight: Tensor, bits: int, search: str) -> Tensor:
    levels, scale = round_weight(weight, bits, axis=0, search=search)
    change = levels * broadcast_scale(scale, 0, weight.dim()) - weight
    return change.square().flatten(1).sum(1)


@pytest.mark.parametrize("bits", range(2, 9))
def test_minmax_levels_are_the_nearest_of_all(bits: int) -> None:
    weight = weight_of(3)
    levels, scale = round_weight(weight, bits, axis=0, search="minmax")
    low, high = level_range(bits)
    grid = torch.arange(low, high + 1)
    for channel in range(len(weight)):
        assert float(scale[channel]) == pytest.approx(float(weight[channel].abs().max()) / high, rel=1e-6)
        distance = (grid[:, None].double() * scale[channel].double() - weight[channel].flatten().double()).abs()
        nearest = distance.min(0).values
        found = (levels[channel].flatten() * scale[channel].double() - weight[channel].flatten().double()).abs()
        torch.testing.assert_close(found, nearest, rtol=1e-5, atol=1e-7 * float(scale[channel]))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_mse_finds_the_best_of_its_candidates(bits: int) -> None:
    weight = weight_of(5)
    low, high = level_range(bits)
    for channel, row in enumerate(weight.flatten(1)):
        sign = -1.0 if row.max() > -row.min() else 1.0
        scales = [float(row.abs().max()) / high]
        scales += [sign * float(r * row.abs().max()) / -low for r in torch.linspace(0.3, 1.0, NUM_CANDIDATES)]
        best = min(float(((row / s).round().clamp(low, high) * s - row).square().sum()) for s in scales)
        assert float(error(weight, bits, "mse")[channel]) == pytest.approx(best, rel=1e-4)


@given(SEEDS, BITS, SEARCHES, st.sampled_from([0, 1, 2, None]))
def test_levels_lie_in_range_and_zeros_stay_zeros(seed: int, bits: int, search: str, axis: int | None) -> None:
    weight = weight_of(seed)
    weight[torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed)) < 0.4] = 0
    weight[1] = 0
    levels, scale = round_weight(weight, bits, axis=axis, search=search)
    low, high = level_range(bits)
    assert levels.dtype == torch.int8 and levels.shape == weight.shape
    assert low <= int(levels.min()) and int(levels.max()) <= high
    assert not levels[weight == 0].any()
    assert scale.shape == (() if axis is None else (weight.shape[axis],))
    if axis == 0:
        assert float(scale[1].abs()) == 1.0


@given(SEEDS, BITS)
def test_minmax_moves_a_weight_by_half_a_step_at_most(seed: int, bits: int) -> None:
    weight = weight_of(seed)
    levels, scale = round_weight(weight, bits, axis=0, search="minmax")
    wide = broadcast_scale(scale, 0, 3)
    assert bool(((levels * wide - weight).abs() <= wide * (0.5 + 1e-5)).all())


@given(SEEDS, BITS)
def test_mse_is_never_worse_than_minmax(seed: int, bits: int) -> None:
    weight = weight_of(seed)
    assert bool((error(weight, bits, "mse") <= error(weight, bits, "minmax") * (1 + 1e-5)).all())


@given(SEEDS, BITS, SEARCHES, st.integers(-8, 8))
def test_scaling_a_channel_scales_its_scale(seed: int, bits: int, search: str, power: int) -> None:
    weight = weight_of(seed)
    scaled = weight.clone()
    scaled[2] *= 2.0**power
    levels, scale = round_weight(weight, bits, axis=0, search=search)
    scaled_levels, scaled_scale = round_weight(scaled, bits, axis=0, search=search)
    assert torch.equal(levels, scaled_levels)
    assert torch.equal(scaled_scale[2], scale[2] * 2.0**power)
    assert torch.equal(scaled_scale[:2], scale[:2])


@pytest.mark.parametrize("search", ["minmax", "mse"])
def test_a_channel_below_float32s_normal_range_counts_as_zeros(search: str) -> None:
    levels, scale = round_weight(torch.tensor([[1e-45, -1e-39], [1.0, -0.5]]), 4, axis=0, search=search)
    assert levels[0].tolist() == [0, 0]
    assert abs(float(scale[0])) == 1.0
    assert levels[1].any()


@given(st.floats(-1e6, 1e6), st.floats(0, 1e6), st.integers(2, 8))
def test_an_activations_grid_holds_zero_and_covers_its_range(low: float, width: float, bits: int) -> None:
    high = low + width
    scale, zero_point = activation_grid(low, high, bits)
    top = 2**bits - 1
    assert scale > 0
    assert 0 <= zero_point <= top
    slack = scale * 0.5 * (1 + 1e-6) + 1e-30
    assert -zero_point * scale <= min(low, 0) + slack
    assert (top - zero_point) * scale >= max(high, 0) - slack
