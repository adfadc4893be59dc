"""The report record as a page for a person: one self-contained HTML file, and Markdown for a pull request.

Both templates print figures through ``Figure``, so that a page shows a number of the record or says ``not measured``.
Names of layers and files come from untrusted checkpoints; every string is escaped on its way out, by ``finalize``.
"""

from __future__ import annotations

import functools
import math
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from markupsafe import Markup

from .budget import format_bytes
from .errors import escape
from .saliency_plot import saliency_svg, saliency_text
from .verdict import Check, Verdict

if TYPE_CHECKING:
    from jinja2 import Environment

Row = TypeVar("Row")

NOT_MEASURED = "not measured"
NUM_WORST = 10  # Layers in the Markdown tables of the largest relative errors and of the largest sensitivities.
NUM_TICKS = 8  # Labels under a plot that still fit on a telephone.
MIN_SLOTS = 12  # A network of two layers gets bars, not walls.
MAX_POINTS = 200  # Of a frontier, drawn.
SAME_COST = 0.01  # Two costs are one budget this close, in units of the frontier's span: most of a cost may be fixed.
LOG_COSTS = 6  # Costs that span a larger factor get a logarithmic axis,
LOG_LOSSES = 100  # and so do losses.
FAR = 30.0  # A prediction that is off by a larger factor than all that was measured isn't drawn.
NEGLIGIBLE = 1e-6  # A loss below this share of the largest is drawn as none.
BY_CHANNEL = " by channel"  # how the name of an option ends that gives each channel a width of its own
BYTE_TICKS = (0, 2, 4, 6, 8)  # of an axis of bits
PART_NAMES = {
    "weights": "packed weights",
    "scales": "scales",
    "floats": "float tensors",
    "constants": "other constants",
    "nodes": "nodes",
    "rest": "names and shapes",
}
MAX_WORD = 60  # Characters of a longer word are cut from its middle.


def render_html(report: dict[str, Any]) -> str:
    """One HTML page that needs no network: inline style and plots, light and dark, for screen and paper."""
    return render_page("report", _view(report))


def render_markdown(report: dict[str, Any]) -> str:
    """The same facts as GitHub-flavoured Markdown."""
    return render_text("report", _view(report))


def render_page(name: str, view: dict[str, Any]) -> str:
    """The HTML template of a name, whose strings are escaped."""
    return _environment(_html_text).get_template(f"{name}.html.jinja").render(view)


def render_text(name: str, view: dict[str, Any]) -> str:
    """The Markdown template of a name, whose strings are escaped."""
    return _environment(_markdown_text).get_template(f"{name}.md.jinja").render(view)


def verdict_of(report: dict[str, Any]) -> Verdict:
    """The record's checks."""
    return Verdict(tuple(Check(**check) for check in report["checks"]))


def verdict_text(verdict: Verdict) -> str:
    """The outcome in a line, such as ``Failed: max_drop (1 of 4 checks)``."""
    failures, total = verdict.failures(), len(verdict.checks)
    if not total:
        return "Measured: no checks were set"
    if failures:
        names = ", ".join(escape(check.name) for check in failures)
        return f"Failed: {names} ({len(failures)} of {total} checks)"
    return f"Passed: all {total} checks" if total > 1 else "Passed: 1 check"


def check_text(check: Check) -> str:
    """A check in a line, with the digits that decide it: ``max_drop: 1.21 points, limit 1 points: FAILED``."""
    unit = check.unit
    limit = "" if check.limit is None else f", limit {_exact(check.limit, unit).text}"
    return f"{escape(check.name)}: {_exact(check.value, unit).text}{limit}: {'passed' if check.ok else 'FAILED'}"


def headline(report: dict[str, Any]) -> str:
    """Each measured figure, dense and compressed, in a line of plain text."""
    return ", ".join(
        f"{row.name} {row.dense.text} -> {row.compressed.text} ({row.change})"
        for row in _comparisons(report)
        if row.dense is not None and row.compressed is not None
    )


def frontier_text(frontier: dict[str, Any]) -> str:
    """The chosen point in a line, and what the best plan of one width everywhere loses for the same budget."""
    where = f"point {frontier['index']:,} of {frontier['num_points']:,}"
    if frontier["num_points"] == 1:
        where = "the only point"
    cost, loss = amount_text(frontier["cost"], frontier["unit"]), loss_amount(frontier["loss"], frontier["loss_unit"])
    text = f"{where}: {cost}, expected to lose {loss}"
    rival = _rival(frontier)
    if rival is None:
        return text
    name = f"{escape(rival['name'])} everywhere"
    less = times_text(rival["loss"], frontier["loss"]) or loss_amount(rival["loss"], frontier["loss_unit"])
    if abs(rival["cost"] - frontier["cost"]) <= _same_cost(frontier):
        return f"{text}; the same budget spent as {name} is expected to lose {less}"
    return f"{text}; {name}, {amount_text(rival['cost'], frontier['unit'])}, is expected to lose {less}"


def loss_text(loss: dict[str, Any]) -> str:
    """Predicted against measured loss in a line, with what was measured and on how many examples."""
    unit, predicted, measured = loss["unit"], loss["predicted"], loss["measured"]
    about = f"({escape(loss['what'])}; {loss['num_examples']:,} examples)"
    unseen = loss.get("evaluation")
    if unseen is not None:
        about += (
            f"; {loss_amount(unseen['measured'], unit)} on {unseen['num_examples']:,} examples of the evaluation data"
        )
    if predicted is None:
        return f"measured {loss_amount(measured, unit)} {about}"
    times = times_text(measured, predicted)
    words = f"predicted {loss_amount(predicted, unit)}, measured {loss_amount(measured, unit)}"
    return f"{words}{f', {times}' if times else ''} {about}"


def predictors_text(predictors: dict[str, Any]) -> str:
    """What the predictors of the loss were compared on, in a line."""
    least, most = min(predictors["measured"]), max(predictors["measured"])
    return (
        f"{predictors['num_configurations']:,} random configurations of 2 to 8 bits a weight, levels "
        f"{escape(predictors['levels'])}, that lose {least:.3g} to {loss_amount(most, predictors['unit'])}, "
        f"measured on {predictors['num_examples']:,} calibration examples"
    )


def predictor_cells(predictors: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """Of each predictor its name, rank correlation, spread and median ratio, as text."""
    return [
        (
            escape(entry["name"]),
            _or_dash(entry["spearman"], "{:.4f}"),
            _or_dash(entry["spread"], "{:.3g}"),
            _or_dash(entry["ratio"], "{:.3g}"),
        )
        for entry in predictors["predictors"]
    ]


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def amount_text(value: float, unit: str) -> str:
    """A cost in its unit: ``3.998 average bits``, ``147.5 KB``, ``1.31 ms``."""
    if unit == "bytes":
        return re.sub(r"(?=[KMG]?B$)", " ", format_bytes(value), count=1)
    number = f"{value:.4g}" if abs(value) < 1e3 else _scaled(value)
    return f"{number} {escape(unit)}"


def cost_label(cost: float, unit: str) -> str:
    """A cost where an axis or a column already says the unit."""
    return amount_text(cost, unit).removesuffix(f" {escape(unit)}")


def loss_amount(value: float, unit: str) -> str:
    """A loss to three digits, in its unit; a unit that isn't known is left out."""
    return f"{value:.3g} {escape(unit)}".rstrip()


def times_text(loss: float, base: float) -> str:
    """How many times ``base`` a loss is; empty where a ratio says nothing, as one of them is negligible or a gain."""
    if loss <= 0 or base <= loss * NEGLIGIBLE:
        return ""
    ratio = f"{loss / base:.3g}"
    return "as much" if ratio == "1" else f"{ratio} times as much"


def sensitivity_text(sensitivity: dict[str, Any]) -> str:
    """A sensitivity with its standard error, as ``12.4 +- 0.3``; exact ones stand alone."""
    value, stderr = f"{sensitivity['value']:.3g}", sensitivity["stderr"]
    return f"{value} +- {stderr:.2g}" if stderr else value


def brief(text: str) -> str:
    """A sentence with the middle of overlong words cut, such as the range of each of a thousand channels."""
    return re.sub(rf"\S{{{MAX_WORD + 1},}}", lambda found: escape(found[0], limit=MAX_WORD // 2), text)


@dataclass(frozen=True, slots=True)
class Figure:
    """A number of the record, and the text that a person reads."""

    value: float
    text: str


@dataclass(frozen=True, slots=True)
class Comparison:
    """A figure of the dense and of the compressed model; None where it was not measured.

    Attributes:
        change: Words such as ``3.9x smaller``; empty without both figures.
        scale: Value at which a bar is full.
        note: On what, or against what, it was measured.
    """

    name: str
    dense: Figure | None
    compressed: Figure | None
    change: str
    scale: float
    note: str


@dataclass(frozen=True, slots=True)
class Bar:
    """One layer of a plot: height in percent of the axis, and the text on hover.

    Attributes:
        spread: Least and greatest height of the layer's channels; empty where all are as high as the bar.
    """

    height: float
    decision: str
    title: str
    spread: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Tick:
    position: float
    label: str


@dataclass(frozen=True, slots=True)
class Plot:
    """A quantity along the network, one bar a layer.

    Attributes:
        about: What the bars are, below the plot.
        constant: The text of every layer, where all are the same and a plot would say nothing; else empty.
        slots: Width of the drawing, in bars.
        line: Height of a second quantity per layer, drawn as a step line; may be empty.
    """

    title: str
    unit: str
    about: str
    constant: str
    slots: int
    bars: tuple[Bar, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    line: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Part:
    """Some of the bytes of model.onnx.

    Attributes:
        start: Where it starts in a bar of all of them, in percent.
        width: Of all of them, in percent.
    """

    key: str
    name: str
    size: int
    share: float
    title: str
    start: float
    width: float


@dataclass(frozen=True, slots=True)
class Spot:
    """A point of the frontier's plot that has a name.

    Attributes:
        x: In percent of the plot, from the left.
        y: In percent, from the bottom.
        kind: ``chosen``, ``measured`` or ``rival``.
        side: Of its label: ``right``, ``left`` or ``below``, which is to the left and lower.
        title: The text on hover.
    """

    x: float
    y: float
    kind: str
    side: str
    name: str
    title: str


@dataclass(frozen=True, slots=True)
class FrontierPlot:
    """The best expected loss for each cost, as a falling staircase, and the plans that stand above it.

    Attributes:
        points: Position in percent of each point, from the left and the bottom, and its text on hover.
    """

    title: str
    points: tuple[tuple[float, float, str], ...]
    spots: tuple[Spot, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    x_title: str
    y_title: str


@dataclass(frozen=True, slots=True)
class Scatter:
    """Predicted against measured loss, both on one logarithmic scale.

    Attributes:
        series: Name of each predictor, and its points in percent from the left and the bottom.
    """

    series: tuple[tuple[str, tuple[tuple[float, float], ...]], ...]
    ticks: tuple[Tick, ...]
    unit: str


@functools.cache
def _environment(finalize: Callable[[object], Markup]) -> Environment:
    # 60 ms, and the sentences above do without.
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("compress", ""),
        autoescape=True,
        finalize=finalize,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "read_alternatives": read_alternatives,
        "alternative": lambda entry: f"{entry['option']} {_loss(entry['loss']).text}",
        "bits": _bits,
        "brief": brief,
        "code": _markdown_code,
        "cost": lambda entry: amount_text(entry["cost"], entry["unit"]),
        "count": _count,
        "duration": _duration,
        "error": _error,
        "exact": _exact,
        "fenced": lambda text: Markup(escape(text, limit=1000)),
        "loss": _loss,
        "percent": _percent,
        "sensitivity": lambda record: Figure(record["value"], sensitivity_text(record)),
        "size": _size,
        "small": _small,
        "whole": lambda value: Figure(value, f"{value:,}"),
    }
    return environment


def _html_text(value: object) -> Markup:
    if isinstance(value, Markup):
        return value
    if value is None:
        return Markup('<span class="none">{}</span>').format(NOT_MEASURED)
    if isinstance(value, Figure):
        return Markup('<data value="{}">{}</data>').format(value.value, value.text)
    return Markup.escape(escape(str(value), limit=400))


def _markdown_text(value: object) -> Markup:
    if isinstance(value, Markup):
        return value
    if value is None:
        return Markup(NOT_MEASURED)
    text = value.text if isinstance(value, Figure) else escape(str(value), limit=400)
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return Markup(re.sub(r"([\\`*_\[\]|~$#])", r"\\\1", text))


def _markdown_code(name: str) -> Markup:
    """A code span; where backticks or pipes would end it or its table cell, an element of character references."""
    shown = escape(name)
    if shown.strip() and not set(shown) & set("`|\\"):
        return Markup(f"`{shown}`")
    return Markup("<code>{}</code>").format(Markup(re.sub(r"[^\w. ]|_", lambda found: f"&#{ord(found[0])};", shown)))


def _view(report: dict[str, Any]) -> dict[str, Any]:
    """What both templates see: the record, and what follows from it."""
    verdict = verdict_of(report)
    layers = _with_shares(report["layers"])
    worst = sorted((layer for layer in layers if layer["relative_error"]), key=lambda layer: -layer["relative_error"])
    plots = _plots(layers, report.get("activations") or []) if layers else ()
    frontier, loss, predictors = report.get("frontier"), report.get("loss"), report.get("predictors")
    explained, saliencies = _explained(layers), report.get("saliencies")
    return {
        "report": report,
        "verdict": verdict,
        "verdict_text": verdict_text(verdict),
        "headline": headline(report),
        "comparisons": _comparisons(report),
        "nonzero_macs": _nonzero_macs(report),
        "parts": _parts(report.get("onnx_bytes") or {}),
        "layers": layers,
        "decisions": [name for name in ("quantize", "mask", "keep") if any(x["decision"] == name for x in layers)],
        "worst": worst[:NUM_WORST],
        "plots": plots,
        "failures": [check_text(check) for check in verdict.failures()],
        "drawn": [plot for plot in plots if not plot.constant],
        "reproduce": _reproduce(report),
        "frontier_text": frontier_text(frontier) if frontier else "",
        "frontier_plot": _frontier_plot(frontier, loss) if frontier else None,
        "loss_text": loss_text(loss) if loss else "",
        "predictors_text": predictors_text(predictors) if predictors else "",
        "predictor_cells": predictor_cells(predictors) if predictors else [],
        "scatter": _scatter(predictors) if predictors else None,
        "saliency_text": saliency_text(saliencies) if saliencies else "",
        "saliency_svg": Markup(saliency_svg(saliencies)) if saliencies else "",
        "options": _options(explained),
        "explained": explained,
        "most_sensitive": _most_sensitive(explained)[:NUM_WORST],
        "measures": _measures(explained),
        "activations": _read_activations(report),
        "loss_unit": frontier["loss_unit"] if frontier else "",
    }


def _comparisons(report: dict[str, Any]) -> tuple[Comparison, ...]:
    delivered, latency = report["delivered"], report["latency_ms"] or {"dense": None, "compressed": None}
    nonzero = _nonzero_macs(report)
    against = "" if delivered == "model.onnx" else " against the dense model.onnx"
    return (
        _metric(report["metric"]),
        _compare(
            "bytes on disk", _size, report["dense_bytes"], report["files"].get(delivered), note=f"{delivered}{against}"
        ),
        _compare("MACs", _count, *_pair(report["macs"]), note="multiply-accumulate operations"),
        _compare("latency", _milliseconds, *_pair(latency), words=("faster", "slower"), note="at batch 1"),
        _compare("params", _count, *_pair(report["params"])),
        *([_compare("MACs of nonzero weights", _count, *_pair(nonzero))] if nonzero else []),
    )


def _nonzero_macs(report: dict[str, Any]) -> dict[str, float | None] | None:
    """MACs whose weight isn't zero; None where that is all of them."""
    found: dict[str, float | None] | None = report.get("nonzero_macs")
    return None if found == report["macs"] else found


def _pair(record: dict[str, Any]) -> tuple[float | None, float | None]:
    return record["dense"], record["compressed"]


def _compare(
    name: str,
    figure: Callable[[float | None], Figure | None],
    dense: float | None,
    compressed: float | None,
    *,
    words: tuple[str, str] = ("smaller", "larger"),
    note: str = "",
) -> Comparison:
    change = ""
    if dense and compressed:
        ratio = dense / compressed
        share = f"{100 * compressed / dense:.1f} % of dense"
        times = f"{max(ratio, 1 / ratio):.2f}x {words[0] if ratio > 1 else words[1]}"
        change = "no change" if times.startswith("1.00x") else f"{times}, {share}"
    return Comparison(name, figure(dense), figure(compressed), change, max(dense or 0, compressed or 0), note)


def _metric(metric: dict[str, Any] | None) -> Comparison:
    if metric is None:
        return Comparison("metric", None, None, "", 0.0, "no evaluation data")
    dense, compressed = _pair(metric)
    is_percent = metric["unit"] == "%"
    name = escape(metric["name"] if is_percent else f"{metric['name']} ({metric['unit']})")
    change = ""
    if dense is not None and compressed is not None:
        change = f"{compressed - dense:+z.2f} points" if is_percent else f"{compressed - dense:+z.3g}"

    def show(value: float | None) -> Figure | None:
        return None if value is None else Figure(value, f"{value:.2f} %" if is_percent else f"{value:.4g}")

    better = "" if metric["higher_is_better"] else "; lower is better"
    note = f"{metric['num_examples']:,} examples in {metric['runtime']}{better}"
    scale = 100.0 if is_percent else max(dense or 0, compressed or 0)
    return Comparison(name, show(dense), show(compressed), change, scale, note)


def _with_shares(layers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Layers with their number, share of the weights' bits, and share of the elements."""
    bits = sum(layer["elements"] * layer["bits"] for layer in layers) or 1
    elements = sum(layer["elements"] for layer in layers) or 1
    return [
        {
            **layer,
            "number": number,
            "byte_share": layer["elements"] * layer["bits"] / bits,
            "element_share": layer["elements"] / elements,
        }
        for number, layer in enumerate(layers, start=1)
    ]


def _parts(sizes: Mapping[str, int]) -> tuple[Part, ...]:
    """What model.onnx is made of, in the order of ``PART_NAMES``; what takes nothing is left out."""
    total, before, found = sum(sizes.values()), 0, []
    for key, name in PART_NAMES.items():
        if size := sizes.get(key, 0):
            share = size / total
            title = f"{name}: {size:,} bytes, {_percent(share).text}"
            found.append(Part(key, name, size, share, title, round(100 * before / total, 3), round(100 * share, 3)))
            before += size
    return tuple(found)


def _plots(layers: list[dict[str, Any]], activations: list[dict[str, Any]]) -> tuple[Plot, ...]:
    most_bits = max(max((layer["bits"], *_spread(layer))) for layer in layers)
    most_share = _ceiling(max(max(layer["byte_share"], layer["element_share"]) for layer in layers))
    most_error = _ceiling(max(layer["relative_error"] for layer in layers))
    unit, ticks = _bits_axis(most_bits)
    plots = [
        _plot(layers, "bits", "Bits", unit, show=_bits, at=lambda bits: _bits_height(bits, most_bits), ticks=ticks),
        _plot(
            layers,
            "sparsity",
            "Sparsity",
            "zeros / elements",
            show=_percent,
            label=_percent_label,
            at=lambda x: 100 * x,
            ticks=(0, 0.5, 1),
        ),
        _plot(
            layers,
            "relative_error",
            "Relative error",
            "of the weights",
            show=_error,
            at=lambda x: 100 * x / most_error,
            ticks=(0, most_error / 2, most_error),
        ),
        _plot(
            layers,
            "byte_share",
            "Share of bytes",
            "elements x bits, of all weights",
            show=_percent,
            label=_percent_label,
            at=lambda x: 100 * x / most_share,
            ticks=(0, most_share / 2, most_share),
            line="element_share",
        ),
    ]
    if activations:
        rounded = [
            {"number": number, "tensor": entry["tensor"], "bits": entry["bits"], "decision": "quantize"}
            for number, entry in enumerate(activations, start=1)
        ]
        plots.insert(
            1,
            _plot(
                rounded,
                "bits",
                "Activation bits",
                "a value",
                show=_bits,
                at=_of_a_byte,
                ticks=BYTE_TICKS,
                what="activation",
            ),
        )
    return tuple(sorted(plots, key=lambda plot: bool(plot.constant)))


def _plot(
    layers: list[dict[str, Any]],
    key: str,
    title: str,
    unit: str,
    *,
    show: Callable[[float], Figure],
    label: Callable[[float], str] = "{:.3g}".format,
    at: Callable[[float], float],
    ticks: Sequence[float],
    line: str = "",
    what: str = "layer",
) -> Plot:
    slots = max(len(layers), MIN_SLOTS)
    texts = {show(layer[key]).text for layer in layers}
    step = next(n * 10**k for k in range(9) for n in (1, 2, 5) if len(layers) / (n * 10**k) <= NUM_TICKS)
    numbers = sorted({1, *range(step, len(layers) + 1, step)} - ({step} if 1 < step <= 2 else set()))
    spreads = [_spread(layer) if key == "bits" else () for layer in layers]
    is_constant = len(texts) == 1 and not any(spreads)
    about = f"{what}, in network order" + ("; the line is the share of elements" if line else "")
    return Plot(
        title=title,
        unit=unit,
        about=about + ("; whiskers reach from the narrowest channel to the widest" if any(spreads) else ""),
        constant=f"{texts.pop()} in {f'every {what}' if len(layers) > 1 else f'the only {what}'}"
        if is_constant
        else "",
        slots=slots,
        bars=tuple(
            Bar(
                round(at(layer[key]), 2),
                layer["decision"],
                f"{layer['number']}. {escape(layer['tensor'])}: "
                f"{title.lower()} {show(layer[key]).text}{_channels(layer) if spread else ''} ({layer['decision']})",
                tuple(round(at(end), 2) for end in spread),
            )
            for layer, spread in zip(layers, spreads, strict=True)
        ),
        x_ticks=tuple(Tick(100 * (number - 0.5) / slots, str(number)) for number in numbers),
        y_ticks=tuple(Tick(round(at(value), 2), label(value)) for value in ticks),
        line=tuple(round(at(layer[line]), 2) for layer in layers) if line else (),
    )


def _spread(layer: Mapping[str, Any]) -> tuple[float, ...]:
    """Bits of the narrowest and the widest channel; empty where all have the same."""
    channels = layer.get("channel_bits") or []
    return (channels[0][0], channels[-1][0]) if channels else ()


def _channels(layer: Mapping[str, Any]) -> str:
    """How many channels have which bits, in brackets."""
    return f" [{', '.join(f'{count} of {bits:.3g}' for bits, count in layer['channel_bits'])}]"


def _bits_axis(most: float) -> tuple[str, tuple[float, ...]]:
    """Unit and ticks; logarithmic where floats would press all quantized layers to the floor."""
    if most <= 8:
        return "a weight", BYTE_TICKS
    return "a weight, logarithmic", tuple(2.0**power for power in range(math.floor(math.log2(most)) + 1))


def _of_a_byte(bits: float) -> float:
    return 100 * bits / 8


def _bits_height(bits: float, most: float) -> float:
    if most <= 8:
        return _of_a_byte(bits)
    return 100 * (math.log2(max(bits, 0.5)) + 1) / (math.log2(most) + 1)


def _ceiling(value: float) -> float:
    """The round number at the top of an axis that must hold ``value``."""
    if value <= 0:
        return 1.0
    scale: float = 10.0 ** math.floor(math.log10(value))
    return next(step * scale for step in (1, 2, 4, 6, 8, 10) if value <= step * scale * (1 + 1e-9))


def _rival(frontier: dict[str, Any]) -> dict[str, Any] | None:
    """The plan of one width everywhere that loses the least within the chosen point's cost; of equal ones the last."""
    limit = frontier["cost"] + _same_cost(frontier)
    within = [rival for rival in frontier["rivals"] if rival["cost"] <= limit]
    return min(within, key=lambda rival: (rival["loss"], -rival["cost"]), default=None)


def _same_cost(frontier: dict[str, Any]) -> float:
    costs = [cost for cost, _ in frontier["points"]] + [frontier["cost"]]
    return SAME_COST * float(max(costs) - min(costs))


def _frontier_plot(frontier: dict[str, Any], loss: dict[str, Any] | None) -> FrontierPlot:
    unit, rivals = frontier["unit"], frontier["rivals"]
    chosen = (frontier["cost"], frontier["loss"])
    measured = loss["measured"] if loss and loss["unit"] == frontier["loss_unit"] else None
    # The chosen point may have been thinned out, and must lie on the line.
    points = sorted({*((cost, loss) for cost, loss in thinned(frontier["points"], MAX_POINTS)), chosen})
    known = [*points, *((rival["cost"], rival["loss"]) for rival in rivals)]
    x, x_ticks, x_scale = _cost_axis([cost for cost, _ in known], unit)
    y, y_ticks, y_scale = _loss_axis([loss for _, loss in known] + ([] if measured is None else [measured]))

    def words(cost: float, loss: float, which: str = "expected") -> str:
        return f"{amount_text(cost, unit)}, {which} loss {loss_amount(loss, frontier['loss_unit'])}"

    def spot(kind: str, name: str, cost: float, loss: float) -> Spot:
        across, up = x(cost), y(loss)
        beside = "right" if across < 88 else "left"
        # Nothing lies below the frontier, so that the labels of its point have room there, one below the other.
        side = "below" if kind != "rival" and across > 25 and up > 12 else beside
        if side == "below" and measured is not None and (kind == "chosen") == (measured < chosen[1]):
            side = "left"
        which = "measured" if kind == "measured" else "expected"
        return Spot(across, up, kind, side, escape(name, limit=40), f"{escape(name)}: {words(cost, loss, which)}")

    return FrontierPlot(
        title=f"Expected loss against {escape(unit)}, {len(points)} points; {frontier_text(frontier)}",
        points=tuple((x(cost), y(loss), words(cost, loss)) for cost, loss in points),
        spots=(
            *(spot("rival", rival["name"], rival["cost"], rival["loss"]) for rival in rivals),
            spot("chosen", f"chosen: {cost_label(frontier['cost'], unit)}", *chosen),
            *(
                []
                if measured is None
                else [spot("measured", f"measured: {loss_amount(measured, '')}", chosen[0], measured)]
            ),
        ),
        x_ticks=x_ticks,
        y_ticks=y_ticks,
        x_title=f"{unit}{x_scale}",
        y_title=f"{frontier['loss_unit']}{y_scale}",
    )


def _scatter(predictors: dict[str, Any]) -> Scatter | None:
    """Predicted against measured loss on two equal logarithmic axes; None where a loss isn't above 0.

    Each predictor's values are divided by their median ratio: how far the points are from the line is what a factor
    can't mend.
    """
    measured = predictors["measured"]
    series = [
        (entry["name"], [value / entry["ratio"] for value in entry["predicted"]])
        for entry in predictors["predictors"]
        if entry["ratio"]
    ]
    every = [*measured, *(value for _, values in series for value in values)]
    # What is far from all that was measured would press the rest together.
    low, high = min(measured) / FAR, max(measured) * FAR
    shown = [value for value in every if low <= value <= high]
    if min(measured) <= 0 or min(shown) >= max(shown):
        return None
    start, span = math.log10(min(shown)), math.log10(max(shown) / min(shown))

    def at(value: float) -> float:
        return round(3 + 94 * (math.log10(value) - start) / span, 2)

    ticks = tuple(Tick(at(value), f"{value:.3g}") for value in _powers(min(shown), max(shown), binary=False))
    return Scatter(
        series=tuple(
            (escape(name), tuple((at(m), at(p)) for m, p in zip(measured, values, strict=True) if low <= p <= high))
            for name, values in series
        ),
        ticks=ticks,
        unit=predictors["unit"],
    )


def thinned(rows: Sequence[Row], limit: int) -> list[Row]:
    """At most ``limit`` rows, evenly spaced, the first and the last among them."""
    if len(rows) <= limit:
        return list(rows)
    return [rows[round(place * (len(rows) - 1) / (limit - 1))] for place in range(limit)]


def _cost_axis(costs: Sequence[float], unit: str) -> tuple[Callable[[float], float], tuple[Tick, ...], str]:
    """Position of a cost in percent, ticks, and the words of a scale that isn't linear."""
    low, high = min(costs), max(costs)

    if low == high:
        return lambda cost: 50.0, (Tick(50.0, cost_label(low, unit)),), ""
    is_log = low > 0 and high / low > LOG_COSTS
    scale: Callable[[float], float] = math.log if is_log else float
    start, span = scale(low), scale(high) - scale(low)

    def at(cost: float) -> float:
        return round(3 + 94 * (scale(cost) - start) / span, 2)

    values = _powers(low, high, binary=unit == "average bits") if is_log else _multiples(low, high)
    ticks = tuple(Tick(at(value), cost_label(value, unit)) for value in values)
    return at, ticks, ", logarithmic" if is_log else ""


def _powers(low: float, high: float, *, binary: bool) -> list[float]:
    """Round numbers between two, about evenly spaced on a logarithmic axis."""
    if binary:
        found = [2.0**k for k in range(math.ceil(math.log2(low)), math.floor(math.log2(high)) + 1)]
    else:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        found = [n * 10.0**k for k in decades for n in (1, 2, 5) if low <= n * 10.0**k <= high]
    return found[:: math.ceil(len(found) / NUM_TICKS)]


def _multiples(low: float, high: float) -> list[float]:
    """The multiples of a round step between two numbers."""
    scale = 10.0 ** math.floor(math.log10((high - low) / NUM_TICKS))
    step = next(n * scale for n in (1, 2, 5, 10, 20) if (high - low) / (n * scale) <= NUM_TICKS)
    return [n * step for n in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _loss_axis(losses: Sequence[float]) -> tuple[Callable[[float], float], tuple[Tick, ...], str]:
    """Position of a loss in percent, ticks, and the words of a scale that isn't linear.

    A gain, no loss and a negligible one lie on the floor.
    """
    top = max(losses)
    lowest = min((loss for loss in losses if loss > max(top, 0) * NEGLIGIBLE), default=0.0)
    if top <= LOG_LOSSES * lowest or top <= 0:
        ceiling = _ceiling(top)
        ticks = (0, ceiling / 2, ceiling) if top > 0 else (0,)
        return (
            lambda loss: round(100 * max(loss, 0) / ceiling, 2),
            tuple(Tick(100 * value / ceiling, f"{value:.3g}") for value in ticks),
            "",
        )
    bottom, height = math.floor(math.log10(lowest)), math.ceil(math.log10(top)) - math.floor(math.log10(lowest))
    floor = 10.0**bottom
    below = "\u2264 " if min(losses) < floor else ""
    powers = range(bottom, bottom + height + 1, math.ceil(height / 5))
    return (
        lambda loss: round(100 * (math.log10(max(loss, floor)) - bottom) / height, 2),
        tuple(
            Tick(round(100 * (k - bottom) / height, 2), f"{below if k == bottom else ''}{10.0**k:.3g}") for k in powers
        ),
        ", logarithmic",
    )


def _explained(layers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The layers whose record says why, with a sensitivity, alternatives or both; the latter also by option."""
    found = []
    for layer in layers:
        sensitivity = layer.get("sensitivity")
        # Of the mixtures of widths by channel, of which each layer has its own, the chosen one.
        alternatives = [
            entry
            for entry in layer.get("alternatives") or []
            if entry["chosen"] or not entry["option"].endswith(BY_CHANNEL)
        ]
        if sensitivity or alternatives:
            by_option = {entry["option"]: entry for entry in alternatives}
            chosen = next((entry for entry in alternatives if entry["chosen"]), None)
            found.append(
                {**layer, "sensitivity": sensitivity, "alternatives": alternatives}
                | {"by_option": by_option, "chosen": chosen}
            )
    return found


def read_alternatives(activation: dict[str, Any]) -> str:
    """What an activation's widths are expected to lose: ``4 bits 0.012, 6 bits 0.0011``."""
    return ", ".join(f"{entry['option']} {loss_amount(entry['loss'], '')}" for entry in activation["alternatives"])


def _read_activations(report: dict[str, Any]) -> list[dict[str, Any]]:
    """The activations whose widths were chosen."""
    return [entry for entry in report.get("activations") or () if entry["alternatives"]]


def _options(layers: list[dict[str, Any]]) -> list[str]:
    """Every option of any layer: those that start with a number by it, then the others as they come.

    Mixtures of widths by channel are each layer's own, and would be a column each.
    """
    every = dict.fromkeys(entry["option"] for layer in layers for entry in layer["alternatives"])
    found = [option for option in every if not option.endswith(BY_CHANNEL)]

    def number(option: str) -> float:
        leading = re.match(r"\d+(\.\d+)?", option)
        return float(leading[0]) if leading else math.inf

    return sorted(found, key=number)


def _most_sensitive(layers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Layers by falling sensitivity, then by the largest loss that an option of theirs is expected to bring."""

    def key(layer: dict[str, Any]) -> tuple[float, float]:
        value = layer["sensitivity"]["value"] if layer["sensitivity"] else -math.inf
        return -value, -max((entry["loss"] for entry in layer["alternatives"]), default=-math.inf)

    return sorted(layers, key=key)


def _measures(layers: list[dict[str, Any]]) -> str:
    """The measures of the sensitivities, each with its unit."""
    found = [layer["sensitivity"] for layer in layers if layer["sensitivity"]]
    return "; ".join(dict.fromkeys(f"{entry['measure']}, in {entry['unit']}" for entry in found))


def _reproduce(report: dict[str, Any]) -> str:
    """The command line without the user's own settings, which manifest.json has."""
    words = ["hcompress", report["command"], report["source"]["name"]]
    if report["command"] in ("prune", "quantize"):
        words += ["--method", report["method"]]
        words += ["--budget", report["budget"]] if report["budget"] else []
        words += ["--for", "safetensors"] if report["delivered"] == "model.safetensors" else []
        words += ["--seed", str(report["seed"])]
    return shlex.join(words)


def _size(value: float | None) -> Figure | None:
    return None if value is None else Figure(value, amount_text(value, "bytes"))


def _count(value: float | None) -> Figure | None:
    return None if value is None else Figure(value, _scaled(value))


def _scaled(value: float) -> str:
    for unit, scale in (("G", 1e9), ("M", 1e6), ("K", 1e3)):
        if value >= scale:
            return f"{value / scale:.4g} {unit}"
    return f"{value:g}"


def _milliseconds(value: float | None) -> Figure | None:
    return None if value is None else Figure(value, f"{value:.3g} ms")


def _duration(value: float) -> Figure:
    return Figure(value, f"{value:.3g} s" if value < 120 else f"{value / 60:.3g} min")


def _bits(value: float) -> Figure:
    return Figure(value, f"{value:.4g}")


def _small(value: float) -> Figure:
    return Figure(value, f"{value:.2g}")


def _loss(value: float) -> Figure:
    return Figure(value, loss_amount(value, ""))


def _error(value: float) -> Figure:
    return Figure(value, "0" if value == 0 else f"{value:.4f}" if value >= 0.0005 else f"{value:.1e}")


def _percent(value: float) -> Figure:
    """A fraction as percent; what is not quite all is not shown as all."""
    share = 100 * value
    return Figure(value, f"{share:.6g} %" if 99.995 <= share < 100 else f"{share:.2f} %")


def _percent_label(value: float) -> str:
    return f"{100 * value:.3g}%"


def _exact(value: float, unit: str) -> Figure:
    """The digits that decide a check, which a rounded figure would hide."""
    return Figure(value, f"{value:,.0f} bytes" if unit == "bytes" else f"{value:.6g} {escape(unit)}".rstrip())
