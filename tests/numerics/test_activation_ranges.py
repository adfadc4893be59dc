"""Ranges of activations: against the values themselves, and against the definitions written out."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compress.numerics.activation_ranges import (
    NESTED,
    NUM_CLIPS,
    RULES,
    SMALLEST_CLIP,
    between_steps,
    clipped_range,
    divergent_range,
    squared_error,
)
from compress.numerics.rounding import activation_grid

SEEDS = st.integers(0, 10_000)
BINS = 2048


def heavy_tailed(seed: int, least: float) -> tuple[Tensor, Tensor, float, float]:
    """Values, their histogram and its ends."""
    values = torch.randn(4000, generator=torch.Generator().manual_seed(seed)).pow(3).clamp(min=10 * least)
    values = values.abs() if least > 0 else values
    low, high = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
    return values, torch.histc(values, BINS, low, high).double(), low, high


@given(st.floats(-10, 0), st.floats(0.1, 10), st.floats(0.05, 1), st.floats(0.05, 1), st.sampled_from([4, 6]))
def test_no_value_of_eight_bits_is_halfway_between_levels(
    low: float, high: float, a: float, b: float, bits: int
) -> None:
    found = between_steps(a * low, b * high, bits, (low, high))
    (step, eight), (scale, zero_point) = activation_grid(low, high, 8), activation_grid(*found, bits)
    values = (torch.arange(256, dtype=torch.float64) - eight) * step / scale
    away = (values - values.floor() - 0.5).abs() * scale / step
    assert float(away.min()) >= 1 / (2 * NESTED) - 1e-9
    assert 0 <= zero_point < 2**bits
    assert abs(scale - activation_grid(a * low, b * high, bits)[0]) <= step / NESTED * 1.001


def activation_error(values: Tensor, low: float, high: float, bits: int) -> float:
    scale, zero_point = activation_grid(low, high, bits)
    rounded = torch.fake_quantize_per_tensor_affine(values, scale, zero_point, 0, 2**bits - 1)
    return float((values - rounded).double().square().sum())


@settings(max_examples=15)
@given(SEEDS, st.sampled_from([4, 6]), st.sampled_from([-1.0, 0.0, 1.0]))
def test_a_clipped_range_is_the_best_of_those_tried(seed: int, bits: int, least: float) -> None:
    values, counts, low, high = heavy_tailed(seed, least)
    found = clipped_range(counts, low, high, bits)
    shares = torch.linspace(1, SMALLEST_CLIP, NUM_CLIPS).tolist()
    errors = {(a, b): activation_error(values, a * low, b * high, bits) for a in shares for b in shares}
    assert low <= found[0] <= 0 <= found[1] <= high
    assert activation_error(values, *found, bits) < 1.05 * min(errors.values())  # of values, not of their bins
    assert activation_error(values, *found, bits) <= errors[1.0, 1.0]


def test_a_range_without_tails_stays_whole() -> None:
    values = torch.linspace(0, 3, 10_001)
    low, high = clipped_range(torch.histc(values, BINS, 0, 3).double(), 0.0, 3.0, 4)
    assert low == 0
    assert high > 2.8


@given(SEEDS, st.sampled_from([4, 6, 8]), st.sampled_from([-1.0, 0.0, 1.0]))
def test_the_error_of_a_histogram_is_that_of_the_values(seed: int, bits: int, least: float) -> None:
    values, counts, low, high = heavy_tailed(seed, least)
    ends = 0.5 * low, 0.4 * high
    slack = len(values) * ((high - low) / BINS) ** 2  # half a bin off at each value
    assert squared_error(counts, low, high, ends, bits) == pytest.approx(
        activation_error(values, *ends, bits), rel=0.02, abs=slack
    )


@pytest.mark.parametrize("rule", RULES)
@settings(max_examples=10)
@given(seed=SEEDS, bits=st.sampled_from([4, 8]), least=st.sampled_from([-1.0, 0.0, 1.0]))
def test_every_rule_stays_within_the_extremes(rule: str, seed: int, bits: int, least: float) -> None:
    _, counts, low, high = heavy_tailed(seed, least)
    found = RULES[rule](counts, low, high, bits)
    assert low <= found[0] <= 0 <= found[1] <= high
    assert found[0] < found[1]


@given(SEEDS, st.sampled_from(["p99.9", "p99.99"]), st.sampled_from([-1.0, 0.0, 1.0]))
def test_a_percentile_is_that_of_the_values(seed: int, rule: str, least: float) -> None:
    values, counts, low, high = heavy_tailed(seed, least)
    percent, width = float(rule[1:]), (high - low) / BINS
    above = np.quantile(values.numpy(), percent / 100, method="higher")
    below = np.quantile(values.numpy(), 1 - percent / 100, method="lower")
    found = RULES[rule](counts, low, high, 8)
    assert found[1] == pytest.approx(max(above, 0), abs=1.01 * width)
    assert found[0] == pytest.approx(min(below, 0), abs=1.01 * width)


def test_what_is_clipped_beyond_a_percentile_is_a_share_of_the_values() -> None:
    values = torch.cat([torch.rand(99_990), torch.full((10,), 50.0)])
    counts = torch.histc(values, BINS, 0, 50).double()
    assert RULES["p99.9"](counts, 0.0, 50.0, 8)[1] < 1.1
    assert RULES["minmax"](counts, 0.0, 50.0, 8) == (0.0, 50.0)


@settings(max_examples=8)
@given(SEEDS)
def test_the_divergent_range_is_the_best_by_the_definition_written_out(seed: int) -> None:
    values, _, low, high = heavy_tailed(seed, 0.0)
    bins, bits = 64, 3
    counts = torch.histc(values, bins, low, high).double()
    width = (high - low) / bins
    centres = [low + width * (k + 0.5) for k in range(bins)]
    zero_bin = min(int(-low / width), bins - 1)
    left = [0.0 if k == zero_bin else float(c) for k, c in enumerate(counts)]

    def divergence(bottom: float, top: float) -> float:
        inside = [k for k in range(bins) if bottom <= centres[k] <= top]
        if not sum(left[k] for k in inside):
            return math.inf
        p = {k: left[k] for k in inside}
        p[inside[0]] += sum(left[k] for k in range(bins) if centres[k] < bottom)
        p[inside[-1]] += sum(left[k] for k in range(bins) if centres[k] > top)
        scale, zero = activation_grid(bottom, top, bits)
        levels = {k: min(max(round(centres[k] / scale), -zero), 2**bits - 1 - zero) for k in inside}
        q = dict.fromkeys(inside, 0.0)
        for level in set(levels.values()):
            used = [k for k in inside if levels[k] == level and left[k]]
            for k in used:
                q[k] = sum(left[j] for j in used) / len(used)
        whole_p, whole_q = sum(p.values()), sum(q.values())
        return sum(v / whole_p * math.log(v / whole_p / max(q[k] / whole_q, 1e-12)) for k, v in p.items() if v)

    shares = torch.linspace(1, SMALLEST_CLIP, NUM_CLIPS, dtype=torch.float64).tolist()
    least = min(divergence(a * low, b * high) for a in shares for b in shares)
    assert divergence(*divergent_range(counts, low, high, bits)) == pytest.approx(least, rel=1e-9)
