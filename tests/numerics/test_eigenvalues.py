"""Top eigenvalues against dense ones of float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from compress.numerics.eigenvalues import Eigenvalue, top_eigenvalues


class Counted:
    """A matrix that counts its products."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix, self.count = matrix, 0

    def __call__(self, rows: Tensor) -> Tensor:
        self.count += len(rows)
        return rows @ self.matrix


def symmetric(d: int, seed: int, decay: float) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))[0]
    values = torch.arange(1, d + 1, dtype=torch.float64) ** -decay * torch.sign(
        torch.randn(d, generator=generator, dtype=torch.float64)
    )
    return (basis * values) @ basis.T


def start(d: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(d, generator=torch.Generator().manual_seed(7), dtype=dtype)


def found(matrix: Tensor, count: int, *, rtol: float = 0.0, limit: int = 30) -> tuple[Eigenvalue, ...]:
    return top_eigenvalues(Counted(matrix), start(len(matrix), matrix.dtype), count, rtol=rtol, limit=limit)


@given(
    d=st.integers(1, 60),
    count=st.integers(1, 3),
    seed=st.integers(0, 2**16),
    decay=st.sampled_from([0.0, 0.5, 1.0, 2.0]),
)
def test_an_eigenvalue_lies_within_each_residual(d: int, count: int, seed: int, decay: float) -> None:
    matrix = symmetric(d, seed, decay)
    exact = torch.linalg.eigvalsh(matrix)
    values = found(matrix, count, limit=12)
    assert len(values) == min(count, d)
    assert [one.value for one in values] == sorted((one.value for one in values), reverse=True)
    for one in values:
        assert float((exact - one.value).abs().min()) <= one.residual + 1e-12
        assert one.value <= float(exact.max()) + 1e-12, "a Rayleigh quotient"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_largest_ones_are_found(dtype: torch.dtype) -> None:
    matrix = symmetric(200, 0, 1.0).to(dtype)
    exact = torch.linalg.eigvalsh(matrix.double()).flip(0)[:3]
    values = torch.tensor([one.value for one in found(matrix, 3, limit=60)], dtype=torch.float64)
    assert float((values / exact - 1).abs().max()) <= (1e-5 if dtype == torch.float32 else 1e-8)


def test_a_matrix_no_larger_than_the_limit_is_exact() -> None:
    matrix = symmetric(30, 1, 0.0)
    values = found(matrix, 2, limit=30)
    assert [one.residual for one in values] == [0.0, 0.0]
    assert [one.value for one in values] == pytest.approx(torch.linalg.eigvalsh(matrix).flip(0)[:2].tolist(), rel=1e-12)


@pytest.mark.parametrize("scale", [0.0, 1.0, -1.0])
def test_multiples_of_the_unit_matrix(scale: float) -> None:
    values = found(scale * torch.eye(50, dtype=torch.float64), 2, limit=20)
    assert [one.value for one in values] == pytest.approx([scale, scale], abs=1e-12)
    assert all(one.residual <= 1e-12 for one in values)


def test_a_matrix_of_rank_one_has_one_value() -> None:
    v = start(80)
    first, second = found(torch.outer(v, v), 2, limit=20)
    assert first.value == pytest.approx(float(v @ v))
    assert second.value == pytest.approx(0.0, abs=1e-9)


def test_a_short_search_is_enough_where_its_residuals_are_small() -> None:
    gap = torch.diag(torch.cat([torch.tensor([100.0]), torch.linspace(0, 1, 299)])).double()
    short, long = Counted(gap), Counted(gap)
    (one,) = top_eigenvalues(short, start(300), 1, rtol=0.05, limit=40)
    (other,) = top_eigenvalues(long, start(300), 1, rtol=0.0, limit=40)
    assert one.value == pytest.approx(100.0, rel=1e-6) and other.value == pytest.approx(100.0, rel=1e-12)
    assert short.count < 15 < 40 < long.count < 60


def test_one_start_gives_one_result() -> None:
    matrix = symmetric(70, 3, 1.0)
    assert found(matrix, 2) == found(matrix, 2)
