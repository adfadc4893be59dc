"""Estimates of a trace against the dense matrix."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from compress.numerics.trace import ESTIMATORS, Control, TraceEstimate, hutch_plus_plus, hutchinson

D = 60
SPECTRA = {
    "decaying": torch.arange(1, D + 1, dtype=torch.float64) ** -1.5,
    "indefinite": torch.linspace(-1, 1.3, D, dtype=torch.float64),
    "low rank": torch.cat([torch.tensor([3.0, 2.0, -1.0]), torch.zeros(D - 3)]).double(),
}


def matrix(eigenvalues: Tensor) -> Tensor:
    d = len(eigenvalues)
    q, _ = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    return (q * eigenvalues) @ q.T


def estimate(name: str, dense: Tensor, *, seed: int = 0, rtol: float = 0.0, limit: int = 18) -> TraceEstimate:
    asked = 0

    def products(v: Tensor) -> Tensor:
        nonlocal asked
        asked += len(v)
        return v @ dense

    def probes(numbers: range) -> Tensor:
        rows = torch.zeros(len(numbers), len(dense), dtype=dense.dtype)
        for row, number in zip(rows, numbers, strict=True):
            generator = torch.Generator().manual_seed(1000 * seed + number)
            row.copy_(torch.randint(0, 2, row.shape, generator=generator) * 2 - 1)
        return rows

    found = ESTIMATORS[name](products, probes, rtol=rtol, limit=limit)
    assert found.passes == asked
    return found


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("name", ESTIMATORS)
def test_estimates_are_unbiased_and_their_errors_honest(name: str, spectrum: str) -> None:
    dense = matrix(SPECTRA[spectrum])
    exact, found = float(dense.trace()), [estimate(name, dense, seed=seed) for seed in range(60)]
    errors = torch.tensor([e.mean - exact for e in found], dtype=torch.float64)
    if name != "hutchinson" and spectrum == "low rank":
        assert errors.abs().max() < 1e-12
        return
    spread = errors.square().mean().sqrt()
    assert abs(errors.mean()) < 3 * spread / math.sqrt(len(found))
    # The values that XTrace takes the spread of are not quite independent.
    share = 0.65 if name == "xtrace" else 0.8
    assert sum(abs(e.mean - exact) <= 2 * e.stderr for e in found) >= share * len(found)


@pytest.mark.parametrize("name", ["hutch++", "xtrace"])
def test_deflation_beats_plain_probes_where_eigenvalues_decay(name: str) -> None:
    dense = matrix(SPECTRA["decaying"])
    exact = float(dense.trace())
    ours, plain = (
        sum((estimate(kind, dense, seed=seed, limit=30).mean - exact) ** 2 for seed in range(20))
        for kind in (name, "hutchinson")
    )
    assert ours < plain / 9  # of the squares


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("limit", [2, 3, 4, 5, 6, 7, 9, 29, 30])
def test_no_more_products_are_made_than_allowed(name: str, limit: int) -> None:
    found = estimate(name, matrix(SPECTRA["indefinite"]), limit=limit)
    assert found.passes <= (max(limit, 4) if name == "xtrace" else limit)
    assert found.stderr > 0


@pytest.mark.parametrize("name", ESTIMATORS)
def test_products_end_at_the_tolerance(name: str) -> None:
    dense = matrix(SPECTRA["decaying"])
    loose, tight = (estimate(name, dense, rtol=rtol, limit=60) for rtol in (0.5, 1e-4))
    assert loose.passes < tight.passes <= 60
    assert loose.stderr <= 0.5 * abs(loose.mean)


@pytest.mark.parametrize("name", ["hutch++", "xtrace"])
@pytest.mark.parametrize("d", [1, 2, 5])
def test_a_matrix_smaller_than_the_budget_is_exact(name: str, d: int) -> None:
    dense = matrix(torch.arange(1.0, d + 1, dtype=torch.float64))
    found = estimate(name, dense, limit=60)
    assert found.mean == pytest.approx(d * (d + 1) / 2, rel=1e-12)
    assert found.stderr == 0


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_matrix_of_zeros_has_a_trace_of_zero(name: str, dtype: torch.dtype) -> None:
    found = estimate(name, torch.zeros(30, 30, dtype=dtype))
    assert (found.mean, found.stderr) == (0.0, 0.0)


@pytest.mark.parametrize("name", ["hutch++", "xtrace"])
def test_low_rank_in_single_precision_is_found_to_its_precision(name: str) -> None:
    found = estimate(name, matrix(SPECTRA["low rank"]).float(), limit=40)
    assert found.mean == pytest.approx(4.0, abs=1e-4)


def controlled(dense: Tensor, near: Tensor | None, *, seed: int) -> TraceEstimate:
    def probes(numbers: range) -> Tensor:
        rows = [
            torch.randint(0, 2, (D,), generator=torch.Generator().manual_seed(1000 * seed + n)) * 2 - 1 for n in numbers
        ]
        return torch.stack(rows).double()

    control = None
    if near is not None:
        every = probes(range(18))
        control = Control(float(near.trace()), tuple(((every @ near) * every).sum(1).tolist()))
    return hutchinson(lambda v: v @ dense, probes, rtol=0.0, limit=18, control=control)


def test_a_control_leaves_the_spread_of_the_difference() -> None:
    dense, noise = matrix(SPECTRA["decaying"]), torch.randn(D, D, generator=torch.Generator().manual_seed(3)).double()
    near = dense + 1e-3 * (noise + noise.T)
    exact = float(dense.trace())
    same = controlled(dense, dense, seed=0)
    assert same.mean == pytest.approx(exact, rel=1e-12) and same.stderr < 1e-12
    plain, helped = ([controlled(dense, b, seed=seed) for seed in range(40)] for b in (None, near))
    errors = [torch.tensor([e.mean - exact for e in found]) for found in (plain, helped)]
    assert errors[1].square().mean().sqrt() < 0.2 * errors[0].square().mean().sqrt()
    assert sum(abs(e.mean - exact) <= 2 * e.stderr for e in helped) >= 0.8 * len(helped)


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_a_sketch_of_a_matrix_nearby_costs_no_products_and_biases_nothing(spectrum: str) -> None:
    dense, noise = matrix(SPECTRA[spectrum]), torch.randn(D, D, generator=torch.Generator().manual_seed(3)).double()
    near, exact = dense + 1e-3 * (noise + noise.T), float(dense.trace())
    asked, plain, helped = 0, [], []

    def products(v: Tensor) -> Tensor:
        nonlocal asked
        asked += len(v)
        return v @ dense

    for seed in range(60):

        def probes(numbers: range, seed: int = seed) -> Tensor:
            rows = [
                torch.randint(0, 2, (D,), generator=torch.Generator().manual_seed(1000 * seed + n)) * 2 - 1
                for n in numbers
            ]
            return torch.stack(rows).double() if rows else torch.zeros(0, D).double()

        asked = 0
        found = hutch_plus_plus(products, probes, rtol=0.0, limit=18, sketch=probes(range(9)) @ near)
        assert found.passes == asked == 18
        helped.append(found.mean - exact)
        plain.append(hutch_plus_plus(products, probes, rtol=0.0, limit=18).mean - exact)
    errors = torch.tensor(helped)
    spread = errors.square().mean().sqrt()
    assert abs(errors.mean()) < 3 * spread / math.sqrt(len(errors))
    if spectrum == "decaying":
        assert spread < 0.8 * torch.tensor(plain).square().mean().sqrt()


def test_a_control_that_is_far_off_is_left_out() -> None:
    dense, far = matrix(SPECTRA["decaying"]), 50 * matrix(SPECTRA["indefinite"].flip(0))
    assert controlled(dense, far, seed=0) == controlled(dense, None, seed=0)
