"""Runs in every form of the files: budgets hold for what was written, and no plan depends on the form."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import compress
from compress import export, pipeline
from compress.data import load_object
from compress.errors import BudgetError, UsageError
from compress.formats.checkpoint import read_checkpoint
from compress.plan import read_plan
from compress.settings import Value, resolve

FOLDER = Path(str(resources.files("compress.demo")))
NETWORK = """
import torch
from torch import nn

def make():
    torch.manual_seed(0)
    body = [nn.Conv2d(1, 32, 3, 2, bias=False), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 64, 3, 2), nn.ReLU()]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(1024, 10))
"""
pytestmark = pytest.mark.usefixtures("quick_runs")


def quiet(stage: str, done: int, total: int | None) -> None:
    """Progress of a test."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("network")
    (folder / "network.py").write_text(NETWORK)
    module = load_object(f"{folder / 'network.py'}:make", "--model")()
    save_file(module.state_dict(), folder / "network.safetensors")
    images = np.load(FOLDER / "calibration.npz")
    np.savez(folder / "images.npz", x=images["x"][:64], y=images["y"][:64])
    return folder / "network.safetensors"


def settings(checkpoint: Path, out: Path, **given: Any) -> Mapping[str, Value]:
    flags = {
        "model": f"{checkpoint.with_name('network.py')}:make",
        "data": str(checkpoint.with_name("images.npz")),
        "eval": str(checkpoint.with_name("images.npz")),
        "num_calibration": 32,
        "reconstruction": "none",
        "max_drop": 100.0,
        "cache": "off",
        "out": str(out),
        **given,
    }
    return resolve(flags, environment={}, folder=None)


def run(job: str, checkpoint: Path, out: Path, **given: Any) -> dict[str, Any]:
    return pipeline.run_method(
        job,
        checkpoint,
        settings(checkpoint, out, **given),
        force=False,
        dry_run=False,
        plan=None,
        command=[],
        progress=quiet,
    )


@pytest.mark.parametrize(
    ("job", "method", "floats", "runtime", "goal"),
    [
        ("prune", "magnitude", "fp16", "onnxruntime", "30%"),
        ("prune", "magnitude", "bf16", "openvino", "30%"),
        ("prune", "magnitude", "fp16", "portable", "60%"),
        ("quantize", "uniform", "bf16", "portable", "35%"),
        ("quantize", "uniform", "fp16", "onnxruntime", "20%"),
    ],
)
@pytest.mark.parametrize("delivered", ["onnx", "safetensors"])
def test_a_budget_of_bytes_holds_for_the_written_file(
    checkpoint: Path, tmp_path: Path, job: str, method: str, floats: str, runtime: str, goal: str, delivered: str
) -> None:
    given = {"method": method, "budget": goal, "float_storage": floats, "runtime": runtime, "for": delivered}
    record = run(job, checkpoint, tmp_path / "run", **given)
    size = (tmp_path / "run" / record["delivered"]).stat().st_size
    share = size / record["dense_bytes"]
    assert size == record["files"][record["delivered"]]
    assert share <= float(goal.rstrip("%")) / 100
    assert all(check["ok"] for check in record["checks"])
    if job == "prune" and runtime != "portable":  # the planner knows what 16 bits save
        assert share > 0.9 * float(goal.rstrip("%")) / 100


def test_a_portable_file_has_no_fewer_than_8_bits(checkpoint: Path, tmp_path: Path) -> None:
    given = {"method": "uniform", "budget": "20%", "runtime": "portable"}
    with pytest.raises(BudgetError, match=r"20% is out of reach: the smallest model.onnx of this method has \d+ bytes"):
        run("quantize", checkpoint, tmp_path / "run", **given)


def test_no_plan_depends_on_the_form(checkpoint: Path, tmp_path: Path) -> None:
    forms = (("onnxruntime", "fp32"), ("portable", "fp16"), ("openvino", "bf16"))
    plans = []
    for runtime, floats in forms:
        out = tmp_path / runtime
        run("quantize", checkpoint, out, method="uniform", budget="4bit", runtime=runtime, float_storage=floats)
        plans.append((out / "plan.json").read_bytes())
    assert len(set(plans)) == 1


def test_a_run_of_halves_is_a_checkpoint_and_a_network_of_floats(checkpoint: Path, tmp_path: Path) -> None:
    record = run("prune", checkpoint, tmp_path / "run", method="magnitude", sparsity="0.2", float_storage="fp16")
    stored = read_checkpoint(tmp_path / "run" / "model.safetensors").state
    assert {t.dtype for t in stored.values() if t.is_floating_point()} <= {torch.float16, torch.float32}
    assert record["average_bits"] == 16
    factory = f"{checkpoint.with_name('network.py')}:make"
    make = load_object(factory, "--model")
    loaded = compress.load(tmp_path / "run", make)
    weight = load_file(checkpoint)["7.weight"]
    assert loaded.state_dict()["7.weight"].dtype == torch.float32
    kept = loaded.state_dict()["7.weight"] != 0
    assert torch.equal(loaded.state_dict()["7.weight"][kept], weight.half().float()[kept])
    given = {"model": factory, **dict.fromkeys(("data", "eval"), str(checkpoint.with_name("images.npz")))}
    again = run("quantize", tmp_path / "run", tmp_path / "again", method="uniform", budget="8bit", **given)
    assert again["average_bits"] == 8


@pytest.mark.parametrize("method", ["uniform", "hawq"])
def test_dynamic_activations_are_in_the_plan_and_in_the_files(
    checkpoint: Path, tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "is_faster_as_integers", lambda product: True)
    given = {"method": method, "budget": "5bit", "activations": "dynamic", "passes": 2}
    record = run("quantize", checkpoint, tmp_path / "run", **given)
    plan = read_plan(tmp_path / "run" / "plan.json")
    assert plan.options["activations"] == "dynamic" and not plan.quantized("activation")
    assert any(note.startswith("1 of 1 matrix products round their activations to 8 bits") for note in record["notes"])
    again = settings(checkpoint, tmp_path / "again")
    pipeline.apply_plan(checkpoint, tmp_path / "run", again, force=False, command=[], progress=quiet)
    for name in ("model.onnx", "model.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    assert pipeline.verify_run(tmp_path / "run", again, progress=quiet)["checks"]
    given["activations"] = "float"
    run("quantize", checkpoint, tmp_path / "float", **given)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("run", "float")]
    assert weights[0] == weights[1]


def test_dynamic_activations_without_a_linear_layer_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    given = {"method": "uniform", "budget": "20bit", "activations": "dynamic", "exclude": "7.weight"}
    with pytest.raises(UsageError, match="rounds the inputs of linear layers, and none has a quantized weight"):
        run("quantize", checkpoint, tmp_path / "run", **given)


def test_a_form_that_is_unknown_is_named() -> None:
    with pytest.raises(UsageError, match="'tensorrt' is not a choice") as caught:
        resolve({"runtime": "tensorrt"}, environment={}, folder=None)
    assert caught.value.hint == "choices: onnxruntime, openvino, portable"
