"""Rounding by outputs, against exhaustive search and rounding to nearest."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compress.errors import NumericsError
from compress.formats.planes import numbers_of, pack
from compress.numerics import output_rounding
from compress.numerics.output_rounding import damped, round_to_outputs
from compress.numerics.rounding import choose_ranges, level_range, round_weight, spread_scale, stored_bits
from compress.widths import levels_of


def drawn(groups: int, rows: int, k: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight ``[g, c, k]`` and the moment ``[g, k, k]`` of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(groups, 4 * k + 8, k, generator=generator) @ torch.randn(groups, k, k, generator=generator)
    return torch.randn(groups, rows, k, generator=generator), mixed.transpose(1, 2) @ mixed / (4 * k + 8)


def errors(weight: Tensor, levels: Tensor, scales: Tensor, moment: Tensor) -> Tensor:
    """``(w - s q) H (w - s q)^T`` of each row, float64 ``[g, c]``."""
    change = weight.double() - scales[..., None].double() * levels.double()
    return ((change @ moment.double()) * change).sum(-1)


def test_few_levels_come_near_to_the_best_of_all() -> None:
    weight, moment = drawn(1, 40, 5)
    levels, scales = round_to_outputs(weight, moment, 2)
    found = errors(weight, levels, scales, damped(moment.double(), 0.01))
    every = torch.tensor(list(itertools.product(range(-2, 2), repeat=5)), dtype=torch.float64)
    best = torch.stack(
        [errors(weight, q.expand(1, 40, 5), scales, damped(moment.double(), 0.01))[0] for q in every]
    ).amin(0)
    assert bool((found[0] >= best - 1e-9).all())
    assert float(found.sum()) <= 1.1 * float(best.sum())


@settings(max_examples=40, deadline=None)
@given(
    groups=st.integers(1, 3),
    rows=st.integers(1, 6),
    k=st.integers(2, 70),
    bits=st.integers(2, 8),
    seed=st.integers(0, 99),
)
def test_levels_are_the_grids_and_the_outputs_nearer_than_by_the_nearest(
    groups: int, rows: int, k: int, bits: int, seed: int
) -> None:
    weight, moment = drawn(groups, rows, k, seed=seed)
    levels, scales = round_to_outputs(weight, moment, bits)
    low, high = level_range(bits)
    assert levels.dtype == torch.int8
    assert low <= int(levels.min()) <= int(levels.max()) <= high
    nearest = (weight / scales[..., None]).round().clamp(low, high)
    h = damped(moment.double(), 0.01)
    assert float(errors(weight, levels, scales, h).sum()) <= float(errors(weight, nearest, scales, h).sum()) * (
        1 + 1e-4
    )


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 6),
    k=st.integers(1, 70),
    width=st.sampled_from("abcdefghijklm"),
    tail=st.sampled_from([1.0, 3.0]),
    pruned=st.booleans(),
    seed=st.integers(0, 99),
)
def test_rows_in_a_code_by_stages_keep_to_their_bits(
    rows: int, k: int, width: str, tail: float, pruned: bool, seed: int
) -> None:
    weight, moment = drawn(1, rows, k, seed=seed)
    weight = weight.sign() * weight.abs() ** tail
    zeros = torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed)) < 0.5 if pruned else None
    weight = weight if zeros is None else weight.masked_fill(zeros, 0)
    for is_quick in (False, True):
        levels, scales = round_to_outputs(weight, moment, width, zeros=zeros, is_quick=is_quick)
        sizes = [len(pack(numbers_of(row.numpy().astype(np.int16), width), width)) for row in levels[0]]
        assert max(sizes) <= math.ceil(levels_of(width).bits * k / 8) + 2 * len(levels_of(width).stages)
        assert bool((stored_bits(levels[0], width, 1) <= levels_of(width).bits * k).all())
        assert level_range(width)[0] <= int(levels.min()) <= int(levels.max()) <= level_range(width)[1]
        assert bool((scales > 0).all())
        assert zeros is None or not levels[zeros].any()


def test_large_weights_in_a_code_by_stages_are_tried_at_fewer_scales(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, moment = drawn(1, 6, 72)
    monkeypatch.setattr(output_rounding, "MOST_WEIGHTS", 500)
    levels, scales = round_to_outputs(weight, moment, "d")
    assert bool((stored_bits(levels[0], "d", 1) <= levels_of("d").bits * 72).all())
    nearest = round_weight(weight[0], "channels:dddddd", axis=0, search="mse")
    assert float(errors(weight, levels, scales, moment).sum()) < 0.8 * float(
        errors(weight, nearest[0][None], nearest[1][None], moment).sum()
    )


@pytest.mark.parametrize(("width", "other"), [("d", "s"), ("e", 3), ("g", 4), ("i", 5)])
def test_a_code_by_stages_moves_outputs_less_for_its_bits(width: str, other: str | int) -> None:
    weight, moment = drawn(1, 32, 288)
    by_stages, of_equal_length = (
        float(errors(weight, *round_to_outputs(weight, moment, bits), moment).sum()) * 4 ** levels_of(bits).bits
        for bits in (width, other)
    )
    assert by_stages < 0.9 * of_equal_length


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_it_moves_outputs_less_than_the_best_range(bits: int) -> None:
    weight, moment = drawn(1, 32, 72)
    _, nearest = choose_ranges(weight[0], bits, moment[0].double(), axis=0)
    found = errors(weight, *round_to_outputs(weight, moment, bits), moment)
    assert float(found.sum()) < 0.75 * nearest


def test_groups_are_alone() -> None:
    weight, moment = drawn(3, 4, 20)
    levels, scales = round_to_outputs(weight, moment, 3)
    for g in range(3):
        alone, scale = round_to_outputs(weight[g : g + 1], moment[g : g + 1], 3)
        assert torch.equal(alone[0], levels[g])
        torch.testing.assert_close(scale[0], scales[g])


def test_zeros_stay_and_one_scale_is_shared() -> None:
    weight, moment = drawn(1, 6, 30)
    zeros = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    levels, _ = round_to_outputs(weight.masked_fill(zeros, 0), moment, 4, zeros=zeros)
    assert not bool(levels[zeros].any())
    assert bool(levels[~zeros].any())
    _, shared = round_to_outputs(weight, moment, 4, is_shared=True)
    assert len(shared.unique()) == 1


def test_dead_inputs_and_rows_of_zeros_are_rounded() -> None:
    weight, moment = drawn(1, 3, 10)
    weight[0, 1] = 0
    moment[:, 4:] = moment[:, :, 4:] = 0
    levels, scales = round_to_outputs(weight, moment, 3)
    assert not bool(levels[0, 1].any())
    assert bool(torch.isfinite(scales).all())
    assert bool((scales != 0).all())
    levels, _ = round_to_outputs(weight, torch.zeros_like(moment), 8)
    assert int(levels.abs().max()) > 100


def group_errors(weight: Tensor, levels: Tensor, scales: Tensor, moment: Tensor, size: int) -> Tensor:
    """As ``errors``, with scales ``[1, c, m]``."""
    each = spread_scale(scales[0], 0, weight[0].shape, size)[None]
    return errors(weight, levels * each, torch.ones(weight.shape[:2]), moment)


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 5),
    k=st.integers(2, 70),
    bits=st.integers(2, 8),
    size=st.sampled_from([1, 3, 32, 64]),
    seed=st.integers(0, 99),
)
def test_groups_have_scales_of_16_bits_and_outputs_nearer_than_by_the_nearest(
    rows: int, k: int, bits: int, size: int, seed: int
) -> None:
    weight, moment = drawn(1, rows, k, seed=seed)
    levels, scales = round_to_outputs(weight, moment, bits, group_size=size)
    low, high = level_range(bits)
    assert low <= int(levels.min()) <= int(levels.max()) <= high
    assert list(scales.shape) == [1, rows, -(-k // size)] and torch.equal(scales, scales.bfloat16().float())
    nearest = (weight / spread_scale(scales[0], 0, weight[0].shape, size)).round().clamp(low, high)
    h = damped(moment.double(), 0.01)
    found, other = (float(group_errors(weight, x, scales, h, size).sum()) for x in (levels, nearest))
    assert found <= other * (1 + 1e-4) + 1e-9


def test_few_levels_of_groups_come_near_to_the_best_of_all() -> None:
    weight, moment = drawn(1, 20, 6)
    levels, scales = round_to_outputs(weight, moment, 2, group_size=3)
    h = damped(moment.double(), 0.01)
    found = group_errors(weight, levels, scales, h, 3)[0]
    every = torch.tensor(list(itertools.product(range(-2, 2), repeat=6)), dtype=torch.float64)
    best = torch.stack([group_errors(weight, q.expand(1, 20, 6), scales, h, 3)[0] for q in every]).amin(0)
    assert bool((found >= best - 1e-9).all())
    assert float(found.sum()) <= 1.1 * float(best.sum())


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_groups_move_outputs_less_than_rows_and_than_the_nearest_of_groups(bits: int) -> None:
    weight, moment = drawn(1, 32, 96)
    weight *= torch.tensor([0.1, 1.0, 0.3]).repeat_interleave(32)
    rows = errors(weight, *round_to_outputs(weight, moment, bits), moment)
    _, nearest = choose_ranges(weight[0], bits, moment[0].double(), axis=0, group_size=32)
    found = group_errors(weight, *round_to_outputs(weight, moment, bits, group_size=32), moment, 32)
    assert float(found.sum()) < 0.8 * min(float(rows.sum()), nearest)


def test_no_scale_of_a_group_is_better_for_its_levels() -> None:
    weight, moment = drawn(1, 8, 64)
    levels, scales = round_to_outputs(weight, moment, 3, group_size=32)
    h = damped(moment.double(), 0.01)
    least = group_errors(weight, levels, scales, h, 32)
    for part in range(2):
        for factor in (0.98, 1.02):
            other = scales.clone()
            other[..., part] *= factor
            assert bool((group_errors(weight, levels, other, h, 32) > 0.999 * least).all())


def test_groups_of_zeros_are_rounded_and_pruned_weights_stay() -> None:
    weight, moment = drawn(1, 4, 70)
    weight[0, 1] = weight[0, :, 32:64] = 0
    zeros = weight == 0
    levels, scales = round_to_outputs(weight, moment, 3, zeros=zeros, group_size=32)
    assert not bool(levels[zeros].any()) and bool(levels[0, 0].any())
    assert bool(torch.isfinite(scales).all()) and bool((scales != 0).all())


def test_what_is_not_finite_is_refused() -> None:
    weight, moment = drawn(1, 3, 10)
    with pytest.raises(NumericsError, match="isn't finite"):
        round_to_outputs(weight.fill_(float("nan")), moment, 3)
