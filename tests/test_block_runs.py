"""Blocks of curvature as a user asks for them: one command on the network that ships with the package."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from command import record as run

DEMO = Path(str(resources.files("compress.demo")))
NETWORK = ("--model", "compress.demo.network:fashion_net", "--mean", "0.286", "--std", "0.353")
DATA = ("--data", DEMO / "calibration.npz", "--eval", DEMO / "evaluation.npz", "--num-calibration", "64")
GOAL = ("--method", "obs", "--sparsity", "0.5", "--rounds", "2", "--block-size", "48")
pytestmark = pytest.mark.usefixtures("quick_runs")


def prune(folder: Path, *options: object, code: int = 0) -> dict[str, Any]:
    return run("prune", DEMO / "fashion_net.safetensors", *NETWORK, *DATA, *options, "--out", folder, code=code)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("blocks") / "made"
    prune(folder, *GOAL)
    return folder


def test_the_plan_records_the_size_of_blocks_and_the_sparsity_is_met(made: Path) -> None:
    plan, report = (json.loads((made / name).read_text()) for name in ("plan.json", "report.json"))
    assert plan["options"]["block_size"] == 48
    assert report["sparsity"] >= 0.5
    assert report["metric"]["compressed"] > report["metric"]["dense"] - 5


def test_gradients_in_a_file_give_the_same_bytes(made: Path, tmp_path: Path) -> None:
    prune(tmp_path / "filed", *GOAL, "--memory", "1MB")
    for name in ("plan.json", "model.safetensors"):
        assert (tmp_path / "filed" / name).read_bytes() == (made / name).read_bytes()


def test_a_plan_is_followed_with_its_blocks(made: Path, tmp_path: Path) -> None:
    prune(tmp_path / "again", "--plan", made)
    plan = json.loads((tmp_path / "again" / "plan.json").read_text())
    masks = [
        {d["tensor"]: d["mask_sha256"] for d in found["decisions"] if "mask_sha256" in d}
        for found in (plan, json.loads((made / "plan.json").read_text()))
    ]
    assert plan["options"]["block_size"] == 48 and masks[0] == masks[1] != {}


def test_a_block_has_no_negative_size(tmp_path: Path) -> None:
    failure = prune(tmp_path / "none", *GOAL, "--block-size", "-1", code=2)
    assert "--block-size" in failure["error"]["message"]


def test_a_method_without_curvature_has_no_blocks(tmp_path: Path) -> None:
    failure = prune(tmp_path / "none", "--method", "magnitude", "--sparsity", "0.5", "--block-size", "8", code=2)
    assert "--block-size" in failure["error"]["message"]
