"""The cache gives back what was written, or nothing: what is damaged is said so and measured again."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

from compress import cache, canonical

KEY = {"measure": "fisher", "source_sha256": "0" * 64, "inputs": [{"shape": [3, 32, 32]}]}
RECORD = {"entries": [{"layer": "conv", "value": 0.1 + 0.2}], "notes": []}
TENSORS = {"conv": torch.arange(6.0).reshape(2, 3), "a.weight": torch.tensor(2, dtype=torch.int64)}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "hcompress"


def kept(tensors: dict[str, torch.Tensor] | None = None) -> None:
    notes: list[str] = []
    cache.write("trace", KEY, RECORD, TENSORS if tensors is None else tensors, notes=notes)
    assert notes == []


def missed() -> list[str]:
    """The notes of a read that finds nothing."""
    notes: list[str] = []
    assert cache.read("trace", KEY, notes) is None
    return notes


def test_nothing_is_found_where_nothing_was_written(folder: Path) -> None:
    assert missed() == []
    assert not folder.exists()


def test_what_is_read_is_what_was_written(folder: Path) -> None:
    kept()
    notes: list[str] = []
    found = cache.read("trace", dict(reversed(KEY.items())), notes)
    assert found is not None and notes == []
    record, tensors = found
    assert record == RECORD
    assert tensors.keys() == TENSORS.keys()
    assert all(torch.equal(tensors[name], value) for name, value in TENSORS.items())
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32, torch.int64}


def test_a_record_without_tensors_is_one_file(folder: Path) -> None:
    kept({})
    assert cache.read("trace", KEY, []) == (RECORD, {})
    (path,) = [path for path in folder.iterdir() if path.name != ".lock"]
    assert path.name == f"trace-{canonical.sha256_of(KEY)}.json"
    assert json.loads(path.read_text())["schema"] == "hcompress.cache/1"


def test_strided_tensors_are_kept_by_value(folder: Path) -> None:
    kept({"t": TENSORS["conv"].T})
    found = cache.read("trace", KEY, [])
    assert found is not None and torch.equal(found[1]["t"], TENSORS["conv"].T)


@pytest.mark.parametrize("name", KEY)
def test_a_changed_key_is_another_entry(folder: Path, name: str) -> None:
    kept()
    notes: list[str] = []
    assert cache.read("trace", KEY | {name: "other"}, notes) is None
    assert cache.read("other", KEY, notes) is None
    assert notes == []


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_last_byte(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


def make_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def change(**fields: Any) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return edit


DAMAGE: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "truncated JSON": (".json", truncate, "not readable as JSON"),
    "empty JSON": (".json", lambda path: path.write_bytes(b""), "not readable as JSON"),
    "no UTF-8": (".json", lambda path: path.write_bytes(b"\xff\xfe"), "not readable as JSON"),
    "a list": (".json", lambda path: path.write_text("[]"), "a JSON object is expected"),
    "another schema": (".json", change(schema="hcompress.cache/0"), "expected hcompress.cache/1"),
    "a missing key": (".json", lambda path: path.write_text('{"schema": "hcompress.cache/1"}'), "not a cache entry"),
    "a figure changed": (".json", change(record=RECORD | {"notes": ["x"]}), "bytes were changed"),
    "a figure that is NaN": (".json", change(record={"value": float("nan")}), "not a cache entry"),
    "a record that is none": (".json", change(record=3), "bytes were changed"),
    "tensors taken out": (".json", change(tensors_sha256=None), "bytes were changed"),
    "another's entry": (".json", change(key={"measure": "other"}), "of another measurement"),
    "a folder in its place": (".json", make_folder, "not readable as JSON"),
    "truncated tensors": (".safetensors", truncate, "bytes were changed"),
    "a flipped bit": (".safetensors", flip_last_byte, "bytes were changed"),
    "tensors gone": (".safetensors", Path.unlink, "can't be read"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_entry_is_a_miss_with_one_sentence_and_is_replaced(folder: Path, case: str) -> None:
    suffix, damage, words = DAMAGE[case]
    kept()
    path = folder / f"trace-{canonical.sha256_of(KEY)}{suffix}"
    damage(path)
    (note,) = missed()
    assert str(path) in note and words in note and "measured again" in note
    if path.is_dir():
        path.rmdir()
    kept()
    assert cache.read("trace", KEY, []) is not None


def test_a_well_sealed_file_that_is_no_safetensors_is_a_miss(folder: Path) -> None:
    kept()
    path = folder / f"trace-{canonical.sha256_of(KEY)}.json"
    path.with_suffix(".safetensors").write_bytes(b"\x80\x04pickle")
    entry = json.loads(path.read_text()) | {"tensors_sha256": canonical.sha256_of_bytes(b"\x80\x04pickle")}
    del entry["sha256"]
    path.write_text(canonical.dumps({**entry, "sha256": canonical.sha256_of(entry)}))
    (note,) = missed()
    assert "truncated" in note


def test_a_folder_that_cannot_be_written_is_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    notes: list[str] = []
    cache.write("trace", KEY, RECORD, notes=notes)
    (note,) = notes
    assert note.startswith("measurements are not cached (") and "--cache off" in note
    assert missed() == []


def test_a_full_disk_is_a_note_and_leaves_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    folder.mkdir()
    monkeypatch.setattr(os, "fsync", full)
    notes: list[str] = []
    cache.write("trace", KEY, RECORD, TENSORS, notes=notes)
    assert "No space left on device" in notes[0]
    assert [path.name for path in folder.iterdir()] == [".lock"]


def test_a_writer_does_not_wait_for_ever(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "LOCK_TIMEOUT_S", 0.0)
    folder.mkdir()
    notes: list[str] = []
    with FileLock(folder / ".lock"):
        cache.write("trace", KEY, RECORD, notes=notes)
    assert "is locked by another run" in notes[0]


def test_without_a_home_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setenv("XDG_CACHE_HOME", "relative/is/ignored")
    monkeypatch.setattr(Path, "home", homeless)
    assert missed() == []
    notes: list[str] = []
    cache.write("trace", KEY, RECORD, notes=notes)
    assert "no home folder" in notes[0]


def test_the_home_folder_is_used_without_xdg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    kept()
    assert (tmp_path / ".cache" / "hcompress").stat().st_mode & 0o777 == 0o700


def entry(number: int) -> dict[str, int]:
    return {"number": number}


def stems(folder: Path) -> set[str]:
    return {path.stem for path in folder.glob("trace-*")}


def test_the_least_recently_used_entries_make_room(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {"t": torch.zeros(1000)}
    for number in range(3):
        cache.write("trace", entry(number), {}, tensors, notes=[])
        for path in folder.glob(f"trace-{canonical.sha256_of(entry(number))}.*"):
            os.utime(path, (number, number))
    assert cache.read("trace", entry(0), []) is not None  # used again: 1 is now the oldest
    (folder / ".trace-dead.json.partial").touch()
    monkeypatch.setattr(cache, "MAX_BYTES", 15_000)
    cache.write("trace", entry(3), {}, tensors, notes=[])
    assert stems(folder) == {f"trace-{canonical.sha256_of(entry(number))}" for number in (0, 2, 3)}
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 15_000
    assert not list(folder.glob(".*.partial"))


def test_tensors_beyond_the_limit_are_not_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "MAX_BYTES", 1000)
    notes: list[str] = []
    cache.write("trace", KEY, RECORD, {"t": torch.zeros(1000)}, notes=notes)
    assert notes == ["measurements of 4KB are not cached: 1KB is the most"]
    assert not folder.exists()


def test_the_key_of_a_program_changes_with_its_code() -> None:
    found = cache.versions()
    assert found["torch"] == torch.__version__
    assert found == cache.versions()
    assert len(found["code"]) == 64
