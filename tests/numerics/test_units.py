"""Units of removal against loops over rows, columns and positions, and masks by enumeration."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compress.numerics.units import Units, cheapest, masks_of_most, masks_without
from compress.pattern import Pattern

SHAPES = st.lists(st.integers(1, 5), min_size=2, max_size=5).map(tuple)
SIDES = st.integers(1, 4)


def members(units: Units) -> dict[tuple[int, ...], list[int]]:
    """The flat indices of every unit's weights, by its first row and column and its position: by definition."""
    found: dict[tuple[int, ...], list[int]] = {}
    r, c = units.pattern.rows, units.pattern.columns
    for number, place in enumerate(itertools.product(*map(range, units.shape))):
        row, column = place[units.row_axis], place[units.column_axis]
        rest = tuple(at for axis, at in enumerate(place) if axis not in (units.row_axis, units.column_axis))
        found.setdefault((row // r, column // c, *rest), []).append(number)
    return found


@settings(max_examples=60, deadline=None)
@given(shape=SHAPES, rows=SIDES, columns=SIDES, transposed=st.booleans())
def test_units_are_blocks_of_consecutive_rows_and_columns(
    shape: tuple[int, ...], rows: int, columns: int, transposed: bool
) -> None:
    units = Units(shape, int(transposed), int(not transposed), Pattern(rows, columns))
    numbers = units.blocks(torch.arange(math.prod(shape)), -1).flatten(0, 1).flatten(1)
    found = sorted(sorted(i for i in row if i >= 0) for row in numbers.tolist())
    assert found == sorted(members(units).values())
    assert units.sizes().flatten().tolist() == [sum(i >= 0 for i in row) for row in numbers.tolist()]
    assert bool((numbers[:, 0] >= 0).all()), "what a unit lacks is at its end"
    values = torch.arange(len(numbers)).reshape(units.sizes().shape)
    assert torch.equal(units.blocks(units.spread(values), -1)[:, :, 0, 0], values)
    scores = torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    means = [float(scores.flatten()[[i for i in row if i >= 0]].mean()) for row in numbers.tolist()]
    assert units.means(scores).flatten().tolist() == pytest.approx(means)


def test_single_weights_lie_as_in_memory() -> None:
    values = torch.arange(2 * 3 * 4).reshape(2, 3, 4)
    assert torch.equal(Units((2, 3, 4), 0, 1, Pattern()).blocks(values).flatten(), values.flatten())


def test_columns_are_those_of_the_weight_as_a_matrix() -> None:
    assert Units((8, 6), 0, 1, Pattern(2, 4)).columns_of().tolist() == [[0, 1, 2, 3], [4, 5, -1, -1]]
    # Inputs 0 to 2 at each of two positions: consecutive inputs are two columns apart.
    assert Units((1, 3, 2), 0, 1, Pattern(1, 2)).columns_of().tolist() == [[0, 2], [4, -1], [1, 3], [5, -1]]


@settings(max_examples=60, deadline=None)
@given(
    costs=st.lists(st.integers(0, 4), min_size=1, max_size=9),
    removed=st.integers(0, 30),
    data=st.data(),
)
def test_the_cheapest_go_and_no_more_than_it_takes(costs: list[int], removed: int, data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(1, 4), min_size=len(costs), max_size=len(costs)))
    gone = cheapest(torch.tensor(costs), torch.tensor(sizes), removed).tolist()
    order = sorted(range(len(costs)), key=lambda unit: (costs[unit], unit))
    assert gone == order[: len(gone)]
    assert sum(sizes[unit] for unit in gone) >= min(removed, sum(sizes))
    assert not gone or sum(sizes[unit] for unit in gone[:-1]) < removed


def test_layers_compete_or_lose_their_own_share() -> None:
    units = {name: Units((4, 3), 0, 1, Pattern(2, 1)) for name in "ab"}
    costs = {"a": torch.arange(6.0).reshape(2, 3), "b": 10 + torch.arange(6.0).reshape(2, 3)}
    together = masks_without(units, costs, 9)
    assert [int((~together[name]).sum()) for name in "ab"] == [10, 0]
    alone = masks_without(units, costs, {"a": 2, "b": 5})
    assert [int((~alone[name]).sum()) for name in "ab"] == [2, 6]
    assert alone["b"].tolist() == [[False] * 3] * 2 + [[True] * 3] * 2


@pytest.mark.parametrize(("n", "m", "axis"), [(2, 4, 0), (1, 2, 1), (1, 3, 1), (3, 4, 1), (2, 6, 0)])
def test_the_kept_scores_of_every_m_have_the_largest_sum(n: int, m: int, axis: int) -> None:
    sizes = [2, 3, 2]
    sizes[axis] = 2 * m
    scores = torch.rand(sizes, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 0.5
    mask = of_most(scores, n, m, axis)
    assert mask.shape == scores.shape
    assert mask.is_contiguous()
    rows, kept = (x.movedim(axis, -1).reshape(-1, m) for x in (scores, mask))
    for row, keep in zip(rows, kept, strict=True):
        best = max(itertools.combinations(range(m), n), key=lambda chosen: float(row[list(chosen)].sum()))
        assert keep.nonzero().flatten().tolist() == list(best)


def of_most(scores: Tensor, n: int, m: int, axis: int) -> Tensor:
    units = Units(tuple(scores.shape), 1 - axis, axis, Pattern(quota=(n, m)))
    return masks_of_most({"w": units}, {"w": units.means(scores)}, n)["w"]


def test_of_equal_scores_the_first_are_kept() -> None:
    assert of_most(torch.zeros(1, 8), 2, 4, 1).int().tolist() == [[1, 1, 0, 0, 1, 1, 0, 0]]
    protected = torch.tensor([[float("inf"), 3.0, -1.0, float("inf")]])
    assert of_most(protected, 2, 4, 1).int().tolist() == [[1, 0, 0, 1]]
