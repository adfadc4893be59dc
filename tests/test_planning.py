"""From goals to plans: points picked from a frontier, latency met as measured, the smallest model within the gates."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from compress import canonical, pipeline, planning
from compress.budget import Budget, parse_budget
from compress.data import load_object
from compress.errors import BudgetError, GateError, InputError, UsageError
from compress.frontier import FrontierRecord, read_frontier
from compress.plan import read_plan
from compress.registry import find_method
from compress.sensitivity import CostTable
from compress.settings import Value, resolve
from compress.task import Classification, Regression
from compress.verdict import Gates

FOLDER = Path(str(resources.files("compress.demo")))
NETWORK = """
import torch
from torch import nn

def make():
    torch.manual_seed(0)
    body = [nn.Conv2d(1, 12, 5, 3, bias=False), nn.ReLU(), nn.Conv2d(12, 24, 3, 2), nn.ReLU()]
    return nn.Sequential(*body, nn.Flatten(), nn.Linear(216, 10))
"""
HAWQ = find_method("quantize", "hawq")
pytestmark = pytest.mark.usefixtures("quick_runs")


def quiet(stage: str, done: int, total: int | None) -> None:
    """Progress of a test."""


@dataclass(frozen=True)
class Files:
    """A network that classifies better than chance, small slices of the shipped data, and a run at 4 bits."""

    network: Path
    checkpoint: Path
    calibration: Path
    evaluation: Path
    run: Path


def fitted_network(path: Path, x: torch.Tensor, y: torch.Tensor) -> nn.Module:
    """Random features, and the last layer by ridge regression."""
    module: nn.Module = load_object(f"{path}:make", "--model")()
    body, last = module[:-1], module[-1]  # type: ignore[index]
    with torch.no_grad():
        features = F.pad(body(x), (0, 1), value=1.0).double()
        gram = features.T @ features + 1e-2 * len(x) * features.square().mean() * torch.eye(features.shape[1])
        solved = torch.linalg.solve(gram, features.T @ F.one_hot(y, 10).double()).float().T
        last.weight.copy_(10 * solved[:, :-1])
        last.bias.copy_(10 * solved[:, -1])
    return module


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("files")
    network = folder / "network.py"
    network.write_text(NETWORK)
    for name, count in (("calibration", 64), ("evaluation", 256)):
        whole = np.load(FOLDER / f"{name}.npz")
        np.savez(folder / f"{name}.npz", x=whole["x"][:count], y=whole["y"][:count])
    train = np.load(FOLDER / "calibration.npz")
    x = (torch.from_numpy(train["x"]).float().reshape(-1, 1, 28, 28) / 255 - 0.286) / 0.353
    module = fitted_network(network, x, torch.from_numpy(train["y"]).long())
    save_file(module.state_dict(), folder / "network.safetensors")
    made = Files(
        network,
        folder / "network.safetensors",
        folder / "calibration.npz",
        folder / "evaluation.npz",
        folder / "run",
    )
    quantize(made, folder / "run", budget="4bit")
    return made


def settings(files: Files, out: Path, **given: Any) -> Mapping[str, Value]:
    flags = {
        "model": f"{files.network}:make",
        "data": str(files.calibration),
        "eval": str(files.evaluation),
        "mean": "0.286",
        "std": "0.353",
        "task": "classification",
        "method": "hawq",
        "activations": "float",
        "range": "mse",
        "cache": "off",
        "passes": 2,
        "out": str(out),
        **given,
    }
    return resolve(flags, environment={}, folder=None)


def quantize(
    files: Files,
    out: Path,
    *,
    plan: Path | None = None,
    pick: str | None = None,
    dry_run: bool = False,
    job: str = "quantize",
    **given: Any,
) -> dict[str, Any]:
    return pipeline.run_method(
        job,
        files.checkpoint,
        settings(files, out, **given),
        force=False,
        dry_run=dry_run,
        plan=plan,
        pick=pick,
        command=["hcompress", job],
        progress=quiet,
    )


def bits_at(frontier: FrontierRecord, index: int, folder: Path) -> float:
    """Average bits of the plan in a folder, checked to be the frontier's point."""
    moved = read_frontier(folder / "frontier.json")
    assert moved == frontier.at(index, moved.chosen)
    chosen = {t: c.bits for item, c in zip(moved.items, moved.chosen_choices(), strict=True) for t in item.tensors}
    assert {name: d.bits for name, d in read_plan(folder / "plan.json").quantized("weight").items()} == chosen
    return moved.amount(moved.costs[index])


# -- another point of a frontier -------------------------------------------------------------------------------------


def test_a_picked_point_has_its_bits_and_needs_no_data(files: Files, tmp_path: Path) -> None:
    frontier = read_frontier(files.run / "frontier.json")
    index = frontier.index // 2
    report = quantize(files, tmp_path / "picked", plan=files.run, pick=str(index), data=None)
    assert bits_at(frontier, index, tmp_path / "picked") == pytest.approx(report["average_bits"])
    assert report["average_bits"] < 4
    plan = read_plan(tmp_path / "picked" / "plan.json")
    assert plan.budget is None
    assert plan.options == read_plan(files.run / "plan.json").options
    again = quantize(files, tmp_path / "back", plan=tmp_path / "picked", pick="4bit")
    assert again["average_bits"] <= 4
    for name in ("model.onnx", "model.safetensors", "frontier.json"):
        assert (tmp_path / "back" / name).read_bytes() == (files.run / name).read_bytes()


def test_a_budget_picks_the_best_point_within(files: Files, tmp_path: Path) -> None:
    frontier = read_frontier(files.run / "frontier.json")
    record = quantize(files, tmp_path, plan=files.run / "plan.json", pick="3bit", data=None, dry_run=True)
    index = frontier.within(3.0)
    assert index is not None
    assert record["predicted"]["loss"] == frontier.losses[index]
    assert record["predicted"]["average_bits"] <= 3


def test_a_picked_size_is_that_of_the_written_file(files: Files, tmp_path: Path) -> None:
    quantize(files, tmp_path / "run", budget="60%")
    frontier = read_frontier(tmp_path / "run" / "frontier.json")
    for share in (0.6, 0.9):
        limit = int(frontier.amount(frontier.costs[int(share * len(frontier.costs))]))
        report = quantize(files, tmp_path / f"{share}", plan=tmp_path / "run", pick=f"{limit}B", data=None)
        assert limit - 800 < report["files"]["model.onnx"] <= limit  # what nodes of widths that aren't used would take


@pytest.mark.parametrize(
    ("pick", "error", "words"),
    [
        ("999999", InputError, "--pick 999999: the frontier has points 0 to"),
        ("60%", UsageError, "the frontier's costs are bits"),
        ("bops=10%", UsageError, "the frontier's costs are bits"),
        ("zonk", UsageError, "budget 'zonk' is not understood"),
        ("-1", UsageError, "budget '-1' is out of range"),
        ("1bit", BudgetError, "--pick 1bit: the frontier starts at 2bit"),
    ],
)
def test_a_point_that_is_none_is_refused(
    files: Files, tmp_path: Path, pick: str, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        quantize(files, tmp_path / "out", plan=files.run, pick=pick, data=None)
    assert not list(tmp_path.iterdir())


def test_a_run_without_a_frontier_says_so(files: Files, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.mkdir()
    shutil.copy(files.run / "plan.json", plain)
    shutil.copy(files.run / "plan.safetensors", plain)
    with pytest.raises(InputError, match=r"frontier\.json: no such file"):
        quantize(files, tmp_path / "out", plan=plain, pick="0", data=None)
    with pytest.raises(UsageError, match="--pick needs the run whose frontier it means"):
        quantize(files, tmp_path / "out", pick="0")


def test_a_frontier_beside_another_method_s_plan_is_refused(files: Files, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.mkdir()
    record = canonical.plain(read_plan(files.run / "plan.json")) | {"method": "uniform", "sidecar": None}
    (plain / "plan.json").write_text(canonical.dumps(record))
    shutil.copy(files.run / "frontier.json", plain)
    with pytest.raises(InputError, match="the frontier is one of hawq, the plan of uniform"):
        quantize(files, tmp_path / "out", plan=plain, pick="0", data=None)


# -- budgets of bytes ------------------------------------------------------------------------------------------------


def test_the_written_file_is_within_and_hardly_smaller_than_it_may_be(files: Files, tmp_path: Path) -> None:
    report = quantize(files, tmp_path / "run", budget="6000B")
    size = (tmp_path / "run" / "model.onnx").stat().st_size
    assert 0.9 * 6000 < size == report["files"]["model.onnx"] <= 6000
    frontier = read_frontier(tmp_path / "run" / "frontier.json")
    assert frontier.amount(frontier.costs[frontier.index]) == size


# -- budgets of latency ----------------------------------------------------------------------------------------------


@dataclass
class Clock:
    """A machine whose latency grows with the size of the file, which the table of layers knows in part."""

    offset: float
    tried: dict[int, float]
    index: int = -1

    def measured(self, job: Any, dense: Any, model: bytes) -> float:
        latency = self.offset + len(model) / 10_000
        self.tried[self.index] = latency
        return latency


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], Clock]:
    def install(offset: float) -> Clock:
        found = Clock(offset, {})
        real = planning.publish

        def published(job: Any, decided: planning.Decided, stage: Path) -> Any:
            assert decided.frontier is not None
            found.index = decided.frontier.index
            return real(job, decided, stage)

        def table(build: Any, graph: Any, layers: Any, widths: Any, *rest: Any, **options: Any) -> CostTable:
            entries = {(la.tensor, str(b)): la.elements * b / 80_000 for la in layers for b in (*range(2, 9), 32)}
            return CostTable("latency", entries, 0.1)

        monkeypatch.setattr(planning, "publish", published)
        monkeypatch.setattr(planning, "cached_latency_table", table)
        monkeypatch.setattr(planning, "_measured_latency", found.measured)
        return found

    return install


@pytest.mark.parametrize(("offset", "limit"), [(0.0, 1.1), (5.0, 5.75)])
def test_a_latency_budget_is_met_as_it_is_measured(
    files: Files, tmp_path: Path, clock: Callable[[float], Clock], offset: float, limit: float
) -> None:
    found = clock(offset)
    record = quantize(files, tmp_path / "run", budget=f"latency={limit}ms", dry_run=True)
    latency = offset + record["predicted"]["model.onnx_bytes"] / 10_000
    assert latency <= limit
    within = {index: tried for index, tried in found.tried.items() if index >= 0 and tried <= limit}
    assert latency == max(within.values())
    beyond = [index for index, tried in found.tried.items() if index >= 0 and tried > limit]
    assert latency >= planning.CLOSE_LATENCY * limit or max(within) + 1 in beyond


@pytest.mark.parametrize("missed", [1, 99])
def test_a_cut_that_is_too_slow_in_the_last_measurement_gives_way_to_a_smaller_one(
    files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missed: int
) -> None:
    macs: list[int] = []

    def checked(job: Any, goal: Any, built: Any) -> tuple[float, float]:
        macs.append(built.graph.macs)
        return 20.0 if len(macs) <= missed else len(built.onnx) / 1000, 7.0

    monkeypatch.setattr(planning, "_measured_latency", lambda job, dense, model: len(model) / 1000)
    monkeypatch.setattr(planning, "_checked_latency", checked)
    monkeypatch.setattr(planning, "CLOSE_LATENCY", 1.0)
    goal = {"method": "structured-obs", "budget": "latency=7ms", "multiple_of": 1, "dry_run": True}
    if missed == 1:
        record = quantize(files, tmp_path / "run", job="prune", **goal)
        assert record["predicted"]["macs"] == macs[-1] < macs[0]
        assert record["predicted"]["model.onnx_bytes"] <= 7_000
    else:
        with pytest.raises(BudgetError, match="the fastest network that was tried takes 20 ms") as caught:
            quantize(files, tmp_path / "run", job="prune", **goal)
        assert "latency=20.6ms" in caught.value.hint


def test_a_latency_out_of_reach_names_the_minimum_which_is_within_reach(
    files: Files, tmp_path: Path, clock: Callable[[float], Clock], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "LATENCY_TRIES", 3)  # not enough to come down to the first point
    offset = 40.0
    found = clock(offset)
    with pytest.raises(BudgetError, match="is out of reach: the fastest network of hawq takes") as caught:
        quantize(files, tmp_path / "run", budget=f"latency={offset + 0.01}ms", dry_run=True)
    least = found.tried[0]
    assert f"{least:.3g} ms" in caught.value.message
    minimum = next(word.strip(",") for word in caught.value.hint.split() if word.startswith("latency="))
    assert least <= parse_budget(minimum).limit <= 1.05 * least
    record = quantize(files, tmp_path / "run", budget=minimum, dry_run=True)
    assert offset + record["predicted"]["model.onnx_bytes"] / 10_000 <= parse_budget(minimum).limit


# -- the smallest model within the gates -----------------------------------------------------------------------------


def test_a_search_ends_at_the_smallest_model_within_the_gates(
    files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    verdicts: list[tuple[int, int, bool]] = []
    real = planning._scorer

    def scorer(job: Any, goal: Any) -> Callable[[Any], bool]:
        passes = real(job, goal)

        def noted(built: Any) -> bool:
            frontier = read_frontier(goal.stage / "frontier.json")
            verdicts.append((frontier.index, frontier.costs[frontier.index], passes(built)))
            return verdicts[-1][2]

        return noted

    monkeypatch.setattr(planning, "_scorer", scorer)
    monkeypatch.setattr(planning, "RESOLUTION", 0.03)
    report = quantize(files, tmp_path / "run", max_drop=2.0, reconstruction="none")
    assert report["metric"]["dense"] > 60, "the network is to be one that has something to lose"
    assert all(check["ok"] for check in report["checks"])
    frontier = read_frontier(tmp_path / "run" / "frontier.json")
    passed = [index for index, _, ok in verdicts if ok]
    failed = [index for index, _, ok in verdicts if not ok]
    assert failed and max(failed) < frontier.index == min(passed)
    gap = frontier.costs[frontier.index] - frontier.costs[max(failed)]
    assert frontier.index == max(failed) + 1 or gap <= planning.RESOLUTION * report["dense_bytes"]
    assert f"of {len(verdicts)} models the smallest one" in " ".join(report["notes"])


def test_gates_that_nothing_passes_reject_the_largest_model(
    files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "RESOLUTION", 0.2)
    with pytest.raises(GateError, match="min_metric") as caught:
        quantize(files, tmp_path / "run", min_metric=100.0)
    assert caught.value.exit_code == 4
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "run.rejected" / "model.onnx").exists()
    assert set(read_plan(tmp_path / "run.rejected" / "plan.json").quantized("weight")) == {
        "0.weight",
        "2.weight",
        "5.weight",
    }


def test_a_search_of_candidates_goes_on_until_one_fails(
    files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    verdicts = iter([True, True, False])
    monkeypatch.setattr(planning, "_scorer", lambda job, goal: lambda built: next(verdicts))
    record = quantize(files, tmp_path, job="prune", method="obs", num_calibration=8, max_drop=50.0, dry_run=True)
    assert next(verdicts, None) is None
    assert record["predicted"]["sparsity"] == pytest.approx(1 - 0.7 * 0.88, abs=1e-3)
    assert any("of 3 models the smallest one" in note for note in record["notes"])


ANY = resolve({}, environment={}, folder=None)


def test_a_pattern_says_how_small_the_model_is_to_be() -> None:
    obs, pattern = find_method("prune", "obs"), resolve({"pattern": "2:4"}, environment={}, folder=None)
    assert planning.is_searched(obs, None, ANY) and planning.is_searched(HAWQ, None, pattern)
    assert not planning.is_searched(obs, None, pattern)
    assert planning.is_searched(obs, None, resolve({"pattern": "4x1"}, environment={}, folder=None)), "blocks don't"
    assert planning.search_gates(obs, None, Gates(), pattern, Regression()) == Gates()


def test_without_a_budget_one_point_may_be_lost() -> None:
    assert planning.search_gates(HAWQ, None, Gates(), ANY, Classification()) == Gates(max_drop=1.0)
    for gates in (Gates(max_drop=0.1), Gates(min_metric=90.0)):
        assert planning.search_gates(HAWQ, None, gates, ANY, Classification()) == gates
    assert planning.search_gates(HAWQ, Budget("bits", 4), Gates(), ANY, Regression()) == Gates()
    assert planning.search_gates(find_method("quantize", "uniform"), None, Gates(), ANY, Regression()) == Gates()
    assert planning.search_gates(HAWQ, None, Gates(max_drop=0.5), ANY, Regression()) == Gates(max_drop=0.5)


def test_a_metric_without_percent_needs_a_budget_or_a_gate() -> None:
    with pytest.raises(UsageError, match=r"how much mse \(squared error\) may get worse") as caught:
        planning.search_gates(HAWQ, None, Gates(max_bytes=1e6), ANY, Regression())
    assert "--max-drop" in caught.value.hint
