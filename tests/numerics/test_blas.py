"""Products of symmetric and triangular matrices, against whole products in float64."""

from __future__ import annotations

import pytest
import torch

from compress.numerics.blas import add_gram, applies, triangular_product

DTYPES = (torch.float32, torch.float64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "layout", ["contiguous", "columns of more", "every other", "transposed", "one row", "one column"]
)
def test_a_gram_matrix_is_added_to_the_lower_triangle_alone(dtype: torch.dtype, layout: str) -> None:
    torch.manual_seed(0)
    more = torch.randn(37, 90, dtype=dtype)
    part = {
        "contiguous": more,
        "columns of more": more[:, 5:60],
        "every other": more[:, ::2],
        "transposed": torch.randn(53, 40, dtype=dtype)[:, 2:39].T,
        "one row": more[3:4, 5:60],
        "one column": more[:, 5:6],
    }[layout]
    r = len(part)
    sums = torch.randn(r, r, dtype=dtype)
    before, copy = sums.clone(), part.clone()
    add_gram(sums, part)
    whole = before.double() + part.double() @ part.double().T
    lower = torch.ones(r, r, dtype=torch.bool).tril()
    torch.testing.assert_close(sums[lower], whole[lower].to(dtype))
    assert torch.equal(sums[~lower], before[~lower])
    assert torch.equal(part, copy)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("r", "k"), [(37, 55), (1, 55), (37, 1)])
def test_a_triangular_product_reads_the_lower_triangle_alone_and_leaves_its_inputs(
    dtype: torch.dtype, r: int, k: int
) -> None:
    torch.manual_seed(0)
    root, more = torch.randn(r, r, dtype=dtype), torch.randn(r, 90, dtype=dtype)
    part, before = more[:, 5 : 5 + k], more.clone()
    torch.testing.assert_close(triangular_product(root, part), (root.double().tril() @ part.double()).to(dtype))
    assert torch.equal(more, before)


def test_what_is_not_finite_stays_so() -> None:
    part, sums = torch.ones(3, 5), torch.zeros(3, 3)
    part[1, 2] = torch.nan
    add_gram(sums, part)
    assert sums.isnan().tolist() == [[False, False, False], [True, True, False], [False, True, False]]


def test_they_are_for_one_thread_of_the_processor() -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert applies(torch.zeros(1))
        assert not applies(torch.zeros(1, device="meta"))
        torch.set_num_threads(2)
        assert not applies(torch.zeros(1))
    finally:
        torch.set_num_threads(threads)
