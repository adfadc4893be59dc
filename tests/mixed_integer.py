"""Bit widths for layers of real sizes, and a mixed-integer solver's choice of them: HiGHS through scipy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from compress.numerics.pareto import Frontier

WIDTHS = range(2, 9)
Case = tuple[list[list[int]], list[list[float]]]


def resnet50() -> list[int]:
    """Elements of its 53 convolutions and its linear layer."""
    sizes = [64 * 3 * 49]
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for number in range(blocks):
            sizes += [inputs * width, 9 * width * width, width * 4 * width]
            if number == 0:
                sizes.append(inputs * 4 * width)
            inputs = 4 * width
    return [*sizes, 2048 * 1000]


def widths_of(sizes: Sequence[int], seed: int = 0) -> Case:
    """Costs in bits at 2 to 8 bits, and losses that fall by about four a bit, as those of rounding do."""
    rng = np.random.default_rng(seed)
    scale = np.exp(rng.normal(0, 1.5, len(sizes)))
    noise = np.exp(rng.normal(0, 0.2, (len(sizes), len(WIDTHS))))
    costs = [[size * bits for bits in WIDTHS] for size in sizes]
    values = [
        [float(s * e * 4.0**-bits) for bits, e in zip(WIDTHS, row, strict=True)]
        for s, row in zip(scale, noise, strict=True)
    ]
    return costs, values


def solved(case: Case, budget: int) -> tuple[int, float]:
    """Cost and loss of the best that HiGHS finds; it may miss the budget by its tolerance, a millionth."""
    costs, values = (np.array(part, dtype=np.float64) for part in case)
    items, options = costs.shape
    one_of_each = np.kron(np.eye(items), np.ones(options))
    scale = values.max()  # HiGHS has absolute tolerances
    found = milp(
        (values / scale).ravel(),
        constraints=[
            LinearConstraint(one_of_each, 1, 1),
            LinearConstraint(costs.ravel()[None] / budget, -np.inf, 1),
        ],
        integrality=np.ones(items * options),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 0.0},
    )
    assert found.x is not None, found.message
    chosen = found.x.reshape(items, options).argmax(1)
    rows = np.arange(items)
    return int(costs[rows, chosen].sum()), float(values[rows, chosen].sum())


def at_most(frontier: Frontier, budget: int) -> float:
    """The least loss of a point within the budget."""
    place = int(np.searchsorted(frontier.costs, budget, side="right")) - 1
    return float(frontier.values[place])
