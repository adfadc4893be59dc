"""What continuous integration reads: valid XML, escaped workflow commands, and one summary in one place."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from compress.errors import DiskError
from compress.summary import SUMMARY_LIMIT, github_annotations, junit_xml, publish, write_job_summary, write_junit


def make_report(**changes: Any) -> dict[str, Any]:
    report = {
        "schema": "hcompress.report/1",
        "command": "quantize",
        "method": "uniform",
        "seed": 0,
        "metric": None,
        "files": {"model.onnx": 400000},
        "dense_bytes": 1000000,
        "average_bits": 4.0,
        "sparsity": 0.0,
        "params": {"dense": None, "compressed": None},
        "macs": {"dense": None, "compressed": None},
        "latency_ms": None,
        "parity": [],
        "checks": [
            {"name": "max_drop", "value": 1.25, "limit": 1.0, "unit": "points", "ok": False},
            {"name": "max_bytes", "value": 400000, "limit": 500000, "unit": "bytes", "ok": True},
            {"name": "parity", "value": 3e-06, "limit": None, "unit": "", "ok": True},
        ],
        "time_s": 12.5,
        "peak_rss_bytes": 5e8,
        "layers": [],
        "notes": [],
        "source": {"name": "net.pt", "sha256": "cd" * 32},
        "budget": None,
        "delivered": "model.onnx",
        "versions": {"hcompress": "0.1.0"},
    }
    return report | changes


def make_layers(count: int) -> list[dict[str, Any]]:
    layer = {"op": "linear", "shape": [8], "elements": 8, "macs": None, "bits": 4, "sparsity": 0.0}
    rest = {"decision": "quantize", "relative_error": 0.1, "why": "why " * 40}
    return [{"tensor": f"layer{number}", **layer, **rest} for number in range(count)]


def test_junit_has_a_case_a_check_with_value_and_limit() -> None:
    root = ElementTree.fromstring(junit_xml([make_report()]))
    assert root.tag == "testsuites"
    suite = root[0]
    assert suite.attrib == {
        "name": "hcompress quantize",
        "tests": "3",
        "failures": "1",
        "errors": "0",
        "time": "12.500",
    }
    assert [(case.get("name"), case.findtext("system-out")) for case in suite] == [
        ("max_drop", "max_drop: 1.25 points, limit 1 points: FAILED"),
        ("max_bytes", "max_bytes: 400,000 bytes, limit 500,000 bytes: passed"),
        ("parity", "parity: 3e-06: passed"),
    ]
    assert [failure.get("message") for failure in suite.iter("failure")] == [
        "max_drop: 1.25 points, limit 1 points: FAILED"
    ]
    assert suite[0].findtext("failure") == "bytes on disk 1 MB -> 400 KB (2.50x smaller, 40.0 % of dense)"


def test_junit_of_a_hostile_name_is_valid_xml() -> None:
    name = 'a\x00\x0b\ufffe\ud800<&"]]>'
    report = make_report(checks=[{"name": name, "value": 2, "limit": 1, "unit": name, "ok": False}])
    text = junit_xml([report])
    case = ElementTree.fromstring(text.encode())[0][0]
    assert case.get("name") == 'a<&"]]>'


def test_annotations_mark_failures_and_escape() -> None:
    assert github_annotations(make_report()) == [
        "::error title=hcompress quantize%3A max_drop::max_drop: 1.25 points, limit 1 points: FAILED",
        "::notice title=hcompress quantize%3A Failed%3A max_drop (1 of 3 checks)::"
        "bytes on disk 1 MB -> 400 KB (2.50x smaller, 40.0 %25 of dense)",
    ]


def test_an_annotation_is_one_line_whatever_the_name() -> None:
    checks = [{"name": "x\r\n::error::a,b%", "value": 2.0, "limit": 1.0, "unit": "%\n", "ok": False}]
    error, notice = github_annotations(make_report(checks=checks))
    for line in (error, notice):
        assert "\n" not in line
        assert "\r" not in line
    title = error.removeprefix("::error title=").split("::")[0]
    assert "%2C" in title
    assert "%25" in title
    assert "," not in title


def test_outside_github_only_the_named_files_are_written(tmp_path: Path) -> None:
    step = tmp_path / "step.md"
    environment = {"GITHUB_STEP_SUMMARY": str(step)}
    lines = publish(make_report(), summary=tmp_path / "s.md", junit=tmp_path / "j.xml", environment=environment)
    assert lines == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["j.xml", "s.md"]
    assert publish(make_report(), summary=None, junit=None, environment={}) == []


def test_on_github_the_step_summary_and_annotations_come_by_themselves(tmp_path: Path) -> None:
    step = tmp_path / "step.md"
    step.write_text("before\n")
    environment = {"GITHUB_ACTIONS": "true", "GITHUB_STEP_SUMMARY": str(step)}
    lines = publish(make_report(), summary=None, junit=None, environment=environment)
    assert [line.split(" ")[0] for line in lines] == ["::error", "::notice"]
    assert step.read_text().startswith("before\n# hcompress quantize: Failed: ")
    publish(make_report(), summary=step, junit=None, environment=environment)
    assert step.read_text().count("# hcompress quantize: Failed: ") == 2


def test_a_summary_that_github_would_drop_leaves_its_layers_out(tmp_path: Path) -> None:
    path = tmp_path / "s.md"
    write_job_summary(make_report(layers=make_layers(4000)), path)
    assert path.stat().st_size < SUMMARY_LIMIT / 2
    assert "4000 layers are too many for a job summary; report.md lists them" in path.read_text()
    write_job_summary(make_report(layers=make_layers(40)), path)
    assert "<summary>All layers (40)</summary>" in path.read_text()


def test_files_that_cannot_be_written_are_named(tmp_path: Path) -> None:
    with pytest.raises(DiskError) as summary:
        write_job_summary(make_report(), tmp_path)
    assert summary.value.message == f"{tmp_path}: can't be written (Is a directory)"
    assert summary.value.hint == "pass --summary a file in a folder that exists and has room"
    missing = tmp_path / "none" / "junit.xml"
    with pytest.raises(DiskError, match=r"junit\.xml: can't be written \(No such file or directory\)") as junit:
        write_junit([make_report()], missing)
    assert junit.value.hint == "pass --junit a file in a folder that exists and has room"


def test_a_failed_junit_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "junit.xml"
    path.write_text("old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(DiskError, match="No space left on device"):
        write_junit([make_report()], path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
