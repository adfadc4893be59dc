"""Histograms of saliencies: every one is counted once, in the bin of its logarithm, and the words are the record's."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compress import canonical
from compress.saliencies import MOST_BINS, saliency_histogram
from compress.saliency_plot import saliency_svg, saliency_text


@given(st.lists(st.tuples(st.floats(0, 1e300), st.booleans()), min_size=1, max_size=60))
def test_every_saliency_is_counted_once(entries: list[tuple[float, bool]]) -> None:
    values = torch.tensor([value for value, _ in entries], dtype=torch.float64)
    kept = torch.tensor([flag for _, flag in entries])
    found = saliency_histogram(values, kept, what="size")
    for part, which in ((found.kept, kept), (found.removed, ~kept)):
        own = values[which]
        assert part.count == len(own) == part.zeros + sum(part.bins) and len(part.bins) <= MOST_BINS
        assert part.zeros == int((own == 0).sum())
        if part.count > part.zeros:
            assert (part.least, part.most) == (float(own[own > 0].min()), float(own.max()))
    saliency_svg(canonical.plain(found))
    saliency_text(canonical.plain(found))


def test_a_saliency_lies_in_the_bin_of_its_logarithm() -> None:
    values = torch.tensor([0.011, 0.012, 0.2, 5.0, 0.0, math.inf])
    kept = torch.tensor([False, False, False, True, False, True])
    found = saliency_histogram(values, kept, what="size", unit="loss")
    assert found.step == 0.125 and found.low == -2.0
    assert {number: count for number, count in enumerate(found.removed.bins) if count} == {0: 2, 10: 1}
    assert {number: count for number, count in enumerate(found.kept.bins) if count} == {21: 1}
    assert (found.removed.count, found.removed.zeros, found.removed.median) == (4, 1, pytest.approx(0.012))
    assert found.kept.count == 1, "what stays in any case has no place"


def test_a_few_tiny_ones_do_not_stretch_the_axis() -> None:
    values = torch.cat([torch.full((2000,), 0.5), torch.full((2000,), 0.05), torch.tensor([1e-30])])
    found = saliency_histogram(values.double(), values > 0.1, what="size")
    assert found.low > -2 and found.removed.bins[0] == 2001 and found.removed.least == pytest.approx(1e-30)


def test_the_words_and_the_bars_are_the_records() -> None:
    values = torch.tensor([0.0, 0.1, 0.2, 1.0, 2.0], dtype=torch.float64)
    found = canonical.plain(saliency_histogram(values, values > 0.5, what="<size>", unit="loss"))
    assert saliency_text(found) == (
        "Saliency: <size> (loss). Removed: 3 weights, 1 of them zero, from 0.1 to 0.2, median 0.2. "
        "Kept: 2 weights, from 1 to 2, median 2"
    )
    svg = saliency_svg(found)
    assert svg.count('<rect class="removed"') == 2 and svg.count('<rect class="kept"') == 2
    assert "&lt;size&gt;" in svg and "<size>" not in svg
    assert "1 weights kept" in svg and "up to " in svg
