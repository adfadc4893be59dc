"""A sweep: each point is the run of its sparsity alone, what they share is measured once, what is finished stays."""

from __future__ import annotations

import contextlib
import json
import shutil
import types
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from command import hcompress, record
from safetensors.torch import save_file

from compress import canonical, planning, settings, store, sweep
from compress.budget import Budget
from compress.context import Context
from compress.data import load_object
from compress.errors import BudgetError, DiskError, InputError, NumericsError, UsageError
from compress.job import Job, method_options, open_job
from compress.manifest import check_files, read_manifest
from compress.plan import Plan
from compress.prune import layerwise, obs, structured_obs
from compress.prune.fisher import fisher_of
from compress.registry import find_method, load_module
from compress.sweep_report import read_sweep, render_sweep, sweep_svg
from compress.train import loop

FOLDER = Path(str(resources.files("compress.demo")))
NETWORK = """
import torch
from torch import nn

def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(49, 24), nn.ReLU(), nn.Linear(24, 10))
"""
pytestmark = pytest.mark.usefixtures("quick_runs")


@dataclass(frozen=True)
class Files:
    folder: Path

    def line(self, *more: object) -> list[str]:
        """``hcompress prune`` of the network with the shipped data."""
        given = {"model": "network.py:make", "data": "calibration.npz", "eval": "evaluation.npz"}
        normal = {"mean": 0.286, "std": 0.353, "cache": "off", "num-calibration": 32, "max-drop": 100}
        flags = [str(part) for name, value in (given | normal).items() for part in (f"--{name}", value)]
        return ["prune", "network.safetensors", *flags, *map(str, more)]

    def run(self, *more: object, code: int = 0) -> dict[str, Any]:
        return record(*self.line(*more), code=code, folder=self.folder)

    def say(self, *more: object, code: int = 0) -> str:
        return hcompress(*self.line(*more), code=code, folder=self.folder)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("sweep")
    (folder / "network.py").write_text(NETWORK)
    for name, count in (("calibration", 64), ("evaluation", 128)):
        whole = np.load(FOLDER / f"{name}.npz")
        np.savez(folder / f"{name}.npz", x=whole["x"][:count], y=whole["y"][:count])
    module: torch.nn.Module = load_object(f"{folder / 'network.py'}:make", "--model")()
    save_file(module.state_dict(), folder / "network.safetensors")
    return Files(folder)


def hashes(run: Path) -> dict[str, str]:
    """Of what a run decided and made."""
    names = ("plan.json", "plan.safetensors", "model.onnx", "model.safetensors")
    return {name: canonical.sha256_of_file(run / name) for name in names}


METHODS = {
    "magnitude": (),
    "obs": ("--rounds", 2, "--fisher", "sampled"),
    "layerwise": (),
    "gradual": ("--recover-steps", 8, "--batch-size", 16),
    "structured-obs": (),
}


@pytest.fixture(scope="module")
def made(files: Files) -> Path:
    """A sweep of obs at 0.5 and 0.8."""
    files.run("--method", "obs", *METHODS["obs"], "--sparsity", "0.8,0.5,0.8", "--out", "made")
    return files.folder / "made"


@pytest.fixture
def again(made: Path) -> Iterator[Path]:
    """The same, to be changed by one test."""
    kept = made.with_name("kept")
    shutil.copytree(made, kept)
    yield made
    shutil.rmtree(made)
    kept.rename(made)


def same_as_alone(files: Files, folder: Path, point: dict[str, Any], options: Sequence[object]) -> None:
    single = f"{folder.name}-{point['sparsity']}"
    report = files.run(*options, "--sparsity", point["sparsity"], "--out", single)
    run = folder / point["folder"]
    assert hashes(run) == hashes(files.folder / single)
    inside = json.loads((run / "report.json").read_text())
    same = ("metric", "budget", "sparsity", "layers", "saliencies", "loss", "checks", "notes")
    assert {name: inside[name] for name in same} == {name: report[name] for name in same}
    check_files(run, read_manifest(run))
    assert (point["plan_sha256"], point["model_sha256"]) == tuple(hashes(run)[n] for n in ("plan.json", "model.onnx"))
    assert point["metric"] == report["metric"]["compressed"] and point["bytes"] == report["files"]["model.onnx"]


def test_a_later_point_is_the_run_of_its_sparsity_alone(files: Files, made: Path) -> None:
    points = read_sweep(made)["points"]
    assert [(point["sparsity"], point["status"], point["code"]) for point in points] == [
        (0.5, "passed", 0),
        (0.8, "passed", 0),
    ]
    same_as_alone(files, made, points[1], ["--method", "obs", *METHODS["obs"]])


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_point_of_every_method_is_the_run_of_its_sparsity_alone(method: str, files: Files) -> None:
    out, options = f"{method}-sweep", ["--method", method, *METHODS[method]]
    for point in files.run(*options, "--sparsity", "0.8,0.5", "--out", out)["points"]:
        same_as_alone(files, files.folder / out, point, options)


@pytest.mark.slow
def test_an_interrupted_training_of_a_point_goes_on(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ("--method", "gradual", *METHODS["gradual"], "--sparsity", "0.5,0.8", "--out")
    files.run(*options, "trained")
    real, written = loop.write_journal, list[Path]()

    def write_and_stop(path: Path, digest: str, state: Mapping[str, Any]) -> None:
        real(path, digest, state)
        written.append(path)
        if sum(other.name == "sparsity-0.8.journal" for other in written) == 4:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "write_journal", write_and_stop)
        patch.setattr(loop, "JOURNAL_EVERY_S", 0.0)
        files.run(*options, "trained-again", code=130)
    again = files.folder / "trained-again"
    assert (again / "sparsity-0.8.journal").is_file() and (again / "sparsity-0.5" / "manifest.json").is_file()
    files.run(*options, "trained-again", "--resume")
    for name in ("sparsity-0.5", "sparsity-0.8"):
        assert hashes(again / name) == hashes(files.folder / "trained" / name)
    notes = json.loads((again / "sparsity-0.8" / "report.json").read_text())["notes"]
    assert not any("started anew" in note for note in notes)
    assert not (again / "sparsity-0.8.journal").exists()


def opened(files: Files, **given: object) -> Job:
    flags = {"model": "network.py:make", "data": "calibration.npz", "mean": "0.286", "std": "0.353", "rounds": 2}
    with contextlib.chdir(files.folder):
        chosen = settings.resolve({**flags, **given}, environment={}, folder=None)
        return open_job(Path("network.safetensors"), chosen, lambda *_: None, needs_data=True)


def surroundings(memo: dict[str, Any], *, is_swept: bool) -> Context:
    generator = torch.Generator().manual_seed(0)
    made = Context(generator, torch.device("cpu"), lambda *_: None, lambda _: 0, [], memo=memo)
    return replace(made, is_swept=is_swept)


MEASURED = {
    "obs": [(obs, "sample_gradients", 4)],  # once at the dense weights, and once in the second round of each point
    "layerwise": [(layerwise, "output_gradients", 1), (layerwise, "removal_costs", 1)],
    "structured-obs": [(structured_obs, "gate_curvatures", 1)],
    "magnitude": [],
}


@pytest.mark.parametrize("method", MEASURED)
def test_plans_of_a_sweep_share_what_is_measured_and_are_the_same_to_the_bit(
    method: str, files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, calls = opened(files), Counter[str]()

    def plan(sparsity: float, memo: dict[str, Any], *, is_swept: bool) -> tuple[Plan, dict[str, torch.Tensor]]:
        known, context = find_method("prune", method), surroundings(memo, is_swept=is_swept)
        options, budget = method_options(job, known.options), Budget("sparsity", sparsity)
        made: tuple[Plan, dict[str, torch.Tensor]] = load_module(known).plan(
            job.source, job.graph, {}, job.calibration, budget, options, context
        )
        return made

    sparsities = (0.3, 0.5, 0.7)
    alone = [plan(sparsity, {}, is_swept=False) for sparsity in sparsities]
    for module, name, _ in MEASURED[method]:
        monkeypatch.setattr(module, name, counted(calls, name, getattr(module, name)))
    memo: dict[str, Any] = {}
    shared = [plan(sparsity, memo, is_swept=True) for sparsity in sparsities]
    for (one, tensors), (other, others) in zip(alone, shared, strict=True):
        assert one == other and tensors.keys() == others.keys()
        assert all(torch.equal(tensors[name], others[name]) for name in tensors)
    assert calls == {name: count for _, name, count in MEASURED[method]}


def counted(calls: Counter[str], name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def called(*arguments: Any, **keywords: Any) -> Any:
        calls[name] += 1
        return function(*arguments, **keywords)

    return called


def test_gradients_that_are_kept_count_to_the_memory_of_the_others(files: Files) -> None:
    kept = obs._Curvature(fisher_of(torch.zeros(10, 25)), {}, torch.zeros(1))
    for memo, left in (({}, 5000), ({obs.DENSE: kept}, 4000)):
        context = types.SimpleNamespace(memo=memo, memory=5000)
        assert obs._memory_left(types.SimpleNamespace(context=context)) == left  # type: ignore[arg-type]


def test_the_folder_says_what_the_points_came_to(files: Files, made: Path) -> None:
    found = read_sweep(made)
    assert {path.name for path in made.iterdir()} == {
        *("sweep.json", "report.md", "report.html", "sparsity-0.5", "sparsity-0.8")
    }
    text, page = (made / "report.md").read_text(), (made / "report.html").read_text()
    assert text.startswith("# hcompress prune, a sweep: 2 of 2 points passed\n")
    for point in found["points"]:
        report = json.loads((made / point["folder"] / "report.json").read_text())
        dense, compressed = report["metric"]["dense"], report["metric"]["compressed"]
        row = f"| {point['sparsity']} | {100 * point['reached']:.2f} % | "
        assert row in text and f"| {compressed:.2f} % | {dense - compressed:.2f} points | passed |" in text
        assert f'<a href="{point["folder"]}/report.html">' in page
        assert f"sparsity {point['sparsity']}: {compressed:.2f} %</title>" in page
        assert point["reached"] >= point["sparsity"] - 1e-4
    assert "http" not in page.replace("http-equiv", "") and "<script" not in page
    (svg,) = [part for part in page.split("<svg ")[1:] if part.startswith('class="chart"')]
    assert len(ElementTree.fromstring("<svg " + svg.split("</svg>")[0] + "</svg>").findall("g")) == 2
    shown = hcompress("show", made)
    assert "obs: 2 of 2 points passed" in shown and f"run folder: {made / 'sparsity-0.8'}" in shown
    assert record("show", made) == found


def test_other_commands_take_a_point_and_say_so_of_the_whole(files: Files, made: Path) -> None:
    assert record("verify", made / "sparsity-0.5")["checks"]
    assert "sparsity-0.8" in hcompress("diff", made / "sparsity-0.5", made / "sparsity-0.8")
    error = record("verify", made, code=3)["error"]
    assert "a sweep, not a run folder" in error["message"] and "pass one of its points" in error["hint"]
    error = record("show", made, "--why", "1", code=2)["error"]
    assert "is a sweep, not one run" in error["message"]
    error = files.run("--method", "magnitude", "--sparsity", 0.5, "--out", "made", "--force", code=2)["error"]
    assert "made holds a sweep" in error["message"]


class Runs:
    """Stands in for the runs of a sweep, and counts them."""

    def __init__(self, patch: pytest.MonkeyPatch, *, stop_at: float = 2.0, error: BaseException | None = None) -> None:
        self.real, self.stop_at, self.error = sweep.run_opened, stop_at, error
        self.sparsities: list[float] = []
        patch.setattr(sweep, "run_opened", self)

    def __call__(self, job: Job, *rest: Any, **more: Any) -> dict[str, Any]:
        sparsity = job.value("sparsity")
        self.sparsities.append(sparsity)
        if self.error is not None and sparsity >= self.stop_at:
            raise self.error
        return self.real(job, *rest, **more)


OBS = ("--method", "obs", *METHODS["obs"], "--out", "made")


def test_resume_keeps_what_is_finished_and_unchanged(
    files: Files, again: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = Runs(monkeypatch, stop_at=0.0, error=NumericsError("stopped"))
    before = (again / "sparsity-0.5" / "manifest.json").read_bytes()
    found = files.run(*OBS, "--sparsity", "0.5,0.8", "--resume")
    assert runs.sparsities == [] and [point["status"] for point in found["points"]] == ["passed", "passed"]
    with (again / "sparsity-0.8" / "plan.json").open("a") as stream:
        stream.write(" ")
    files.run(*OBS, "--sparsity", "0.5,0.8", "--resume", code=9)
    assert runs.sparsities == [0.8], "what was changed by others is made again"
    assert (again / "sparsity-0.5" / "manifest.json").read_bytes() == before
    for more in (("--seed", 1), ("--num-calibration", 16), ("--fisher", "labels")):
        runs.sparsities.clear()
        files.run(*OBS, "--sparsity", "0.5,0.8", "--resume", *more, code=9)
        assert runs.sparsities == [0.5, 0.8], f"{more[0]} makes another run"


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_a_point_that_has_no_memory_leaves_the_others(
    error: BaseException, files: Files, again: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Runs(monkeypatch, stop_at=0.9, error=error)
    found = files.run(*OBS, "--sparsity", "0.5,0.8,0.9", "--resume", code=8)["report"]
    assert [point["code"] for point in found["points"]] == [0, 0, 8]
    assert "not enough memory" in found["points"][2]["message"]


def test_a_bug_in_a_point_ends_the_sweep(files: Files, again: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Runs(monkeypatch, stop_at=0.9, error=RuntimeError("shape mismatch"))
    error = files.run(*OBS, "--sparsity", "0.5,0.8,0.9", "--resume", code=1)["error"]
    assert "shape mismatch" in error["message"]
    assert [point["status"] for point in read_sweep(again)["points"]] == ["passed", "passed", "not run yet"]


def test_what_a_killed_sweep_leaves_is_gone_on_with(files: Files, again: Path) -> None:
    for name in (
        ".sparsity-0.8.partial-x_1",
        ".sparsity-0.8.lock",
        ".sparsity-0.8.journal.12.tmp",
        ".report.md.partial",
    ):
        (again / name).touch()
    (again / "sparsity-0.8.journal.2").touch()
    store.check_gathered(again, force=False, resume=True)
    (again / "notes.partial").touch()
    with pytest.raises(UsageError, match=r"holds notes\.partial"):
        store.check_gathered(again, force=False, resume=True)


def test_resume_adds_points_and_loses_none(files: Files, again: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = Runs(monkeypatch, stop_at=0.0, error=NumericsError("stopped", hint="wait"))
    error = files.run(*OBS, "--sparsity", "0.5,0.9", "--resume", code=2)["error"]
    assert "has a point at sparsity 0.8" in error["message"] and "--sparsity 0.5,0.8,0.9" in error["hint"]
    found = files.run(*OBS, "--sparsity", "0.5,0.8,0.9", "--resume", code=9)
    assert runs.sparsities == [0.9]
    assert found["error"]["kind"] == "numerical failure"
    assert found["error"]["message"] == ("2 of 3 points passed; 1 numerical failure; Sparsity 0.9: stopped (wait)")
    assert [point["status"] for point in found["report"]["points"]] == ["passed", "passed", "numerical failure"]
    assert not any(name.startswith("sparsity-0.9") for name in (path.name for path in again.iterdir()))


def test_a_point_that_fails_leaves_the_others_and_the_worst_code_counts(
    files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The last layer stays, so that 0.999 is out of reach; a hundredth of the weights makes the file too large.
    options = ("--method", "magnitude", "--exclude", "4.weight", "--out", "failing")
    ci = ("--max-bytes", "5KB", "--junit", "junit.xml", "--summary", "summary.md")
    found = files.run(*options, *ci, "--sparsity", "0.999,0.01,0.8", code=5)
    gate, passed, far = found["report"]["points"]
    assert (gate["status"], passed["status"], far["status"]) == ("gate failed", "passed", "infeasible budget")
    assert (gate["code"], passed["code"], far["code"], found["error"]["code"]) == (4, 0, 5, 5)
    assert "max_bytes" in gate["message"] and "out of reach" in far["message"]
    folder = files.folder / "failing"
    assert (gate["folder"], passed["folder"], far["folder"]) == ("sparsity-0.01.rejected", "sparsity-0.8", None)
    assert json.loads((folder / gate["folder"] / "report.json").read_text())["metric"]["compressed"] == gate["metric"]
    page = (folder / "report.html").read_text()
    assert page.count('class="missing"') == 1 and page.count('class="dot bad"') == page.count('class="dot good"') == 1
    assert f"sparsity 0.999: {far['message']}</title>" in page
    suites = ElementTree.parse(files.folder / "junit.xml").getroot()
    assert [suite.attrib["name"] for suite in suites] == [
        *("hcompress prune, sparsity=0.01", "hcompress prune, sparsity=0.8", "hcompress sweep")
    ]
    assert suites.attrib["failures"] == suites.attrib["errors"] == "1"
    assert (files.folder / "summary.md").read_text() == (folder / "report.md").read_text() + "\n"


def test_a_limit_is_drawn_where_the_curve_is() -> None:
    def levels(limit: float) -> int:
        metric = {**{"name": "accuracy", "unit": "%", "dense": 90.0, "limit": limit}}
        points = [{"sparsity": 0.5, "metric": 88.0, "status": "passed", "message": ""}]
        return sweep_svg({"metric": metric, "points": points}).count('class="level"')

    assert levels(89.0) == levels(87.0) == 2 and levels(0.0) == 1


def test_an_interruption_leaves_what_is_finished_and_says_how_to_go_on(
    files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = ("--method", "magnitude", "--out", "stopped", "--sparsity", "0.2,0.4")
    with pytest.MonkeyPatch.context() as patch:
        Runs(patch, stop_at=0.4, error=KeyboardInterrupt())
        error = files.run(*line, code=130)["error"]
    assert error["message"] == "interrupted; 1 of 2 points of the sweep are finished, in stopped"
    assert error["hint"] == "the same command with --resume goes on from there"
    folder = files.folder / "stopped"
    assert sorted(path.name for path in folder.iterdir()) == ["report.html", "report.md", "sparsity-0.2", "sweep.json"]
    assert [point["status"] for point in read_sweep(folder)["points"]] == ["passed", "not run yet"]
    check_files(folder / "sparsity-0.2", read_manifest(folder / "sparsity-0.2"))
    error = files.run(*line, code=2)["error"]
    assert "stopped already exists" in error["message"] and "--resume" in error["hint"]
    with pytest.MonkeyPatch.context() as patch:
        Runs(patch, stop_at=0.4, error=DiskError("full", hint="free some"))
        error = files.run(*line, "--resume", code=7)["error"]
    assert error["hint"] == "free some; the same command with --resume keeps the finished points (1) in stopped"
    runs = Runs(monkeypatch)
    assert files.run(*line, "--resume")["code"] == 0 and runs.sparsities == [0.4]


def test_force_makes_a_sweep_anew_and_nothing_else(files: Files, again: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = Runs(monkeypatch, stop_at=0.5, error=BudgetError("out of reach"))
    (again / "mine.txt").touch()
    error = files.run(*OBS, "--sparsity", "0.5,0.6", "--force", code=2)["error"]
    assert "made holds mine.txt" in error["message"] and runs.sparsities == []
    (again / "mine.txt").unlink()
    files.run(*OBS, "--sparsity", "0.5,0.6", "--force", code=5)
    assert runs.sparsities == [0.5, 0.6]
    assert {path.name for path in again.iterdir()} == {"sweep.json", "report.md", "report.html"}


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--sparsity", "0.5,x"], "'0.5,x' is not a number, or numbers such as 0.5,0.7,0.9"),
        (["--sparsity", "0.5,,0.7"], "'0.5,,0.7' is not a number"),
        (["--sparsity", "0.5,1.5"], "'sparsity=1.5' is out of range"),
        (["--sparsity", "0.5,0.7", "--budget", "50%"], "contradict each other"),
        (["--sparsity", "0.5,0.7", "--plan", "made/sparsity-0.5"], "0.5,0.7 are 2 sparsities, and this takes one"),
        (["--sparsity", "0.5,0.7", "--method", "magnitude", "--rounds", "2"], "method magnitude has no --rounds"),
    ],
)
def test_a_list_that_makes_no_sense_is_one_sentence(more: list[str], words: str, files: Files, made: Path) -> None:
    assert words in files.run(*more, "--out", "new", code=2)["error"]["message"]
    assert not (files.folder / "new").exists()


def test_a_dry_run_says_what_each_point_would_be(files: Files) -> None:
    options = ("--method", "magnitude", "--exclude", "4.weight", "--dry-run")
    found = files.run(*options, "--sparsity", "0.999,0.5")
    assert [point["code"] for point in found["points"]] == [0, 5]
    assert found["points"][0]["plan"]["predicted"]["sparsity"] == pytest.approx(0.5, abs=1e-3)


def test_numbers_are_sorted_and_one_of_them_is_no_sweep() -> None:
    def given(value: object) -> object:
        return settings.resolve({"sparsity": value}, environment={}, folder=None)["sparsity"].value

    assert given("0.9, 0.5,0.90,0.7") == given([0.9, 0.5, 0.7]) == (0.5, 0.7, 0.9)
    assert given("0.5,0.5") == given("0.5") == given(0.5) == given([0.5]) == 0.5
    assert settings.swept(settings.resolve({"sparsity": "0.5"}, environment={}, folder=None)) == []


def test_a_plan_that_is_followed_is_shown_by_magnitude(files: Files) -> None:
    job = opened(files)
    for method, of in (("magnitude", "weights"), ("structured-obs", "channels")):
        known, context = find_method("prune", method), surroundings({}, is_swept=False)
        options, budget = method_options(job, known.options), Budget("sparsity", 0.5)
        decided = planning.Decided(
            *load_module(known).plan(job.source, job.graph, {}, job.calibration, budget, options, context)
        )
        found = planning.saliencies_of(job, decided)
        assert found is not None and found.of == of and found.removed.count > 0
        total = 49 * 24 + 24 * 10 if of == "weights" else 24
        assert found.removed.count + found.kept.count == total
        if of == "weights":
            assert found.removed.most is not None and found.kept.least is not None
            assert found.what.startswith("magnitude") and found.removed.most <= found.kept.least


def made_up(**changes: Any) -> dict[str, Any]:
    empty = dict.fromkeys(("folder", "sha256", "plan_sha256", "model_sha256", "reached", "bytes", "metric", "drop"))
    base = {"code": 0, "message": "", "key": "", "time_s": 1.0, **empty}
    metric = {"name": "loss", "unit": "nats", "higher_is_better": False, "dense": 0.841, "limit": 0.86}
    return {
        **{"schema": "hcompress.sweep/1", "command": "prune", "argv": ["hcompress", "prune"], "method": "obs"},
        **{"seed": 0, "source": {"name": "model.pt", "sha256": ""}, "dense_bytes": 1000, "delivered": "model.onnx"},
        **{"code": 5, "time_s": 12.0, "metric": {**metric, "num_examples": 617, "runtime": "onnxruntime"}},
        "points": [
            {**base, "sparsity": 0.5, "status": "passed", "metric": 0.853, "drop": 0.012, "bytes": 600, "reached": 0.5},
            {**base, "sparsity": 0.9, "status": "infeasible budget", "code": 5, "message": "out of reach"},
        ],
    } | changes


def test_a_loss_has_its_unit_and_a_point_without_figures_its_message() -> None:
    page, text = render_sweep(made_up())
    assert "| 0.5 | 50.00 % | 600 B | 60.00 % | 0.853 | 0.012 | passed |" in text
    assert "| 0.9 | - | - | - | - | - | infeasible budget |" in text
    assert "loss: 617 examples in onnxruntime; lower is better." in text and "- Sparsity 0.9: out of reach" in text
    assert "sparsity 0.9: out of reach</title>" in page and "limit 0.86" in page and "dense 0.841" in page
    page, text = render_sweep(made_up(metric=None))
    assert 'class="chart"' not in page and "| 0.5 |" in text


def test_words_cannot_leave_their_place() -> None:
    evil = "<script>alert(1)</script>|\x1b[31m"
    record = made_up(source={"name": evil, "sha256": ""}, argv=["hcompress", evil])
    record["points"][1]["message"] = evil
    page, text = render_sweep(record)
    assert "<script" not in page and "<script" not in text.split("## Reproduce")[0] and "\x1b" not in page + text


@pytest.mark.parametrize("sparsity", ["many", None])
def test_a_bad_sparsity_in_a_record_is_refused(sparsity: object, tmp_path: Path) -> None:
    record = made_up()
    record["points"][0]["sparsity"] = sparsity
    (tmp_path / "sweep.json").write_text(canonical.dumps(record))
    with pytest.raises(InputError, match="bad value"):
        read_sweep(tmp_path)


def test_a_record_that_lacks_a_key_is_named(tmp_path: Path) -> None:
    (tmp_path / "sweep.json").write_text('{"schema": "hcompress.sweep/1", "points": [{"sparsity": 0.5}]}')
    with pytest.raises(InputError, match="key 'status' is missing"):
        read_sweep(tmp_path)
