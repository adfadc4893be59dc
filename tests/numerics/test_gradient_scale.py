"""Gradients that are scaled where they lie, by how long they are."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from compress.numerics.gradient_scale import clipped, scale_rows
from compress.numerics.mfac import new_gradients, squared_norms


def gradients(memory: int) -> tuple[Tensor, object]:
    values = torch.randn(10, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values[3] *= 100
    values[7] = 0
    found = new_gradients(10, 50, torch.float64, memory=memory)
    found[slice(0, 10), slice(0, 50)] = values
    return values, found


@pytest.mark.parametrize("memory", [2**40, 0])
def test_rows_are_scaled_where_they_lie(memory: int) -> None:
    values, found = gradients(memory)
    factors = torch.linspace(0.5, 2, 10, dtype=torch.float64)
    scale_rows(found, factors)  # type: ignore[arg-type]
    assert_close(found.narrow(1, 0, 50), values * factors.unsqueeze(1))  # type: ignore[attr-defined]
    assert_close(squared_norms(found), (values * factors.unsqueeze(1)).square().sum(1))  # type: ignore[arg-type]


@pytest.mark.parametrize(("quantile", "rows"), [(1.0, 0), (0.9, 1), (0.5, 4)])
def test_no_gradient_is_longer_than_the_quantile_and_the_others_stay(quantile: float, rows: int) -> None:
    values, found = gradients(2**40)
    factors, clipping = clipped(squared_norms(found), quantile)  # type: ignore[arg-type]
    norms = values.norm(dim=1)
    assert clipping.rows == rows == int((factors < 1).sum())
    assert clipping.norm == pytest.approx(float(norms.sort().values[9 - rows]))
    scale_rows(found, factors)  # type: ignore[arg-type]
    scaled = squared_norms(found)  # type: ignore[arg-type]
    assert_close(scaled.sqrt(), norms.clamp(max=clipping.norm))
    assert clipping.share == pytest.approx(1 - float(scaled.sum() / norms.square().sum()))


def test_gradients_of_zero_are_not_clipped() -> None:
    factors, clipping = clipped(torch.zeros(4, dtype=torch.float64), 0.5)
    assert factors.tolist() == [1, 1, 1, 1]
    assert (clipping.rows, clipping.share, clipping.norm) == (0, 0, 0)


def test_gradients_of_zero_do_not_lower_the_bound() -> None:
    factors, clipping = clipped(torch.tensor([0.0, 0.0, 0.0, 1.0, 4.0], dtype=torch.float64), 0.5)
    assert factors.tolist() == [1, 1, 1, 1, 0.5]
    assert (clipping.rows, clipping.norm, clipping.share) == (1, 1.0, pytest.approx(3 / 5))
