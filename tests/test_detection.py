"""A network with two outputs through a task of the user's own: classes and boxes, each worth its bits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compress.cli.show import find_layer, why_lines
from safetensors.torch import save_file

from compress import pipeline
from compress.data import load_object
from compress.settings import resolve

SOURCE = '''
import torch
from torch import nn
from torch.nn import functional as F

class Detector(nn.Module):
    """Where the only object of an image is, and which of three it is: boxes are left, top, right, bottom in [0, 1]."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(144, 48), nn.ReLU(),
        )
        self.classes = nn.Linear(48, 3)
        self.boxes = nn.Linear(48, 4)

    def forward(self, x):
        h = self.body(x)
        return self.classes(h), self.boxes(h)

def make():
    torch.manual_seed(0)
    return Detector()

class Detection:
    """Right where the class is and the box overlaps by more than a third; targets are class and box, [n, 5]."""

    name, unit, higher_is_better = "detection rate", "%", True

    def loss(self, outputs, targets):
        logits, boxes = outputs
        return F.cross_entropy(logits, targets[:, 0].long()) + 10 * F.mse_loss(boxes, targets[:, 1:])

    def score(self, outputs, targets):
        logits, boxes = outputs
        wanted = targets[:, 1:]
        inside = (torch.minimum(boxes[:, 2:], wanted[:, 2:]) - torch.maximum(boxes[:, :2], wanted[:, :2])).clamp(min=0)
        areas = [(b[:, 2:] - b[:, :2]).clamp(min=0).prod(1) for b in (boxes, wanted)]
        overlap = inside.prod(1) / (sum(areas) - inside.prod(1)).clamp(min=1e-6)
        return 100.0 * ((logits.argmax(1) == targets[:, 0].long()) & (overlap > 1 / 3)).double()
'''
Run = Callable[..., dict[str, Any]]
pytestmark = pytest.mark.usefixtures("quick_runs")


def scenes(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Noisy 12 x 12 images of a full square, a frame or a cross, and ``[class, left, top, right, bottom]``."""
    rng = np.random.default_rng(seed)
    x, y = 0.2 * rng.standard_normal((n, 1, 12, 12), dtype=np.float32), np.zeros((n, 5), np.float32)
    for image, target in zip(x[:, 0], y, strict=True):
        kind, size = rng.integers(3), rng.integers(4, 8)
        left, top = rng.integers(0, 13 - size, 2)
        part = image[top : top + size, left : left + size]
        if kind == 0:
            part += 1
        elif kind == 1:
            part += 1
            part[1:-1, 1:-1] -= 1
        else:
            part += np.eye(size, dtype=np.float32) + np.eye(size, dtype=np.float32)[::-1]
        target[:] = kind, left / 12, top / 12, (left + size) / 12, (top + size) / 12
    return x, y


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained detector, its task and data."""
    folder = tmp_path_factory.mktemp("detection")
    (folder / "detector.py").write_text(SOURCE)
    network = load_object(f"{folder / 'detector.py'}:make", "--model")()
    task = load_object(f"{folder / 'detector.py'}:Detection", "--task")()
    x, y = (torch.from_numpy(a) for a in scenes(1536, 0))
    optimizer = torch.optim.Adam(network.parameters(), 4e-3)
    order = torch.Generator().manual_seed(0)
    for _ in range(300):
        batch = torch.randint(0, len(x), (64,), generator=order)
        optimizer.zero_grad()
        task.loss(network(x[batch]), y[batch]).backward()
        optimizer.step()
    save_file(network.state_dict(), folder / "detector.safetensors")
    for name, (images, targets) in {"calib": scenes(96, 1), "test": scenes(256, 2)}.items():
        np.savez(folder / f"{name}.npz", x=images, y=targets)
    return folder


@pytest.fixture
def run(folder: Path, tmp_path: Path) -> Run:
    def run(plan: Path | None = None, pick: str | None = None, **given: Any) -> dict[str, Any]:
        flags = {
            "model": f"{folder / 'detector.py'}:make",
            "task": f"{folder / 'detector.py'}:Detection",
            "data": str(folder / "calib.npz"),
            "eval": str(folder / "test.npz"),
            "cache": "off",
            "max_drop": 15,
            "out": str(tmp_path / "out"),
            **given,
        }
        return pipeline.run_method(
            "quantize",
            folder / "detector.safetensors",
            resolve(flags, environment={}, folder=None),
            force=False,
            dry_run=False,
            plan=plan,
            pick=pick,
            command=[],
            progress=lambda *_: None,
        )

    return run


SLOW = pytest.mark.slow
CASES = [
    pytest.param("hawq", "8", "4bit", marks=SLOW),
    pytest.param("output-change", "8", "4bit", marks=SLOW),
    pytest.param("hawq", "mixed", "bops=2.5%", marks=SLOW),
    ("output-change", "mixed", "bops=2.5%"),
]


@pytest.mark.parametrize(("method", "activations", "budget"), CASES)
def test_both_heads_keep_what_they_are_for(
    run: Run, folder: Path, tmp_path: Path, method: str, activations: str, budget: str
) -> None:
    report = run(method=method, activations=activations, budget=budget)
    assert report["metric"]["dense"] > 90
    assert report["metric"]["compressed"] > report["metric"]["dense"] - 3
    assert all(check["ok"] for check in report["checks"])
    bits = {layer["tensor"]: layer["bits"] for layer in report["layers"]}
    assert min(bits["classes.weight"], bits["boxes.weight"]) > 3
    assert report["loss"]["unit"] == "variances"
    if activations == "8":
        return
    read = {entry["tensor"]: entry for entry in report["activations"]}
    assert read["x"]["bits"] == 8 and read["x"]["read_by"] == ["body.0.weight"]
    assert read["relu_2"]["read_by"] == ["classes.weight", "boxes.weight"]
    assert len({entry["bits"] for entry in read.values()}) > 1
    for name, entry in read.items():
        assert [other["chosen"] for other in entry["alternatives"]].count(True) == (name != "x")
        assert (entry["sensitivity"] is not None) == (method == "hawq" and name != "x")
    page, text = ((tmp_path / "out" / f"report.{kind}").read_text() for kind in ("html", "md"))
    assert 'id="activations"' in page and "## Activations" in text
    assert (tmp_path / "out" / "activation-trace.json").is_file() == (method == "hawq")
    lines = why_lines(find_layer(report["layers"], "boxes"), report)
    assert any(
        line.startswith(f"It reads relu_2 at {read['relu_2']['bits']} bits, which is expected to") for line in lines
    )
    assert any(line.startswith("That activation's trace is") for line in lines) == (method == "hawq")
    picked = run(plan=tmp_path / "out", pick="0", out=str(tmp_path / "picked"), max_drop=100)
    assert {entry["bits"] for entry in picked["activations"]} == {4, 8}  # of all the least; the input has eight
