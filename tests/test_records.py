"""Canonical JSON, errors, verdicts, manifests and sensitivities say what they hold and refuse what they can't."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress import canonical, errors
from compress.errors import EXIT_CODES, GateError, HCompressError, InputError, escape
from compress.manifest import NAME, Manifest, check_files, describe_files, read_manifest
from compress.sensitivity import CostTable, Estimate, Sensitivity, read_sensitivity
from compress.verdict import Check, Gates, Verdict, limit_check, metric_checks

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(JSON)
def test_canonical_text_reads_back_and_is_stable(value: object) -> None:
    assert json.loads(canonical.dumps(value)) == value
    assert canonical.dumps(json.loads(canonical.dumps(value))) == canonical.dumps(value)


@given(st.dictionaries(st.text(), st.integers()))
def test_the_order_of_keys_does_not_change_the_hash(value: dict[str, int]) -> None:
    assert canonical.sha256_of(value) == canonical.sha256_of(dict(reversed(value.items())))


def test_a_number_that_is_none_is_never_written() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical.dumps({"value": math.nan})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no such file"),
        ("{", "not readable as JSON"),
        ("[" * 100_000, "not readable as JSON"),
        ("[]", "a JSON object is expected"),
        ('{"schema": "y/\\u001b1"}', "schema is y/\\x1b1, expected x/1"),
    ],
)
def test_a_file_that_is_no_record_is_refused(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "record.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError) as caught:
        canonical.read_record(path, "x/1")
    assert message in caught.value.message
    assert str(path) in caught.value.message


def test_every_error_has_its_own_exit_code_and_meaning() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, HCompressError)]
    assert sorted(kind.exit_code for kind in kinds) == list(range(1, 10))
    assert [entry.code for entry in EXIT_CODES] == [*range(10), 130, 143]
    assert len({entry.meaning for entry in EXIT_CODES}) == len(EXIT_CODES)


def test_a_failed_gate_carries_its_report() -> None:
    assert GateError("x", report={"a": 1}).report == {"a": 1}


def test_names_of_untrusted_files_cannot_steer_a_terminal() -> None:
    assert escape("a\x1b[31m\n") == "a\\x1b[31m\\n"
    assert len(escape("a" * 1000)) < 120


def test_a_drop_equal_to_the_limit_passes_and_more_fails() -> None:
    def ok(compressed: float) -> list[bool]:
        gates = Gates(max_drop=1.0, min_metric=90.0)
        checks = metric_checks(gates, unit="%", higher_is_better=True, dense=91.0, compressed=compressed)
        return [check.ok for check in checks]

    assert ok(90.0) == [True, True]
    assert ok(89.9) == [False, False]


def test_a_loss_that_grows_is_a_drop() -> None:
    (check,) = metric_checks(Gates(max_drop=0.1), unit="nats", higher_is_better=False, dense=1.0, compressed=1.2)
    assert not check.ok
    assert check.value == pytest.approx(0.2)
    (check,) = metric_checks(Gates(min_metric=1.1), unit="nats", higher_is_better=False, dense=1.0, compressed=1.2)
    assert not check.ok


def test_no_limit_is_no_check() -> None:
    assert metric_checks(Gates(), unit="%", higher_is_better=True, dense=1.0, compressed=0.0) == []
    assert limit_check("max_bytes", 10.0, None, "bytes") == []
    assert [check.ok for check in limit_check("max_bytes", 10.0, 9.0, "bytes")] == [False]


def test_a_verdict_holds_if_every_check_does() -> None:
    good, bad = Check("a", 1.0, 2.0, "ms", True), Check("b", 3.0, 2.0, "ms", False)
    assert Verdict((good,)).ok
    assert not Verdict((good, bad)).ok
    assert Verdict((good, bad)).failures() == (bad,)
    assert str(bad) == "b: 3 ms (limit 2 ms) FAILED"
    assert str(Check("latency", 3.0, None, "ms", True)) == "latency: 3 ms ok"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "model.onnx").write_bytes(b"model")
    manifest = Manifest(describe_files(tmp_path), {"checkpoint": "0"}, {}, ["hcompress"], 0, "2026-01-01T00:00:00Z", {})
    (tmp_path / NAME).write_text(canonical.dumps(manifest))
    return tmp_path


def test_a_manifest_reads_back_and_its_files_are_whole(run: Path) -> None:
    manifest = read_manifest(run)
    assert manifest.files["model.onnx"]["bytes"] == 5
    check_files(run, manifest)


def test_a_changed_a_missing_and_an_escaping_file_are_named(run: Path) -> None:
    manifest = read_manifest(run)
    (run / "model.onnx").write_bytes(b"Model")
    with pytest.raises(InputError, match=r"model\.onnx: bytes differ from the manifest"):
        check_files(run, manifest)
    (run / "model.onnx").unlink()
    with pytest.raises(InputError, match=r"model\.onnx: missing, though the manifest lists it"):
        check_files(run, manifest)
    with pytest.raises(InputError, match="leaves the folder"):
        check_files(run, replace(manifest, files={"../x": {"sha256": "0"}}))


def test_a_folder_without_a_manifest_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a run folder"):
        read_manifest(tmp_path)
    (tmp_path / NAME).write_text('{"schema": "hcompress.manifest/1"}')
    with pytest.raises(InputError, match="key 'files' is missing"):
        read_manifest(tmp_path)


def test_a_sensitivity_survives_its_file_in_order(tmp_path: Path) -> None:
    entries = {("b", "4"): Estimate(1.0, 0.1), ("a", ""): Estimate(2.0)}
    record = Sensitivity("magnitude", "squared weight", "0" * 64, None, entries)
    path = tmp_path / "sensitivity.json"
    path.write_text(canonical.dumps(record.to_json()))
    assert read_sensitivity(path) == record
    assert list(read_sensitivity(path).entries) == list(entries)


def test_a_sensitivity_with_a_bad_entry_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "sensitivity.json"
    path.write_text(json.dumps({"schema": "hcompress.sensitivity/1", "entries": [{"layer": "a"}]}))
    with pytest.raises(InputError, match=r"bad entry \('option'\)"):
        read_sensitivity(path)


def test_a_cost_table_is_plain_json() -> None:
    record = CostTable("bytes", {("a", "4"): 10.0}).to_json()
    assert record["entries"] == [{"layer": "a", "option": "4", "value": 10.0}]
