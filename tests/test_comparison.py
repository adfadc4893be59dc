"""Two records side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence
from xml.etree import ElementTree

import pytest

from compress.comparison import compare_records, comparison_cells, comparison_svg, comparison_text, option_text
from compress.errors import UsageError
from compress.sensitivity import Estimate, Sensitivity

SHA = "0" * 64


def record(values: Sequence[float], *, option: str = "", stderr: float = 0.0, **others: float) -> Sensitivity:
    entries = {(f"layer{number}", option): Estimate(value, stderr) for number, value in enumerate(values)}
    entries |= {(name, option): Estimate(value) for name, value in others.items()}
    return Sensitivity("fisher", "loss", SHA, None, entries)


def test_layers_stand_by_the_first_measure_with_both_ranks() -> None:
    found = compare_records(("a", "b"), (record([1, 3, 2], extra=9.0), record([10, 20, 30], other=1.0)))
    assert [entry["layer"] for entry in found["entries"]] == ["layer1", "layer2", "layer0"]
    assert [entry["ranks"] for entry in found["entries"]] == [[1, 2], [2, 1], [3, 3]]
    assert found["spearman"] == 0.5 and found["spearman_stderr"] == 0.0
    assert found["left_out"] == ["extra", "other"]
    assert comparison_text(found) == "Spearman rho 0.500 of a and b over 3 layers"
    assert comparison_cells(found)[0] == ("layer1", "3", "1", "20", "2")


def test_errors_spread_the_correlation() -> None:
    sharp, close = record(range(1, 21)), record(range(1, 21), stderr=0.1)
    noisy = record(range(1, 21), stderr=10.0)
    spreads = [compare_records(("a", "b"), (sharp, other))["spearman_stderr"] for other in (sharp, close, noisy)]
    assert spreads[0] == 0.0 and spreads[0] <= spreads[1] < spreads[2] < 1
    assert "+-" in comparison_text(compare_records(("a", "b"), (sharp, noisy)))


def test_one_option_stands_for_a_layer() -> None:
    both = {**record([1, 2, 3], option="3").entries, **record([3, 2, 1], option="4").entries}
    found = compare_records(("a", "b"), (Sensitivity("x", "nats", SHA, None, both), record([1, 2, 3])))
    assert found["spearman"] == -1.0
    assert "a (4 bits)" in comparison_text(found)
    assert [option_text(o) for o in ("4", "0.5", "eigenvalue 1")] == ["4 bits", "sparsity 0.5", "eigenvalue 1"]


def test_equal_values_have_no_correlation() -> None:
    found = compare_records(("a", "b"), (record([1, 1, 1]), record([1, 2, 3])))
    assert found["spearman"] is None
    assert comparison_text(found).startswith("Spearman rho undefined, as all values of one are equal, of a and b")


def test_two_layers_have_no_order_to_compare() -> None:
    with pytest.raises(UsageError, match=r"^a and b have 2 layers in common, and 3 are the fewest to compare\n"):
        compare_records(("a", "b"), (record([1, 2]), record([1, 2, 3])))


def test_the_plot_has_a_dot_a_layer_at_the_logarithms_of_its_values() -> None:
    found = compare_records(("a<b", "b"), (record([1, 10, 100, -1]), record([1, 10, 100, 5])))
    root = ElementTree.fromstring(comparison_svg(found))
    dots = [group.find("circle") for group in root.findall("g")]
    places = [(float(dot.attrib["cx"]), float(dot.attrib["cy"])) for dot in dots if dot is not None]
    assert len(places) == 4
    (x2, y2), (x1, y1), (x0, y0), (x_none, _) = places
    assert math.isclose(x2 - x1, x1 - x0, abs_tol=0.2) and math.isclose(y2 - y1, y1 - y0, abs_tol=0.2)
    assert x0 < x1 < x2 and y0 > y1 > y2 and x_none == 70.0
