"""Elimination against optimal brain surgery by definition, and survivors against least squares, in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compress.numerics import elimination
from compress.numerics.elimination import eliminate, fit_survivors


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


@settings(max_examples=30, deadline=None)
@given(r=st.integers(1, 5), k=st.integers(1, 60), share=st.floats(0, 1), seed=st.integers(0, 99))
def test_several_at_once_are_no_worse_than_the_smallest(r: int, k: int, share: float, seed: int) -> None:
    weight, moment = drawn(r, k, seed=seed)
    steps = round(share * k)
    found = eliminate(weight, moment, steps)
    kept = found.kept(torch.full((r,), steps))
    assert kept.sum(1).tolist() == [k - steps] * r
    assert sorted(found.place[0].tolist()) == [*range(steps), *[steps] * (k - steps)]
    assert bool((found.costs.diff(dim=1) >= 0).all())
    smallest = torch.ones_like(kept).scatter_(1, weight.abs().argsort(1)[:, :steps], False)
    ours, theirs = (
        sum(nearest(w, moment, mask.nonzero()[:, 0].tolist())[1] for w, mask in zip(weight, masks, strict=True))
        for masks in (kept, smallest)
    )
    assert ours <= 1.25 * theirs + 1e-9


def test_few_survivors_come_near_to_the_best_of_all_sets() -> None:
    weight, moment = drawn(20, 8)
    found = eliminate(weight, moment, 5).kept(torch.full((20,), 5))
    ours = sum(nearest(w, moment, m.nonzero()[:, 0].tolist())[1] for w, m in zip(weight, found, strict=True))
    best = sum(min(nearest(w, moment, list(s))[1] for s in itertools.combinations(range(8), 3)) for w in weight)
    assert best <= ours <= 1.15 * best


@settings(max_examples=30, deadline=None)
@given(r=st.integers(1, 5), k=st.integers(1, 40), own=st.booleans(), seed=st.integers(0, 99))
def test_survivors_are_those_of_least_squares(r: int, k: int, own: bool, seed: int) -> None:
    weight, moment = drawn(r, k, seed=seed, own=own)
    kept = torch.rand(r, k, generator=torch.Generator().manual_seed(seed)) < 0.4
    found = fit_survivors(weight, moment, kept)
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
    found = eliminate(weight, moment, steps, pattern=(n, m))
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
