"""A checkpoint meets its architecture: strictly, in float32, and every misfit is one message."""

from __future__ import annotations

import json
import shutil
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import compress
from compress import model, pipeline, settings
from compress.demo.network import fashion_net
from compress.errors import InputError, UsageError

SOURCE = """
import torch
from torch import nn

def net(width=4):
    return nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 2))

def fails(): raise FileNotFoundError("weights/base.pt")
def leaves(): raise SystemExit("usage: net.py")
def number(): return 3
def state(): return net().state_dict()
ready = net()
constant = 3

def half(): return net().half()
def bfloat(): return net().bfloat16()
def double(): return net().double()
def meta():
    with torch.device("meta"):
        return net()
def lazy(): return nn.Sequential(nn.LazyLinear(4), nn.ReLU(), nn.Linear(4, 2))

class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3, 2)
        self.register_buffer("noise", torch.randn(3), persistent=False)
    def forward(self, x):
        return self.head(x + self.noise)

class Extra(nn.Linear):
    def get_extra_state(self): return {"version": 1}
    def set_extra_state(self, state): pass

def extra(): return Extra(3, 2)

class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.output = nn.Linear(3, 5, bias=False)
        self.output.weight = self.embedding.weight
    def forward(self, ids):
        return self.output(self.embedding(ids))
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "net.py"
    path.write_text(SOURCE)
    return path


def net(width: int = 4) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 2))


def saved(state: dict[str, Tensor], folder: Path) -> Path:
    path = folder / "net.pt"
    torch.save(state, path)
    return path


def load(path: Path, source: Path, name: str = "net", arguments: str | None = None) -> model.Source:
    return model.load_source(path, f"{source}:{name}", arguments)


def test_a_state_dict_fills_its_architecture(tmp_path: Path, source: Path) -> None:
    expected = net().state_dict()
    loaded = load(saved(expected, tmp_path), source)
    for key, value in loaded.module.state_dict().items():
        assert torch.equal(value, expected[key])
    assert not loaded.module.training and not any(p.requires_grad for p in loaded.module.parameters())
    assert loaded.notes == () and loaded.format == "torch"


def test_arguments_reach_the_factory(tmp_path: Path, source: Path) -> None:
    loaded = load(saved(net(7).state_dict(), tmp_path), source, arguments='{"width": 7}')
    assert loaded.module.get_parameter("0.weight").shape == (7, 3)


def test_every_misfit_is_in_one_message(tmp_path: Path, source: Path) -> None:
    state = dict(net(5).state_dict())
    del state["3.bias"]
    state["3.gain"] = torch.ones(2)
    with pytest.raises(InputError) as caught:
        load(saved(state, tmp_path), source)
    message = caught.value.message
    assert caught.value.exit_code == 3 and "net.pt: keys don't fit the model" in message
    assert "1 missing (3.bias)" in message and "1 unexpected (3.gain)" in message
    assert "0.weight is [5, 3], the model's is [4, 3]" in message and "misshapen" in message
    assert "--model-args" in caught.value.hint and "\n" not in message


def test_long_lists_and_strange_names_are_cut_and_escaped(tmp_path: Path, source: Path) -> None:
    state = {f"layer{i}": torch.ones(1) for i in range(20)} | {"a\x1b[31mred": torch.ones(1)}
    with pytest.raises(InputError, match="and 13 more") as caught:
        load(saved(state, tmp_path), source)
    assert "\x1b" not in caught.value.message


def test_integers_arent_taken_for_floats(tmp_path: Path, source: Path) -> None:
    state = dict(net().state_dict())
    state["0.weight"] = torch.ones(4, 3, dtype=torch.int8)
    with pytest.raises(InputError, match=r"1 of another kind \(0\.weight is int8, the model's is float32\)"):
        load(saved(state, tmp_path), source)


@pytest.mark.parametrize("change", ["drop", "float"])
def test_batch_counters_may_be_missing_or_averaged(tmp_path: Path, source: Path, change: str) -> None:
    state = dict(net().state_dict())
    if change == "drop":
        del state["1.num_batches_tracked"]
    else:
        state["1.num_batches_tracked"] = torch.tensor(12.5)
    loaded = load(saved(state, tmp_path), source).module.state_dict()
    assert loaded["1.num_batches_tracked"].dtype == torch.int64


def test_a_tied_weight_may_be_stored_under_either_name(tmp_path: Path, source: Path) -> None:
    weight = torch.randn(5, 3)
    for keys in (["embedding.weight"], ["output.weight"], ["embedding.weight", "output.weight"]):
        module = load(saved({key: weight.clone() for key in keys}, tmp_path), source, "Tied").module
        assert torch.equal(module.get_parameter("output.weight"), weight)
        assert module.get_parameter("output.weight") is module.get_parameter("embedding.weight")


def test_two_different_weights_arent_tied(tmp_path: Path, source: Path) -> None:
    state = {"embedding.weight": torch.ones(5, 3), "output.weight": torch.zeros(5, 3)}
    with pytest.raises(InputError, match=r"output\.weight differs from embedding\.weight, which the model ties to it"):
        load(saved(state, tmp_path), source, "Tied")


# -- dtypes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_checkpoints_of_other_floats_are_read_as_float32(tmp_path: Path, source: Path, dtype: torch.dtype) -> None:
    expected = net().to(dtype).state_dict()
    loaded = load(saved(expected, tmp_path), source)
    state = loaded.module.state_dict()
    assert state["1.num_batches_tracked"].dtype == torch.int64
    assert all(value.dtype == torch.float32 for key, value in state.items() if "num_batches" not in key)
    assert torch.equal(state["0.weight"], expected["0.weight"].float())
    assert loaded.notes == (f"8 tensors of {str(dtype).removeprefix('torch.')} were read as float32",)
    assert loaded.module(torch.randn(2, 3)).dtype == torch.float32


@pytest.mark.parametrize("name", ["half", "bfloat", "double"])
def test_factories_of_other_floats_give_float32_networks(tmp_path: Path, source: Path, name: str) -> None:
    expected = net().state_dict()
    loaded = load(saved(expected, tmp_path), source, name)
    assert torch.equal(loaded.module.state_dict()["0.weight"], expected["0.weight"])  # not rounded on the way


def test_doubles_beyond_float32_are_named(tmp_path: Path, source: Path) -> None:
    state = net().double().state_dict()
    state["0.weight"][0, 0] = 1e300
    with pytest.raises(InputError, match=r"0\.weight has values beyond float32 \(largest 1e\+300\)"):
        load(saved(state, tmp_path), source)


def test_a_half_precision_program_is_refused(tmp_path: Path) -> None:
    program = torch.export.export(nn.Linear(3, 2).half(), (torch.zeros(2, 3).half(),))
    torch.export.save(program, tmp_path / "half.pt2")
    with pytest.raises(InputError, match="weight is float16; exported programs are read in float32 alone") as caught:
        model.load_source(tmp_path / "half.pt2", None, None)
    assert "model.float()" in caught.value.hint


# -- factories -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("missing", "has no 'missing'"),
        ("fails", r"failed \(FileNotFoundError: weights/base\.pt\)"),
        ("leaves", r"failed \(SystemExit: usage: net\.py\)"),
        ("number", "returned int"),
        ("state", "returned OrderedDict"),
        ("ready", "is a Sequential, not a factory"),
        ("constant", "is a int, not a factory"),
        ("meta", "0.weight, 0.bias, .* on the meta device"),
        ("lazy", r"0\.weight, 0\.bias has no shape yet \(a lazy module\)"),
        ("extra", r"keeps state that isn't a tensor \(_extra_state\)"),
    ],
)
def test_a_factory_that_isnt_one_is_named(tmp_path: Path, source: Path, name: str, words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        load(saved(net().state_dict(), tmp_path), source, name)
    assert caught.value.hint and caught.value.exit_code == 2


def test_a_missing_factory_lists_what_the_file_has(tmp_path: Path, source: Path) -> None:
    with pytest.raises(UsageError) as caught:
        load(saved(net().state_dict(), tmp_path), source, "Net")
    assert caught.value.hint.startswith("it has: net, fails, leaves, number, state, half")
    with pytest.raises(UsageError, match=r"absent\.py: no such file"):
        load(saved(net().state_dict(), tmp_path), tmp_path / "absent.py")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [("{width: 3}", "is not JSON"), ("[3]", "is not a JSON object"), ('{"depth": 3}', "unexpected keyword argument")],
)
def test_wrong_arguments_are_named(tmp_path: Path, source: Path, arguments: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        load(saved(net().state_dict(), tmp_path), source, arguments=arguments)


def test_a_state_dict_needs_an_architecture(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no architecture") as caught:
        model.load_source(saved(net().state_dict(), tmp_path), None, None)
    assert "--model FILE.py:FACTORY" in caught.value.hint


def test_a_factory_may_be_in_a_package(tmp_path: Path) -> None:
    path = tmp_path / "fashion.safetensors"
    save_file(fashion_net().state_dict(), path)
    loaded = model.load_source(path, "compress.demo.network:fashion_net", None)
    assert loaded.format == "safetensors" and type(loaded.module).__name__ == "FashionNet"


def test_a_factory_imports_what_lies_beside_its_file(tmp_path: Path) -> None:
    (tmp_path / "blocks_of_net").mkdir()
    (tmp_path / "blocks_of_net" / "__init__.py").write_text("")
    (tmp_path / "blocks_of_net" / "dense.py").write_text("from torch import nn\ndef block(): return nn.Linear(3, 2)")
    (tmp_path / "with_blocks.py").write_text("from blocks_of_net.dense import block\ndef make(): return block()")
    state = nn.Linear(3, 2).state_dict()
    loaded = model.load_source(saved(state, tmp_path), f"{tmp_path / 'with_blocks.py'}:make", None)
    assert torch.equal(loaded.module.state_dict()["weight"], state["weight"])


def test_what_the_checkpoint_doesnt_hold_is_the_same_each_time(tmp_path: Path, source: Path) -> None:
    path = saved(nn.Linear(3, 2).state_dict(), tmp_path)
    state = {f"head.{key}": value for key, value in torch.load(path).items()}
    path = saved(state, tmp_path)
    load(path, source, "Noisy")  # runs the file, which draws a network of its own
    before = torch.random.get_rng_state()
    first, second = (load(path, source, "Noisy").module.get_buffer("noise") for _ in range(2))
    assert torch.equal(first, second) and torch.equal(before, torch.random.get_rng_state())


# -- guessed inputs --------------------------------------------------------------------------------------------------


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 2)

    def forward(self, image: Tensor, mask: Tensor, scale: float = 1.0) -> Tensor:
        result: Tensor = self.head(image * mask) * scale
        return result


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.Linear(5, 2), [5]),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)), [3, 32, 32]),
        (nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(2 * 26 * 26, 2)), [1, 28, 28]),
        (nn.Sequential(nn.Conv2d(3, 4, 7, stride=2), nn.AdaptiveAvgPool2d(1)), [3, 224, 224]),
        (nn.Sequential(nn.Conv1d(2, 4, 3), nn.AdaptiveAvgPool1d(1)), [2, 1024]),
        (nn.Sequential(nn.Conv3d(1, 2, 3), nn.AdaptiveAvgPool3d(1)), [1, 16, 16, 16]),
        (nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 10)), [256]),
        (nn.GRU(5, 4, batch_first=True), [16, 5]),
    ],
)
def test_inputs_follow_from_the_first_layer(module: nn.Module, shape: list[int]) -> None:
    (x,), note = model.guess_inputs(module, None)
    assert list(x.shape) == [2, *shape]
    assert "no data given: traced with" in note and f"[n, {', '.join(map(str, shape))}]" in note


def test_given_shapes_are_used_and_checked() -> None:
    (x,), _ = model.guess_inputs(nn.Sequential(nn.Conv2d(3, 4, 3)), "3,40,48")
    assert x.shape == (2, 3, 40, 48)
    for text in ("3,x", "", "3,-1", "0"):
        with pytest.raises(UsageError, match="isn't sizes"):
            model.guess_inputs(nn.Linear(3, 2), text)
    with pytest.raises(UsageError, match="the shape of the inputs isn't known"):
        model.guess_inputs(nn.Linear(3, 2), "4")
    with pytest.raises(UsageError, match="the shape of the inputs isn't known"):
        model.guess_inputs(nn.Linear(3, 2), "1000000000,1000000000,1000000000")


def test_several_inputs_need_data() -> None:
    with pytest.raises(UsageError, match=r"takes 2 inputs \(image, mask\), whose shapes can't be guessed") as caught:
        model.guess_inputs(TwoInputs(), None)
    assert "--data" in caught.value.hint and "((image, mask), y)" in caught.value.hint


def test_a_network_without_a_telling_layer_asks_for_the_shape() -> None:
    with pytest.raises(UsageError, match="no layer says what the network takes") as caught:
        model.guess_inputs(nn.ReLU(), None)
    assert "--input-shape" in caught.value.hint and "--data" in caught.value.hint


# -- run folders -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's network quantized to 8 bits on a few of its images."""
    folder = tmp_path_factory.mktemp("run")
    demo = resources.files("compress.demo")
    for name, count in (("calibration", 32), ("evaluation", 64)):
        with np.load(str(demo / f"{name}.npz")) as arrays:
            np.savez(folder / f"{name}.npz", x=arrays["x"][:count], y=arrays["y"][:count])
    given: dict[str, Any] = {
        "model": "compress.demo.network:fashion_net",
        "data": str(folder / "calibration.npz"),
        "eval": str(folder / "evaluation.npz"),
        "mean": (0.286,),
        "std": (0.353,),
        "method": "uniform",
        "budget": "8bit",
        "out": str(folder / "out"),
        "threads": 1,
    }
    pipeline.run_method(
        "quantize",
        Path(str(demo / "fashion_net.safetensors")),
        settings.resolve(given, environment={}, folder=None),
        force=False,
        dry_run=False,
        plan=None,
        command=["hcompress"],
        progress=lambda *_: None,
    )
    return folder / "out"


def images(run: Path) -> Tensor:
    with np.load(run.parent / "evaluation.npz") as arrays:
        return (torch.from_numpy(arrays["x"]).float() / 255 - 0.286) / 0.353


def test_a_run_loads_with_and_without_its_factory(run: Path) -> None:
    x = images(run)
    dense = fashion_net()
    dense.load_state_dict(load_file(str(resources.files("compress.demo") / "fashion_net.safetensors")))
    expected = dense.eval()(x).argmax(1)
    for network in (
        compress.load(run, fashion_net),
        compress.load(str(run), "compress.demo.network:fashion_net"),
        compress.load(run),
    ):
        assert (network(x).argmax(1) == expected).float().mean() > 0.95
    network = compress.load(run, fashion_net)
    assert type(network).__name__ == "FashionNet"
    assert all(p.requires_grad for p in network.parameters()), "as the factory made them"

    def frozen() -> torch.nn.Module:
        made = fashion_net()
        made.head.weight.requires_grad_(False)
        return made

    assert [n for n, p in compress.load(run, frozen).named_parameters() if not p.requires_grad] == ["head.weight"]


def test_a_run_is_a_checkpoint(run: Path) -> None:
    loaded = model.load_source(run, "compress.demo.network:fashion_net", None)
    assert loaded.format == "run" and loaded.stored["head.weight"].bits == 8
    assert "manifest" in loaded.parents and any("is quantized" in note for note in loaded.notes)


@pytest.mark.parametrize("name", ["model.safetensors", "model.pt2", "report.json"])
def test_a_changed_file_is_named(run: Path, tmp_path: Path, name: str) -> None:
    changed = tmp_path / "changed"
    shutil.copytree(run, changed)
    content = bytearray((changed / name).read_bytes())
    content[len(content) // 2] ^= 1
    (changed / name).write_bytes(content)
    for factory in (None, fashion_net):
        with pytest.raises(InputError, match=f"{name}: bytes differ from the manifest"):
            compress.load(changed, factory)
    (changed / name).unlink()
    with pytest.raises(InputError, match=f"{name}: missing"):
        compress.load(changed)


def test_a_run_in_another_architecture_is_refused(run: Path) -> None:
    with pytest.raises(InputError, match=r"model\.safetensors: keys don't fit the model"):
        compress.load(run, lambda: nn.Linear(3, 2))


def test_a_folder_that_isnt_a_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"not a run folder \(manifest\.json is missing\)"):
        compress.load(tmp_path, fashion_net)
    with pytest.raises(InputError, match="no such file"):
        compress.load(tmp_path / "none", "compress.demo.network:fashion_net")


def test_a_run_without_a_program_asks_for_the_factory(run: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(run, bare)
    (bare / "model.pt2").unlink()
    manifest = json.loads((bare / "manifest.json").read_text())
    del manifest["files"]["model.pt2"]
    (bare / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UsageError, match=r"has no model\.pt2") as caught:
        compress.load(bare)
    assert "--model" in caught.value.hint
