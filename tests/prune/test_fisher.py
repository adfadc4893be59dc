"""The Fisher matrix of a round of OBS, whole or in blocks, against dense float64 matrices."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from compress.numerics.mfac import Gradients, new_gradients
from compress.prune import fisher
from compress.prune.fisher import SALIENCY_DAMPING, fisher_of, unit_saliencies, updates

M, D = 40, 103
DAMPINGS = (1e-4, 1e-2, 1.0)
# Single weights; and units within a block, across blocks, and with fewer weights, in blocks of 1, 7, 50 and all.
SINGLE = torch.arange(D)[:, None]
UNITS = torch.tensor([[0, 1, 2, 3], [5, 6, 7, 8], [49, 50, 99, 102], [20, 60, -1, -1], [101, -1, -1, -1]])


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradients(dtype: torch.dtype = torch.float64) -> Tensor:
    """Of very different sizes, as those of layers are."""
    return (normal(0, M, D) * torch.exp(normal(1, D))).to(dtype)


def dense(rows: Tensor, block_size: int, damping: float) -> Tensor:
    block = torch.arange(rows.shape[1]) // block_size
    f = torch.where(block[:, None] == block, rows.double().T @ rows.double() / len(rows), 0.0)
    return f + damping * torch.eye(len(f), dtype=torch.float64)


@pytest.fixture(autouse=True, params=[2**24, 600])
def span(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """All blocks at once, and a few at a time."""
    monkeypatch.setattr(fisher, "SPAN", request.param)


@pytest.mark.parametrize("units", [SINGLE, UNITS], ids=["weights", "units"])
@pytest.mark.parametrize("block_size", [1, 7, 40, 50, D, 500])
def test_saliencies_are_those_of_the_dense_block_diagonal_inverse(block_size: int, units: Tensor) -> None:
    rows, weights = gradients(), normal(2, D)
    mean = float(rows.square().sum()) / rows.numel()
    inverse = torch.linalg.inv(dense(rows, block_size, SALIENCY_DAMPING * mean))
    expected = []
    for unit in units.tolist():
        q = [i for i in unit if i >= 0]
        expected.append(weights[q] @ torch.linalg.inv(inverse[q][:, q]) @ weights[q] / 2)
    found = unit_saliencies(fisher_of(rows, block_size), weights, units)
    assert_close(found, torch.stack(expected), rtol=1e-8, atol=0)


@pytest.mark.parametrize("block_size", [1, 7, 40, 50, D, 500])
def test_updates_are_the_least_loss_of_each_block(block_size: int) -> None:
    rows, weights, keep = gradients(), normal(2, D), normal(3, D) > 0
    mean = float(rows.square().sum()) / rows.numel()
    found = updates(fisher_of(rows, block_size), weights, keep, DAMPINGS)
    for damping, change in zip(DAMPINGS, found, strict=True):
        f = dense(rows, block_size, damping * mean)
        assert_close(change[~keep], -weights[~keep], rtol=0, atol=0)
        expected = torch.linalg.solve(f[keep][:, keep], f[keep][:, ~keep] @ weights[~keep])
        assert_close(change[keep], expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("block_size", [D, D + 1, 10 * D])
def test_a_block_of_all_weights_is_the_whole_matrix(block_size: int) -> None:
    rows, weights, keep = gradients(), normal(2, D), normal(3, D) > 0
    whole, block = fisher_of(rows), fisher_of(rows, block_size)
    assert block.mean == pytest.approx(whole.mean, rel=1e-12)
    for units in (SINGLE, UNITS):
        assert_close(unit_saliencies(block, weights, units), unit_saliencies(whole, weights, units), rtol=1e-8, atol=0)
    assert_close(updates(block, weights, keep, DAMPINGS), updates(whole, weights, keep, DAMPINGS), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("block_size", [7, 50])
def test_gradients_in_a_file_give_the_same_bits(block_size: int) -> None:
    rows, weights, keep = gradients(torch.float32), normal(2, D).float(), normal(3, D) > 0
    stored: Gradients = new_gradients(M, D, torch.float32, memory=0)
    stored[slice(0, M), slice(0, D)] = rows
    held, filed = fisher_of(rows, block_size), fisher_of(stored, block_size)
    assert held.mean == filed.mean
    for units in (SINGLE, UNITS):
        assert torch.equal(unit_saliencies(held, weights, units), unit_saliencies(filed, weights, units))
    assert torch.equal(updates(held, weights, keep, DAMPINGS), updates(filed, weights, keep, DAMPINGS))


@pytest.mark.parametrize("block_size", [None, 7])
def test_without_curvature_the_squares_count(block_size: int | None) -> None:
    weights = normal(2, D)
    found = unit_saliencies(fisher_of(torch.zeros(M, D), block_size), weights, UNITS)
    assert_close(found[4], weights[101].square())
    assert_close(found[3], weights[[20, 60]].square().sum())
