"""Linear layers with a scale for each group of inputs, from a setting to files that a runtime opens."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from compress.cli.main import main
from safetensors.torch import load_file, save_file
from torch import Tensor

import compress
from compress import pipeline
from compress.data import load_object
from compress.errors import InputError, UsageError
from compress.formats import onnx_blocks
from compress.formats.checkpoint import read_checkpoint
from compress.formats.packed import GROUP_SCALES, QuantizedTensor, decode
from compress.plan import read_plan
from compress.settings import Value, resolve
from compress.verify import open_session

FOLDER = Path(str(resources.files("compress.demo")))
NETWORK = """
import torch
from torch import nn

def mlp():
    torch.manual_seed(0)
    body = [nn.AvgPool2d(2), nn.Flatten(), nn.Linear(196, 64), nn.BatchNorm1d(64), nn.ReLU()]
    net = nn.Sequential(*body, nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    net[3].running_var.uniform_(0.5, 2.0)
    return net

def convolutional():
    torch.manual_seed(0)
    body = [nn.Conv2d(1, 32, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()]
    return nn.Sequential(*body, nn.Linear(128, 10))

def headless():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 10, 3, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten())
"""
pytestmark = pytest.mark.usefixtures("quick_runs")


def quiet(stage: str, done: int, total: int | None) -> None:
    """Progress of a test."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("networks")
    (folder / "network.py").write_text(NETWORK)
    for name in ("mlp", "convolutional", "headless"):
        save_file(load_object(f"{folder / 'network.py'}:{name}", "--model")().state_dict(), folder / name)
    images = np.load(FOLDER / "calibration.npz")
    np.savez(folder / "images.npz", x=images["x"][:64], y=images["y"][:64])
    return folder


@pytest.fixture
def kept_signal() -> Iterator[None]:
    """The command line takes the signal that ends a test's process."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def settings(folder: Path, name: str, out: Path, **given: Any) -> Mapping[str, Value]:
    flags = {
        "model": f"{folder / 'network.py'}:{name}",
        "data": str(folder / "images.npz"),
        "eval": str(folder / "images.npz"),
        "num_calibration": 32,
        "max_drop": 100.0,
        "cache": "off",
        "group_size": 32,
        "out": str(out),
        **given,
    }
    return resolve(flags, environment={}, folder=None)


def run(folder: Path, out: Path, name: str = "mlp", plan: Path | None = None, **given: Any) -> dict[str, Any]:
    (folder / f"{name}.safetensors").write_bytes((folder / name).read_bytes())
    return pipeline.run_method(
        "quantize",
        folder / f"{name}.safetensors",
        settings(folder, name, out, **given),
        force=False,
        dry_run=False,
        plan=plan,
        pick=given.get("pick"),
        command=[],
        progress=quiet,
    )


def weights(out: Path) -> dict[str, QuantizedTensor]:
    checkpoint = read_checkpoint(out / "model.safetensors")
    found = decode(checkpoint.state, checkpoint.metadata)
    return {name: value for name, value in found.items() if isinstance(value, QuantizedTensor)}


def outputs(out: Path, x: Tensor) -> np.ndarray[Any, Any]:
    session = open_session((out / "model.onnx").read_bytes(), 1)
    return np.asarray(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


@pytest.mark.parametrize("method", ["uniform", "hawq", "output-change"])
def test_every_method_gives_each_group_a_scale(folder: Path, tmp_path: Path, method: str) -> None:
    record = run(folder, tmp_path / "run", method=method, budget="4bit")
    assert all(check["ok"] for check in record["checks"]) and record["average_bits"] <= 4
    found = weights(tmp_path / "run")
    assert {name: list(value.scale.shape) for name, value in found.items()} == {
        "2.weight": [64, 7],  # the last of 196 inputs are a group of four
        "5.weight": [64, 2],
        "7.weight": [10, 2],
    }
    assert all(type(value.bits) is int and value.group_size == 32 for value in found.values())
    assert all("a scale for each 32 inputs" in layer["why"] for layer in record["layers"])
    # What the runtime computes is what the levels and scales say, in float64.
    module = load_object(f"{folder / 'network.py'}:mlp", "--model")().eval()
    state = {
        k: v.dequantize() if isinstance(v, QuantizedTensor) else v for k, v in decode_all(tmp_path / "run").items()
    }
    module.load_state_dict(state)
    for batch in (1, 3, 7):
        x = torch.randn(batch, 1, 28, 28, generator=torch.Generator().manual_seed(batch))
        expected = module.double()(x.double()).detach().numpy()
        np.testing.assert_allclose(outputs(tmp_path / "run", x), expected, rtol=1e-4, atol=1e-4)


def decode_all(out: Path) -> dict[str, Tensor | QuantizedTensor]:
    checkpoint = read_checkpoint(out / "model.safetensors")
    return decode(checkpoint.state, checkpoint.metadata)


@pytest.mark.parametrize(
    ("runtime", "floats", "size"),
    [("portable", "fp16", 32), pytest.param("openvino", "fp32", 64, marks=pytest.mark.slow)],
)
def test_the_files_of_every_form_hold_the_scales_in_16_bits(
    folder: Path, tmp_path: Path, runtime: str, floats: str, size: int
) -> None:
    given = {"method": "uniform", "budget": "3bit", "reconstruction": "none", "group_size": size}
    record = run(folder, tmp_path / "run", runtime=runtime, float_storage=floats, **given)
    assert all(check["ok"] for check in record["checks"])
    groups = sum(value.scale.numel() for value in weights(tmp_path / "run").values())
    assert groups == sum(n * -(-k // size) for n, k in ((64, 196), (64, 64), (10, 64)))
    assert read_checkpoint(tmp_path / "run" / "model.safetensors").state[GROUP_SCALES].nbytes == 2 * groups
    model = onnx.load(tmp_path / "run" / "model.onnx")
    halves = [t for t in model.graph.initializer if t.data_type == onnx.TensorProto.BFLOAT16]
    # The scales of a weight before a batch norm take its factors, and stay float32.
    assert sum(int(np.prod(t.dims)) for t in halves) >= 64 * -(-64 // size)
    assert {node.domain for node in model.graph.node} <= {""}


def test_large_products_read_blocks_of_a_group(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_blocks, "MIN_WEIGHTS", 4096)
    given = {"method": "uniform", "budget": "4bit", "reconstruction": "none"}
    record = run(folder, tmp_path / "run", **given)
    assert all(check["ok"] for check in record["checks"])
    blocks = [n for n in onnx.load(tmp_path / "run" / "model.onnx").graph.node if n.op_type == "MatMulNBits"]
    # Rows of 196 inputs are no whole groups of 32, which the kernel doesn't take.
    assert [{a.name: a.i for a in node.attribute}["block_size"] for node in blocks] == [32]


def test_a_plan_is_applied_again_to_the_same_bytes_and_loaded(folder: Path, tmp_path: Path) -> None:
    run(folder, tmp_path / "run", method="uniform", budget="4bit")
    given = {"group_size": None, "data": None}
    run(folder, tmp_path / "again", plan=tmp_path / "run", **given)
    for name in ("model.safetensors", "model.onnx", "plan.json"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    module = compress.load(tmp_path / "run", factory=f"{folder / 'network.py'}:mlp")
    plain = compress.load(tmp_path / "run")
    x = torch.randn(3, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    found = weights(tmp_path / "run")["5.weight"].dequantize()
    assert torch.equal(module.state_dict()["5.weight"], found)
    for network in (module, plain):
        np.testing.assert_allclose(network(x).detach().numpy(), outputs(tmp_path / "run", x), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_another_point_of_the_frontier_keeps_the_groups(folder: Path, tmp_path: Path) -> None:
    run(folder, tmp_path / "run", method="output-change", budget="4bit", reconstruction="none")
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert plan["options"]["group_size"] == "32"
    run(folder, tmp_path / "other", plan=tmp_path / "run", pick="3bit", group_size=None, method="output-change")
    picked = read_plan(tmp_path / "other" / "plan.json").quantized("weight")
    assert [decision.group_size for decision in picked.values()] == [32, 32, 32]
    assert {str(decision.bits) for decision in picked.values()} != {"4"}


@pytest.mark.slow
@pytest.mark.parametrize("delivered", ["onnx", "safetensors"])
def test_a_budget_of_bytes_holds_for_the_written_file(folder: Path, tmp_path: Path, delivered: str) -> None:
    given = {"method": "uniform", "budget": "15KB", "reconstruction": "none", "for": delivered}
    record = run(folder, tmp_path / "run", **given)
    assert 9_000 < record["files"][record["delivered"]] <= 15_000


@pytest.mark.slow
def test_convolutions_keep_a_scale_for_each_channel(folder: Path, tmp_path: Path) -> None:
    given = {"method": "uniform", "budget": "4bit", "activations": "float", "reconstruction": "none"}
    run(folder, tmp_path / "run", "convolutional", **given)
    found = weights(tmp_path / "run")
    assert (found["0.weight"].group_size, list(found["0.weight"].scale.shape)) == (None, [32])
    assert (found["4.weight"].group_size, list(found["4.weight"].scale.shape)) == (32, [10, 4])


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("mlp", {"activations": "8"}, "--group-size 32 goes with float activations, not with --activations 8"),
        ("mlp", {"activations": "dynamic"}, "not with --activations dynamic"),
        ("convolutional", {}, "not with --activations 8"),
        ("headless", {"activations": "float"}, "--group-size 32 is for linear layers, and the network has none"),
        ("mlp", {"group_size": 48}, "--group-size .*48.* is not a choice"),
    ],
)
def test_groups_that_nothing_could_run_are_refused(
    folder: Path, tmp_path: Path, name: str, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        run(folder, tmp_path / "run", name, method="uniform", budget="4bit", **given)


@pytest.mark.usefixtures("kept_signal")
def test_a_run_is_written_in_the_layout_of_hugging_face_folders(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(folder, tmp_path / "run", method="uniform", budget="24.4bit", reconstruction="none", exclude="2.weight")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mlp", "quantization_config": {"old": 1}}))
    given = {"force": False, "command": ["export"], "progress": quiet}
    record = pipeline.export_layout(tmp_path / "run", tmp_path / "config.json", tmp_path / "out", **given)
    assert (record["packed"], record["floats"], record["tied"]) == (["5.weight", "7.weight"], [], [])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "mlp" and "old" not in config["quantization_config"]
    (group,) = config["quantization_config"]["config_groups"].values()
    assert group["targets"] == ["5", "7"] and group["weights"]["strategy"] == "group"
    state = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(state["5.weight_scale"], weights(tmp_path / "run")["5.weight"].scale)
    assert torch.equal(state["2.weight"], load_file(folder / "mlp")["2.weight"])
    assert "5.weight" not in state
    line = ["export", str(tmp_path / "run"), "--format", "compressed-tensors", "--out", str(tmp_path / "again"), "-q"]
    assert main(line) == 0
    assert "packed: 2 weights of linear layers" in capsys.readouterr().out
    assert load_file(tmp_path / "again" / "model.safetensors").keys() == state.keys()
    with pytest.raises(UsageError, match="already exists"):
        pipeline.export_layout(tmp_path / "run", None, tmp_path / "out", **given)
    pipeline.export_layout(tmp_path / "run", None, tmp_path / "out", **{**given, "force": True})
    assert json.loads((tmp_path / "out" / "config.json").read_text()).keys() == {"quantization_config"}
    with pytest.raises(InputError, match=r"config.json: not readable as JSON"):
        (tmp_path / "config.json").write_text("{")
        pipeline.export_layout(tmp_path / "run", tmp_path / "config.json", tmp_path / "other", **given)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--config config.json", "--config has no effect on ONNX files"),
        ("--format compressed-tensors --runtime portable", "--runtime has no effect with --format compressed-tensors"),
    ],
)
@pytest.mark.usefixtures("kept_signal")
def test_options_without_an_effect_are_refused(capsys: pytest.CaptureFixture[str], line: str, message: str) -> None:
    assert main(["export", "run", *line.split()]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_rounded_activations_have_no_place_in_that_layout(folder: Path, tmp_path: Path) -> None:
    given = {"group_size": None, "activations": "8", "activation_range": "auto", "reconstruction": "none"}
    run(folder, tmp_path / "run", method="uniform", budget="8bit", **given)
    with pytest.raises(UsageError, match="its activations are rounded"):
        pipeline.export_layout(tmp_path / "run", None, tmp_path / "out", force=False, command=[], progress=quiet)
