"""Elimination against optimal brain surgery by definition, and survivors against least squares, in float64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compress.numerics import elimination
from compress.numerics.elimination import eliminate, fit_survivors
from compress.numerics.units import Units
from compress.pattern import Pattern


def drawn(r: int, k: int, *, seed: int = 0, own: bool = False) -> tuple[Tensor, Tensor]:
    """Rows ``[r, k]`` and the moment of correlated inputs, ``[k, k]``, or one for each row."""
    generator = torch.Generator().manual_seed(seed)
    shape = (r, 3 * k, k) if own else (3 * k, k)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    x = x @ torch.randn(k, k, generator=generator, dtype=torch.float64)
    return torch.randn(r, k, generator=generator, dtype=torch.float64), x.mT @ x / (3 * k)


def nearest(w: Tensor, h: Tensor, kept: list[int]) -> tuple[Tensor, float]:
    """The best row that is zero elsewhere, and its error: by the normal equations."""
    v = torch.zeros_like(w)
    if kept:
        v[kept] = torch.linalg.solve(h[kept][:, kept], (h @ w)[kept])
    return v, float((w - v) @ h @ (w - v))


@pytest.mark.parametrize("own", [False, True])
def test_each_removal_is_the_cheapest_by_definition(own: bool) -> None:
    weight, moment = drawn(4, 7, own=own)  # of so few, they go one by one
    found = eliminate(weight, moment, 7)
    for r, w in enumerate(weight):
        h, left, costs, before = moment[r] if own else moment, list(range(7)), [], 0.0
        for number in range(7):
            errors = {i: nearest(w, h, [j for j in left if j != i])[1] for i in left}
            goes = min(errors, key=errors.__getitem__)
            assert int(found.place[r, goes]) == number
            costs.append(errors[goes] - before)
            before = errors[goes]
            left.remove(goes)
        assert found.costs[r].tolist() == pytest.approx(torch.tensor(costs).cummax(0).values.tolist(), rel=1e-6)


BLOCKS = [
    ((4, 6), 1, Pattern(1, 2)),
    ((4, 6), 1, Pattern(2, 1)),
    ((5, 3, 2), 1, Pattern(2, 2)),  # rows and columns that are no multiple
    ((6, 3, 2), 2, Pattern(2, 1)),  # the band in the middle has rows of both groups
    ((6, 3, 2), 2, Pattern(4, 2)),
    ((4, 2, 2), 4, Pattern(16, 4)),  # larger than the weight
]


@pytest.mark.parametrize(("shape", "groups", "pattern"), BLOCKS)
def test_each_block_is_the_cheapest_for_its_weights_by_definition(
    shape: tuple[int, ...], groups: int, pattern: Pattern
) -> None:
    """Of all blocks of a band, the one without which its rows' least squares are nearest, as all rows lose it."""
    units, r, k = Units(shape, 0, 1, pattern), shape[0], math.prod(shape[1:])
    weight = drawn(r, k)[0]
    moments = torch.stack([drawn(1, k, seed=seed)[1] for seed in range(groups)])
    bands, n = units.sizes().shape
    found = eliminate(weight, moments, n, units=units)
    numbers = units.blocks(torch.arange(r * k), -1).flatten(2)
    for band in range(bands):
        kept, left, costs, before = torch.ones(r * k, dtype=torch.bool), set(range(n)), [], 0.0
        for number in range(n):
            errors = {}
            for unit in left:
                without = kept.clone()
                without[numbers[band, unit][numbers[band, unit] >= 0]] = False
                error = sum(
                    nearest(w, moments[row * groups // r], mask.nonzero()[:, 0].tolist())[1]
                    for row, (w, mask) in enumerate(zip(weight, without.reshape(r, k), strict=True))
                )
                errors[unit] = (error - before, int(units.sizes()[band, unit]), without)
            goes = min(left, key=lambda unit: errors[unit][0] / errors[unit][1])
            assert int(found.place[band, goes]) == number
            cost, size, kept = errors[goes]
            assert int(found.sizes[band, number]) == size
            costs.append(cost / size)
            before += cost
            left.remove(goes)
        assert found.costs[band].tolist() == pytest.approx(torch.tensor(costs).cummax(0).values.tolist(), rel=1e-5)


@pytest.mark.parametrize(("shape", "groups", "pattern"), BLOCKS)
def test_blocks_that_would_take_too_long_are_ranked_by_what_each_costs_alone(
    shape: tuple[int, ...], groups: int, pattern: Pattern, monkeypatch: pytest.MonkeyPatch
) -> None:
    units, r, k = Units(shape, 0, 1, pattern), shape[0], math.prod(shape[1:])
    weight, (bands, n) = drawn(r, k)[0], units.sizes().shape
    moments = torch.stack([drawn(1, k, seed=seed)[1] for seed in range(groups)])
    monkeypatch.setattr(elimination, "MOST_PRODUCTS", 0)
    found = eliminate(weight, moments, n, units=units)
    alone = torch.zeros(bands, n, dtype=torch.float64)
    for band, unit in itertools.product(range(bands), range(n)):
        gone = torch.zeros(bands, n, dtype=torch.bool)
        gone[band, unit] = True
        kept = ~units.spread(gone).reshape(r, k)
        alone[band, unit] = sum(
            nearest(w, moments[row * groups // r], mask.nonzero()[:, 0].tolist())[1]
            for row, (w, mask) in enumerate(zip(weight, kept, strict=True))
        )
    alone /= units.sizes()
    assert torch.equal(found.place.argsort(1), alone.argsort(1))
    assert torch.allclose(found.costs, alone.sort(1).values, rtol=1e-5)


def test_blocks_in_chunks_are_those_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    units = Units((12, 5, 4), 0, 1, Pattern(4, 2))
    weight = drawn(12, 20)[0]
    moments = torch.stack([drawn(1, 20, seed=seed)[1] for seed in range(2)])
    whole = eliminate(weight, moments, 12, units=units)
    monkeypatch.setattr(elimination, "ELEMENTS", 1)
    parts = eliminate(weight, moments, 12, units=units)
    assert torch.equal(whole.place, parts.place)


def test_many_groups_hold_few_inverses_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as rows would be 2**20 numbers; a piece of them is at work at a time."""
    monkeypatch.setattr(elimination, "ELEMENTS", 2**14)
    real, largest = torch.linalg.cholesky, []

    def watched(values: Tensor) -> Tensor:
        largest.append(values.numel())
        return real(values)

    monkeypatch.setattr(torch.linalg, "cholesky", watched)
    weight = drawn(1024, 32)[0]
    moments = torch.stack([drawn(1, 32, seed=seed)[1] for seed in range(4)])
    kept = eliminate(weight, moments, 16).kept(torch.full((1024,), 16))
    fitted = fit_survivors(weight, moments, kept)
    assert max(largest) <= 2**14
    for row in (0, 255, 256, 1023):
        assert torch.allclose(
            fitted[row], nearest(weight[row], moments[row // 256], kept[row].nonzero()[:, 0].tolist())[0]
        )


@settings(max_examples=30, deadline=None)
@given(r=st.integers(1, 5), k=st.integers(1, 60), share=st.floats(0, 1), seed=st.integers(0, 99))
def test_each_row_loses_as_many_in_an_order_of_growing_costs(r: int, k: int, share: float, seed: int) -> None:
    weight, moment = drawn(r, k, seed=seed)
    steps = round(share * k)
    found = eliminate(weight, moment, steps)
    kept = found.kept(torch.full((r,), steps))
    assert kept.sum(1).tolist() == [k - steps] * r
    assert all(sorted(row) == [*range(steps), *[steps] * (k - steps)] for row in found.place.tolist())
    assert bool((found.costs.diff(dim=1) >= 0).all())


@pytest.mark.parametrize("k", [20, 60])
@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_several_at_once_are_nearer_than_the_smallest(k: int, share: float) -> None:
    """Of 20 rows together: of a single one, steps of several may be worse."""
    weight, moment = drawn(20, k)
    steps = round(share * k)
    kept = eliminate(weight, moment, steps).kept(torch.full((20,), steps))
    smallest = torch.ones_like(kept).scatter_(1, weight.abs().argsort(1)[:, :steps], False)
    ours, theirs = (
        sum(nearest(w, moment, mask.nonzero()[:, 0].tolist())[1] for w, mask in zip(weight, masks, strict=True))
        for masks in (kept, smallest)
    )
    assert ours < 0.7 * theirs


def test_few_survivors_come_near_to_the_best_of_all_sets() -> None:
    weight, moment = drawn(20, 8)
    found = eliminate(weight, moment, 5).kept(torch.full((20,), 5))
    ours = sum(nearest(w, moment, m.nonzero()[:, 0].tolist())[1] for w, m in zip(weight, found, strict=True))
    best = sum(min(nearest(w, moment, list(s))[1] for s in itertools.combinations(range(8), 3)) for w in weight)
    assert best <= ours <= 1.15 * best


@settings(max_examples=30, deadline=None)
@given(r=st.integers(1, 5), k=st.integers(1, 40), own=st.booleans(), share=st.floats(0, 1), seed=st.integers(0, 99))
def test_survivors_are_those_of_least_squares(r: int, k: int, own: bool, share: float, seed: int) -> None:
    weight, moment = drawn(r, k, seed=seed, own=own)
    kept = torch.rand(r, k, generator=torch.Generator().manual_seed(seed)) < share
    found = fit_survivors(weight, moment, kept)
    assert not bool(found[~kept].any())
    for row, w in enumerate(weight):
        expected, _ = nearest(w, moment[row] if own else moment, kept[row].nonzero()[:, 0].tolist())
        assert torch.allclose(found[row], expected, atol=1e-6)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8), (3, 4)])
@pytest.mark.parametrize("ranked", [False, True])
def test_n_of_m_neighbours_stay(n: int, m: int, ranked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elimination, "MOST_PRODUCTS", 0 if ranked else 2**42)
    weight, moment = drawn(6, 48)
    weight[0], weight[1, ::2] = 0.0, 0.0  # costs that tie
    steps = 48 * (m - n) // m
    found = eliminate(weight, moment, steps, units=Units((6, 48), 0, 1, Pattern(quota=(n, m))))
    kept = found.kept(torch.full((6,), steps))
    assert bool((kept.reshape(-1, m).sum(1) == n).all())


def test_rows_that_would_take_too_long_are_ranked_by_what_each_weight_costs_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weight, moment = drawn(3, 30)
    monkeypatch.setattr(elimination, "MOST_PRODUCTS", 0)
    found = eliminate(weight, moment, 30)
    alone = torch.stack(
        [torch.tensor([nearest(w, moment, [j for j in range(30) if j != i])[1] for i in range(30)]) for w in weight]
    )
    assert torch.equal(found.place.argsort(1), alone.argsort(1))
    assert torch.allclose(found.costs, alone.double().sort(1).values, rtol=1e-4)


def test_rows_in_chunks_are_those_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, moment = drawn(7, 20)
    whole = eliminate(weight, moment, 12)
    survivors = fit_survivors(weight, moment, whole.kept(torch.full((7,), 12)))
    monkeypatch.setattr(elimination, "ELEMENTS", 900)
    parts = eliminate(weight, moment, 12)
    assert torch.equal(whole.place, parts.place)
    assert torch.allclose(survivors, fit_survivors(weight, moment, parts.kept(torch.full((7,), 12))))
