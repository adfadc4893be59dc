"""Quantization followed by training, as a user does it, on the network that ships with the package."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command import record as run
from safetensors.torch import load_file

DEMO = Path(str(resources.files("compress.demo")))
CHECKPOINT = DEMO / "fashion_net.safetensors"
NETWORK = ("--model", "compress.demo.network:fashion_net", "--mean", "0.286", "--std", "0.353")
# All examples calibrate, so that the report's loss is measured on those of the training's checks.
DATA = ("--data", "images.npz", "--eval", "images.npz", "--num-calibration", "1024")
TRAINING = ("--recover-steps", "20", "--lr", "0.003", "--batch-size", "64", "--augment", "crop")
GOAL = ("--method", "uniform", "--budget", "2bit", "--activations", "4", "--reconstruction", "none")
pytestmark = pytest.mark.usefixtures("quick_runs")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rounding")
    images = np.load(DEMO / "calibration.npz")
    np.savez(folder / "images.npz", x=images["x"][:256], y=images["y"][:256])
    return folder


@pytest.fixture(scope="module")
def trained(folder: Path) -> dict[str, Any]:
    return run("quantize", CHECKPOINT, *NETWORK, *DATA, *GOAL, *TRAINING, "--out", "trained", folder=folder)


def test_a_rounded_network_learns_on_its_grid(trained: dict[str, Any], folder: Path) -> None:
    plan = json.loads((folder / "trained" / "plan.json").read_text())
    assert plan["options"]["recover"]["steps"] == 20
    note = next(note for note in trained["notes"] if "20 training steps" in note)
    before, after = (float(note.split(f" {word}")[0].split()[-1]) for word in ("before", "after"))
    assert after < 0.5 * before
    assert trained["average_bits"] == 2
    sidecar = load_file(folder / "trained" / "plan.safetensors")
    weights = [d for d in plan["decisions"] if d["kind"] == "quantize" and d["target"] == "weight"]
    for decision in weights:
        levels = sidecar[f"{decision['tensor']}#levels"]
        assert levels.dtype == torch.int8 and -2 <= int(levels.min()) <= int(levels.max()) <= 1
    assert any(d["kind"] == "replace" for d in plan["decisions"])
    assert all(check["ok"] for check in trained["checks"])
    # What the report measured in the runtime on the written file is what the training said of the float network.
    assert trained["loss"]["measured"] == pytest.approx(after, rel=0.2)


def test_its_plan_repeats_the_run_without_data(trained: dict[str, Any], folder: Path) -> None:
    run("apply", CHECKPOINT, *NETWORK, "--plan", "trained/plan.json", "--out", "again", folder=folder)
    for name in ("model.onnx", "model.safetensors"):
        assert (folder / "again" / name).read_bytes() == (folder / "trained" / name).read_bytes()


def test_training_options_need_training(folder: Path) -> None:
    found = run("quantize", CHECKPOINT, *NETWORK, *DATA, *GOAL, "--lr", "0.1", "--out", "none", code=2, folder=folder)
    assert "has no effect without training" in found["error"]["message"]


@pytest.mark.slow
def test_another_point_is_trained_where_that_is_asked_for(folder: Path) -> None:
    hawq = ("--budget", "4bit", "--activations", "4", "--reconstruction", "none")
    run("quantize", CHECKPOINT, *NETWORK, *DATA, *hawq, *TRAINING, "--out", "hawq", folder=folder)
    arguments = ("quantize", CHECKPOINT, *NETWORK, *DATA, "--plan", "hawq", "--pick", "2bit")
    for training in ((), TRAINING):
        picked = run(*arguments, *training, "--out", "picked", "--force", folder=folder)
        plan = json.loads((folder / "picked" / "plan.json").read_text())
        assert ("recover" in plan["options"]) == bool(training)
        assert any("20 training steps" in note for note in picked["notes"]) == bool(training)
        assert picked["average_bits"] == 2
