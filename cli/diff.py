"""``hcompress diff``."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import click

from .. import canonical
from ..plan import Decision, Plan, Quantize, read_plan
from .figures import NOTHING, REPORT, decision_text, read_report
from .options import command
from .output import print_json, print_line, print_table

EXAMPLES = """\
hcompress diff small smaller
hcompress diff small/plan.json edited-plan.json
hcompress diff small smaller --json"""
SCHEMA = "hcompress.diff/1"
Pair = dict[str, Any]


@command("diff", examples=EXAMPLES)
@click.argument("a", type=click.Path(path_type=Path))
@click.argument("b", type=click.Path(path_type=Path))
def diff(a: Path, b: Path, as_json: bool, quiet: bool) -> None:
    """Print what differs between A and B, run folders or plan.json files: settings, decisions and figures."""
    plans = [read_plan(path / "plan.json" if path.is_dir() else path) for path in (a, b)]
    of_plan, decisions, figures = plan_changes(*plans), decision_changes(*plans), figure_changes(a, b)
    if as_json:
        paths = {"a": str(a), "b": str(b)}
        print_json({"schema": SCHEMA, **paths, "plan": of_plan, "decisions": decisions, "figures": figures})
        return
    rows = [(name, _text(pair["a"]), _text(pair["b"])) for name, pair in (of_plan | figures).items()]
    if rows:
        print_table(("", str(a), str(b)), rows)
    for change in decisions:
        print_line(f"{change['tensor']}: {change['text']}")
    if not rows and not decisions:
        print_line(f"{a} and {b} do not differ")


def plan_changes(a: Plan, b: Plan) -> dict[str, Pair]:
    """The fields of two plans that differ, options one by one; decisions apart."""
    named = [
        {"method": plan.method, "seed": plan.seed, "budget": None if plan.budget is None else str(plan.budget)}
        | {"source": plan.source_sha256, "task": plan.task_sha256}
        | {f"option {name}": _short(value) for name, value in plan.options.items()}
        | {f"predicted {name}": value for name, value in plan.predicted.items()}
        for plan in (a, b)
    ]
    return _differing(*map(canonical.plain, named))


def _short(option: Any) -> Any:
    """A table of factors by tensor is told by its size and hash."""
    if not isinstance(option, dict):
        return option
    return f"of {len(option)} tensors, {canonical.sha256_of(option)[:12]}"


def decision_changes(a: Plan, b: Plan) -> list[dict[str, Any]]:
    """The tensors that got another decision, in the order of A, then those of B alone."""
    first, second = _by_tensor(a), _by_tensor(b)
    changes = []
    for key in first | second:
        old, new = first.get(key), second.get(key)
        if old != new:
            texts = {"tensor": key[0], "kind": key[1], "text": _change_text(old, new)}
            changes.append(texts | {"a": canonical.plain(old), "b": canonical.plain(new)})
    return changes


def _by_tensor(plan: Plan) -> dict[tuple[str, str], Decision]:
    return {(d.tensor, f"{d.kind} {d.target}" if isinstance(d, Quantize) else d.kind): d for d in plan.decisions}


def _change_text(old: Decision | None, new: Decision | None) -> str:
    if old is None or new is None:
        return "; ".join(f"only in {side}: {decision_text(d)}" for side, d in (("A", old), ("B", new)) if d is not None)
    fields = [field.name for field in dataclasses.fields(old)]
    pairs = [(name, getattr(old, name), getattr(new, name)) for name in fields]
    return ", ".join(f"{name} {_text(before)} -> {_text(after)}" for name, before, after in pairs if before != after)


def figure_changes(a: Path, b: Path) -> dict[str, Pair]:
    """The measured figures that differ; none where one side has no report."""
    if not ((a / REPORT).is_file() and (b / REPORT).is_file()):
        return {}
    return _differing(_figures(read_report(a)), _figures(read_report(b)))


def _figures(report: dict[str, Any]) -> dict[str, Any]:
    metric, latency, macs = report["metric"], report["latency_ms"], report["macs"]
    figures = {f"bytes of {name}": size for name, size in report["files"].items() if name.startswith("model.")}
    if metric is not None:
        figures[f"{metric['name']} ({metric['unit']})"] = metric["compressed"]
    if macs is not None:
        figures["macs"] = macs["compressed"]
    if "nonzero_macs" in report:
        figures["nonzero_macs"] = report["nonzero_macs"]["compressed"]
    if latency is not None:
        figures["latency_ms"] = latency["compressed"]
    return figures | {
        "params": report["params"]["compressed"],
        "average_bits": report["average_bits"],
        "sparsity": report["sparsity"],
    }


def _differing(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Pair]:
    return {name: {"a": a.get(name), "b": b.get(name)} for name in a | b if a.get(name) != b.get(name)}


def _text(value: Any) -> str:
    if value is None:
        return NOTHING
    if isinstance(value, str) and len(value) == 64 and value.isalnum():
        return value[:12]  # A sha256: enough of it to tell two apart.
    return f"{value:.6g}" if isinstance(value, float) else str(value)
