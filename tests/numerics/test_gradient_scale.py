"""Gradients that are scaled where they lie, with the Gram matrix that they have then."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from compress.numerics.gradient_scale import clipped, scale_rows
from compress.numerics.mfac import gram_matrix, new_gradients


def gradients(memory: int) -> tuple[Tensor, object]:
    values = torch.randn(10, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values[3] *= 100
    values[7] = 0
    found = new_gradients(10, 50, torch.float64, memory=memory)
    found[slice(0, 10), slice(0, 50)] = values
    return values, found


@pytest.mark.parametrize("memory", [2**40, 0])
def test_the_gram_matrix_is_that_of_the_scaled_rows(memory: int) -> None:
    values, found = gradients(memory)
    factors = torch.linspace(0.5, 2, 10, dtype=torch.float64)
    gram = scale_rows(found, gram_matrix(found), factors)  # type: ignore[arg-type]
    assert_close(found.narrow(1, 0, 50), values * factors.unsqueeze(1))  # type: ignore[attr-defined]
    assert_close(gram, gram_matrix(found))  # type: ignore[arg-type]


@pytest.mark.parametrize(("quantile", "rows"), [(1.0, 0), (0.9, 1), (0.5, 4)])
def test_no_gradient_is_longer_than_the_quantile_and_the_others_stay(quantile: float, rows: int) -> None:
    values, found = gradients(2**40)
    gram = gram_matrix(found)  # type: ignore[arg-type]
    factors, clipping = clipped(gram, quantile)
    norms = values.norm(dim=1)
    assert clipping.rows == rows == int((factors < 1).sum())
    assert clipping.norm == pytest.approx(float(norms.sort().values[9 - rows]))
    scaled = scale_rows(found, gram, factors)  # type: ignore[arg-type]
    assert_close(scaled.diagonal().sqrt(), norms.clamp(max=clipping.norm))
    assert clipping.share == pytest.approx(1 - float(scaled.trace() / norms.square().sum()))


def test_gradients_of_zero_are_not_clipped() -> None:
    factors, clipping = clipped(torch.zeros(4, 4, dtype=torch.float64), 0.5)
    assert factors.tolist() == [1, 1, 1, 1]
    assert (clipping.rows, clipping.share, clipping.norm) == (0, 0, 0)


def test_gradients_of_zero_do_not_lower_the_bound() -> None:
    gram = torch.diag(torch.tensor([0.0, 0.0, 0.0, 1.0, 4.0], dtype=torch.float64))
    factors, clipping = clipped(gram, 0.5)
    assert factors.tolist() == [1, 1, 1, 1, 0.5]
    assert (clipping.rows, clipping.norm, clipping.share) == (1, 1.0, pytest.approx(3 / 5))
