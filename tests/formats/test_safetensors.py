"""safetensors headers: what the library lets through is refused here, what is well formed reads exactly."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from compress.errors import InputError
from compress.formats import safetensors

STATE = {"a.weight": torch.arange(12.0).reshape(3, 4), "b": torch.tensor([1, 2], dtype=torch.uint8)}
F32 = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


def write(path: Path, header: dict[str, Any] | str, data: bytes = b"\0" * 4) -> Path:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def message(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        safetensors.read(path)
    assert str(path) in caught.value.message and "\n" not in caught.value.message
    return caught.value.message


def test_tensors_and_metadata_are_read_exactly(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "s.safetensors", metadata={"format": "pt"})
    found, metadata = safetensors.read(tmp_path / "s.safetensors")
    assert metadata == {"format": "pt"}
    assert all(torch.equal(found[key], STATE[key]) and found[key].dtype == STATE[key].dtype for key in STATE)


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float64, torch.bool, torch.int64]
)
def test_every_listed_dtype_is_read(tmp_path: Path, dtype: torch.dtype) -> None:
    save_file({"w": torch.ones(3).to(dtype), "empty": torch.empty(0, 4, dtype=dtype)}, tmp_path / "s")
    found, _ = safetensors.read(tmp_path / "s")
    assert found["w"].dtype == dtype and found["empty"].shape == (0, 4)


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ({"w": {**F32, "shape": [2]}}, "'w' declares shape [2] of F32 = 8 bytes, its offsets hold 4"),
        ({"w": {**F32, "shape": [0, 2**50], "data_offsets": [0, 0]}}, "overflows although it has no elements"),
        ({"w": {**F32, "shape": [2**62, 2**62]}}, "its offsets hold 4"),
        ({"w": {**F32, "shape": [-1]}}, "'w' has a shape or data_offsets that no tensor can have"),
        ({"w": {**F32, "shape": [True]}}, "'w' has a shape or data_offsets that no tensor can have"),
        ({"w": {**F32, "data_offsets": [0, 4, 8]}}, "'w' has a shape or data_offsets that no tensor can have"),
        ({"w": {**F32, "dtype": "Q4\x1b"}}, "'w' has dtype Q4\\x1b, which is none of BOOL, U8"),
        ({"w": {**F32, "extra": 1}}, "'w' must have exactly dtype, shape and data_offsets"),
        ({"w": 3}, "'w' must have exactly dtype, shape and data_offsets"),
        ({"v": F32, "w": F32}, "'w' overlaps the tensor before it"),
        ({"w": {**F32, "data_offsets": [4, 8]}}, "'w' leaves a hole before it"),
        ({"w": {**F32, "shape": [2], "data_offsets": [0, 8]}}, "truncated: its tensors need 8 bytes and it has 4"),
        ({}, "has 4 bytes after its last tensor"),
        ({"w\x1b[31m": F32}, "the tensor name 'w\\x1b[31m' has control characters"),
        ({"__metadata__": {"a": 1}, "w": F32}, "its __metadata__ must map strings to strings"),
        ('{"w": 1, "w": 2}', "its header has the key 'w' twice"),
        ("{nonsense", "its header is not JSON"),
        ("[]", "its header is not a JSON object"),
        ("[" * 100_000, "its header is not JSON"),
    ],
)
def test_malformed_headers_are_refused(tmp_path: Path, header: dict[str, Any] | str, words: str) -> None:
    assert words in message(write(tmp_path / "s.safetensors", header))


def test_header_longer_than_the_file_is_truncated(tmp_path: Path) -> None:
    (tmp_path / "s").write_bytes(struct.pack("<Q", 1000) + b"{}")
    assert "the file is truncated: its header needs 1000 bytes" in message(tmp_path / "s")


def test_oversized_headers_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "s", {f"w{i}": {**F32, "shape": [0], "data_offsets": [0, 0]} for i in range(9)}, b"")
    monkeypatch.setattr(safetensors, "MAX_TENSORS", 8)
    assert "its header lists 9 tensors, more than 8" in message(path)
    monkeypatch.setattr(safetensors, "MAX_HEADER_BYTES", 100)
    assert "more than 100" in message(path)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.floats(0, 1, exclude_max=True), byte=st.integers(0, 255), cut=st.booleans())
def test_changed_or_cut_file_is_refused_or_well_formed(tmp_path: Path, position: float, byte: int, cut: bool) -> None:
    path = tmp_path / "s.safetensors"
    save_file(STATE, path, metadata={"format": "pt"})
    content = bytearray(path.read_bytes())
    at = int(position * len(content))
    if cut:
        del content[at:]
    else:
        content[at] = byte
    path.write_bytes(content)
    try:
        found, _ = safetensors.read(path)
    except InputError:
        return
    # No checksum: a change to a name, a dtype or the data that leaves the header consistent can't be seen.
    assert not cut and sum(tensor.nbytes for tensor in found.values()) == sum(
        tensor.nbytes for tensor in STATE.values()
    )
