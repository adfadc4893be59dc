"""Channels cut as a user does it: one command, on the network that ships with the package, and what comes after."""

from __future__ import annotations

import json
import warnings
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch
from command import record as run

import compress
from compress.demo.network import fashion_net
from compress.errors import InputError

DEMO = Path(str(resources.files("compress.demo")))
CHECKPOINT = DEMO / "fashion_net.safetensors"
NETWORK = ("--model", "compress.demo.network:fashion_net", "--mean", "0.286", "--std", "0.353")
DATA = ("--data", DEMO / "calibration.npz", "--eval", DEMO / "evaluation.npz", "--num-calibration", "64")
GOAL = ("--method", "structured-obs", "--budget", "macs=60%")
pytestmark = pytest.mark.usefixtures("quick_runs")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("channels")


@pytest.fixture(scope="module")
def cut(folder: Path) -> dict[str, Any]:
    return run("prune", CHECKPOINT, *NETWORK, *DATA, *GOAL, "--out", folder / "cut")


def test_the_network_is_smaller_in_every_figure(cut: dict[str, Any]) -> None:
    assert cut["macs"]["compressed"] <= 0.6 * cut["macs"]["dense"]
    assert cut["macs"]["compressed"] >= 0.58 * cut["macs"]["dense"]
    assert cut["params"]["compressed"] < 0.85 * cut["params"]["dense"]
    assert cut["files"]["model.onnx"] < 0.85 * cut["dense_bytes"]
    assert cut["metric"]["compressed"] > cut["metric"]["dense"] - 3
    (check,) = [check for check in cut["checks"] if check["name"] == "budget"]
    assert check["unit"] == "macs" and check["ok"]
    pruned = [layer for layer in cut["layers"] if layer["decision"] == "prune"]
    assert pruned and all("are left" in layer["why"] for layer in pruned)
    assert all(group["kept"] % 8 == 0 for group in cut["groups"] if group["channels"] >= 16)


@pytest.mark.parametrize("method", [pytest.param("structured-obs", marks=pytest.mark.slow), "hesso", "cric"])
def test_where_nothing_has_to_go_the_checkpoint_comes_back(method: str, tmp_path: Path) -> None:
    note = "nothing is cut: the network is within the budget as it is"
    note += "" if method == "structured-obs" else ", so that nothing was trained"
    train = () if method == "structured-obs" else ("--train", DEMO / "calibration.npz", "--recover-steps", "1")
    goal = ("--method", method, "--sparsity", "0", "--out", tmp_path / "whole")
    report = run("prune", CHECKPOINT, *NETWORK, *DATA, *train, *goal)
    assert (tmp_path / "whole" / "model.safetensors").read_bytes() == CHECKPOINT.read_bytes()
    assert note in report["notes"]
    assert report["params"]["compressed"] == report["params"]["dense"]


def test_it_loads_as_a_program_and_in_the_user_s_class(cut: dict[str, Any], folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of torch to itself
        program, network = compress.load(folder / "cut"), compress.load(folder / "cut", fashion_net)
    with pytest.raises(InputError, match=r"model\.safetensors: the network has no channels of .*weight"):
        compress.load(folder / "cut", lambda: torch.nn.Sequential(torch.nn.Conv2d(1, 8, 3), torch.nn.Conv2d(8, 2, 3)))
    assert type(network) is type(fashion_net())
    assert sum(p.numel() for p in network.parameters()) == cut["params"]["compressed"]
    x = torch.randn(5, 1, 28, 28)
    torch.testing.assert_close(program(x), network(x), rtol=1e-4, atol=1e-4)


def test_a_damaged_record_of_the_cut_is_refused(folder: Path, cut: dict[str, Any], tmp_path: Path) -> None:
    from compress.formats.checkpoint import read_checkpoint
    from compress.pruned import read_cuts

    path = folder / "cut" / "model.safetensors"
    metadata = dict(read_checkpoint(path).metadata)
    assert read_cuts(metadata, path)[0].channels
    metadata["hcompress.cuts"] = "[{}]"
    with pytest.raises(InputError, match="damaged metadata"):
        read_cuts(metadata, path)


def test_a_cut_network_is_quantized_like_any_other(cut: dict[str, Any], folder: Path) -> None:
    arguments = (*NETWORK, *DATA, "--method", "uniform", "--budget", "8bit")
    quantized = run("quantize", folder / "cut", *arguments, "--out", folder / "small")
    assert quantized["params"]["dense"] == cut["params"]["compressed"]
    assert quantized["files"]["model.onnx"] < 0.45 * cut["files"]["model.onnx"]
    assert quantized["metric"]["compressed"] > cut["metric"]["compressed"] - 1
    network = compress.load(folder / "small", fashion_net)
    assert sum(p.numel() for p in network.parameters()) == cut["params"]["compressed"]


def test_a_plan_is_applied_without_data_and_repeats_the_run(cut: dict[str, Any], folder: Path) -> None:
    run("apply", CHECKPOINT, *NETWORK, "--plan", folder / "cut" / "plan.json", "--out", folder / "again")
    for name in ("model.onnx", "model.safetensors"):
        assert (folder / "again" / name).read_bytes() == (folder / "cut" / name).read_bytes()


def test_a_plan_that_was_edited_beyond_its_values_is_refused(cut: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    plan = json.loads((folder / "cut" / "plan.json").read_text())
    channels = next(d for d in plan["decisions"] if d["kind"] == "prune_channels")
    channels["keep"] = channels["keep"][:-1]
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    (tmp_path / "plan.safetensors").write_bytes((folder / "cut" / "plan.safetensors").read_bytes())
    arguments = ("apply", CHECKPOINT, *NETWORK, "--plan", tmp_path / "plan.json", "--out", tmp_path / "out")
    assert "new values" in run(*arguments, code=3)["error"]["message"]
    channels["keep"] = [0, 0]
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    assert "out of order" in run(*arguments, code=3)["error"]["message"]
    channels["size"], channels["keep"] = 999, [0]
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    assert "the plan's has 999" in run(*arguments, code=3)["error"]["message"]
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_budget_of_bytes_is_kept_by_the_file(folder: Path) -> None:
    goal = ("--method", "structured-obs", "--budget", "250KB", "--multiple-of", "1")
    record = run("prune", CHECKPOINT, *NETWORK, *DATA, *goal, "--out", folder / "bytes")
    assert 0.95 * 250_000 <= record["files"]["model.onnx"] <= 250_000


@pytest.mark.slow
def test_what_is_out_of_reach_gives_the_least(folder: Path) -> None:
    goal = ("--method", "structured-obs", "--budget", "macs=1%")
    failure = run("prune", CHECKPOINT, *NETWORK, *DATA, *goal, "--out", folder / "never", code=5)
    assert "out of reach" in failure["error"]["message"]
    assert failure["error"]["hint"].startswith("raise the budget to macs=")


@pytest.mark.slow
def test_training_after_the_cut_is_part_of_the_plan(cut: dict[str, Any], folder: Path) -> None:
    training = ("--recover-steps", "30", "--lr", "0.003", "--batch-size", "64", "--augment", "crop")
    goal = ("--method", "structured-obs", "--budget", "macs=40%")
    record = run("prune", CHECKPOINT, *NETWORK, *DATA, *goal, *training, "--out", folder / "trained")
    assert any("30 training steps of 64 on 1,024 examples" in note for note in record["notes"])
    plan = json.loads((folder / "trained" / "plan.json").read_text())
    assert plan["options"]["recover"]["steps"] == 30
    assert not (folder / "trained.journal").exists()
    replaced = {d["tensor"] for d in plan["decisions"] if d["kind"] == "replace"}
    assert {"stem.weight", "bn.running_mean", "head.bias"} <= replaced
    again = run("prune", CHECKPOINT, *NETWORK, *DATA, *goal, *training, "--out", folder / "twice")
    assert again["files"] == record["files"]
    assert (folder / "twice" / "model.safetensors").read_bytes() == (
        folder / "trained" / "model.safetensors"
    ).read_bytes()


@pytest.mark.slow
def test_masked_weights_stay_zero_in_training(folder: Path) -> None:
    training = ("--recover-steps", "10", "--lr", "0.003", "--batch-size", "64")
    goal = ("--method", "magnitude", "--sparsity", "0.8")
    record = run("prune", CHECKPOINT, *NETWORK, *DATA, *goal, *training, "--out", folder / "masked")
    assert abs(record["sparsity"] - 0.8) < 1e-3
    bare = run("prune", CHECKPOINT, *NETWORK, *DATA, *goal, "--out", folder / "bare")
    assert record["metric"]["compressed"] > bare["metric"]["compressed"]
