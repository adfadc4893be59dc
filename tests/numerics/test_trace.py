"""Estimates of a trace against the dense matrix."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from compress.numerics.trace import ESTIMATORS, TraceEstimate

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
