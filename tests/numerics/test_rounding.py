"""Affine grids against brute force, and their properties."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compress.errors import NumericsError
from compress.formats.planes import numbers_of, pack
from compress.numerics import rounding
from compress.numerics.rounding import (
    LEAST_REACH,
    NUM_CANDIDATES,
    activation_grid,
    broadcast_scale,
    choose_ranges,
    level_range,
    mean_stored_bits,
    range_candidates,
    round_weight,
    rows,
    spread_scale,
    staged_scale,
    stored_bits,
)
from compress.plan import BY_CHANNEL, RANGES
from compress.widths import levels_of, of_letter

BITS = st.integers(2, 8)
SEEDS = st.integers(0, 10_000)
SEARCHES = st.sampled_from(list(RANGES))
AXES = st.sampled_from([0, 1, 2, None])


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


@given(SEEDS, BITS, SEARCHES, AXES)
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


@pytest.mark.parametrize("search", RANGES)
def test_a_channel_below_float32s_normal_range_counts_as_zeros(search: str) -> None:
    levels, scale = round_weight(torch.tensor([[1e-45, -1e-39], [1.0, -0.5]]), 4, axis=0, search=search)
    assert levels[0].tolist() == [0, 0]
    assert abs(float(scale[0])) == 1.0
    assert levels[1].any()


@given(SEEDS, BITS, st.sampled_from(["p99.9", "p99.5", "p99", "p98"]), st.sampled_from([1, 2, 7, 400]))
def test_a_percentile_is_that_of_the_magnitudes_without_zeros(seed: int, bits: int, search: str, size: int) -> None:
    weight = weight_of(seed, (3, size))
    weight[1, : size // 2] = 0
    scale = round_weight(weight, bits, axis=0, search=search)[1]
    for channel, row in enumerate(weight.double()):
        covered = torch.quantile(row[row != 0].abs(), float(search[1:]) / 100)
        sign = -1.0 if row.max() > -row.min() else 1.0
        assert float(scale[channel]) == pytest.approx(sign * float(covered) / -level_range(bits)[0], rel=1e-5)


@given(SEEDS, BITS, SEARCHES, AXES)
def test_the_same_letter_for_all_channels_is_the_plain_range_bit_for_bit(
    seed: int, bits: int, search: str, axis: int | None
) -> None:
    weight = weight_of(seed)
    letters = RANGES[search] * (1 if axis is None else weight.shape[axis])
    plain = round_weight(weight, bits, axis=axis, search=search)
    spelled = round_weight(weight, bits, axis=axis, search=BY_CHANNEL + letters)
    assert torch.equal(spelled[0], plain[0]) and torch.equal(spelled[1], plain[1])


@given(SEEDS, BITS, st.lists(SEARCHES, min_size=4, max_size=4))
def test_every_channel_is_rounded_in_its_own_range(seed: int, bits: int, searches: list[str]) -> None:
    weight = weight_of(seed)
    levels, scale = round_weight(weight, bits, axis=0, search=BY_CHANNEL + "".join(RANGES[s] for s in searches))
    for channel, search in enumerate(searches):
        alone = round_weight(weight, bits, axis=0, search=search)
        assert torch.equal(levels[channel], alone[0][channel]) and torch.equal(scale[channel], alone[1][channel])


@pytest.mark.parametrize("search", ["", "wide", "mmmm", "channels:", "channels:mmm", "channels:mmmmm", "channels:mmmz"])
def test_a_range_that_does_not_fit_is_refused(search: str) -> None:
    with pytest.raises(ValueError, match="is no range of 4 channels"):
        round_weight(weight_of(0), 4, axis=0, search=search)


@pytest.mark.parametrize("search", RANGES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_reaches_the_scale(search: str, bad: float) -> None:
    weight = weight_of(1, (2, 300))
    weight[1, 7] = bad
    scale = round_weight(weight, 4, axis=0, search=search)[1]
    assert torch.isfinite(scale).tolist() == [True, False]


def moment_of(seed: int, size: int, groups: int = 1) -> Tensor:
    """Of inputs with a mean, correlated and on very different scales."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(groups, size, size, generator=generator, dtype=torch.float64)
    x = (torch.randn(groups, 2 * size, size, generator=generator, dtype=torch.float64) + 0.5) @ mix
    return x.mT @ x / (2 * size)


def output_errors(weight: Tensor, bits: int, search: str, moment: Tensor) -> Tensor:
    """By the definition: float64, one row at a time."""
    levels, scale = round_weight(weight, bits, axis=0, search=search)
    change = (levels * broadcast_scale(scale, 0, weight.dim()) - weight).double().flatten(1)
    each = len(change) // len(moment)
    return torch.stack([row @ moment[channel // each] @ row for channel, row in enumerate(change)])


@given(SEEDS, BITS, st.sampled_from([1, 2, 4]))
def test_each_channel_gets_the_range_with_the_least_output_error(seed: int, bits: int, groups: int) -> None:
    weight, moment = weight_of(seed), moment_of(seed, 15, groups)
    found, total = choose_ranges(weight, bits, moment if groups > 1 else moment[0], axis=0)
    candidates = torch.stack([output_errors(weight, bits, search, moment) for search in RANGES])
    own = output_errors(weight, bits, found, moment)
    torch.testing.assert_close(own, candidates.min(0).values, rtol=1e-3, atol=0.0)
    assert total == pytest.approx(float(own.sum()), rel=1e-4)
    assert all(total <= float(errors.sum()) * (1 + 1e-4) for errors in candidates)


@given(SEEDS, BITS)
def test_without_a_moment_the_weights_error_counts(seed: int, bits: int) -> None:
    weight = weight_of(seed)
    found, total = choose_ranges(weight, bits, None, axis=0)
    assert total == pytest.approx(float(error(weight, bits, found).sum()), rel=1e-4)
    assert total == pytest.approx(choose_ranges(weight, bits, torch.eye(15).double(), axis=0)[1], rel=1e-4)


def test_one_scale_is_chosen_over_all_channels() -> None:
    weight, moment = weight_of(4, (6, 20)), moment_of(4, 20)
    found, total = choose_ranges(weight, 3, moment[0], axis=None)
    sums = {}
    for search in RANGES:
        levels, scale = round_weight(weight, 3, axis=None, search=search)
        change = (levels * scale - weight).double()
        sums[search] = float((change @ moment[0] * change).sum())
    assert found == min(sums, key=sums.__getitem__)
    assert total == pytest.approx(sums[found], rel=1e-5)


def test_equal_errors_go_to_the_first_range() -> None:
    weight = weight_of(2)
    weight[1] = 0
    assert choose_ranges(weight, 4, torch.zeros(15, 15).double(), axis=0) == ("minmax", 0.0)
    assert choose_ranges(torch.zeros(3, 5), 2, None, axis=0) == ("minmax", 0.0)
    found, _ = choose_ranges(weight, 4, moment_of(2, 15)[0], axis=0)
    assert found[len(BY_CHANNEL) + 1] == RANGES["minmax"]


@pytest.mark.parametrize("shape", [(1, 1), (5, 1, 1, 1), (1, 1, 3, 3)])
@pytest.mark.parametrize("axis", [0, None])
def test_small_weights_are_chosen_for_too(shape: tuple[int, ...], axis: int | None) -> None:
    weight = weight_of(6, shape)
    found, total = choose_ranges(weight, 4, None, axis=axis)
    levels, scale = round_weight(weight, 4, axis=axis, search=found)
    change = levels * broadcast_scale(scale, axis, len(shape)) - weight
    assert total == pytest.approx(float(change.double().square().sum()), rel=1e-3)
    if axis == 0 and weight[0].numel() == 1:
        assert float(change.abs().max()) <= 1e-6 * float(weight.abs().max())


def test_candidates_are_the_weight_in_every_range() -> None:
    weight = weight_of(7)
    levels, scales = range_candidates(weight, 3, axis=1)
    for index, search in enumerate(RANGES):
        expected = round_weight(weight, 3, axis=1, search=search)
        assert torch.equal(levels[index], rows(expected[0], 1)) and torch.equal(scales[index], expected[1])


@settings(max_examples=40)
@given(
    rows=st.integers(1, 4),
    k=st.integers(1, 80),
    bits=st.integers(2, 8),
    size=st.sampled_from([1, 32, 64]),
    search=st.sampled_from(["minmax", "mse", "p99", "clip0.60", "letters"]),
    seed=st.integers(0, 99),
)
def test_a_group_is_rounded_like_a_channel_with_a_scale_of_16_bits(
    rows: int, k: int, bits: int, size: int, search: str, seed: int
) -> None:
    weight = torch.randn(rows, k, generator=torch.Generator().manual_seed(seed))
    names = [("minmax", "mse", "p98")[row % 3] if search == "letters" else search for row in range(rows)]
    ranges = BY_CHANNEL + "".join(RANGES[name] for name in names)
    levels, scale = round_weight(weight, bits, axis=0, search=ranges, group_size=size)
    assert list(scale.shape) == [rows, -(-k // size)]
    low, high = level_range(bits)
    for row, name in enumerate(names):
        for group, part in enumerate(weight[row].split(size)):
            own = round_weight(part[None], bits, axis=0, search=name)[1].bfloat16().float()
            assert float(scale[row, group]) == float(own)
            nearest = (part / own).round().clamp(low, high)
            assert torch.equal(levels[row].split(size)[group], nearest.to(torch.int8))


@given(seed=st.integers(0, 30), bits=st.integers(2, 4), size=st.sampled_from([3, 5, 8]))
def test_the_groups_of_a_channel_get_the_range_with_the_least_output_error(seed: int, bits: int, size: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight, inputs = torch.randn(3, 13, generator=generator), torch.randn(60, 13, generator=generator)
    moment = (inputs.T @ inputs / 60).double()
    among = ("minmax", "mse", "clip0.60")
    chosen, error = choose_ranges(weight, bits, moment, axis=0, among=among, group_size=size)
    errors = []
    for name in among:
        levels, scale = round_weight(weight, bits, axis=0, search=name, group_size=size)
        change = levels * spread_scale(scale, 0, weight.shape, size) - weight
        errors.append(((change.double() @ moment) * change.double()).sum(1))
    least = torch.stack(errors).amin(0)
    assert error == pytest.approx(float(least.sum()), rel=1e-4)
    levels, scale = round_weight(weight, bits, axis=0, search=chosen, group_size=size)
    change = (levels * spread_scale(scale, 0, weight.shape, size) - weight).double()
    assert float(((change @ moment) * change).sum()) == pytest.approx(error, rel=1e-4)


@pytest.mark.parametrize("axis", [0, 1, None])
def test_blocks_change_no_bit_of_a_weight_and_no_choice(axis: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = weight_of(8, (60, 90))
    moment = moment_of(8, 60 if axis == 1 else 90)[0]
    whole = {search: round_weight(weight, 3, axis=axis, search=search) for search in RANGES}
    choice = choose_ranges(weight, 3, moment, axis=axis)
    monkeypatch.setattr(rounding, "BLOCK", 128)
    monkeypatch.setattr(rounding, "LARGEST_CHANGE", 700)
    monkeypatch.setattr(rounding, "COLUMNS", 7)
    for search, (levels, scale) in whole.items():
        parts = round_weight(weight, 3, axis=axis, search=search)
        assert torch.equal(parts[0], levels) and torch.equal(parts[1], scale)
    found, total = choose_ranges(weight, 3, moment, axis=axis)
    assert found == choice[0] and total == pytest.approx(choice[1], rel=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_error_that_is_not_finite_is_refused(bad: float) -> None:
    weight, moment = weight_of(9), moment_of(9, 15)[0]
    for place in (weight.flatten(1)[1], moment[3]):
        before, place[3] = float(place[3]), bad
        with pytest.raises(NumericsError, match="the output error of rounding isn't finite"):
            choose_ranges(weight, 4, moment, axis=0)
        place[3] = before


@pytest.mark.parametrize("shape", [(14, 14), (3, 15, 15), (30, 30)])
def test_a_moment_that_does_not_fit_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="don't fit a weight of"):
        choose_ranges(weight_of(0), 4, torch.zeros(shape), axis=0)


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


@given(SEEDS, st.integers(1, 40), st.integers(0, 1))
def test_the_bits_of_a_weight_are_those_of_its_packed_levels(seed: int, k: int, axis: int) -> None:
    letters = "0abcdefghijklm2t"
    levels = torch.zeros(len(letters), 8 * k, dtype=torch.int8)
    generator, size = torch.Generator().manual_seed(seed), 0
    for row, letter in zip(levels, letters, strict=True):
        low, high = level_range(letter)
        row.copy_((torch.randn(8 * k, generator=generator) * high / 3).round().clamp(low, high))
        size += 0 if letter == "0" else pack(numbers_of(row.numpy().astype(np.int16), letter), of_letter(letter)).size
    found = (
        mean_stored_bits(levels if axis == 0 else levels.T.contiguous(), BY_CHANNEL + letters, axis) * levels.numel()
    )
    assert found <= 8 * size <= found + 8 * 3 * len(letters)
    assert mean_stored_bits(levels, 4, 0) == 4


@given(SEEDS, st.sampled_from("abcdefghijklm"), st.sampled_from([1.0, 4.0]))
def test_the_scale_of_a_code_by_stages_is_the_least_that_keeps_to_its_bits(seed: int, width: str, tail: float) -> None:
    flat = weight_of(seed, (4, 60))
    flat = flat.sign() * flat.abs() ** tail
    scale = staged_scale(flat, width)
    low, high = level_range(width)
    limit = levels_of(width).bits * 60
    levels = (flat / scale[:, None]).round().clamp(low, high)
    assert bool((stored_bits(levels, width, 1) <= limit).all())
    finer = (flat / (scale[:, None] * 0.98)).round().clamp(low, high)
    reaches = scale > 1.03 * LEAST_REACH * flat.abs().amax(1) / high
    assert bool(((stored_bits(finer, width, 1) > limit) | ~reaches).all())
    levels, found = round_weight(flat, BY_CHANNEL + width * 4, axis=0, search="minmax")
    assert torch.equal(found, scale)
