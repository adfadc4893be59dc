"""The report says the record's figures in words that a person reads, and nothing that a checkpoint smuggled in."""

from __future__ import annotations

import itertools
import math
import re
from html.parser import HTMLParser
from typing import Any

import pytest

from compress.report import (
    MAX_POINTS,
    amount_text,
    brief,
    frontier_text,
    headline,
    loss_text,
    render_html,
    render_markdown,
    sensitivity_text,
    thinned,
    verdict_of,
    verdict_text,
)

VOID = {"meta", "link", "rect", "line", "path", "circle", "br"}
EVIL = '<script>alert(1)</script>|`"\x1b[31m\u202e'


def make_layer(number: int, **changes: Any) -> dict[str, Any]:
    layer = {
        "tensor": f"layer{number}.conv.weight",
        "op": "conv2d",
        "shape": [16, 16, 3, 3],
        "elements": 2304 + number,
        "macs": 2359296 + number,
        "bits": 2 + number % 5,
        "sparsity": 0.0,
        "decision": "quantize",
        "relative_error": 0.01 * (number % 7 + 1),
        "why": f"reason {number}",
    }
    return layer | changes


def make_report(num_layers: int = 20, **changes: Any) -> dict[str, Any]:
    report = {
        "schema": "hcompress.report/1",
        "command": "quantize",
        "method": "uniform",
        "seed": 7,
        "metric": {
            "name": "accuracy",
            "unit": "%",
            "higher_is_better": True,
            "dense": 91.73,
            "compressed": 91.52,
            "num_examples": 10000,
            "runtime": "onnxruntime",
        },
        "files": {"model.onnx": 283123, "model.safetensors": 279001},
        "dense_bytes": 1093456,
        "average_bits": 4.0213,
        "sparsity": 0.125,
        "params": {"dense": 272474, "compressed": 270001},
        "macs": {"dense": 40813184, "compressed": 30609888},
        "latency_ms": {"dense": 2.412, "compressed": 1.311},
        "parity": [
            {"batch": 1, "max_abs": 3.1e-06, "argmax_agreement": 1.0},
            {"batch": 64, "max_abs": 5.2e-06, "argmax_agreement": None},
        ],
        "checks": [
            {"name": "max_drop", "value": 0.21, "limit": 1.0, "unit": "points", "ok": True},
            {"name": "max_bytes", "value": 283123, "limit": 300000.0, "unit": "bytes", "ok": True},
        ],
        "time_s": 38.41,
        "peak_rss_bytes": 1234567890,
        "layers": [make_layer(number) for number in range(1, num_layers + 1)],
        "notes": ["MACs are counted at batch 1"],
        "source": {"name": "resnet20.pt", "sha256": "ab" * 32},
        "budget": "25%",
        "delivered": "model.onnx",
        "versions": {"hcompress": "0.1.0", "torch": "2.13.0"},
    }
    return report | changes


def make_frontier(num_points: int = 61, **changes: Any) -> dict[str, Any]:
    """From 2 to 8 average bits; the loss falls by e with each bit, and one width everywhere loses 4.95 times that."""
    costs = [2 + 6 * n / max(num_points - 1, 1) for n in range(num_points)]
    index = 20 * num_points // 61
    frontier = {
        **{"quantity": "bits", "unit": "average bits", "loss_unit": "nats"},
        **{"num_points": num_points, "index": index, "cost": costs[index], "loss": math.exp(-costs[index])},
        "points": [[cost, math.exp(-cost)] for cost in costs],
        "rivals": [{"name": f"{n} bits", "cost": float(n), "loss": 4.95 * math.exp(-n)} for n in range(2, 9)],
    }
    return frontier | changes


def alternatives(chosen: int) -> list[dict[str, Any]]:
    return [
        {"option": f"{n} bits", "cost": 36864.0 * n, "unit": "bytes", "loss": 0.02 * 4.0**-n, "chosen": n == chosen}
        for n in (2, 4, 8, 16)
    ]


def explained_layer(number: int, **changes: Any) -> dict[str, Any]:
    measured = {"measure": "hessian-trace", "value": 10.0 + number, "stderr": 0.25, "unit": "loss per squared weight"}
    return make_layer(number, sensitivity=measured, alternatives=alternatives(2 ** (1 + number % 3)), **changes)


def make_predictors(**changes: Any) -> dict[str, Any]:
    measured = [0.01 * 1.3**n for n in range(10)]
    predicted = {
        "hawq": [50 * m * (1 + n % 3) for n, m in enumerate(measured)],
        "output-change": [0.9 * m for m in measured],
    }
    return {
        **{"num_configurations": 10, "num_examples": 128, "levels": "the nearest", "unit": "nats"},
        **{"average_bits": [3.0 + 0.1 * n for n in range(10)], "measured": measured},
        "predictors": [
            {"name": "hawq", "spearman": 0.91234, "spread": 2.9, "ratio": 100.0, "predicted": predicted["hawq"]},
            {
                "name": "output-change",
                "spearman": 1.0,
                "spread": 1.0,
                "ratio": 0.9,
                "predicted": predicted["output-change"],
            },
        ],
    } | changes


PARTS = {"weights": 200000, "scales": 5708, "floats": 0, "constants": 5832, "nodes": 68000, "rest": 3583}
LOSS = {"predicted": 0.0021, "measured": 0.0030, "unit": "nats", "what": "KL divergence", "num_examples": 512}


class Page(HTMLParser):
    """A page as the parser sees it: the tags, the text and the figures, by the table they stand in."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.figures: list[tuple[float, str]] = []
        self.rows: dict[str, list[list[str]]] = {}
        self.table = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "table":
            self.table = dict(attrs)["id"] or ""
            self.rows[self.table] = []
        if tag == "tr":
            self.rows[self.table].append([])
        if tag in ("td", "th"):
            self.rows[self.table][-1].append("")
        if tag == "data":
            self.figures.append((float(dict(attrs)["value"] or "nan"), ""))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            return
        self.text += data
        if "td" in self.open or "th" in self.open:
            self.rows[self.table][-1][-1] += data
        if self.open and self.open[-1] == "data":
            value, text = self.figures[-1]
            self.figures[-1] = value, text + data


def make_activation(number: int, bits: int) -> dict[str, Any]:
    own = {"tensor": f"relu_{number}", "bits": bits, "range": [0.0, 1.0], "read_by": [f"{number}.weight"]}
    return own | {"sensitivity": None, "alternatives": []}


CASES = {
    "quantize": make_report(),
    "prune": make_report(
        command="prune",
        method="magnitude",
        layers=[make_layer(n, decision="mask", bits=32, sparsity=n / 30) for n in range(1, 21)],
    ),
    "both": make_report(layers=[make_layer(n, sparsity=n / 30) for n in range(1, 21)]),
    "export": make_report(
        command="export",
        method=None,
        budget=None,
        checks=[],
        notes=[],
        layers=[make_layer(n, decision="keep", bits=32, relative_error=0.0) for n in range(1, 4)],
    ),
    "one layer": make_report(1),
    "two layers": make_report(2),
    "300 layers": make_report(300),
    "no layers": make_report(0),
    "explained": make_report(
        layers=[explained_layer(n) for n in range(1, 21)], frontier=make_frontier(), loss=dict(LOSS)
    ),
    "keys of null": make_report(
        layers=[make_layer(1, sensitivity=None, alternatives=[])],
        **{"frontier": None, "loss": LOSS | {"predicted": None}, "predictors": None, "activations": []},
    ),
    "all that there is": make_report(
        layers=[make_layer(n, channel_bits=[[0.0, 2], [1.6, 4], [5.0, 10]]) for n in range(1, 21)],
        activations=[make_activation(n, 4 + 4 * (n % 2)) for n in range(9)],
        **{"onnx_bytes": PARTS, "predictors": make_predictors(), "frontier": make_frontier(), "loss": dict(LOSS)},
    ),
    "predictors without a loss": make_report(
        predictors=make_predictors(
            measured=[0.0] * 10,
            predictors=[{"name": "hawq", "spearman": None, "spread": None, "ratio": None, "predicted": [0.0] * 10}],
        )
    ),
    "thousands of points": make_report(frontier=make_frontier(5321)),
    "one point": make_report(frontier=make_frontier(1, rivals=[])),
    "no losses": make_report(
        layers=[explained_layer(1) | {"alternatives": [entry | {"loss": 0.0} for entry in alternatives(4)]}],
        frontier=make_frontier(2, loss=0.0, points=[[2.0, 0.0], [8.0, 0.0]], rivals=[]),
        loss=LOSS | {"predicted": 0.0, "measured": 0.0},
    ),
    "nothing measured": make_report(
        metric=None, latency_ms=None, macs={"dense": None, "compressed": None}, parity=[], files={"plan.json": 5}
    ),
}


@pytest.mark.parametrize("report", CASES.values(), ids=CASES)
def test_page_is_whole_and_needs_neither_network_nor_script(report: dict[str, Any]) -> None:
    html = render_html(report)
    page = Page(html)
    assert page.open == []
    assert "script" not in {tag for tag, _ in page.tags}
    assert not re.search(r"(https?:)?//[a-z]|@import|url\(", html)
    for tag, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")], tag
        assert attributes.get("href", "data:,") == "data:,"
        assert "src" not in attributes
    policy = [attributes["content"] for tag, attributes in page.tags if "http-equiv" in attributes]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'; img-src data:"]


@pytest.mark.parametrize("report", CASES.values(), ids=CASES)
def test_no_page_shows_none(report: dict[str, Any]) -> None:
    assert not re.search(r"\bNone\b|\bnan\b|Undefined", Page(render_html(report)).text + render_markdown(report))


def numbers_of(value: Any) -> set[float]:
    if isinstance(value, dict):
        return {n for item in value.values() for n in numbers_of(item)}
    if isinstance(value, list):
        return {n for item in value for n in numbers_of(item)}
    return {float(value)} if isinstance(value, int | float) else set()


@pytest.mark.parametrize("report", [make_report(), CASES["explained"]], ids=["plain", "explained"])
def test_every_figure_shown_is_the_records(report: dict[str, Any]) -> None:
    total = sum(layer["elements"] * layer["bits"] for layer in report["layers"])
    known = numbers_of(report) | {layer["elements"] * layer["bits"] / total for layer in report["layers"]}
    figures = Page(render_html(report)).figures
    assert len(figures) > 100
    for value, text in figures:
        assert value in known
        number, _, unit = text.replace(",", "").partition(" ")
        scale = {"K": 1e3, "M": 1e6, "G": 1e9, "KB": 1e3, "MB": 1e6, "GB": 1e9}.get(unit, 1.0)
        if unit == "%" and value < 1:  # Sparsity, shares and agreement are fractions in the record.
            scale = 0.01 if value != 0.21 else 1.0
        if unit == "%" and value == 1.0:
            scale = 0.01
        # Shown to two decimals, four decimals or three digits, whichever the quantity has.
        assert float(number) * scale == pytest.approx(value, rel=5e-3, abs=5.1e-5), (value, text)


def test_words_of_the_headline_cards_and_facts() -> None:
    text = Page(render_html(make_report())).text
    for words in (
        "Passed: all 2 checks",
        "91.52 %",
        "-0.21 points",
        "10,000 examples in onnxruntime",
        "283.1 KB",
        "1.093 MB",
        "3.86x smaller, 25.9 % of dense",
        "30.61 M",
        "1.33x smaller, 75.0 % of dense",
        "1.31 ms",
        "1.84x faster, 54.4 % of dense",
        "4.021",
        "12.50 %",
        "38.4 s",
        "1.235 GB",
        "hcompress quantize resnet20.pt --method uniform --budget 25% --seed 7",
        "Seed 7",
        "torch 2.13.0",
        "MACs are counted at batch 1",
    ):
        assert words in text, words


def test_a_failed_check_leads_the_page_and_is_marked_in_its_row() -> None:
    report = make_report()
    report["checks"][0] |= {"value": 1.0000004, "ok": False}
    page = Page(render_html(report))
    assert "Failed: max_drop (1 of 2 checks)" in page.text
    assert page.rows["checks"] == [
        ["check", "result", "value", "limit"],
        ["max_drop", "FAILED", "1 points", "1 points"],
        ["max_bytes", "passed", "283,123 bytes", "300,000 bytes"],
    ]
    assert "| `max_drop` | **FAILED** | 1 points | 1 points |" in render_markdown(report)


def test_tables_hold_a_row_a_record() -> None:
    report = make_report(300)
    report["layers"][0]["macs"] = None
    rows = Page(render_html(report)).rows
    assert len(rows["layers"]) == 301
    assert rows["layers"][1][:9] == [
        "1",
        "layer1.conv.weight",
        "conv2d",
        "16 x 16 x 3 x 3",
        "2,305",
        "-",
        "3",
        "0.00 %",
        "quantize",
    ]
    assert rows["layers"][1][-1] == "reason 1"
    assert rows["parity"][1:] == [["1", "3.1e-06", "100.00 %"], ["64", "5.2e-06", "-"]]
    assert rows["files"][1:] == [["model.onnx", "283,123"], ["model.safetensors", "279,001"]]


def test_plots_have_a_titled_bar_for_each_layer() -> None:
    html = render_html(make_report(300))
    assert len(re.findall(r'<rect class="bar quantize"', html)) == 3 * 300  # Sparsity is the same everywhere.
    assert "<title>17. layer17.conv.weight: bits 4 (quantize)</title>" in html
    assert "<strong>Sparsity</strong>: 0.00 % in every layer" in html
    ticks = re.findall(r'<span style="left: [\d.]+%">(\d+)</span>', html)
    assert ticks[: len(ticks) // 3] == ["1", "50", "100", "150", "200", "250", "300"]


def test_floats_beside_quantized_layers_get_a_logarithmic_axis() -> None:
    html = render_html(make_report(layers=[make_layer(1, bits=32, decision="keep"), make_layer(2, bits=4)]))
    assert "(a weight, logarithmic)" in html
    assert re.findall(r'<rect class="bar (\w+)"[^>]* height="([\d.]+)"', html)[:2] == [
        ("keep", "100.0"),
        ("quantize", "50.0"),
    ]


def test_a_name_cannot_leave_its_place_in_the_page() -> None:
    report = make_report(
        layers=[make_layer(1, tensor=EVIL, op=EVIL, why=EVIL, decision=EVIL), make_layer(2)],
        source={"name": EVIL, "sha256": EVIL},
        notes=[EVIL],
        method=EVIL,
        files={EVIL: 1, "model.onnx": 2},
    )
    report["checks"][0] |= {"name": EVIL, "unit": EVIL, "ok": False}
    html = render_html(report)
    page = Page(html)
    assert page.open == []
    assert "<script" not in html
    assert "\x1b" not in html
    assert "\u202e" not in html
    assert page.rows["layers"][1][1] == '<script>alert(1)</script>|`"\\x1b[31m\\u202e'


def test_a_name_cannot_leave_its_cell_in_markdown() -> None:
    report = make_report(layers=[make_layer(1, tensor=EVIL, why=EVIL + "\n# heading"), make_layer(2)], notes=[EVIL])
    markdown = render_markdown(report)
    assert "<script" not in markdown
    assert "<code>&#60;script&#62;alert&#40;1&#41;&#60;&#47;script&#62;&#124;&#96;" in markdown
    assert "&lt;script&gt;alert(1)&lt;/script&gt;\\|\\`" in markdown
    assert "\n# heading" not in markdown
    for line in markdown.splitlines():
        if line.startswith("| 1 | <code>"):
            assert len(re.findall(r"(?<!\\)\|", line)) == 13


def test_markdown_says_the_same() -> None:
    markdown = render_markdown(make_report())
    for words in (
        "# hcompress quantize: Passed: all 2 checks",
        "| accuracy | 91.73 % | 91.52 % | -0.21 points |",
        "| bytes on disk | 1.093 MB | 283.1 KB | 3.86x smaller, 25.9 % of dense |",
        "| MACs | 40.81 M | 30.61 M | 1.33x smaller, 75.0 % of dense |",
        "| `max_bytes` | passed | 283,123 bytes | 300,000 bytes |",
        "| 64 | 5.2e-06 | - |",
        "<summary>All layers (20)</summary>",
        "| `layer6.conv.weight` | quantize | 3 | 0.00 % | 0.0700 | reason 6 |",
        "hcompress quantize resnet20.pt --method uniform --budget 25% --seed 7",
    ):
        assert words in markdown, words
    worst = markdown.split("## Largest relative errors")[1].split("<details>")[0]
    assert worst.count("\n| `layer") == 10


def test_what_was_not_measured_is_said() -> None:
    report = CASES["nothing measured"]
    assert Page(render_html(report)).text.count("not measured") == 4
    assert "no evaluation data" in render_html(report)
    assert "| metric | not measured | not measured |  |" in render_markdown(report)
    assert "| bytes on disk | 1.093 MB | not measured |  |" in render_markdown(report)
    no_dense = make_report(metric=make_report()["metric"] | {"dense": None})
    assert "| accuracy | not measured | 91.52 % |  |" in render_markdown(no_dense)
    assert "accuracy" not in headline(no_dense)


def test_a_loss_has_its_unit_and_direction() -> None:
    metric = make_report()["metric"] | {
        "name": "loss",
        "unit": "nats per token",
        "higher_is_better": False,
        "dense": 2.01,
        "compressed": 2.0345,
    }
    text = Page(render_html(make_report(metric=metric))).text
    assert "loss (nats per token)" in text
    assert "+0.0245" in text
    assert "10,000 examples in onnxruntime; lower is better" in text


def test_the_delivered_safetensors_is_named_against_the_dense_onnx() -> None:
    report = make_report(delivered="model.safetensors")
    assert "model.safetensors against the dense model.onnx" in render_html(report)
    assert "279 KB" in headline(report)
    assert "--budget 25% --for safetensors --seed 7" in render_markdown(report)


def test_export_says_that_nothing_changed() -> None:
    report = make_report(command="export", method=None, budget=None, checks=[], files={"model.onnx": 1093456})
    assert "bytes on disk 1.093 MB -> 1.093 MB (no change)" in headline(report)
    assert verdict_text(verdict_of(report)) == "Measured: no checks were set"
    assert "hcompress export resnet20.pt\n" in render_markdown(report)


def test_headline_names_each_measured_pair() -> None:
    assert headline(make_report()) == (
        "accuracy 91.73 % -> 91.52 % (-0.21 points), "
        "bytes on disk 1.093 MB -> 283.1 KB (3.86x smaller, 25.9 % of dense), "
        "MACs 40.81 M -> 30.61 M (1.33x smaller, 75.0 % of dense), "
        "latency 2.41 ms -> 1.31 ms (1.84x faster, 54.4 % of dense), "
        "params 272.5 K -> 270 K (1.01x smaller, 99.1 % of dense)"
    )


# Why


def test_the_frontier_is_compared_with_one_width_for_the_same_budget() -> None:
    chosen = make_frontier(num_points=5321, index=2207, cost=3.998, loss=0.0021)
    assert frontier_text(chosen | {"rivals": [{"name": "4 bits", "cost": 4.0, "loss": 0.0104}]}) == (
        "point 2,207 of 5,321: 3.998 average bits, expected to lose 0.0021 nats; "
        "the same budget spent as 4 bits everywhere is expected to lose 4.95 times as much"
    )
    rivals = [{"name": f"{n} bits", "cost": float(n), "loss": 0.1 / n} for n in (2, 3, 8)]
    assert frontier_text(chosen | {"rivals": rivals}).endswith(
        "0.0021 nats; 3 bits everywhere, 3 average bits, is expected to lose 15.9 times as much"
    )
    assert frontier_text(chosen | {"rivals": rivals[2:]}).endswith("expected to lose 0.0021 nats")


@pytest.mark.parametrize(
    ("loss", "rival", "words"),
    [
        (0.0, 0.5, "is expected to lose 0.5 nats"),
        (1e-300, 0.5, "is expected to lose 0.5 nats"),
        (0.0, 0.0, "is expected to lose 0 nats"),
        (-0.1, 0.2, "is expected to lose 0.2 nats"),
        (0.2, 0.2, "is expected to lose as much"),
    ],
)
def test_no_ratio_to_a_loss_of_nothing(loss: float, rival: float, words: str) -> None:
    frontier = make_frontier(cost=4.0, loss=loss, rivals=[{"name": "4 bits", "cost": 4.0, "loss": rival}])
    assert frontier_text(frontier).endswith(words)
    render_html(make_report(frontier=frontier))


def test_predicted_stands_against_measured_loss() -> None:
    assert (
        loss_text(LOSS)
        == "predicted 0.0021 nats, measured 0.003 nats, 1.43 times as much (KL divergence; 512 examples)"
    )
    assert loss_text(LOSS | {"predicted": None}) == "measured 0.003 nats (KL divergence; 512 examples)"
    unseen = LOSS | {"evaluation": {"measured": 0.015, "num_examples": 500}}
    assert loss_text(unseen) == f"{loss_text(LOSS)}; 0.015 nats on 500 examples of the evaluation data"
    for render in (render_html, render_markdown):
        assert loss_text(unseen) in render(make_report(loss=dict(unseen)))


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (3.9981, "average bits", "3.998 average bits"),
        (147456.0, "bytes", "147.5 KB"),
        (147456.0, "bits", "147.5 K bits"),
        (1.2e9, "bit operations", "1.2 G bit operations"),
        (1.3112, "ms", "1.311 ms"),
        (0.0, "ms", "0 ms"),
    ],
)
def test_a_cost_has_its_unit(value: float, unit: str, text: str) -> None:
    assert amount_text(value, unit) == text


def test_a_sensitivity_has_its_error_unless_it_is_exact() -> None:
    assert sensitivity_text({"value": 12.41, "stderr": 0.304}) == "12.4 +- 0.3"
    assert sensitivity_text({"value": 12.41, "stderr": 0.0}) == "12.4"


def spots(html: str) -> dict[str, tuple[float, float]]:
    """The named points of the plot, in percent from the left and the bottom."""
    found = re.findall(r'<span class="at [a-z ]+" style="left: ([\d.]+)%; bottom: ([\d.]+)%">([^<]*)</span>', html)
    return {name: (float(x), float(y)) for x, y, name in found}


def test_the_chosen_point_and_its_rivals_are_marked_where_the_axes_say() -> None:
    html = render_html(make_report(frontier=make_frontier()))
    found = spots(html)
    assert list(found) == [*(f"{n} bits" for n in range(2, 9)), "chosen: 4"]
    assert len(re.findall('class="spot rival"', html)) == 7 and len(re.findall('class="spot chosen"', html)) == 1
    assert "(nats, logarithmic)" in html and "average bits, logarithmic" not in html
    assert [found[f"{n} bits"][0] for n in (2, 5, 8)] == [3.0, 50.0, 97.0]
    # From 0.0001, the decade below exp(-8), to 1, that above 4.95 exp(-2).
    assert found["chosen: 4"][1] == pytest.approx(25 * (4 - 4 / math.log(10)), abs=0.01)
    assert found["8 bits"][1] == pytest.approx(25 * (4 + math.log10(4.95) - 8 / math.log(10)), abs=0.01)
    assert '<title id="frontier-title">Expected loss against average bits, 61 points; point 20 of 61' in html
    assert "<title>4 bits: 4 average bits, expected loss 0.0907 nats</title>" in html


def test_the_line_is_a_staircase_that_never_rises() -> None:
    html = render_html(make_report(frontier=make_frontier(5321)))
    (path,) = re.findall(r'<path class="frontier" d="([^"]+)"', html)
    across = [float(x) for x in re.findall(r"[MH]([\d.]+)", path)]
    down = [float(y) for y in re.findall(r"(?:V|M[\d.]+ )([\d.]+)", path)]
    assert len(across) == len(down) in (MAX_POINTS, MAX_POINTS + 1)
    assert across == sorted(across) and down == sorted(down)
    assert (across[0], across[-1]) == (3.0, 97.0)
    chosen_x, chosen_y = spots(html)["chosen: 3.967"]
    assert (chosen_x, round(100 - chosen_y, 2)) in zip(across, down, strict=True)
    assert len(html) < 100_000


@pytest.mark.parametrize(
    ("losses", "ticks"),
    [
        ((0.4, 0.1), ["0", "0.2", "0.4"]),
        ((0.4, 0.1, 0.0), ["0", "0.2", "0.4"]),
        ((0.4, 1e-3), ["0.001", "0.01", "0.1", "1"]),
        ((0.4, 1e-3, 0.0), ["\u2264 0.001", "0.01", "0.1", "1"]),
        ((0.4, 1e-3, 1e-12, -1e-3), ["\u2264 0.001", "0.01", "0.1", "1"]),
        ((0.0, 0.0), ["0"]),
        ((-0.1, -0.2), ["0"]),
    ],
)
def test_the_loss_axis_holds_every_loss(losses: tuple[float, ...], ticks: list[str]) -> None:
    points = [[float(n), loss] for n, loss in enumerate(losses, start=1)]
    html = render_html(make_report(frontier=make_frontier(cost=1.0, loss=losses[0], points=points, rivals=[])))
    plot = html.split('<section id="frontier">')[1].split("</section>")[0]
    assert re.findall(r'class="y" style="[^"]+">([^<]+)<', plot) == ticks
    assert all(0 <= float(y) <= 100 for y in re.findall(r' ([\d.-]+)h0"', plot))
    if min(losses) <= 0:
        assert ' 100.0h0"' in plot


@pytest.mark.parametrize(
    ("unit", "costs", "ticks"),
    [
        ("average bits", (2.0, 32.0), ["2", "4", "8", "16", "32"]),
        ("average bits", (2.0, 8.0), ["2", "3", "4", "5", "6", "7", "8"]),
        ("bytes", (1e5, 1.2e6), ["100 KB", "200 KB", "500 KB", "1 MB"]),
        ("bit operations", (1e9, 1.4e9), ["1 G", "1.05 G", "1.1 G", "1.15 G", "1.2 G", "1.25 G", "1.3 G", "1.35 G"]),
        ("ms", (0.0, 3.0), ["0", "0.5", "1", "1.5", "2", "2.5", "3"]),
        ("ms", (1.3, 1.3), ["1.3"]),
    ],
)
def test_the_cost_axis_has_round_ticks(unit: str, costs: tuple[float, float], ticks: list[str]) -> None:
    frontier = make_frontier(unit=unit, cost=costs[0], loss=0.2, points=[[costs[0], 0.2], [costs[1], 0.1]], rivals=[])
    plot = render_html(make_report(frontier=frontier)).split('<section id="frontier">')[1].split("</section>")[0]
    assert re.findall(r'<span style="left: [\d.]+%">([^<]+)<', plot)[: len(ticks)] == ticks


def test_alternatives_have_a_row_a_layer_and_a_column_an_option() -> None:
    layers = [explained_layer(n) for n in range(1, 4)] + [make_layer(4)]
    layers[1]["sensitivity"] = None
    layers[2]["alternatives"] = [
        {"option": "float", "cost": 4.0, "unit": "bits", "loss": 0.0, "chosen": True},
        {"option": "3 bits", "cost": 2.0, "unit": "bits", "loss": 0.5, "chosen": False},
    ]
    html = render_html(make_report(layers=layers, frontier=make_frontier()))
    head = ["#", "tensor", "sensitivity", "2 bits", "3 bits", "4 bits", "8 bits", "16 bits", "float"]
    assert Page(html).rows["alternatives"] == [
        [*head, "cost of the chosen"],
        ["1", "layer1.conv.weight", "11 +- 0.25", "0.00125", "-", "7.81e-05", "3.05e-07", "4.66e-12", "-", "147.5 KB"],
        ["2", "layer2.conv.weight", "-", "0.00125", "-", "7.81e-05", "3.05e-07", "4.66e-12", "-", "294.9 KB"],
        ["3", "layer3.conv.weight", "13 +- 0.25", "-", "0.5", "-", "-", "-", "0", "4 bits"],
    ]
    assert len(re.findall(r"<td[^>]*><strong><data", html)) == 3
    assert '<td class="num" title="73.73 KB">' in html
    assert "in nats, if this layer alone" in html and "hessian-trace, in loss per squared weight" in html


def test_markdown_names_the_ten_most_sensitive_layers() -> None:
    markdown = render_markdown(CASES["explained"])
    why = markdown.split("## Why this plan")[1].split("\n## ")[0]
    assert "The plan is point 20 of 61: 4 average bits" in why and "is expected to lose 4.95 times as much." in why
    assert re.findall(r"^\| `layer(\d+)", why, re.MULTILINE) == [str(n) for n in range(20, 10, -1)]
    assert (
        "| `layer20.conv.weight` | 30 +- 0.25 | 8 bits, 294.9 KB | 3.05e-07 | "
        "2 bits 0.00125, 4 bits 7.81e-05, 16 bits 4.66e-12 |"
    ) in why


def test_layers_without_a_sensitivity_are_ordered_by_their_largest_loss() -> None:
    losses = {1: 0.1, 2: 0.3, 3: 0.2}
    layers = [make_layer(n, alternatives=[alternatives(2)[0] | {"loss": loss}]) for n, loss in losses.items()]
    markdown = render_markdown(make_report(layers=layers))
    assert re.findall(r"^\| `layer(\d).* \| - \| 2 bits", markdown, re.MULTILINE) == ["2", "3", "1"]


@pytest.mark.parametrize("name", ["one layer", "keys of null"])
def test_an_old_report_has_no_empty_sections(name: str) -> None:
    page, markdown = Page(render_html(CASES[name])), render_markdown(CASES[name])
    assert "Alternatives" not in page.text and "alternatives" not in page.rows
    assert "frontier-title" not in render_html(CASES[name]) and "The plan is" not in markdown
    assert ("Why this plan" in page.text) == ("Why this plan" in markdown) == (name == "keys of null")


def test_a_name_cannot_leave_its_place_beside_the_frontier() -> None:
    entry = {"option": EVIL, "cost": 1.0, "unit": EVIL, "loss": 0.1, "chosen": True}
    measured = {"measure": EVIL, "value": 1.0, "stderr": 0.1, "unit": EVIL}
    rivals = [{"name": EVIL, "cost": 4.0, "loss": 0.1}]
    report = make_report(
        layers=[make_layer(1, tensor=EVIL, sensitivity=measured, alternatives=[entry, entry | {"chosen": False}])],
        frontier=make_frontier(unit=EVIL, loss_unit=EVIL, rivals=rivals),
        loss=LOSS | {"unit": EVIL, "what": EVIL + "\n# heading"},
    )
    html, markdown = render_html(report), render_markdown(report)
    assert Page(html).open == []
    for text in (html, markdown):
        assert "<script" not in text and "\x1b" not in text and "\u202e" not in text
    assert Page(html).rows["alternatives"][1][1] == '<script>alert(1)</script>|`"\\x1b[31m\\u202e'
    assert "\n# heading" not in markdown
    (row,) = [line for line in markdown.splitlines() if line.startswith("| <code>") and "+-" in line]
    assert len(re.findall(r"(?<!\\)\|", row)) == 6


def test_an_endless_word_does_not_flood_a_page() -> None:
    why = f"chose 4 bits with channels:{'mms' * 1000} ranges: the weights move by 3 %"
    assert re.fullmatch(r"chose 4 bits with channels:[ms]+\.\.\.[ms]+ ranges: the weights move by 3 %", brief(why))
    assert len(brief(why)) < 90
    report = make_report(layers=[make_layer(1, why=why)])
    assert Page(render_html(report)).rows["layers"][1][-1] == brief(why)
    assert brief(why) in render_markdown(report)
    assert brief("reason 1") == "reason 1"


@pytest.mark.parametrize("length", [0, 1, 2, 20, 21, 5321])
def test_thinned_rows_keep_both_ends(length: int) -> None:
    rows = list(range(length))
    kept = thinned(rows, 20)
    assert len(kept) == min(length, 20) and kept == sorted(set(kept))
    assert kept[:1] + kept[-1:] == rows[:1] + rows[-1:]


def test_the_parts_of_the_file_add_up_to_its_bytes() -> None:
    html = render_html(CASES["all that there is"])
    rows = Page(html).rows["parts"]
    assert rows[0] == ["part", "bytes", "share"]
    assert ["packed weights", "200,000", "70.64 %"] in rows
    assert "float tensors" not in [row[0] for row in rows], "what takes nothing is left out"
    assert sum(int(row[1].replace(",", "")) for row in rows[1:]) == sum(PARTS.values())
    bar = html.split('class="pair parts"')[1].split("</svg>")[0]
    ends = [(float(x), float(w)) for x, w in re.findall(r'x="([\d.]+)" width="([\d.]+)"', bar)]
    assert ends[0][0] == 0
    assert all(a + w == pytest.approx(b, abs=0.01) for (a, w), (b, _) in itertools.pairwise(ends))
    assert sum(ends[-1]) == pytest.approx(100, abs=0.01)
    assert "| packed weights | 200,000 | 70.64 % |" in render_markdown(CASES["all that there is"])


def test_bits_are_drawn_with_the_spread_of_the_channels() -> None:
    html = render_html(CASES["all that there is"])
    assert len(re.findall('<path class="whisker" d="M[0-9.]+ 100.0V37.5"/>', html)) == 20  # from none to 5 bits of 8
    assert "layer1.conv.weight: bits 3 [2 of 0, 4 of 1.6, 10 of 5] (quantize)" in html
    assert "whiskers reach from the narrowest channel to the widest" in html
    assert "whisker" not in render_html(make_report()).split("</style>")[1]


def test_bits_of_activations_are_drawn_where_they_differ_and_said_where_they_do_not() -> None:
    html = render_html(CASES["all that there is"])
    assert "<title>2. relu_1: activation bits 8 (quantize)</title>" in html
    assert "activation, in network order" in html
    same = [make_activation(n, 8) for n in range(3)]
    assert "<strong>Activation bits</strong>: 8 in every activation" in render_html(make_report(activations=same))


def test_the_measured_loss_stands_in_the_frontiers_plot() -> None:
    plot = render_html(CASES["all that there is"]).split('<section id="frontier">')[1].split("</section>")[0]
    assert '<span class="at measured' in plot
    assert ">measured: 0.003</span>" in plot
    assert "measured: 0.003: 4 average bits, measured loss 0.003 nats</title>" in plot
    other = make_report(frontier=make_frontier(), loss=LOSS | {"unit": "squared output"})
    assert "at measured" not in render_html(other), "another unit has no place on the axis"


def test_predictors_are_compared_in_a_table_and_a_plot() -> None:
    html, markdown = (render(CASES["all that there is"]) for render in (render_html, render_markdown))
    assert Page(html).rows["predictor-table"][1:] == [
        ["hawq", "0.9123", "2.9", "100"],
        ["output-change", "1.0000", "1", "0.9"],
    ]
    assert "| output-change | 1.0000 | 1 | 0.9 |" in markdown
    words = "10 random configurations of 2 to 8 bits a weight, levels the nearest, that lose 0.01 to 0.106 nats, "
    assert words + "measured on 128 calibration examples" in html
    drawn = re.findall(r'<path class="spot series(\d)" d="([^"]*)"', html)
    assert [(number, path.count("M")) for number, path in drawn] == [("0", 10), ("1", 10)]
    (on_the_line,) = (path for number, path in drawn if number == "1")
    assert all(float(x) + float(y) == pytest.approx(100) for x, y in re.findall(r"M([\d.]+) ([\d.]+)h0", on_the_line))
    far = make_predictors()
    far["predictors"][0]["predicted"][0] *= 1e6
    drawn = re.findall(r'<path class="spot series0" d="([^"]*)"', render_html(make_report(predictors=far)))
    assert drawn[0].count("M") == 9, "what is far from all that was measured would press the rest together"


def test_predictors_of_a_network_without_a_loss_have_no_plot() -> None:
    html = render_html(CASES["predictors without a loss"])
    assert Page(html).rows["predictor-table"][1:] == [["hawq", "-", "-", "-"]]
    assert "spot series" not in html


def test_of_mixtures_by_channel_only_the_chosen_one_is_shown() -> None:
    mixed = [
        {"option": f"{bits} bits by channel", "cost": 9.0, "unit": "bits", "loss": loss, "chosen": bits == 2.5}
        for bits, loss in ((1.75, 0.5), (2.5, 0.125))
    ]
    whole = [entry | {"chosen": False} for entry in alternatives(4)]
    report = make_report(layers=[make_layer(1, alternatives=[*whole, *mixed]), make_layer(2, alternatives=whole)])
    head, first, second = Page(render_html(report)).rows["alternatives"]
    assert head[3:] == ["2 bits", "4 bits", "8 bits", "16 bits", "cost of the chosen"]
    assert first[-1] == "2.5 bits by channel: 0.125, 9 bits"
    assert second[-1] == "-"
    assert "1.75 bits by channel" not in render_markdown(report)
