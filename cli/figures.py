"""Figures of a report as a person reads them: the before/after table, the checks and the decisions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .. import canonical
from ..errors import InputError, escape
from ..plan import CorrectBias, Decision, MaskWeights, PruneChannels, Replace
from ..verdict import Check
from ..widths import shown
from .output import print_line, print_table

REPORT_SCHEMA = "hcompress.report/1"
REPORT = "report.json"
SWEEP_SCHEMA = "hcompress.sweep/1"
NOTHING = "-"
KEYS = (
    *("method", "seed", "metric", "files", "dense_bytes", "average_bits", "sparsity", "params", "macs", "latency_ms"),
    *("parity", "checks", "time_s", "peak_rss_bytes", "layers", "notes"),
)


def read_report(folder: Path) -> dict[str, Any]:
    """The report of a run folder, with every key that is printed.

    Raises:
        InputError: The folder has no report, or one that lacks a key; names it.
    """
    record = canonical.read_record(folder / REPORT, REPORT_SCHEMA)
    missing = [key for key in KEYS if key not in record]
    if missing:
        raise InputError(f"{folder / REPORT}: key {missing[0]!r} is missing", hint="make the run again")
    return record


def print_report(report: dict[str, Any]) -> None:
    """Before and after, the proofs, the checks and the notes of one run."""
    print_table(("", "dense", "compressed", "change"), comparison_rows(report))
    for line in prediction_lines(report):
        print_line(line)
    if report.get("predictors"):
        print_predictors(report["predictors"])
    for line in proof_lines(report):
        print_line(line)


def print_sweep(record: dict[str, Any]) -> None:
    """The points of a sweep, a row each, and what those without a model say."""
    from ..sweep_report import messages, plain_rows, sweep_head, sweep_text

    print_line(f"{record['method']}: {sweep_text(record)}")
    print_table(sweep_head(record), plain_rows(record))
    for message in messages(record):
        print_line(message)


def print_measured(record: dict[str, Any]) -> None:
    """The record of a run, of a sweep or of a verification: all that it measured."""
    if record["schema"] == SWEEP_SCHEMA:
        print_sweep(record)
        return
    if record["schema"] == REPORT_SCHEMA:
        print_report(record)
        return
    metric = record["metric"]
    if metric is not None:
        unit = metric["unit"]
        print_line(f"{metric['name']}: {metric['compressed']:.4g} {unit} (dense {metric['dense']:.4g} {unit})")
    for line in [parity_line(record["parity"]), *gate_lines(record["checks"])]:
        print_line(line)


def comparison_rows(report: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """The before/after table; a figure that was not measured has no row."""
    rows = []
    metric = report["metric"]
    if metric is not None:
        unit = metric["unit"]
        change = f"{metric['compressed'] - metric['dense']:+.4g} {'points' if unit == '%' else unit}"
        name = f"{metric['name']} ({metric['num_examples']:,} examples)"
        rows.append((name, f"{metric['dense']:.4g} {unit}", f"{metric['compressed']:.4g} {unit}", change))
    dense_bytes, delivered = report["dense_bytes"], report.get("delivered", "model.onnx")
    rows.append((delivered, *_sizes(dense_bytes, report["files"].get(delivered))))
    rows += [
        (name, NOTHING, size(size_bytes), "")
        for name, size_bytes in sorted(report["files"].items())
        if name != delivered
    ]
    for key, label in (("params", "parameters"), ("macs", "MACs"), ("nonzero_macs", "MACs of nonzero weights")):
        pair = report.get(key)
        if key == "nonzero_macs" and pair == report["macs"]:  # no weight is zero
            continue
        if pair is not None and pair["dense"] is not None:
            rows.append(
                (label, count(pair["dense"]), count(pair["compressed"]), share(pair["compressed"], pair["dense"]))
            )
    rows.append(("average bits", NOTHING, f"{report['average_bits']:.4g}", ""))
    rows.append(("sparsity", NOTHING, f"{100 * report['sparsity']:.4g} %", ""))
    latency = report["latency_ms"]
    if latency is not None:
        rows.append(("latency, batch 1", *latency_cells(latency["dense"], latency["compressed"])))
    return rows


def _sizes(dense_bytes: int, size_bytes: int | None) -> tuple[str, str, str]:
    if size_bytes is None:  # A rejected run keeps no models.
        return size(dense_bytes), NOTHING, ""
    return size(dense_bytes), size(size_bytes), share(size_bytes, dense_bytes)


def latency_cells(dense_ms: float, compressed_ms: float) -> tuple[str, str, str]:
    """Two times and their ratio."""
    change = f"{dense_ms / compressed_ms:.3g}x as fast" if compressed_ms else ""
    return f"{dense_ms:.3g} ms", f"{compressed_ms:.3g} ms", change


def prediction_lines(report: dict[str, Any]) -> list[str]:
    """The chosen point of the frontier, and its loss as predicted and as measured; none of a run without them."""
    frontier, loss = report.get("frontier"), report.get("loss")
    if not frontier and not loss:
        return []
    from ..report import frontier_text, loss_text

    lines = [f"frontier: {frontier_text(frontier)}"] if frontier else []
    return lines + ([f"loss: {loss_text(loss)}"] if loss else [])


def print_predictors(predictors: dict[str, Any]) -> None:
    """How well predictors of the loss foretold what random widths cost, a row each."""
    from ..report import predictor_cells, predictors_text

    print_line(f"predictors: {predictors_text(predictors)}")
    print_table(("predictor", "Spearman rho", "p90/p10 of predicted/measured", "median"), predictor_cells(predictors))


def proof_lines(report: dict[str, Any]) -> list[str]:
    """Parity, checks, cost and notes, a line each."""
    lines = [parity_line(report["parity"])] if report["parity"] else []
    lines += gate_lines(report["checks"])
    lines.append(f"took {report['time_s']:.1f} s, peak memory {size(report['peak_rss_bytes'])}")
    return lines + [f"note: {note}" for note in report["notes"]]


def parity_line(parity: list[dict[str, Any]]) -> str:
    """The comparison of the exported model with the torch one, over all batch sizes."""
    batches = ", ".join(str(entry["batch"]) for entry in parity)
    agreements = [entry["argmax_agreement"] for entry in parity if entry["argmax_agreement"] is not None]
    same = f", same class for {100 * min(agreements):.4g} % of examples" if agreements else ""
    largest = max(entry["max_abs"] for entry in parity)
    return f"parity of ONNX Runtime with torch at batches {batches}: largest difference {largest:.3g}{same}"


def gate_lines(checks: list[dict[str, Any]]) -> list[str]:
    """Each gate with its limit and whether it holds; of the parity checks those that fail."""
    shown = [check for check in checks if not check["ok"] or not check["name"].startswith("parity")]
    return [str(Check(c["name"], c["value"], c["limit"], c["unit"], c["ok"])) for c in shown]


def size(size_bytes: float) -> str:
    """Decimal bytes: ``283 KB``, ``1.08 MB``."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if size_bytes >= scale:
            return f"{size_bytes / scale:.3g} {unit}"
    return f"{size_bytes:g} B"


def count(number: float) -> str:
    """A whole number with its thousands apart."""
    return f"{number:,.0f}"


def share(part: float, whole: float) -> str:
    """What remains, in percent."""
    return f"{100 * part / whole:.3g} %" if whole else ""


def decision_text(decision: Decision) -> str:
    """A decision in words."""
    if isinstance(decision, MaskWeights):
        return f"keeps {decision.kept:,} of {decision.total:,}, {decision.pattern}"
    if isinstance(decision, CorrectBias):
        return f"corrected, values {decision.values_sha256[:12]}"
    if isinstance(decision, Replace):
        return f"new values {decision.values_sha256[:12]}"
    if isinstance(decision, PruneChannels):
        return f"keeps {len(decision.keep):,} of {decision.size:,} channels"
    per = "one scale" if decision.axis is None else f"a scale for each index of dimension {decision.axis}"
    # A range for each channel is as long as the layer is wide.
    given = decision.range
    found = escape(given, limit=40) if isinstance(given, str) else "{:.4g} to {:.4g}".format(*given)
    how = f"range {found}" if decision.values_sha256 is None else f"levels {decision.values_sha256[:12]}"
    return f"{shown(decision.bits)}, {decision.scheme}, {per}, {how}"
