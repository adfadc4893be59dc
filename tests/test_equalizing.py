"""Equalized channels as a user meets them: a network whose channels differ a thousandfold keeps its accuracy."""

from __future__ import annotations

import json
import shutil
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from command import record as run
from safetensors.torch import load_file, save_file

from compress.demo.network import fashion_net
from compress.graph.equalize import find_links
from compress.graph.rewrite import unlift
from compress.graph.trace import trace_graph

DEMO = Path(str(resources.files("compress.demo")))
NETWORK = ("--model", "compress.demo.network:fashion_net", "--mean", "0.286", "--std", "0.353")
DATA = ("--data", DEMO / "calibration.npz", "--num-calibration", "128")
EVAL = ("--eval", DEMO / "evaluation.npz")
GOAL = ("--method", "uniform", "--budget", "6bit", "--activations", "8", "--reconstruction", "none")
pytestmark = pytest.mark.usefixtures("quick_runs")


def rescaled(seed: int) -> dict[str, torch.Tensor]:
    """The demo's network with a random power of two, 1/64 to 64, for each channel between two layers."""
    state = load_file(DEMO / "fashion_net.safetensors")
    module = fashion_net().eval()
    graph = trace_graph(module, (torch.randn(2, 1, 28, 28),))
    generator = torch.Generator().manual_seed(seed)
    for link in find_links(unlift(graph.program, graph.tied), state):
        factor = torch.exp2(torch.randint(-6, 7, (len(state[link.weight]),), generator=generator).float())
        for key in link.divided:
            state[key] = state[key] / factor.reshape(-1, *[1] * (state[key].dim() - 1))
        for key, dim in link.read_by:
            state[key] = state[key] * factor.reshape([-1 if d == dim else 1 for d in range(state[key].dim())])
    return state


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("equalized")
    save_file(rescaled(0), folder / "0.safetensors")
    return folder


def quantize(folder: Path, checkpoint: Path | str, *options: object, data: tuple[object, ...] = DATA) -> dict[str, Any]:
    return run("quantize", checkpoint, *NETWORK, *data, *EVAL, *options, folder=folder)


@pytest.fixture(scope="module")
def made(folder: Path) -> dict[str, Any]:
    return quantize(folder, "0.safetensors", *GOAL, "--out", "auto")


def test_channels_of_a_thousandfold_are_found_and_equalized(made: dict[str, Any], folder: Path) -> None:
    plan = json.loads((folder / "auto" / "plan.json").read_text())
    factors = plan["options"]["equalization"]
    assert "stage1.conv1.weight" in factors
    assert all(max(own) - min(own) >= 4 for own in factors.values())
    assert any("channels between layers are equalized" in note for note in made["notes"])
    plain = quantize(folder, "0.safetensors", *GOAL, "--equalization", "off", "--out", "off")
    assert "equalization" not in json.loads((folder / "off" / "plan.json").read_text())["options"]
    assert made["metric"]["compressed"] > made["metric"]["dense"] - 1
    assert plain["metric"]["compressed"] < made["metric"]["compressed"] - 3


def test_the_result_is_that_of_the_network_that_was_never_scaled(made: dict[str, Any], folder: Path) -> None:
    usual = quantize(folder, DEMO / "fashion_net.safetensors", *GOAL, "--equalization", "on", "--out", "usual")
    assert usual["metric"] == made["metric"]
    a, b = (load_file(folder / name / "model.safetensors") for name in ("usual", "auto"))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_where_channels_are_alike_nothing_is_scaled(folder: Path) -> None:
    quantize(folder, DEMO / "fashion_net.safetensors", *GOAL, "--out", "alike")
    assert "equalization" not in json.loads((folder / "alike" / "plan.json").read_text())["options"]


def test_a_plan_is_applied_without_data(made: dict[str, Any], folder: Path) -> None:
    run("apply", "0.safetensors", "--plan", "auto", *NETWORK, "--out", "applied", folder=folder)
    for name in ("model.safetensors", "model.onnx"):
        assert (folder / "applied" / name).read_bytes() == (folder / "auto" / name).read_bytes()


def test_a_plan_keeps_its_factors_on_another_checkpoint(made: dict[str, Any], folder: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    state = load_file(folder / "0.safetensors")
    trained = {k: v * (1 + 1e-3 * torch.randn(v.shape, generator=generator)) for k, v in state.items() if v.dim()}
    save_file({**state, **trained}, folder / "trained.safetensors")
    other = quantize(folder, "trained.safetensors", "--plan", "auto", "--out", "other")
    assert other["metric"]["compressed"] > made["metric"]["compressed"] - 0.5
    plans = [json.loads((folder / name / "plan.json").read_text())["options"] for name in ("auto", "other")]
    assert plans[0]["equalization"] == plans[1]["equalization"]


def test_excluded_weights_keep_every_bit_and_a_plan_knows_them(folder: Path) -> None:
    excluded = "stage2.conv2.weight"
    quantize(folder, "0.safetensors", *GOAL, "--exclude", excluded, "--equalization", "on", "--out", "excluded")
    run("apply", "0.safetensors", "--plan", "excluded", *NETWORK, "--out", "excluded_applied", folder=folder)
    files = [load_file(folder / name / "model.safetensors") for name in ("excluded", "excluded_applied")]
    assert torch.equal(files[0][excluded], load_file(folder / "0.safetensors")[excluded])
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])


def test_factors_that_do_not_fit_are_refused(made: dict[str, Any], folder: Path) -> None:
    for name, factors in (("short", [1, 2]), ("texts", ["a"] * 16)):
        shutil.copytree(folder / "auto", folder / name)
        plan = json.loads((folder / name / "plan.json").read_text())
        plan["options"]["equalization"] = {"stage1.conv1.weight": factors}
        (folder / name / "plan.json").write_text(json.dumps(plan))
        options = ("--plan", f"{name}/plan.json", *NETWORK, "--out", f"{name}_applied")
        failure = run("apply", "0.safetensors", *options, folder=folder, code=3)
        assert "the factors of stage1.conv1.weight don't fit" in failure["error"]["message"]


def test_weights_of_two_names_are_scaled_under_both(folder: Path) -> None:
    (folder / "two.py").write_text(
        "import torch\nfrom torch import nn\n\n"
        "class Two(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.a, self.b = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 10, 3)\n"
        "        self.stem = nn.Sequential(self.a, nn.ReLU())\n\n"
        "    def forward(self, x):\n"
        "        return self.b(self.stem(x)).mean((2, 3))\n"
    )
    generator = torch.Generator().manual_seed(0)
    scale = torch.exp2(torch.randint(-6, 7, (8,), generator=generator).float())
    a, b = torch.randn(8, 1, 3, 3, generator=generator), torch.randn(10, 8, 3, 3, generator=generator)
    state = {"a.weight": a / scale[:, None, None, None], "a.bias": torch.zeros(8), "b.bias": torch.zeros(10)}
    state |= {"b.weight": b * scale[None, :, None, None], "stem.0.bias": torch.zeros(8)}
    torch.save({**state, "stem.0.weight": state["a.weight"]}, folder / "two.pt")
    options = ("--model", "two.py:Two", *NETWORK[2:], *DATA, *GOAL, "--equalization", "on", "--out", "two")
    run("quantize", "two.pt", *options, *EVAL, folder=folder)
    sessions = [onnxruntime.InferenceSession(folder / "two" / f"{name}.onnx") for name in ("dense", "model")]
    x = np.random.default_rng(0).uniform(-0.8, 2, size=(4, 1, 28, 28)).astype(np.float32)
    dense, rounded = (session.run(None, {session.get_inputs()[0].name: x})[0] for session in sessions)
    assert np.abs(dense - rounded).max() < 0.1 * np.abs(dense).max()


def test_levels_that_are_chosen_by_outputs_are_the_equalized_networks(folder: Path) -> None:
    goal = ("--budget", "4bit", "--activations", "8", "--out", "chosen")
    found = quantize(folder, "0.safetensors", *goal)
    assert found["metric"]["compressed"] > found["metric"]["dense"] - 1
    run("apply", "0.safetensors", "--plan", "chosen", *NETWORK, "--out", "chosen_applied", folder=folder)
    one, two = ((folder / name / "model.onnx").read_bytes() for name in ("chosen", "chosen_applied"))
    assert one == two


def test_a_network_without_such_channels_is_told(folder: Path) -> None:
    (folder / "one.py").write_text(
        "from torch import nn\n\ndef make():\n    return nn.Sequential(nn.Flatten(), nn.Linear(784, 10))\n"
    )
    generator = torch.Generator().manual_seed(0)
    weights = {"1.weight": torch.randn(10, 784, generator=generator), "1.bias": torch.zeros(10)}
    save_file(weights, folder / "one.safetensors")
    options = ("--model", "one.py:make", *DATA, "--budget", "8bit", "--equalization", "on", "--dry-run")
    found = run("quantize", "one.safetensors", *options, folder=folder)
    assert any("could be equalized" in note for note in found["notes"])
