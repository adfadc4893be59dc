"""Data files: numpy and safetensors arrays by name, and every unreadable file in one sentence."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from compress.errors import InputError
from compress.formats import arrays
from compress.formats.arrays import read_arrays

X = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
Y = np.array([1, 250], dtype=np.uint8)


def message(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        read_arrays(path)
    assert str(path) in caught.value.message and "\n" not in caught.value.message
    return caught.value.message


def npy(array: np.ndarray, *, allow_pickle: bool = False) -> bytes:  # type: ignore[type-arg]
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=allow_pickle)
    return buffer.getvalue()


def npz(path: Path, entries: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in entries.items():
            file.writestr(name, content)
    return path


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_arrays_keep_names_values_and_dtypes(tmp_path: Path, save: object) -> None:
    save(tmp_path / "d.npz", x=X, y=Y, f=np.asfortranarray(X[0]), s=np.float64(2.5), e=np.zeros((0, 3)))  # type: ignore[operator]
    found = read_arrays(tmp_path / "d.npz")
    assert list(found) == ["x", "y", "f", "s", "e"]
    assert found["y"].dtype == torch.uint8 and found["y"].tolist() == [1, 250]
    assert torch.equal(found["x"], torch.from_numpy(X)) and torch.equal(found["f"], torch.from_numpy(X[0]))
    assert found["s"].shape == () and float(found["s"]) == 2.5 and found["e"].shape == (0, 3)


def test_single_array_below_a_folder_keeps_its_name(tmp_path: Path) -> None:
    assert list(read_arrays(npz(tmp_path / "d.npz", {"train/x.npy": npy(X)}))) == ["train/x"]


def test_other_byte_order_is_converted(tmp_path: Path) -> None:
    assert torch.equal(read_arrays(npz(tmp_path / "d.npz", {"x.npy": npy(X.astype(">f4"))}))["x"], torch.from_numpy(X))


def test_safetensors_data_is_read(tmp_path: Path) -> None:
    save_file({"x": torch.from_numpy(X), "y": torch.from_numpy(Y)}, tmp_path / "d")
    assert read_arrays(tmp_path / "d")["y"].dtype == torch.uint8


def test_real_labels_are_read() -> None:
    root = os.environ.get("HCOMPRESS_TEST_DATA")
    if root is None:
        pytest.skip("HCOMPRESS_TEST_DATA is not set")
    found = read_arrays(Path(root) / "cifar10" / "labels.npz")
    assert 10000 in {len(tensor) for tensor in found.values()}


def test_object_arrays_are_refused_and_do_not_run(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[object, tuple[str, ...]]:
            return os.mkdir, (str(tmp_path / "created"),)

    content = npy(np.array([Payload()], dtype=object), allow_pickle=True)
    assert b"mkdir" in content and pickle.PROTO in content
    assert "'x.npy' has dtype object; hcompress reads numbers, never Python objects" in message(
        npz(tmp_path / "d.npz", {"x.npy": content})
    )
    assert not (tmp_path / "created").exists()


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"x.npy": npy(X)[:-1]}, "'x.npy' declares shape (2, 3, 4) = 96 bytes and has 95"),
        ({"x.npy": b"nothing"}, "'x.npy' is not a numpy array"),
        ({"x.npy": npy(np.array(["a"]))}, "has dtype <U1; hcompress reads numbers"),
        ({"x.npy": npy(np.array([1j]))}, "has dtype complex128; hcompress reads numbers"),
        ({"x.npy": npy(np.zeros(2, dtype=[("a", "f4")]))}, "hcompress reads numbers"),
        ({"x.npy": npy(np.zeros(2, dtype=np.longdouble))}, "which torch can't hold"),
        ({"x.txt": b"a"}, "is not an archive of numpy arrays (it has x.txt)"),
        ({}, "is not an archive of numpy arrays (it has none)"),
        ({"x.npy": npy(np.array([1.0, np.nan, np.inf]))}, "x has 1 NaN and 1 Inf of 3 values"),
    ],
)
def test_unreadable_arrays_are_refused(tmp_path: Path, entries: dict[str, bytes], words: str) -> None:
    assert words in message(npz(tmp_path / "d.npz", entries))


def test_arrays_that_inflate_beyond_the_cap_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = npz(tmp_path / "d.npz", {"x.npy": npy(np.zeros(10**6))})
    assert path.stat().st_size < 10**5
    monkeypatch.setattr(arrays, "MAX_BYTES", 10**6)
    assert "its arrays inflate to 8000128 bytes, more than 1000000" in message(path)


def test_flipped_bit_names_the_array(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=X)
    content = bytearray((tmp_path / "d.npz").read_bytes())
    content[content.index(np.float32(23).tobytes())] ^= 1
    (tmp_path / "d.npz").write_bytes(content)
    assert "the bytes of entry 'x.npy' were changed" in message(tmp_path / "d.npz")


def test_other_files_are_named(tmp_path: Path) -> None:
    assert "no such file" in message(tmp_path / "none.npz")
    assert "is a folder, not a data file" in message(tmp_path)
    (tmp_path / "d.npz").write_bytes(b"hello")
    assert "is neither an .npz archive nor a safetensors file" in message(tmp_path / "d.npz")
    (tmp_path / "d.npz").write_bytes(b"PK\x03\x04hello")
    assert "the file is truncated" in message(tmp_path / "d.npz")


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.floats(0, 1, exclude_max=True), byte=st.integers(0, 255), cut=st.booleans())
def test_changed_or_cut_file_is_refused_or_exact(tmp_path: Path, position: float, byte: int, cut: bool) -> None:
    path = tmp_path / "d.npz"
    np.savez_compressed(path, x=X, y=Y)
    content = bytearray(path.read_bytes())
    at = int(position * len(content))
    if cut:
        del content[at:]
    else:
        content[at] = byte
    path.write_bytes(content)
    try:
        found = read_arrays(path)
    except InputError:
        return
    assert sorted(found) == ["x", "y"] and torch.equal(found["x"], torch.from_numpy(X))
