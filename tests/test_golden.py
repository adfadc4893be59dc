"""Golden figures on real checkpoints, from the written files, computed here by plain ONNX Runtime and the real test
set.

Where they come from: the checkpoints' own accuracy (91.73 %, loss 0.84103) and round-to-nearest and magnitude figures
of the same checkpoints measured independently. The commands are those of the README, run as a user runs them.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from command import hcompress
from PIL import Image

DATA = Path(os.environ.get("HCOMPRESS_TEST_DATA") or "absent")
pytestmark = [
    pytest.mark.data,
    pytest.mark.skipif(not DATA.is_dir(), reason="set HCOMPRESS_TEST_DATA to the folder of real checkpoints"),
    pytest.mark.usefixtures("quick_runs"),
]
CHECKPOINT = DATA / "cifar10" / "resnet20-12fca82f.th"
MODEL = ("--model", f"{DATA}/resnet_cifar.py:resnet20")
# The runs themselves evaluate 1,000 images; the figures below are of all 10,000, computed here.
IMAGES = (*MODEL, "--data", f'{DATA}/cifar.py:tensors("calib")', "--eval", "small.py:first(1000)")
NEAREST = ("--method", "uniform", "--reconstruction", "none", "--bias-correction", "off", "--num-calibration", "128")
SMALL = f"""
import sys
sys.path.insert(0, {str(DATA)!r})
import cifar

def first(count):
    x, y = cifar.tensors("test")
    return x[:count].clone(), y[:count].clone()
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs of the figures below, in one folder; one of the installed command, the others in this process."""
    folder = tmp_path_factory.mktemp("golden")
    (folder / "small.py").write_text(SMALL)
    command = [Path(sys.executable).with_name("hcompress"), "export", CHECKPOINT, *MODEL, "--out", "dense"]
    subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600, check=True)
    hcompress(
        "prune", CHECKPOINT, *IMAGES, "--method", "magnitude", "--sparsity", "0.5", "--out", "pruned", folder=folder
    )
    hcompress("quantize", CHECKPOINT, *IMAGES, *NEAREST, "--budget", "8bit", "--out", "int8", folder=folder)
    hcompress(
        "quantize", CHECKPOINT, *IMAGES, *NEAREST, "--budget", "4bit", "--activations", "float",
        "--out", "int4", folder=folder,
    )  # fmt: skip
    return folder


@functools.cache
def real_images() -> tuple[np.ndarray, np.ndarray]:
    """The 10,000 test images, normalised, and their labels."""
    sheet = Image.open(DATA / "cifar10" / "test10000.png").convert("RGB")
    pixels = np.asarray(sheet).reshape(100, 32, 100, 32, 3).transpose(0, 2, 4, 1, 3).reshape(10000, 3, 32, 32)
    mean, std = (np.array(v, np.float32).reshape(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    images = (pixels.astype(np.float32) / 255 - mean) / std
    return images, np.load(DATA / "cifar10" / "labels.npz")["y_test"]


def accuracy(path: Path, count: int = 10_000) -> float:
    """Percent of the first ``count`` test images that a file gets right, by ONNX Runtime alone."""
    images, labels = (array[:count] for array in real_images())
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    right = 0
    for start in range(0, len(images), 500):
        (logits,) = session.run(None, {"x": images[start : start + 500]})
        right += int((logits.argmax(1) == labels[start : start + 500]).sum())
    return 100 * right / count


def report(folder: Path) -> dict[str, object]:
    return dict(json.loads((folder / "report.json").read_text()))


def test_dense_export_is_the_checkpoint(runs: Path) -> None:
    assert accuracy(runs / "dense" / "model.onnx") == pytest.approx(91.73, abs=0.02)


def test_magnitude_at_half(runs: Path) -> None:
    assert accuracy(runs / "pruned" / "model.onnx") == pytest.approx(90.0, abs=0.2)


def test_a_report_says_what_the_file_does(runs: Path) -> None:
    measured = accuracy(runs / "pruned" / "model.onnx", 1000)
    assert report(runs / "pruned")["metric"]["compressed"] == pytest.approx(measured, abs=1e-9)  # type: ignore[index]


def test_eight_bits_with_eight_bit_activations(runs: Path) -> None:
    assert accuracy(runs / "int8" / "model.onnx") >= 91.5


def test_four_bit_weights(runs: Path) -> None:
    assert (runs / "int4" / "model.safetensors").stat().st_size <= 160_000
    assert (runs / "int4" / "model.onnx").stat().st_size <= 160_000
    assert accuracy(runs / "int4" / "model.onnx") >= 89.5


def test_load_gives_the_users_class_with_the_written_weights(runs: Path) -> None:
    import compress

    network = compress.load(runs / "int4", f"{DATA}/resnet_cifar.py:resnet20")
    assert type(network).__name__ == "CifarResNet"
    program = compress.load(runs / "int4")
    session = onnxruntime.InferenceSession(runs / "int4" / "model.onnx", providers=["CPUExecutionProvider"])
    for batch in (1, 3, 7):
        x = torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(batch))
        expected = network(x)
        torch.testing.assert_close(program(x), expected, rtol=1e-3, atol=1e-4)
        (found,) = session.run(None, {"x": x.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-3, atol=1e-4)


def test_apply_repeats_a_run_from_its_plan(runs: Path) -> None:
    hcompress("apply", CHECKPOINT, *MODEL, "--plan", "int8/plan.json", "--out", "again", folder=runs)
    for name in ("model.safetensors", "model.onnx", "plan.json"):
        assert (runs / "int8" / name).read_bytes() == (runs / "again" / name).read_bytes(), name


@pytest.mark.slow
def test_a_run_is_a_checkpoint_like_any_other(runs: Path) -> None:
    hcompress("quantize", "pruned", *IMAGES, *NEAREST, "--budget", "8bit", "--out", "both", folder=runs)
    both = report(runs / "both")
    assert both["sparsity"] >= 0.5  # type: ignore[operator]
    assert (runs / "both" / "model.safetensors").stat().st_size < 200_000
    assert accuracy(runs / "both" / "model.onnx", 2000) >= 89


def test_verify_show_and_diff(runs: Path) -> None:
    verified = hcompress("verify", "int8", *IMAGES[4:], "--max-drop", "2", "--json", folder=runs)
    assert all(check["ok"] for check in json.loads(verified)["checks"])
    assert json.loads(hcompress("show", "int8", "--json", folder=runs))["method"] == "uniform"
    assert "magnitude" in hcompress("diff", "pruned", "int8", folder=runs)


@pytest.mark.slow
def test_four_bit_levels_by_what_they_do_to_the_outputs(runs: Path) -> None:
    by_outputs = ("--method", "uniform", "--budget", "4bit", "--activations", "float")
    hcompress("quantize", CHECKPOINT, *IMAGES, *by_outputs, "--out", "levels", folder=runs)
    assert accuracy(runs / "levels" / "model.onnx") >= 91.5


@pytest.mark.slow
def test_language_model_at_eight_bits(tmp_path: Path) -> None:
    llama = DATA / "babyllama.py"
    hcompress(
        "quantize", DATA / "babyllama" / "babyllama.safetensors", "--model", f"{llama}:babyllama",
        "--data", f'{llama}:windows("calib")', "--eval", f'{llama}:windows("eval")',
        "--method", "uniform", "--budget", "8bit", "--activations", "float", "--out", "run", folder=tmp_path,
    )  # fmt: skip
    metric = report(tmp_path / "run")["metric"]
    assert metric["dense"] == pytest.approx(0.84103, abs=1e-4)  # type: ignore[index]
    assert metric["compressed"] <= 0.843  # type: ignore[index]
