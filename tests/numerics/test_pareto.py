"""The exact frontier against enumeration, and its properties."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mixed_integer import at_most, resnet50, solved, widths_of

from compress.errors import NumericsError, OutOfMemoryError
from compress.numerics import pareto
from compress.numerics.pareto import Fork, Frontier, Way, pareto_frontier

Case = tuple[list[list[int]], list[list[float]]]

SEEDS = st.integers(0, 10_000)
# Widths that make small cases take each way through the merges, in several blocks and chunks.
WAYS: dict[str, dict[str, Any]] = {
    "sorted": {"DENSE_STEPS": 0, "CHUNK": 8},
    "dense": {"DENSE_STEPS": math.inf, "BLOCK": 3},
    "mixed": {"DENSE_STEPS": 3, "CHUNK": 12, "BLOCK": 5},
    "as shipped": {},
}


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in WAYS[request.param].items():
        monkeypatch.setattr(pareto, name, value)


def case_of(seed: int) -> Case:
    """A few items; small integers and quarters make ties, and some sums round."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, 6, rng.integers(1, 6))
    unit, lowest = int(rng.choice([1, 1, 6, 1000])), int(rng.choice([0, 0, -3, 7]))
    costs = [(unit * rng.integers(lowest, lowest + rng.integers(1, 12), n)).tolist() for n in counts]
    if seed % 2:
        return costs, [(rng.integers(-4, 9, n) / 4).tolist() for n in counts]
    return costs, [rng.choice([0.1, 0.2, 0.3, 1e-17, 1e16, -0.7], n).tolist() for n in counts]


def totals_of(case: Case, choice: tuple[int, ...]) -> tuple[int, float]:
    cost, value = 0, 0.0  # from Python 3.12 on, sum() carries the rounding along
    for i, option in enumerate(choice):
        cost += case[0][i][option]
        value += case[1][i][option]
    return cost, value


def enumerated(case: Case) -> list[tuple[int, float]]:
    every = {totals_of(case, choice) for choice in itertools.product(*(range(len(row)) for row in case[0]))}
    points: list[tuple[int, float]] = []
    for cost, value in sorted(every):
        if not points or value < points[-1][1]:
            points.append((cost, value))
    return points


def points_of(frontier: Frontier) -> list[tuple[int, float]]:
    return list(zip(frontier.costs.tolist(), frontier.values.tolist(), strict=True))


def network_of(num_items: int, unit: int, seed: int = 0) -> Case:
    """Layers of all sizes at 2 to 8 bits, the loss falling by about four a bit."""
    rng = np.random.default_rng(seed)
    sizes = unit * rng.integers(1, 200, num_items)
    noise = np.exp(rng.normal(0, 0.3, (num_items, 7)))
    costs = [[int(size) * bits for bits in range(2, 9)] for size in sizes]
    return costs, [[float(e) * 4.0**-bits for bits, e in zip(range(2, 9), row, strict=True)] for row in noise]


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("seeds", [range(start, start + 50) for start in range(0, 200, 50)], ids=str)
def test_the_frontier_is_that_of_the_enumeration(seeds: range) -> None:
    for seed in seeds:
        case = case_of(seed)
        assert points_of(pareto_frontier(*case)) == enumerated(case), seed


@pytest.mark.usefixtures("way")
def test_every_choice_adds_up_to_its_point() -> None:
    for seed in range(100):
        case = case_of(seed)
        frontier = pareto_frontier(*case)
        choices = [frontier.choice(index) for index in range(len(frontier))]
        assert [totals_of(case, choice) for choice in choices] == points_of(frontier), seed
        assert frontier.choices().dtype == np.uint8
        assert frontier.choices().tolist() == [list(choice) for choice in choices]


def forks_of(case: Case, seed: int) -> list[Fork]:
    """Forks over some of the items; one may have no items."""
    rng = np.random.default_rng(seed + 1)
    order, forks = rng.permutation(len(case[0])).tolist(), []
    for _ in range(rng.integers(1, 4)):
        count = int(rng.integers(0, 3))
        items, order = tuple(order[:count]), order[count:]
        ways = [
            Way(int(rng.choice([1, 4, 6, 8])), int(rng.integers(-3, 9)), float(rng.integers(-4, 9)) / 4)
            for _ in range(rng.integers(1, 4))
        ]
        forks.append(Fork(items, tuple(ways)))
    return forks


def forked_totals(case: Case, forks: list[Fork], choice: tuple[int, ...]) -> tuple[int, float]:
    """Of the items' options and then the forks' ways, added in the frontier's order."""
    free = [i for i in range(len(case[0])) if not any(i in fork.items for fork in forks)]
    cost, value = 0, 0.0
    for i in free:
        cost, value = cost + case[0][i][choice[i]], value + case[1][i][choice[i]]
    for number, fork in enumerate(forks):
        way = fork.ways[choice[len(case[0]) + number]]
        cost, value = cost + way.cost, value + way.value
        for i in fork.items:
            cost, value = cost + way.factor * case[0][i][choice[i]], value + case[1][i][choice[i]]
    return cost, value


@pytest.mark.usefixtures("way")
def test_with_forks_the_frontier_is_that_of_the_enumeration() -> None:
    for seed in range(40):
        case = case_of(seed)
        case = case[0][:4], case[1][:4]
        forks = forks_of(case, seed)
        sizes = [*map(len, case[0]), *(len(fork.ways) for fork in forks)]
        every = {forked_totals(case, forks, choice) for choice in itertools.product(*map(range, sizes))}
        points: list[tuple[int, float]] = []
        for cost, value in sorted(every):
            if not points or value < points[-1][1]:
                points.append((cost, value))
        frontier = pareto_frontier(*case, forks)
        assert points_of(frontier) == points, seed
        choices = [frontier.choice(index) for index in range(len(frontier))]
        assert [forked_totals(case, forks, choice) for choice in choices] == points, seed
        assert frontier.choices().tolist() == [list(choice) for choice in choices]


def test_forks_that_share_an_item_or_have_none_such_are_refused() -> None:
    way = (Way(4, 0, 0.0),)
    for items in ((0, 0), (2,)):
        with pytest.raises(ValueError, match="of forks aren't those"):
            pareto_frontier([[1], [2]], [[0.0], [0.0]], [Fork(items, way)])
    with pytest.raises(ValueError, match="a factor below 1"):
        pareto_frontier([[1]], [[0.0]], [Fork((0,), (Way(0, 0, 0.0),))])
    with pytest.raises(NumericsError, match="the predicted loss of fork 0 isn't finite"):
        pareto_frontier([[1]], [[0.0]], [Fork((0,), (Way(1, 0, math.nan),))])


@pytest.mark.parametrize("unit", [1, 64])
def test_many_items_agree_with_a_table_of_costs(unit: int) -> None:
    costs, values = network_of(25, unit)
    least = {0: 0.0}
    for row, losses in zip(costs, values, strict=True):
        longer: dict[int, float] = {}
        for (cost, value), (step, loss) in itertools.product(least.items(), zip(row, losses, strict=True)):
            longer[cost + step] = min(value + loss, longer.get(cost + step, math.inf))
        least = longer
    ordered = sorted(least.items())
    lowest = itertools.accumulate((value for _, value in ordered), min, initial=math.inf)
    expected = [(cost, value) for (cost, value), low in zip(ordered, lowest, strict=False) if value < low]
    assert points_of(pareto_frontier(costs, values)) == expected


def test_no_mixed_integer_solver_finds_less_for_the_same_cost() -> None:
    sizes = resnet50()
    case = widths_of(sizes)
    frontier = pareto_frontier(*case)
    for bits in np.linspace(2.05, 7.9, 6):
        cost, value = solved(case, round(sum(sizes) * bits))
        assert at_most(frontier, cost) <= value * (1 + 1e-12)


@pytest.mark.parametrize("widths", [{"DENSE_STEPS": 0}, {"DENSE_STEPS": math.inf}], ids=["sorted", "dense"])
def test_both_merges_make_the_same_choices(widths: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    case = network_of(60, 1)
    shipped = pareto_frontier(*case)
    for name, value in widths.items():
        monkeypatch.setattr(pareto, name, value)
    forced = pareto_frontier(*case)
    assert 7 * len(shipped) > pareto.CHUNK
    assert points_of(forced) == points_of(shipped)
    assert np.array_equal(forced.choices(), shipped.choices())


@given(SEEDS, st.floats(-50, 200), st.floats(0, 100))
def test_a_larger_budget_never_gives_a_larger_value(seed: int, limit: float, more: float) -> None:
    case = case_of(seed)
    frontier = pareto_frontier(*case)
    small, large = frontier.within(limit), frontier.within(limit + more)
    fitting = [value for cost, value in enumerated(case) if cost <= limit]
    if small is None:
        assert not fitting
    else:
        assert large is not None
        assert frontier.costs[small] <= limit
        assert frontier.values[small] == min(fitting)
        assert frontier.values[large] <= frontier.values[small]


def test_a_budget_is_met_exactly_or_not_at_all() -> None:
    frontier = pareto_frontier([[10, 20], [5, 30]], [[4.0, 1.0], [2.0, 1.0]])
    assert frontier.costs.tolist() == [15, 25, 50]
    assert [frontier.within(limit) for limit in (-math.inf, 14.999, 15, 49.9, 50, math.inf)] == [None, None, 0, 1, 2, 2]
    with pytest.raises(ValueError, match="can't be nan"):
        frontier.within(math.nan)


@given(SEEDS, st.integers(2, 10**6), st.integers(-(10**9), 10**9))
def test_costs_in_another_unit_change_nothing_else(seed: int, unit: int, overhead: int) -> None:
    costs, values = case_of(seed)
    frontier = pareto_frontier(costs, values)
    scaled = pareto_frontier([[cost * unit + overhead for cost in row] for row in costs], values)
    assert scaled.costs.tolist() == [cost * unit + overhead * len(costs) for cost in frontier.costs.tolist()]
    assert scaled.values.tolist() == frontier.values.tolist()
    assert np.array_equal(scaled.choices(), frontier.choices())


@given(SEEDS, st.randoms(use_true_random=False))
def test_the_order_of_the_options_changes_no_point(seed: int, random: Any) -> None:
    costs, values = case_of(seed)
    orders = [random.sample(range(len(row)), len(row)) for row in costs]
    shuffled_costs = [[row[option] for option in order] for row, order in zip(costs, orders, strict=True)]
    shuffled_values = [[row[option] for option in order] for row, order in zip(values, orders, strict=True)]
    assert points_of(pareto_frontier(shuffled_costs, shuffled_values)) == points_of(pareto_frontier(costs, values))


@pytest.mark.usefixtures("way")
def test_a_tie_takes_the_cheapest_option_of_the_later_items() -> None:
    frontier = pareto_frontier([list(range(7))] * 12, [[-float(cost) for cost in range(7)]] * 12)
    assert frontier.costs.tolist() == list(range(73))
    for cost, choice in enumerate(frontier.choices().tolist()):
        assert choice == [min(6, max(0, cost - 6 * item)) for item in range(12)]


def test_of_equal_options_the_first_is_chosen() -> None:
    frontier = pareto_frontier([[4, 2, 2, 4], [3, 3]], [[0.0, 1.0, 1.0, 0.0], [5.0, 5.0]])
    assert frontier.choices().tolist() == [[1, 0], [0, 0]]


def test_no_items_cost_nothing() -> None:
    frontier = pareto_frontier([], [])
    assert points_of(frontier) == [(0, 0.0)]
    assert frontier.choice(0) == ()
    assert frontier.choices().shape == (1, 0)


def test_256_options_and_costs_near_the_end_of_int64_are_read_back() -> None:
    costs = [[option * 2**52 for option in range(256)], [0, 2**52 + 1]]
    values = [[float(-option) for option in range(256)], [0.0, -0.5]]
    frontier = pareto_frontier(costs, values)
    assert points_of(frontier)[-2:] == [(255 * 2**52, -255.0), (256 * 2**52 + 1, -255.5)]
    assert frontier.choice(len(frontier) - 1) == (255, 1)


def test_numpy_rows_do_as_well_as_lists() -> None:
    costs, values = case_of(3)
    rows = [np.array(row, np.int32) for row in costs], [np.array(row) for row in values]
    assert points_of(pareto_frontier(*rows)) == points_of(pareto_frontier(costs, values))  # type: ignore[arg-type]


def test_a_value_that_is_not_finite_is_refused_by_item() -> None:
    with pytest.raises(NumericsError, match="loss of item 1 is nan at option 2") as caught:
        pareto_frontier([[1], [1, 2, 3]], [[0.0], [1.0, 0.5, math.nan]])
    assert "measured on" in caught.value.hint
    with pytest.raises(NumericsError, match="loss of item 0 is inf at option 0"):
        pareto_frontier([[1]], [[math.inf]])
    with pytest.raises(NumericsError, match="more than a float64 holds at item 1"):
        pareto_frontier([[1], [1]], [[1e308], [-1e308]])


@pytest.mark.parametrize(
    ("costs", "values", "words"),
    [
        ([[1], []], [[0.0], []], "item 1 has 0 options: 1 to 256 are allowed"),
        ([[1] * 257], [[0.0] * 257], "item 0 has 257 options"),
        ([[1]], [[0.0], [0.0]], "1 items have costs and 2 have values"),
        ([[1], [1, 2]], [[0.0], [0.0]], "item 1 has 2 costs and 1 values"),
        ([[1, 2.5]], [[0.0, 0.0]], r"item 0 has costs \[1, 2.5\]: they must be integers of 64 bits"),
        ([[2**70]], [[0.0]], "integers of 64 bits"),
        ([[2**62], [1]], [[0.0], [0.0]], "the costs add up to 4611686018427387905: at most"),
    ],
)
def test_a_wrong_shape_or_cost_is_refused(costs: Any, values: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        pareto_frontier(costs, values)


@pytest.mark.parametrize("steps", [0, math.inf], ids=["sorted", "dense"])
def test_a_frontier_that_outgrows_the_memory_is_refused(steps: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pareto, "DENSE_STEPS", steps)
    monkeypatch.setattr(pareto, "MEMORY_LIMIT", 20_000)
    with pytest.raises(OutOfMemoryError, match=r"needs \d.*KB or more: 20KB are allowed") as caught:
        pareto_frontier(*network_of(60, 1))
    assert "coarser unit" in caught.value.hint
