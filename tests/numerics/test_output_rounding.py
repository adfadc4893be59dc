"""Rounding by outputs, against exhaustive search and rounding to nearest."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compress.errors import NumericsError
from compress.numerics.output_rounding import damped, round_to_outputs
from compress.numerics.rounding import choose_ranges, level_range


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


def test_what_is_not_finite_is_refused() -> None:
    weight, moment = drawn(1, 3, 10)
    with pytest.raises(NumericsError, match="isn't finite"):
        round_to_outputs(weight.fill_(float("nan")), moment, 3)
