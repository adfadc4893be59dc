"""The report says the record's figures in words that a person reads, and nothing that a checkpoint smuggled in."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import Any

import pytest

from compress.report import headline, render_html, render_markdown, verdict_of, verdict_text

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


def test_every_figure_shown_is_the_records() -> None:
    report = make_report()
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
