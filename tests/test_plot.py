"""The plot is well-formed XML that runs nothing, and each bar's length is the logarithm of its value."""

from __future__ import annotations

import math
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress.plot import BAR_WIDTH, Dot, bars_svg, curve_svg, decades, even_ticks, share

SVG = "{http://www.w3.org/2000/svg}"
ENTRIES = [("conv1", 0.5, 0.1), ("head", 200.0, 20.0), ("stem", 0.003, 0.01)]


def drawn(entries: list[tuple[str, float, float]], title: str = "traces", unit: str = "loss") -> ElementTree.Element:
    return ElementTree.fromstring(bars_svg(title, unit, entries))


def rows(root: ElementTree.Element) -> list[ElementTree.Element]:
    return root.findall(f"{SVG}g")


def labels(root: ElementTree.Element) -> list[str]:
    return [row.findall(f"{SVG}text")[0].text or "" for row in rows(root)]


def test_bars_are_sorted_by_value_and_carry_their_numbers() -> None:
    root = drawn(ENTRIES)
    assert labels(root) == ["head", "conv1", "stem"]
    assert [row.findall(f"{SVG}text")[1].text for row in rows(root)] == ["200 ± 20", "0.5 ± 0.1", "0.003 ± 0.01"]
    texts = [text.text for text in root.findall(f"{SVG}text")]
    assert texts[:2] == ["traces", "loss, logarithmic axis"]
    assert texts[2:] == ["0.001", "0.01", "0.1", "1", "10", "100", "1000"]


def test_lengths_are_logarithms_of_the_values() -> None:
    bars = [row.find(f"{SVG}rect") for row in rows(drawn(ENTRIES))]
    lengths = [float(bar.attrib["width"]) for bar in bars if bar is not None]
    expected = [BAR_WIDTH * (math.log10(value) + 3) / 6 for value in (200.0, 0.5, 0.003)]
    assert lengths == pytest.approx(expected, abs=0.05)


def test_whiskers_span_one_standard_error_and_end_at_the_axis() -> None:
    paths = [row.find(f"{SVG}path") for row in rows(drawn(ENTRIES))]
    (head, _, stem) = [path.attrib["d"] for path in paths if path is not None]
    bar = rows(drawn(ENTRIES))[0].find(f"{SVG}rect")
    assert bar is not None
    left = float(bar.attrib["x"])
    ends = [left + BAR_WIDTH * (math.log10(value) + 3) / 6 for value in (180.0, 220.0)]
    start, stop = head.removeprefix("M").split(" ")[0], head.split("H")[1].split("M")[0]
    assert [float(start), float(stop)] == pytest.approx(ends, abs=0.05)
    assert stem.startswith(f"M{left:.1f} "), "an error larger than the value reaches down to the axis"
    assert head.count("v") == 2 and stem.count("v") == 1


@pytest.mark.parametrize("value", [0.0, -2.0, math.nan])
def test_a_value_without_a_logarithm_has_its_number_and_no_bar(value: float) -> None:
    (_, row) = rows(drawn([("good", 1.0, 0.0), ("other", value, 0.5)]))
    assert row.find(f"{SVG}rect") is None and row.find(f"{SVG}path") is None
    assert row.findall(f"{SVG}text")[1].text == f"{value:.3g} ± 0.5"


def test_a_layer_name_is_text_and_nothing_else() -> None:
    name = '</text><script>alert(1)</script>&\x1b[31m\ud800"'
    text = bars_svg(name, name, [(name, 1.0, 0.1)])
    assert "<script" not in text and "\x1b" not in text
    root = ElementTree.fromstring(text)
    assert {element.tag.removeprefix(SVG) for element in root.iter()} <= {
        *("svg", "title", "style", "rect", "text", "line", "g", "path")
    }
    assert "\\x1b[31m\\ud800" in labels(root)[0]


def test_nothing_is_fetched_and_both_colour_schemes_are_styled() -> None:
    text = bars_svg("t", "u", ENTRIES)
    style = ElementTree.fromstring(text).findtext(f"{SVG}style") or ""
    assert "prefers-color-scheme: dark" in style
    assert not any(word in text.replace(SVG[1:-1], "") for word in ("http", "url(", "@import", "href", " on"))


def test_a_long_name_is_cut_in_its_middle_and_whole_on_hover() -> None:
    name = "a" * 50 + "middle" + "b" * 50
    (row,) = rows(drawn([(name, 1.0, 0.0)]))
    assert "..." in labels(drawn([(name, 1.0, 0.0)]))[0]
    assert row.findtext(f"{SVG}title") == f"{name}: 1"


@given(st.lists(st.tuples(st.text(), st.floats(), st.floats(min_value=0)), max_size=5))
def test_any_entries_give_a_picture_with_every_bar_inside(entries: list[tuple[str, float, float]]) -> None:
    root = drawn(entries)
    width = float(root.attrib["width"])
    for bar in root.iter(f"{SVG}rect"):
        assert float(bar.attrib["width"]) >= 0
        assert float(bar.attrib.get("x", 0)) + float(bar.attrib["width"]) <= width
    assert len(rows(root)) == len(entries)


@pytest.mark.parametrize(
    ("values", "expected"),
    [([1.0], (-1, 0)), ([1.0, 10.0], (-1, 1)), ([2.0, 30.0], (0, 2)), ([0.0, -1.0], None), ([5e-324], (-324, -323))],
)
def test_the_axis_has_room_below_the_smallest_value(values: list[float], expected: tuple[int, int] | None) -> None:
    assert decades(values) == expected


def test_a_share_is_measured_in_decades() -> None:
    assert share(10.0, (0, 2)) == 0.5


DOTS = [
    Dot(0.5, 90.0, "90 %", "first", True),
    Dot(0.6, None, "none", "<why>", False),
    Dot(0.7, 80.0, "80 %", "x", False),
]


def test_a_curve_goes_through_the_points_that_have_a_value() -> None:
    root = ElementTree.fromstring(curve_svg("a & b", ("x", "y"), DOTS, [(91.0, "dense")]))
    circles = [(float(c.attrib["cx"]), float(c.attrib["cy"])) for c in root.iter("circle")]
    (line,) = [path.attrib["d"] for path in root.iter("path") if path.attrib["class"] == "curve"]
    assert line == "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in circles)
    assert circles[0][0] < circles[1][0] and circles[0][1] < circles[1][1], "up is better"
    assert [c.attrib["class"] for c in root.iter("circle")] == ["dot good", "dot bad"]
    assert len([path for path in root.iter("path") if path.attrib["class"] == "missing"]) == 1
    assert [group.findtext("title") for group in root.iter("g")] == ["first", "<why>", "x"]
    (level,) = [line for line in root.iter("line") if line.attrib["class"] == "level"]
    assert float(level.attrib["y1"]) < circles[0][1]


@pytest.mark.parametrize("values", [[1.0], [None], [None, None], [5.0, 5.0], [0.0], [-1e-9, 1e9]])
def test_any_values_give_a_curve(values: list[float | None]) -> None:
    dots = [Dot(number / 10, value, "", "", True) for number, value in enumerate(values)]
    root = ElementTree.fromstring(curve_svg("t", ("x", "y"), dots, []))
    places = [float(c.attrib[name]) for c in root.iter("circle") for name in ("cx", "cy")]
    assert all(0 <= place <= 720 for place in places)


@given(st.floats(-1e3, 1e3), st.floats(1e-3, 1e6))
def test_ticks_are_round_even_and_inside(low: float, width: float) -> None:
    ticks = even_ticks(low, low + width)
    assert 2 <= len(ticks) <= 7
    assert all(low - 1e-6 * width <= tick <= low + width * (1 + 1e-6) for tick in ticks)
