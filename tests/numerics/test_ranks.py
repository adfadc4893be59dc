"""Rank correlation and spread of ratios against their definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress.numerics.ranks import ratio_spread, spearman


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=2, max_size=30))
def test_it_is_the_correlation_of_ranks_that_equal_numbers_share(pairs: list[tuple[int, int]]) -> None:
    first, second = (np.array(values, float) for values in zip(*pairs, strict=True))

    def ranks(values: np.ndarray) -> np.ndarray:
        below = (values[None] < values[:, None]).sum(1)
        return below + ((values[None] == values[:, None]).sum(1) - 1) / 2

    found = spearman(first.tolist(), second.tolist())
    x, y = ranks(first), ranks(second)
    if x.std() == 0 or y.std() == 0:
        assert math.isnan(found)
    else:
        assert found == pytest.approx(np.corrcoef(x, y)[0, 1], abs=1e-12)


def test_the_spread_is_that_of_the_deciles_and_a_common_factor_has_none() -> None:
    generator = np.random.default_rng(0)
    predicted, true = np.exp(generator.normal(size=50)), np.exp(generator.normal(size=50))
    high, low = np.percentile(predicted / true, [90, 10])
    assert ratio_spread(predicted.tolist(), true.tolist()) == pytest.approx(high / low)
    assert ratio_spread((3 * true).tolist(), true.tolist()) == pytest.approx(1)
    assert ratio_spread([0.0] * 50, true.tolist()) == math.inf
