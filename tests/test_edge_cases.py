"""Odd networks and odd data, as a user meets them: the right result, or one sentence that names what is odd."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import compress
from compress import pipeline
from compress.data import load_object
from compress.errors import BudgetError, HCompressError, NumericsError, UsageError
from compress.registry import METHODS
from compress.sensing import measure_sensitivity
from compress.settings import Value, resolve

NETWORKS = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4, track_running_stats=kind != "batch_statistics")
        self.drop = nn.Dropout(0.5)
        self.gate = nn.Linear(1, 1)
        self.head = nn.Linear(64, 1 if kind == "one_logit" else 4)
        if kind == "odd":
            self.raw = nn.Parameter(torch.randn(64, 64) / 8)
        if kind == "odd":
            self.second = nn.Linear(64, 64)
            self.third = nn.Linear(64, 64)
            self.third.weight = self.second.weight

    def forward(self, x):
        h = torch.relu(self.norm(self.conv(x))).mean(1).flatten(1)
        h = self.drop(h) * self.gate(x.mean((1, 2, 3)).unsqueeze(1))
        if self.kind == "odd":
            h = h @ self.raw
            h = self.third(torch.relu(self.second(h)))
        if self.kind == "tuple":
            return self.head(h), h
        return self.head(h)

def make(kind="plain"):
    torch.manual_seed(sum(kind.encode()))  # a checkpoint of its own
    net = Net(kind)
    if kind == "odd":
        net.conv.weight.data[1] = 0
        net.conv.bias.data[1] = 0
        net.head.requires_grad_(False)
    return net
"""
CASES = [("prune", "layerwise"), ("prune", "obs"), ("quantize", "hawq")]
WIDTHS = pytest.mark.parametrize("method", ["hawq", "output-change"])
pytestmark = pytest.mark.usefixtures("quick_runs")
Run = Callable[..., dict[str, Any]]


def quiet(stage: str, done: int, total: int | None) -> None:
    """Progress of a test."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("odd")
    (folder / "net.py").write_text(NETWORKS)
    generator = np.random.default_rng(0)
    x, y = generator.standard_normal((64, 1, 8, 8), dtype=np.float32), generator.integers(0, 4, 64)
    data = {"plain": (x, y), "one": (x[:1], y[:1]), "label7": (x, np.where(np.arange(64) == 9, 7, y))}
    huge = x.copy()
    huge[41] = 3e38
    data |= {"wide_range": (10 * x, y)}
    data |= {"one_class": (x, 0 * y), "same": (np.ones_like(x), y)}
    data |= {"huge": (huge, y), "binary": (x, y % 2), "wide": (x, generator.standard_normal((64, 3), dtype=np.float32))}
    for name, (inputs, targets) in data.items():
        np.savez(folder / f"{name}.npz", x=inputs, y=targets)
    return folder


def settings(folder: Path, kind: str, given: Mapping[str, Any]) -> Mapping[str, Value]:
    checkpoint = folder / f"{kind}.safetensors"
    if not checkpoint.is_file():
        module = load_object(f"{folder / 'net.py'}:make", "--model")(kind)
        names = {id(value): key for key, value in reversed(list(module.state_dict(keep_vars=True).items()))}
        save_file(
            {k: v.detach() for k, v in module.state_dict(keep_vars=True).items() if names[id(v)] == k}, checkpoint
        )
    flags = {
        "model": f"{folder / 'net.py'}:make",
        "model_args": f'{{"kind": "{kind}"}}',
        "data": str(folder / "plain.npz"),
        "eval": str(folder / "plain.npz"),
        "cache": "off",
        "passes": 2,
        "rounds": 2,
        "max_drop": 100,
        **given,
    }
    return resolve(flags, environment={}, folder=None)


@pytest.fixture
def run(folder: Path, tmp_path: Path) -> Run:
    def run(job: str, method: str, kind: str, **given: Any) -> dict[str, Any]:
        goal = {"sparsity": 0.5} if method in ("layerwise", "obs", "magnitude") else {"budget": "4bit"}
        chosen = settings(folder, kind, {"method": method, "out": str(tmp_path / "out"), **goal, **given})
        return pipeline.run_method(
            job,
            folder / f"{kind}.safetensors",
            chosen,
            force=False,
            dry_run=False,
            plan=None,
            command=[],
            progress=quiet,
        )

    return run


def refusal(call: Callable[[], object], kind: type[HCompressError], words: str) -> HCompressError:
    with pytest.raises(kind, match=words) as caught:
        call()
    assert caught.value.hint and "\n" not in caught.value.message
    return caught.value


@pytest.mark.parametrize(("job", "method"), CASES)
def test_odd_layers_are_compressed_as_the_budget_says(run: Run, job: str, method: str) -> None:
    """A layer of one weight, a zero channel, a frozen layer, dropout, tied weights, a raw parameter."""
    report = run(job, method, "odd")
    assert all(check["ok"] for check in report["checks"])
    sizes = {"conv.weight": 36, "gate.weight": 1, "head.weight": 256, "second.weight": 4096}
    assert {layer["tensor"]: layer["elements"] for layer in report["layers"]} == sizes
    assert "raw stays as it is: used by aten.matmul.default, which no method compresses" in report["notes"]
    if job == "prune":
        assert report["sparsity"] >= 0.5
    else:
        assert report["average_bits"] <= 4


@pytest.mark.parametrize(("job", "method"), CASES)
def test_one_calibration_image_is_enough(run: Run, folder: Path, job: str, method: str) -> None:
    report = run(job, method, "plain", data=str(folder / "one.npz"))
    assert report["loss"]["num_examples"] == 1
    assert report["loss"]["evaluation"]["num_examples"] == 64


def test_the_loss_is_measured_on_evaluation_data_too(run: Run, folder: Path) -> None:
    same = run("quantize", "uniform", "plain")["loss"]
    assert same["evaluation"] == {"measured": same["measured"], "num_examples": same["num_examples"]}
    other = run("quantize", "uniform", "plain", eval=str(folder / "wide_range.npz"), out=str(folder / "other"))["loss"]
    assert other["measured"] == same["measured"]
    assert other["evaluation"]["measured"] > 2 * same["measured"]


@pytest.mark.parametrize(("job", "method"), CASES)
def test_an_example_that_isnt_finite_is_named(run: Run, folder: Path, job: str, method: str) -> None:
    error = refusal(lambda: run(job, method, "plain", data=str(folder / "huge.npz")), NumericsError, "example 41 of")
    assert "huge.npz" in error.message


def test_an_activation_that_isnt_finite_names_the_example(run: Run, folder: Path) -> None:
    given = {"data": str(folder / "huge.npz"), "activations": "8"}
    refusal(
        lambda: run("quantize", "uniform", "plain", **given),
        NumericsError,
        r"activation \w+ isn't finite on example 41",
    )


def test_data_that_arent_finite_name_the_row(run: Run, folder: Path) -> None:
    x = np.zeros((6, 1, 8, 8), np.float32)
    x[4, 0, 2, 2] = np.nan
    np.savez(folder / "nan.npz", x=x, y=np.zeros(6, np.int64))
    with pytest.raises(HCompressError, match="x has 1 NaN of 384 values") as caught:
        run("prune", "obs", "plain", data=str(folder / "nan.npz"))
    assert caught.value.hint == "clean the data; the first bad row is 4"


@pytest.mark.parametrize(("job", "method"), CASES)
def test_a_label_beyond_the_classes_is_named(run: Run, folder: Path, job: str, method: str) -> None:
    words = r"label7.npz: label 7 of example 9 is out of range: the network has 4 classes"
    refusal(lambda: run(job, method, "plain", data=str(folder / "label7.npz")), UsageError, words)
    refusal(lambda: run(job, method, "plain", eval=str(folder / "label7.npz")), UsageError, words)


@pytest.mark.parametrize(("job", "method"), CASES)
def test_one_logit_is_no_classification(run: Run, folder: Path, job: str, method: str) -> None:
    given = {"data": str(folder / "binary.npz"), "eval": str(folder / "binary.npz")}
    refusal(lambda: run(job, method, "one_logit", **given), UsageError, r"needs logits \[n, classes\]; .* \[2, 1\]")


def test_targets_of_another_width_are_named(run: Run, folder: Path) -> None:
    words = r"wide.npz: targets have shape \[64, 3\], the outputs \[2, 4\]"
    refusal(lambda: run("prune", "obs", "plain", data=str(folder / "wide.npz")), UsageError, words)


@pytest.mark.parametrize(("job", "method"), [("prune", "obs"), ("quantize", "hawq")])
def test_statistics_of_the_batch_leave_no_gradients_of_an_example(run: Run, job: str, method: str) -> None:
    words = "batch_norm takes its statistics from the batch"
    error = refusal(lambda: run(job, method, "batch_statistics"), UsageError, words)
    assert "--method magnitude or uniform" in str(error.hint)


def test_statistics_of_the_batch_are_noted(folder: Path) -> None:
    chosen = settings(folder, "batch_statistics", {})
    record = pipeline.inspect_checkpoint(folder / "batch_statistics.safetensors", chosen, progress=quiet)
    note = "the outputs of an example depend on its batch: batch_norm has no running statistics"
    assert note in record["notes"]


@pytest.mark.parametrize("trace", ["ggn", "hessian"])
def test_a_tuple_of_outputs_has_traces_or_a_reason(folder: Path, trace: str) -> None:
    chosen = settings(folder, "tuple", {"trace": trace, "measure": "hessian-trace"})

    def measured() -> dict[str, Any]:
        return measure_sensitivity(
            folder / "tuple.safetensors",
            chosen,
            "hessian-trace",
            force=False,
            dry_run=False,
            command=[],
            progress=quiet,
            announce=lambda name, expected: None,
        )

    if trace == "ggn":
        assert len(measured()["entries"]) == 3
    else:
        refusal(measured, UsageError, "the network gives .*, the task scores one tensor")


def test_a_pattern_without_a_sparsity_sets_no_gate(run: Run) -> None:
    report = run("prune", "obs", "plain", sparsity=None, pattern="2:4", max_drop=None)
    assert [check["name"] for check in report["checks"] if check["name"] == "max_drop"] == []
    assert not any("no budget was given" in note for note in report["notes"])


def test_the_plan_of_the_other_command_is_refused(run: Run, folder: Path, tmp_path: Path) -> None:
    run("quantize", "hawq", "plain")
    chosen = settings(folder, "plain", {"method": "obs", "out": str(tmp_path / "other")})
    given = {"force": False, "dry_run": False, "plan": tmp_path / "out", "command": [], "progress": quiet}
    words = "a plan of hawq, which is a method of hcompress quantize"
    refusal(lambda: pipeline.run_method("prune", folder / "plain.safetensors", chosen, **given), UsageError, words)


def test_a_network_of_one_weight_reaches_its_sparsity(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "tiny.py").write_text(
        "from torch import nn\ndef make(): return nn.Sequential(nn.Flatten(), nn.Linear(64, 1))"
    )
    save_file(nn.Sequential(nn.Flatten(), nn.Linear(64, 1)).state_dict(), tmp_path / "tiny.safetensors")
    np.savez(tmp_path / "t.npz", x=np.load(folder / "plain.npz")["x"], y=np.zeros((64, 1), np.float32))
    flags = {"model": f"{tmp_path / 'tiny.py'}:make", "data": str(tmp_path / "t.npz"), "eval": str(tmp_path / "t.npz")}
    flags |= {"method": "magnitude", "sparsity": "0.995", "out": str(tmp_path / "out")}
    report = pipeline.run_method(
        "prune",
        tmp_path / "tiny.safetensors",
        resolve(flags, environment={}, folder=None),
        force=False,
        dry_run=False,
        plan=None,
        command=[],
        progress=quiet,
    )
    assert report["sparsity"] == 1  # 0.995 of 64 weights is 63.68: rounded up


@WIDTHS
def test_inputs_that_never_change_and_labels_of_one_class_are_calibrated_on(
    run: Run, folder: Path, method: str
) -> None:
    """Every activation is constant, weights are tied and used twice, and a channel is zero."""
    report = run("quantize", method, "odd", data=str(folder / "same.npz"), activations="mixed", budget="bops=3%")
    assert all(check["ok"] for check in report["checks"])


@pytest.mark.slow
@WIDTHS
def test_data_of_one_class_are_enough(run: Run, folder: Path, method: str) -> None:
    assert run("quantize", method, "odd", data=str(folder / "one_class.npz"))["average_bits"] <= 4


@WIDTHS
def test_a_budget_in_a_unit_that_does_not_apply_names_those_that_do(run: Run, method: str) -> None:
    for budget in ("macs=50%", "sparsity=0.5", "params=50%"):
        error = refusal(lambda goal=budget: run("quantize", method, "odd", budget=goal), UsageError, "has no .* budget")  # type: ignore[misc]
        assert error.hint == "it takes bits, bytes, bops, latency"


@pytest.mark.slow
@WIDTHS
def test_a_budget_that_only_one_configuration_meets_is_met_by_it(run: Run, method: str) -> None:
    report = run("quantize", method, "odd", budget="2bit", channel_widths="equal")
    assert {layer["bits"] for layer in report["layers"]} == {2}


# -- both ends of pruning: the files --------------------------------------------------------------------------------

ZEROING = [
    pytest.param(method.name, marks=[] if method.name == "layerwise" else [pytest.mark.slow])
    for method in METHODS
    if "pattern" in method.options
]


@pytest.fixture(scope="module")
def ordered(folder: Path) -> Path:
    """A checkpoint whose bytes no writer would repeat: tensors in an order of their own, and metadata of the user's."""
    settings(folder, "plain", {})
    state = load_file(folder / "plain.safetensors")
    header: dict[str, Any] = {"__metadata__": {"trained": "on a rainy day"}}
    data = b""
    for name in sorted(state, key=lambda key: key[::-1]):
        value = state[name].numpy().tobytes()
        kind = {"float32": "F32", "int64": "I64"}[str(state[name].numpy().dtype)]
        span = [len(data), len(data) + len(value)]
        header[name] = {"dtype": kind, "shape": list(state[name].shape), "data_offsets": span}
        data += value
    text = json.dumps(header, indent=1).encode()
    path = folder / "ordered.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def prune_plain(folder: Path, checkpoint: Path, out: Path, method: str, **given: Any) -> dict[str, Any]:
    flags = {
        "method": method,
        "out": str(out),
        "sparsity": 0,
        "recover_steps": 4 if method == "gradual" else 0,
        **given,
    }
    return pipeline.run_method(
        "prune", checkpoint, settings(folder, "plain", flags), force=False, dry_run=False, plan=None, command=[],
        progress=quiet,
    )  # fmt: skip


@pytest.mark.parametrize("method", ZEROING)
def test_sparsity_zero_gives_the_bytes_of_the_input(method: str, folder: Path, ordered: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = prune_plain(folder, ordered, out, method)
    assert (out / "model.safetensors").read_bytes() == ordered.read_bytes()
    assert (out / "model.onnx").read_bytes() == (out / "dense.onnx").read_bytes()
    assert report["metric"]["dense"] == report["metric"]["compressed"]
    assert all(check["ok"] for check in report["checks"])
    pipeline.apply_plan(
        ordered,
        out / "plan.json",
        settings(folder, "plain", {"out": str(tmp_path / "applied")}),
        force=False,
        command=[],
        progress=quiet,
    )
    assert (tmp_path / "applied" / "model.safetensors").read_bytes() == ordered.read_bytes()


def test_sparsity_zero_of_another_format_gives_its_tensors(folder: Path, ordered: Path, tmp_path: Path) -> None:
    state = load_file(ordered)
    torch.save(state, tmp_path / "plain.pt")
    prune_plain(folder, tmp_path / "plain.pt", tmp_path / "out", "layerwise")
    found = load_state(tmp_path / "out", folder)
    assert found.keys() == state.keys()
    assert all(torch.equal(found[key], value) and found[key].dtype == value.dtype for key, value in state.items())


@pytest.mark.slow
def test_sparsity_zero_of_a_run_gives_its_file(folder: Path, ordered: Path, tmp_path: Path) -> None:
    prune_plain(folder, ordered, tmp_path / "half", "magnitude", sparsity=0.5)
    prune_plain(folder, tmp_path / "half", tmp_path / "again", "magnitude")
    half, again = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("half", "again"))
    assert half == again != ordered.read_bytes()


@pytest.mark.slow
def test_a_file_in_other_floats_is_written_anew(folder: Path, ordered: Path, tmp_path: Path) -> None:
    prune_plain(folder, ordered, tmp_path / "out", "magnitude", float_storage="fp16")
    state, found = load_file(ordered), load_state(tmp_path / "out", folder)
    assert all(torch.equal(found[key], value.half().float()) for key, value in state.items() if value.dim())
    assert (tmp_path / "out" / "model.safetensors").stat().st_size < ordered.stat().st_size


@pytest.mark.parametrize("method", ZEROING)
def test_sparsity_one_leaves_nothing_and_says_so(method: str, folder: Path, ordered: Path, tmp_path: Path) -> None:
    report = prune_plain(folder, ordered, tmp_path / "out", method, sparsity=1.0)
    assert report["sparsity"] == 1
    assert "nothing is left: every weight of every layer is zero" in report["notes"]
    state = load_state(tmp_path / "out", folder)
    assert not any(bool(state[layer["tensor"]].any()) for layer in report["layers"])


def load_state(run: Path, folder: Path) -> Mapping[str, torch.Tensor]:
    return compress.load(run, load_object(f"{folder / 'net.py'}:make", "--model")).state_dict()


def test_sparsity_one_is_out_of_reach_where_layers_stay(folder: Path, ordered: Path, tmp_path: Path) -> None:
    def go() -> object:
        return prune_plain(folder, ordered, tmp_path / "out", "layerwise", sparsity=1, exclude="head*")

    refusal(go, BudgetError, r"sparsity 1 is out of reach: --exclude leaves at most 0\.\d+")


def test_methods_that_cut_channels_cut_none_or_say_what_must_stay(folder: Path, ordered: Path, tmp_path: Path) -> None:
    report = prune_plain(folder, ordered, tmp_path / "whole", "structured-obs", max_drop=100)
    assert all(group["kept"] == group["channels"] for group in report["groups"])
    assert (tmp_path / "whole" / "model.safetensors").read_bytes() == ordered.read_bytes()
    refusal(
        lambda: prune_plain(folder, ordered, tmp_path / "none", "structured-obs", sparsity=1),
        BudgetError,
        "out of reach",
    )
