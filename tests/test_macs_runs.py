"""Budgets of MACs as a user asks for them, of the methods that zero single weights: on the network that ships."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from command import hcompress
from command import record as run

import compress
from compress.demo.network import fashion_net

DEMO = Path(str(resources.files("compress.demo")))
NETWORK = ("--model", "compress.demo.network:fashion_net", "--mean", "0.286", "--std", "0.353")
DATA = ("--data", DEMO / "calibration.npz", "--eval", DEMO / "evaluation.npz", "--num-calibration", "64")
METHODS: dict[str, tuple[str, ...]] = {
    "layerwise": (),
    "obs": ("--rounds", "2"),
    "magnitude": (),
    "gradual": ("--train", str(DEMO / "calibration.npz"), "--recover-steps", "20", "--batch-size", "16"),
}
LARGEST = 784  # uses of a weight: all positions of the first convolution
pytestmark = pytest.mark.usefixtures("quick_runs")


def prune(folder: Path, method: str, *options: object, code: int = 0) -> dict[str, Any]:
    given = (*NETWORK, *DATA, "--method", method, *METHODS.get(method, ()), *options, "--out", folder)
    return run("prune", DEMO / "fashion_net.safetensors", *given, code=code)


@pytest.mark.parametrize("method", METHODS)
def test_what_is_written_has_the_macs_that_were_asked_for(method: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prune(out, method, "--budget", "macs=40%")
    report, weights = json.loads((out / "report.json").read_text()), compress.load(out, fashion_net).state_dict()
    dense, left = report["macs"]["dense"], report["nonzero_macs"]["compressed"]
    zeros = {layer["tensor"]: int((weights[layer["tensor"]] == 0).sum()) for layer in report["layers"]}
    saved = sum(layer["macs"] // layer["elements"] * zeros[layer["tensor"]] for layer in report["layers"])
    assert left == dense - saved
    assert 0.4 * dense - LARGEST <= left <= 0.4 * dense
    assert report["macs"]["compressed"] == dense == report["nonzero_macs"]["dense"], "zeros are not skipped"
    (check,) = [check for check in report["checks"] if check["name"] == "budget"]
    assert check == {"name": "budget", "value": left, "limit": 0.4 * dense, "unit": "macs", "ok": True}


def test_every_view_of_a_run_says_the_macs_of_nonzero_weights(tmp_path: Path) -> None:
    pruned, summary = tmp_path / "pruned", tmp_path / "summary.md"
    prune(pruned, "magnitude", "--budget", "macs=3M", "--summary", summary)
    left = json.loads((pruned / "report.json").read_text())["nonzero_macs"]["compressed"]
    assert 3e6 - LARGEST <= left <= 3e6
    shown = (hcompress("show", pruned), summary.read_text(), (pruned / "report.html").read_text())
    assert all("MACs of nonzero weights" in text for text in shown)
    assert f"{left:,}" in shown[0]
    why = {layer["why"] for layer in json.loads((pruned / "report.json").read_text())["layers"]}
    assert all(text.endswith("those of the least square for the MACs that they make") for text in why)
    dense = tmp_path / "dense"
    run("export", DEMO / "fashion_net.safetensors", *NETWORK, *DATA[:4], "--out", dense)
    assert "MACs of nonzero weights" not in hcompress("show", dense)


def test_a_plan_on_another_checkpoint_keeps_its_macs(tmp_path: Path) -> None:
    prune(tmp_path / "first", "layerwise", "--budget", "macs=40%")
    given = (*NETWORK, *DATA, "--plan", tmp_path / "first", "--out", tmp_path / "second")
    run("prune", DEMO / "fashion_net.safetensors", *given)
    first, second = (json.loads((tmp_path / name / "report.json").read_text()) for name in ("first", "second"))
    assert first["nonzero_macs"] == second["nonzero_macs"]
    assert [check["limit"] for check in second["checks"] if check["name"] == "budget" and check["ok"]]


@pytest.mark.parametrize(
    ("budget", "options", "code", "words"),
    [
        ("latency=2ms", (), 2, ("has no latency budget", "it takes bytes, macs, sparsity")),
        ("bops=10%", (), 2, ("has no bops budget", "it takes bytes, macs, sparsity")),
        ("macs=10%", ("--exclude", "stage*"), 5, ("macs=10% is out of reach", "raise --budget to macs=")),
        ("macs=10%", ("--pattern", "2:4"), 5, ("pattern 2:4 leaves", "choose a sparser pattern")),
    ],
)
@pytest.mark.parametrize("method", METHODS)
def test_what_cannot_be_done_is_said_in_a_sentence(
    method: str, budget: str, options: tuple[str, ...], code: int, words: tuple[str, str], tmp_path: Path
) -> None:
    error = prune(tmp_path / "none", method, "--budget", budget, *options, code=code)["error"]
    assert words[0] in error["message"] and words[1] in error["hint"]
