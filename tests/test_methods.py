"""The contract of every registered method, on a small network and the images that ship with the package: deterministic,
applied without data, within its budget, and blind to the evaluation data.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from compress import pipeline
from compress.budget import parse_budget
from compress.data import load_object
from compress.errors import BudgetError, GateError, UsageError
from compress.frontier import read_frontier
from compress.plan import read_plan
from compress.registry import METHODS, Method
from compress.settings import Value, resolve

FOLDER = Path(str(resources.files("compress.demo")))
NETWORK = """
import torch
from torch import nn

def make():
    torch.manual_seed(0)
    body = [nn.Conv2d(1, 24, 3, 2, bias=False), nn.BatchNorm2d(24), nn.ReLU()]
    body += [nn.Conv2d(24, 64, 3, 2, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
"""
GOALS = {
    "bytes": ("60%", "25KB"),
    "bits": ("5.5bit",),
    "bops": ("bops=10%",),
    "latency": ("latency=500ms",),  # any network meets it
    "sparsity": ("sparsity=0.75",),
    "macs": ("macs=60%",),
    "params": ("params=70%",),
}
METHODS_THAT_TRAIN = {method.name for method in METHODS if method.trains}
SLOW = {("hesso", "latency=500ms"), *(("cric", goal) for goals in GOALS.values() for goal in goals if goal != "60%")}
CASES = [
    pytest.param(
        (method, goal, "safetensors" if goal == "25KB" else "onnx"),
        marks=[pytest.mark.slow] if (method.name, goal) in SLOW else [],
        id=f"{method.name} {goal}",
    )
    for method in METHODS
    for quantity in method.budgets
    for goal in GOALS[quantity]
]
pytestmark = pytest.mark.usefixtures("quick_runs")


def quiet(stage: str, done: int, total: int | None) -> None:
    """Progress of a test."""


@dataclass(frozen=True)
class Data:
    """The network, and small slices of the shipped data, as files."""

    network: Path
    checkpoint: Path
    calibration: Path
    evaluation: Path
    noise: Path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    folder = tmp_path_factory.mktemp("data")
    network = folder / "network.py"
    network.write_text(NETWORK)
    module = load_object(f"{network}:make", "--model")()
    images = torch.randn(64, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    module(images)  # batch-norm statistics of their own
    save_file(module.state_dict(), folder / "network.safetensors")
    checkpoint, names = folder / "network.safetensors", ("calibration", "evaluation", "noise")
    paths = Data(network, checkpoint, *(folder / f"{name}.npz" for name in names))
    calibration, evaluation = np.load(FOLDER / "calibration.npz"), np.load(FOLDER / "evaluation.npz")
    np.savez(paths.calibration, x=calibration["x"][:128], y=calibration["y"][:128])
    np.savez(paths.evaluation, x=evaluation["x"][:256], y=evaluation["y"][:256])
    shuffled = np.random.default_rng(0).integers(0, 10, 256)
    np.savez(paths.noise, x=evaluation["x"][:256], y=shuffled)
    return paths


def settings(data: Data, out: Path, **given: Any) -> Mapping[str, Value]:
    flags = {
        "model": f"{data.network}:make",
        "data": str(data.calibration),
        "eval": str(data.evaluation),
        "mean": "0.286",
        "std": "0.353",
        "task": "classification",
        "cache": "off",
        "num_calibration": 64,
        "passes": 2,
        "rounds": 2,
        "recover_steps": 20 if METHODS_THAT_TRAIN & {given.get("method")} else 0,
        "batch_size": 16,
        "out": str(out),
        **given,
    }
    return resolve(flags, environment={}, folder=None)


def run(
    method: Method, data: Data, out: Path, *, is_dry: bool = False, is_resumed: bool = False, **given: Any
) -> dict[str, Any]:
    return pipeline.run_method(
        method.job,
        data.checkpoint,
        settings(data, out, method=method.name, **given),
        force=False,
        dry_run=is_dry,
        resume=is_resumed,
        plan=None,
        command=["hcompress", method.job],
        progress=quiet,
    )


Finished = Callable[[Method, str, str], tuple[Path, dict[str, Any]]]


@pytest.fixture(scope="module")
def finished(data: Data, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A run's folder and report by method, budget and delivered file; made once."""

    @functools.cache
    def made(method: Method, goal: str, file: str) -> tuple[Path, dict[str, Any]]:
        out = tmp_path_factory.mktemp("finished") / "run"
        return out, run(method, data, out, budget=goal, **{"for": file})

    return made


@pytest.mark.parametrize("case", CASES)
def test_budget_is_met_by_the_written_file(
    case: tuple[Method, str, str], finished: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, goal, file = case
    monkeypatch.setattr("compress.latency.NUM_MIXTURES", 1)
    budget = parse_budget(goal)
    folder, report = finished(method, goal, file)
    if budget.quantity == "bytes":
        size = (folder / f"model.{file}").stat().st_size
        limit = budget.absolute(report["dense_bytes"])
        assert size <= limit
        assert method.name != "magnitude" or size > 0.97 * limit, "prunes more than the budget asks"
    elif budget.quantity == "bits":
        assert report["average_bits"] <= budget.limit
    elif budget.quantity == "latency":
        assert report["latency_ms"]["compressed"] <= budget.limit
    elif budget.quantity == "bops":
        frontier = read_frontier(folder / "frontier.json")
        assert frontier.amount(frontier.costs[frontier.index]) <= budget.absolute(frontier.dense_amount)
    elif budget.quantity in ("macs", "params"):
        is_masked = any(layer["decision"] == "mask" for layer in report["layers"])
        figure = report["nonzero_macs" if is_masked else budget.quantity]
        limit = budget.absolute(figure["dense"])
        assert 0.9 * limit <= figure["compressed"] <= limit
    elif "multiple_of" in method.options:  # of channels
        (check,) = [check for check in report["checks"] if check["name"] == "budget"]
        kept, whole = (sum(group[key] for group in report["groups"]) for key in ("kept", "channels"))
        assert check["value"] == pytest.approx(1 - kept / whole), "every group loses some"
        assert budget.limit <= check["value"] <= budget.limit + 0.05
    else:
        assert report["sparsity"] == pytest.approx(budget.limit, abs=1e-4)
    assert all(check["ok"] for check in report["checks"])
    assert (report["saliencies"] is not None) == (method.job == "prune")
    if method.job == "prune":
        require_saliencies(report)


def require_saliencies(report: dict[str, Any]) -> None:
    """A histogram of all that the method ranked."""
    found = report["saliencies"]
    parts = [found[name] for name in ("removed", "kept")]
    for part in parts:
        assert part["count"] == part["zeros"] + sum(part["bins"]) and len(part["bins"]) == len(parts[0]["bins"])
    if found["of"] == "channels":
        names, total = ("channels", "kept"), sum(group["channels"] for group in report["groups"])
        assert sum(part["count"] for part in parts) >= total
        assert parts[0]["count"] == sum(group[names[0]] - group[names[1]] for group in report["groups"])
    else:
        masked = [layer for layer in report["layers"] if layer["decision"] == "mask"]
        assert sum(part["count"] for part in parts) == sum(layer["elements"] for layer in masked)
        zeros = sum(round(layer["sparsity"] * layer["elements"]) for layer in masked)
        assert parts[0]["count"] == pytest.approx(zeros, abs=2 * len(masked))
    assert parts[0]["median"] < parts[1]["median"]


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_same_inputs_give_the_same_bytes_and_apply_repeats_them(
    method: Method, data: Data, finished: Finished, tmp_path: Path
) -> None:
    (first, _), second = finished(method, "60%", "onnx"), tmp_path / "second"
    run(method, data, second, budget="60%", eval=str(data.noise))
    for name in ("plan.json", "model.safetensors", "model.onnx"):
        assert (first / name).read_bytes() == (second / name).read_bytes(), f"{name} depends on the evaluation labels"
    applied = tmp_path / "applied"
    without_data = {**settings(data, applied), "data": Value(None, ""), "eval": Value(None, "")}
    pipeline.apply_plan(
        data.checkpoint, first / "plan.json", without_data, force=False, command=["hcompress"], progress=quiet
    )
    for name in ("plan.json", "model.safetensors", "model.onnx"):
        assert (first / name).read_bytes() == (applied / name).read_bytes(), f"apply changed {name}"


@pytest.mark.parametrize("method", [m for m in METHODS if m.searches], ids=lambda m: m.name)
def test_without_a_budget_the_result_passes_the_gates(
    method: Method, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compress.prune.masks.MOST_REMOVED", 0.4)  # two sparsities
    monkeypatch.setattr("compress.planning.RESOLUTION", 0.1)
    report = run(method, data, tmp_path / "run", max_drop=100.0)
    assert report["files"]["model.onnx"] < report["dense_bytes"]
    assert all(check["ok"] for check in report["checks"])
    assert any("no budget was given" in note for note in report["notes"])


@pytest.mark.parametrize("method", [pytest.param(m, marks=[pytest.mark.slow] * m.trains, id=m.name) for m in METHODS])
def test_an_infeasible_byte_budget_gives_the_minimum_that_is_feasible(
    method: Method, data: Data, tmp_path: Path
) -> None:
    with pytest.raises(BudgetError, match="out of reach") as caught:
        run(method, data, tmp_path / "none", budget="1KB")
    assert not (tmp_path / "none").exists()
    minimum = next(word.strip(",") for word in caught.value.hint.split() if word[0].isdigit())
    predicted = run(method, data, tmp_path / "minimum", is_dry=True, budget=minimum)["predicted"]
    assert predicted["model.onnx_bytes"] == int(minimum.removesuffix("B"))


@pytest.mark.parametrize("method", {m.job: m for m in METHODS}.values(), ids=lambda m: m.name)
def test_a_dry_run_builds_what_it_predicts_and_writes_nothing(
    method: Method, data: Data, finished: Finished, tmp_path: Path
) -> None:
    predicted = run(method, data, tmp_path / "run", is_dry=True, budget="60%")["predicted"]
    assert not list(tmp_path.iterdir())
    _, report = finished(method, "60%", "onnx")
    assert predicted["model.onnx_bytes"] == report["files"]["model.onnx"]


def test_without_data_the_shape_of_an_input_is_asked_for(data: Data, tmp_path: Path) -> None:
    nothing = {"method": Value("magnitude", ""), "data": Value(None, ""), "out": Value(str(tmp_path / "run"), "")}
    with pytest.raises(UsageError, match="the shape of the network's inputs isn't known") as caught:
        pipeline.run_method(
            "prune",
            data.checkpoint,
            {**settings(data, tmp_path / "run"), **nothing},
            force=False,
            dry_run=False,
            plan=None,
            command=[],
            progress=quiet,
        )
    assert "--input-shape" in caught.value.hint


def test_seed_changes_the_calibration_sample_and_nothing_else(data: Data, tmp_path: Path) -> None:
    method = next(m for m in METHODS if m.name == "uniform")
    a, b = (run(method, data, tmp_path / "run", is_dry=True, seed=seed)["decisions"] for seed in (0, 1))
    assert [d["tensor"] for d in a] == [d["tensor"] for d in b]
    ranges = [[d["range"] for d in found if d.get("target") == "activation"] for found in (a, b)]
    assert ranges[0] != ranges[1]


def test_a_failed_gate_publishes_the_report_and_no_model(data: Data, tmp_path: Path) -> None:
    method = next(m for m in METHODS if m.name == "magnitude")
    with pytest.raises(GateError, match="min_metric") as caught:
        run(method, data, tmp_path / "run", sparsity=0.95, min_metric=99.0)
    rejected = tmp_path / "run.rejected"
    assert not (tmp_path / "run").exists()
    assert sorted(p.name for p in rejected.iterdir()) == ["plan.json", "report.html", "report.json", "report.md"]
    assert caught.value.report is not None
    record = json.loads((rejected / "report.json").read_text())
    assert not all(check["ok"] for check in record["checks"])


def test_prune_then_quantize_keeps_the_zeros(data: Data, tmp_path: Path) -> None:
    magnitude, uniform = (next(m for m in METHODS if m.name == name) for name in ("magnitude", "uniform"))
    run(magnitude, data, tmp_path / "pruned", sparsity=0.6)
    report = pipeline.run_method(
        "quantize",
        tmp_path / "pruned",
        settings(data, tmp_path / "both", method=uniform.name, budget="4bit"),
        force=False,
        dry_run=False,
        plan=None,
        command=[],
        progress=quiet,
    )
    assert report["sparsity"] >= 0.6
    assert report["average_bits"] == 4


@pytest.mark.parametrize(
    ("name", "goal", "first", "then"),
    [
        ("magnitude", {"sparsity": 0.5}, 0, 0),
        ("magnitude", {}, 3, 0),
        ("layerwise", {"sparsity": 0.5}, 0, 0),
        pytest.param("obs", {"sparsity": 0.5}, 3, 2, marks=pytest.mark.slow),
        ("structured-obs", {}, 0, 2),
        ("hesso", {"budget": "macs=60%"}, 10, 0),
        pytest.param("cric", {"budget": "macs=60%"}, 20, 2, marks=pytest.mark.slow),
    ],
)
def test_a_plan_is_applied_to_a_new_checkpoint_with_its_decisions(
    name: str, goal: dict[str, Any], first: int, then: int, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nearer = itertools.count(0, -1)  # each check than the one before: training helps
    monkeypatch.setattr("compress.train.loop.divergence_from", lambda *given: next(nearer))
    method = next(m for m in METHODS if m.name == name)
    given = run(method, data, tmp_path / "run", recover_steps=first, **goal)
    retrained = {k: v * 1.01 if v.is_floating_point() else v for k, v in load_file(data.checkpoint).items()}
    save_file(retrained, tmp_path / "new.safetensors")
    report = pipeline.run_method(
        "prune",
        tmp_path / "new.safetensors",
        settings(data, tmp_path / "again", recover_steps=then),
        force=False,
        dry_run=False,
        plan=tmp_path / "run" / "plan.json",
        command=[],
        progress=quiet,
    )
    assert report["sparsity"] == pytest.approx(given["sparsity"], abs=1e-4)
    kept, again = (read_plan(tmp_path / folder / "plan.json") for folder in ("run", "again"))
    assert again.channels() == kept.channels()
    assert again.masks().keys() == kept.masks().keys()
    assert ("recover" in again.options) == (then > 0)
    assert str(again.budget) == str(kept.budget) == report["budget"] == given["budget"] is not None
    assert [check["name"] for check in report["checks"]] == [check["name"] for check in given["checks"]]
    assert name in ("layerwise", "obs") or report["loss"]["predicted"] is None
    notes = "\n".join(report["notes"])
    assert "another checkpoint" in notes
    assert ("pass --recover-steps" in notes) == (first > 0 and then == 0)
    assert not (tmp_path / "again.journal").exists()


@pytest.mark.slow
def test_a_run_that_trains_twice_for_its_bytes_is_resumed_in_the_second_training(
    data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compress.train.loop.JOURNAL_EVERY_S", -1)

    def go(out: Path, stop: tuple[int, int] | None, *, resume: bool = False) -> list[tuple[int, int]]:
        seen: list[tuple[int, int]] = []
        first = iter([5000])  # bytes too many

        def progress(stage: str, done: int, total: int | None) -> None:
            if stage == "plan":
                seen.append((seen[-1][0] + 1 if seen else 1, 0))
            if stage == "recover":
                seen.append((seen[-1][0], done))
                if seen[-1] == stop:
                    raise KeyboardInterrupt

        monkeypatch.setattr("compress.planning.overhead_of", lambda *given: next(first, None))
        pipeline.run_method(
            "prune", data.checkpoint, settings(data, out, method="hesso", budget="60%"), force=False, dry_run=False,
            plan=None, resume=resume, command=[], progress=progress,
        )  # fmt: skip
        return [step for step in seen if step[1]]

    assert (2, 20) in go(tmp_path / "whole", None)
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "run", (2, 7))
    assert go(tmp_path / "run", None, resume=True)[0] == (2, 8), "no step is made twice"
    for name in ("plan.json", "model.onnx"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not list(tmp_path.glob("*.journal*"))


@pytest.fixture
def ctrl_c() -> Iterator[Callable[[], None]]:
    """Ctrl-C, as the process of a command meets it: the tests' own process would end at once."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield lambda: os.kill(os.getpid(), signal.SIGINT)
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("name", "stop", "given"),
    [
        ("gradual", 4, {}),  # while the sparsity rises
        pytest.param("gradual", 17, {}, marks=pytest.mark.slow),  # the masks hold
        pytest.param("gradual", 9, {"pattern": "4x1", "optimizer": "adam"}, marks=pytest.mark.slow),
        ("magnitude", 6, {"pattern": "1x4", "sparsity": 0.9, "lr": 0.05}),
        pytest.param(
            "magnitude",
            11,
            {"pattern": "1x4", "sparsity": 0.9, "lr": 0.003, "optimizer": "adam"},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_run_that_ctrl_c_stops_goes_on_to_the_same_bytes(
    name: str, stop: int, given: dict[str, Any], data: Data, tmp_path: Path, ctrl_c: Callable[[], None]
) -> None:
    """A signal that arrives in a step, and a training that moves the weights."""
    method = next(method for method in METHODS if method.name == name)

    def go(out: Path, at: int | None, *, resume: bool = False) -> list[int]:
        steps: list[int] = []

        def progress(stage: str, done: int, total: int | None) -> None:
            if stage == "recover":
                steps.append(done)
                if done == at:
                    ctrl_c()

        chosen = settings(
            data, out, method=name, **{"sparsity": 0.75, "recover_steps": 20, "lr": 0.002, "optimizer": "sgd", **given}
        )
        pipeline.run_method(
            method.job, data.checkpoint, chosen, force=False, dry_run=False, resume=resume, plan=None, command=[],
            progress=progress,
        )  # fmt: skip
        return steps

    assert go(tmp_path / "whole", None)[-1] == 20
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "run", stop)
    assert not (tmp_path / "run").exists() and (tmp_path / "run.journal").is_file()
    assert go(tmp_path / "run", None, resume=True)[0] == stop + 2, "no step is made twice"
    for file in ("plan.json", "plan.safetensors", "model.safetensors", "model.onnx", "model.pt2"):
        assert (tmp_path / "run" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes(), file
    plan = read_plan(tmp_path / "run" / "plan.json")
    assert "recover" in plan.options and plan.replaced()
    sidecar, dense = load_file(tmp_path / "run" / "plan.safetensors"), load_file(data.checkpoint)
    for tensor, decision in plan.masks().items():
        bits = np.unpackbits(sidecar[tensor].numpy(), bitorder="little")[: decision.total]
        assert bits.sum() == decision.kept < decision.total
        before = dense[tensor].flatten()[torch.from_numpy(bits).bool()]
        assert not torch.equal(sidecar[f"{tensor}#values"], before), "training moved the weights that stay"


def test_a_journal_of_another_budget_is_refused(data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compress.train.loop.JOURNAL_EVERY_S", -1)

    def interrupt(stage: str, done: int, total: int | None) -> None:
        if stage == "recover":
            raise KeyboardInterrupt

    def go(budget: str, *, resume: bool = False, **given: Any) -> None:
        pipeline.run_method(
            "prune", data.checkpoint, settings(data, tmp_path / "run", method="hesso", budget=budget, **given),
            force=False, dry_run=False, plan=None, resume=resume, command=[], progress=interrupt,
        )  # fmt: skip

    with pytest.raises(KeyboardInterrupt):
        go("macs=60%")
    go_on = {"macs=50%": {}, "macs=60%": {"multiple_of": 4}}
    for budget, given in go_on.items():
        with pytest.raises(UsageError, match="the journal is of another training"):
            go(budget, resume=True, **given)


def test_training_that_does_not_help_leaves_the_plan_as_it_was(data: Data, tmp_path: Path) -> None:
    magnitude = next(m for m in METHODS if m.name == "magnitude")
    report = run(magnitude, data, tmp_path / "trained", is_resumed=True, recover_steps=2, lr=10.0)
    run(magnitude, data, tmp_path / "bare")
    assert any("training did not help" in note for note in report["notes"])
    assert any("--resume found no trained.journal: the training started anew" in note for note in report["notes"])
    for name in ("plan.json", "model.onnx"):
        assert (tmp_path / "trained" / name).read_bytes() == (tmp_path / "bare" / name).read_bytes()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"exclude": "conv*"}, "--exclude 'conv\\*' matches no weight"),
        ({"recover_steps": 1, "augment": "rotate"}, "--augment 'rotate' is unknown"),
        ({"recover_steps": 1, "recover_epochs": 1}, "say the same"),
        ({"recover_steps": 1, "lr": 0.0}, "learning rate of a training is 0"),
        ({"recover_steps": 1, "train": "wrong"}, "--train: the network doesn't take"),
        ({"recover_steps": 1, "train": "bare", "distill": 0.0}, "--distill 0 leaves nothing to learn"),
        ({"eval": "wrong"}, "--eval: the network doesn't take"),
        ({"eval": "bare"}, "no targets|no labels|needs targets|y"),
    ],
)
def test_what_is_wrong_is_said_before_the_work(
    given: dict[str, Any], words: str, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "dense_files", lambda job: pytest.fail("the work began"))
    images = np.load(data.calibration)["x"]
    np.savez(tmp_path / "wrong.npz", x=np.zeros((8, 5), np.float32), y=np.zeros(8, np.int64))
    np.savez(tmp_path / "bare.npz", x=images[:8])
    named = {k: str(tmp_path / f"{v}.npz") if v in ("wrong", "bare") else v for k, v in given.items()}
    method = next(m for m in METHODS if m.name == "structured-obs")
    with pytest.raises(UsageError, match=words):
        run(method, data, tmp_path / "run", **named)
