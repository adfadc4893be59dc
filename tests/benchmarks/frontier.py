"""Measure the exact frontier of bit widths: its time, and its points against a mixed-integer solver's.

    python -m tests.benchmarks.frontier --out docs/benchmarks.md

The networks are lists of layer sizes: ResNet-50's 54 weights, and 500 layers of a transformer's and of odd sizes. The
peer is HiGHS through scipy, asked for one budget at a time, to its own optimality gap of 0.
Cost: a minute or two of one core.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from compress.numerics.pareto import pareto_frontier

from ..mixed_integer import at_most, resnet50, solved, widths_of
from .page import machine, publish, table

TITLE = "The exact frontier"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and put the section into the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budgets", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args(arguments)
    rng = np.random.default_rng(1)
    blocks = [size for _ in range(62) for size in (768 * 768, 768 * 768, 768 * 768, 768 * 768, 768 * 3072, 3072 * 768)]
    odd = [64 * int(size) for size in rng.integers(100, 40_000, 500 - len(blocks))]
    cases = {"ResNet-50's 54 weights": widths_of(resnet50()), "500 layers": widths_of([*blocks, *odd])}
    rows = []
    for name, case in cases.items():
        times = []
        for _ in range(given.rounds):
            start = time.process_time()
            frontier = pareto_frontier(*case)
            times.append(time.process_time() - start)
        rows.append((name, f"{statistics.median(times):.3f} s", f"{len(frontier.costs):,}"))
    case = cases["ResNet-50's 54 weights"]
    frontier, total = pareto_frontier(*case), sum(resnet50())
    budgets = [round(total * bits) for bits in np.linspace(2.05, 7.9, given.budgets)]
    start = time.process_time()
    theirs = [solved(case, budget) for budget in budgets]
    spent = (time.process_time() - start) / len(budgets)
    excess = [at_most(frontier, cost) / value - 1 for cost, value in theirs]
    text = [
        *machine(),
        "",
        "One thread; processor time, medians.",
        "",
        table(("whole frontier of 2 to 8 bits", "CPU time", "points"), rows),
        f"Against HiGHS at {len(budgets)} budgets of ResNet-50, {spent:.2g} s each: for the cost of its choice,",
        f"the frontier's loss is {-min(excess):.1g} below it to {max(max(excess), 0.0):.1g} above it, relative.",
        "",
        "```sh",
        "python -m tests.benchmarks.frontier --out docs/benchmarks.md",
        "```",
    ]
    publish(given.out, TITLE, text)


if __name__ == "__main__":
    main()
