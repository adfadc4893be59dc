"""The checks as continuous integration reads them: JUnit XML, GitHub annotations and a GitHub job summary.

Sources: the JUnit schema as Jenkins and GitLab read it; GitHub's documents on workflow commands and job summaries.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from .errors import DiskError
from .report import check_text, headline, render_markdown, verdict_of, verdict_text
from .verdict import Verdict

SUMMARY_LIMIT = 1024 * 1024  # GitHub drops a step's summary that is larger.
NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def publish(
    report: dict[str, Any], *, summary: Path | None, junit: Path | None, environment: Mapping[str, str]
) -> list[str]:
    """Write what was asked for, and on GitHub the step's own summary.

    Args:
        summary: Markdown file to append to, or None.
        junit: XML file to write, or None.
        environment: Of the process; ``GITHUB_ACTIONS`` and ``GITHUB_STEP_SUMMARY`` are read.

    Returns:
        Annotation lines to print on stderr, as stdout carries the result; none outside GitHub.

    Raises:
        DiskError: A file can't be written; names it.
    """
    for path in _summaries(summary, environment):
        write_job_summary(report, path)
    if junit is not None:
        write_junit([report], junit)
    return github_annotations(report) if _is_on_github(environment) else []


def publish_sweep(
    text: str,
    reports: Sequence[dict[str, Any]],
    failures: Sequence[str],
    *,
    summary: Path | None,
    junit: Path | None,
    environment: Mapping[str, str],
) -> list[str]:
    """The same of a sweep: its own Markdown, a test suite for each point, and the annotations of all.

    Args:
        text: Markdown of the sweep.
        reports: Of the points that were measured.
        failures: What each other point says.
    """
    for path in _summaries(summary, environment):
        _append(text, path)
    if junit is not None:
        write_junit(reports, junit, failures)
    if not _is_on_github(environment):
        return []
    lines = [line for report in reports for line in github_annotations(report)]
    return [*lines, *(_annotation("error", "hcompress sweep", failure) for failure in failures)]


def _is_on_github(environment: Mapping[str, str]) -> bool:
    return environment.get("GITHUB_ACTIONS") == "true"


def _summaries(summary: Path | None, environment: Mapping[str, str]) -> Iterable[Path]:
    """The files to append to; a user may pass GitHub's own as --summary, and one report there is enough."""
    step_summary = environment.get("GITHUB_STEP_SUMMARY", "") if _is_on_github(environment) else ""
    return dict.fromkeys(path for path in (summary, Path(step_summary) if step_summary else None) if path)


def write_job_summary(report: dict[str, Any], path: Path) -> None:
    """Append the Markdown report; without its layers where GitHub would drop the whole as too long.

    Raises:
        DiskError: The file can't be written; names it.
    """
    text = render_markdown(report)
    if len(text.encode()) > SUMMARY_LIMIT // 2:
        note = f"{len(report['layers'])} layers are too many for a job summary; report.md lists them"
        text = render_markdown({**report, "layers": [], "notes": [*report["notes"], note]})
    _append(text, path)


def _append(text: str, path: Path) -> None:
    try:
        with path.open("a", encoding="utf-8") as stream:
            stream.write(text + "\n")
    except OSError as error:
        raise _disk_error(path, error, flag="--summary") from error


def write_junit(reports: Sequence[dict[str, Any]], path: Path, failures: Sequence[str] = ()) -> None:
    """Write the JUnit XML in one step: a reader sees the old file or the new one.

    Raises:
        DiskError: The file can't be written; names it.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        try:
            with partial.open("w", encoding="utf-8") as stream:
                stream.write(junit_xml(reports, failures))
                stream.flush()
                os.fsync(stream.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise _disk_error(path, error, flag="--junit") from error


def junit_xml(reports: Sequence[dict[str, Any]], failures: Sequence[str] = ()) -> str:
    """A suite a run, in it one test case a check, with what was measured and what was allowed.

    Args:
        failures: What runs say that came to no checks: an error each, in a suite of their own.
    """
    verdicts = [verdict_of(report) for report in reports]
    root = ElementTree.Element("testsuites", _counts(verdicts, len(failures)))
    for report, verdict in zip(reports, verdicts, strict=True):
        _add_suite(root, report, verdict, is_one_of_many=len(reports) + len(failures) > 1)
    if failures:
        name = "hcompress sweep"
        suite = ElementTree.SubElement(root, "testsuite", {"name": name, **_counts([], len(failures)), "time": "0"})
        for number, failure in enumerate(failures, start=1):
            case = ElementTree.SubElement(
                suite, "testcase", {"classname": name, "name": f"point without a model {number}", "time": "0"}
            )
            ElementTree.SubElement(case, "error", {"type": "run", "message": _xml_text(failure)})
    ElementTree.indent(root)
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{ElementTree.tostring(root, encoding="unicode")}\n'


def _counts(verdicts: Sequence[Verdict], errors: int) -> dict[str, str]:
    tests = errors + sum(len(verdict.checks) for verdict in verdicts)
    failures = sum(len(verdict.failures()) for verdict in verdicts)
    return {"tests": str(tests), "failures": str(failures), "errors": str(errors)}


def _add_suite(root: ElementTree.Element, report: dict[str, Any], verdict: Verdict, *, is_one_of_many: bool) -> None:
    goal = f", {report['budget']}" if is_one_of_many else ""
    name = _xml_text(f"hcompress {report['command']}{goal}")
    counts = _counts([verdict], 0)
    suite = ElementTree.SubElement(root, "testsuite", {"name": name, **counts, "time": f"{report['time_s']:.3f}"})
    for check in verdict.checks:
        case = ElementTree.SubElement(
            suite, "testcase", {"classname": name, "name": _xml_text(check.name), "time": "0"}
        )
        if not check.ok:
            failure = ElementTree.SubElement(
                case, "failure", {"type": "check", "message": _xml_text(check_text(check))}
            )
            failure.text = _xml_text(headline(report))
        ElementTree.SubElement(case, "system-out").text = _xml_text(check_text(check))


def github_annotations(report: dict[str, Any]) -> list[str]:
    """A workflow command for each failed check, and a notice with the outcome."""
    verdict = verdict_of(report)
    command = f"hcompress {report['command']}"
    errors = [_annotation("error", f"{command}: {check.name}", check_text(check)) for check in verdict.failures()]
    return [*errors, _annotation("notice", f"{command}: {verdict_text(verdict)}", headline(report))]


def _annotation(level: str, title: str, message: str) -> str:
    title = _escape_data(title).replace(":", "%3A").replace(",", "%2C")
    return f"::{level} title={title}::{_escape_data(message)}"


def _escape_data(text: str) -> str:
    # Percent first, or the escapes of the line ends would be escaped again.
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _xml_text(text: str) -> str:
    """Text without the characters that XML 1.0 has no way to write."""
    return NOT_XML.sub("", text)


def _disk_error(path: Path, error: OSError, *, flag: str) -> DiskError:
    return DiskError(
        f"{path}: can't be written ({error.strerror or error})",
        hint=f"pass {flag} a file in a folder that exists and has room",
    )
