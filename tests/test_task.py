"""Data and tasks: what is read, what is refused in one clear sentence, and that scores mean what they say."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from compress import task
from compress.data import Data, check_forward, load_object, read_data
from compress.errors import InputError, NumericsError, UsageError
from compress.task import CausalLM, Classification, Regression, load_task

SOURCE = """
import sys
import numpy as np
import torch
from torch.utils.data import DataLoader, TensorDataset

x = torch.arange(24.0).reshape(6, 4)
y = torch.tensor([0, 1, 2, 0, 1, 2])

def tensor(): return x
def pair(): return x, y
def unlabelled(): return x, None
def dictionary(): return {"x": x, "y": y, "z": 1}
def two_inputs(): return (x, 2 * x), y
def two_in_dict(): return {"x": [x, 2 * x], "y": y}
def arrays(): return x.numpy()[::-1], y.numpy()
def batches():
    for i in range(3):
        yield x[2 * i : 2 * i + 2], y[2 * i : 2 * i + 2]
def loader(): return DataLoader(TensorDataset(x, y), batch_size=4)
def dict_batches(): return [{"x": x[:4], "y": y[:4]}, {"x": x[4:], "y": y[4:]}]
def with_grad(): return (x.clone().requires_grad_() * 2), y
def doubles(): return x.double(), y
def echo(*args, **kwargs):
    import json
    print("ECHO", json.dumps([args, kwargs]))
    return pair()

def nothing(): return None
def number(): return 3
def text(): return "images"
def triple(): return x, y, y
def wrong_keys(): return {"input_ids": x}
def fails(): raise KeyError("labels")
def leaves(): sys.exit(2)
def empty(): return x[:0], y[:0]
def no_batches(): return []
def lengths(): return x, y[:5]
def nan(): return x / 0, y
def list_pair(): return [x, y]
def mixed_batches(): return [(x[:2], y[:2]), (x[2:], None)]
def objects(): return np.array([["a"], ["b"]]), y
def complex_inputs(): return torch.zeros(3, 4, dtype=torch.complex64)
def nan_targets(): return x, torch.tensor([0.0, 1, 2, 3, 4, float("nan")])
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "data.py"
    path.write_text(SOURCE)
    return path


def read(spec: object, **options: Any) -> Data:
    return read_data(str(spec), "--data", **{"mean": None, "std": None, "layout": None, **options})


X = torch.arange(24.0).reshape(6, 4)
Y = torch.tensor([0, 1, 2, 0, 1, 2])


def assert_examples(data: Data) -> None:
    assert torch.equal(data.inputs[0], X) and data.inputs[0].dtype == torch.float32
    assert data.targets is not None and torch.equal(data.targets, Y)
    assert len(data) == 6


def test_npz_and_safetensors_hold_x_and_y(tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", x=X.numpy(), y=Y.numpy())
    save_file({"x": X, "y": Y}, tmp_path / "data.safetensors")
    assert_examples(read(tmp_path / "data.npz"))
    assert_examples(read(tmp_path / "data.safetensors"))


@pytest.mark.parametrize("name", ["pair", "pair()", "dictionary", "batches", "loader", "dict_batches", "doubles()"])
def test_a_function_returns_pairs_dicts_or_batches(source: Path, name: str) -> None:
    assert_examples(read(f"{source}:{name}"))


def test_a_function_returns_several_inputs(source: Path) -> None:
    for name in ("two_inputs", "two_in_dict"):
        data = read(f"{source}:{name}")
        assert len(data.inputs) == 2 and torch.equal(data.inputs[1], 2 * X)


def test_labels_may_be_missing(source: Path) -> None:
    assert read(f"{source}:tensor").targets is None
    assert read(f"{source}:unlabelled").targets is None


def test_numpy_arrays_and_tensors_with_gradients_are_read(source: Path) -> None:
    assert torch.equal(read(f"{source}:arrays").inputs[0], X.flip(0))
    assert not read(f"{source}:with_grad").inputs[0].requires_grad


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("", "[[], {}]"),
        ("()", "[[], {}]"),
        ('("calib")', '[["calib"], {}]'),
        ("('a b', 3, size=512)", '[["a b", 3], {"size": 512}]'),
        ("""("it's (nested) 'quotes': a/b.py:c")""", """[["it's (nested) 'quotes': a/b.py:c"], {}]"""),
        ("(-1, 2.5, None, True, [1, 2], key={'a': 1})", '[[-1, 2.5, null, true, [1, 2]], {"key": {"a": 1}}]'),
    ],
)
def test_literal_arguments_reach_the_function(
    source: Path, capsys: pytest.CaptureFixture[str], arguments: str, expected: str
) -> None:
    data = read(f"{source}:echo{arguments}")
    assert capsys.readouterr().out == f"ECHO {expected}\n"
    assert data.name == f"data.py:echo{arguments}"


@pytest.mark.parametrize(
    "arguments",
    [
        "(open('{mark}', 'w'))",
        "(__import__('os').system('touch {mark}'))",
        "(*[1])",
        "(**{{'a': 1}})",
        "(1)(2)",
        "(1",
        "(1) + 2",
        "({{[]: 1}})",
        "(x=x)",
        "(" + "[" * 300,
    ],
)
def test_other_arguments_are_refused_and_never_evaluated(source: Path, tmp_path: Path, arguments: str) -> None:
    mark = tmp_path / "mark"
    with pytest.raises(UsageError, match="aren't literals") as caught:
        read(f"{source}:echo{arguments.format(mark=mark)}")
    assert 'fn("calib", size=512)' in caught.value.hint
    assert not mark.exists()


def test_a_long_argument_is_no_file_name(source: Path) -> None:
    assert len(read(f"{source}:echo({'x' * 5000!r})")) == 6


def test_folders_may_have_parentheses_and_colons(tmp_path: Path) -> None:
    folder = tmp_path / "data (1): new"
    folder.mkdir()
    (folder / "data.py").write_text(SOURCE)
    assert_examples(read(f"{folder / 'data.py'}:pair()"))
    np.savez(folder / "a(b):c.npz", x=X.numpy(), y=Y.numpy())
    assert_examples(read(folder / "a(b):c.npz"))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nothing", "data.py:nothing returned NoneType"),
        ("number", "returned int"),
        ("text", "returned str"),
        ("triple", "returned a tuple of Tensor, Tensor, Tensor"),
        ("wrong_keys", "returned a dict with keys input_ids"),
        ("fails", r"fails failed \(KeyError: 'labels'\)"),
        ("leaves", r"leaves failed \(SystemExit: 2\)"),
        ("empty", "holds no examples"),
        ("no_batches", "returned no batches"),
        ("lengths", r"tensors of different lengths \[5, 6\]"),
        ("list_pair", r"batches of different form: x \[n, 4\] float32, then x \[n\] int64"),
        ("mixed_batches", "batches of different form"),
        ("objects", "array of dtype <U1"),
        ("complex_inputs", "complex inputs"),
        ("missing", "has no 'missing'"),
        ("", "names no object"),
        ("pair(1)", r"failed \(TypeError"),
    ],
)
def test_what_isnt_data_is_named(source: Path, name: str, words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        read(f"{source}:{name}")
    assert caught.value.exit_code == 2 and caught.value.hint and "\n" not in caught.value.message


def test_a_missing_function_lists_what_the_file_defines(source: Path) -> None:
    with pytest.raises(UsageError) as caught:
        read(f"{source}:test")
    assert caught.value.hint.startswith("it has: tensor, pair, unlabelled")
    assert "DataLoader" not in caught.value.hint and "more" in caught.value.hint


@pytest.mark.parametrize("name", ["nan", "nan_targets"])
def test_nan_is_a_numerical_failure(source: Path, name: str) -> None:
    with pytest.raises(NumericsError, match="holds NaN or Inf"):
        read(f"{source}:{name}")


def test_files_that_arent_data_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        read(tmp_path / "none.npz")
    with pytest.raises(UsageError, match=r"none\.py: no such file"):
        read(f"{tmp_path / 'none.py'}:fn")
    (tmp_path / "data.csv").write_text("1,2")
    with pytest.raises(InputError, match=r"data of kind \.csv aren't read"):
        read(tmp_path / "data.csv")
    with pytest.raises(InputError, match="data of kind without suffix"):
        read(tmp_path)
    np.savez(tmp_path / "keys.npz", images=X.numpy())
    with pytest.raises(InputError, match="key x is missing; it has images"):
        read(tmp_path / "keys.npz")


def test_files_that_dont_import_are_named(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("def f(:")
    with pytest.raises(UsageError, match=r"broken\.py failed to import \(SyntaxError"):
        read(f"{tmp_path / 'broken.py'}:f")
    (tmp_path / "script.py").write_text("import sys\nsys.exit(3)")
    with pytest.raises(UsageError, match=r"failed to import \(SystemExit: 3"):
        read(f"{tmp_path / 'script.py'}:f")
    with pytest.raises(UsageError, match=r"module 'no\.such\.module' can't be imported"):
        read("no.such.module:f")
    with pytest.raises(UsageError, match="names no object"):
        load_object("file.py", "--model")


def test_a_file_imports_its_neighbours_also_later(tmp_path: Path) -> None:
    (tmp_path / "early_neighbour.py").write_text("SIZE = 6")
    (tmp_path / "late_neighbour.py").write_text("WIDTH = 4")
    (tmp_path / "lazy.py").write_text(
        "import torch\nfrom early_neighbour import SIZE\n"
        "def pair():\n    from late_neighbour import WIDTH\n    return torch.ones(SIZE, WIDTH)"
    )
    assert read(f"{tmp_path / 'lazy.py'}:pair").inputs[0].shape == (6, 4)


def test_two_files_have_their_own_neighbours_of_one_name(tmp_path: Path) -> None:
    for name, rows in (("a", 2), ("b", 3)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "shared_neighbour.py").write_text(f"ROWS = {rows}")
        (tmp_path / name / "data.py").write_text(
            "import torch\nfrom shared_neighbour import ROWS\ndef get(): return torch.ones(ROWS, 1)"
        )
    assert len(read(f"{tmp_path / 'a' / 'data.py'}:get")) == 2
    assert len(read(f"{tmp_path / 'b' / 'data.py'}:get")) == 3


def test_a_module_of_the_current_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "hcompress_test_package").mkdir()
    (tmp_path / "hcompress_test_package" / "data.py").write_text(SOURCE)
    assert_examples(read("hcompress_test_package.data:pair"))


# -- normalising -----------------------------------------------------------------------------------------------------


def test_uint8_images_are_scaled_moved_and_normalised(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (4, 5, 6, 3), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", x=images, y=np.arange(4))
    data = read(tmp_path / "images.npz", mean=(0.1, 0.2, 0.3), std=(0.5,), layout="nhwc")
    expected = (images / 255 - np.array([0.1, 0.2, 0.3])) / 0.5
    assert data.inputs[0].shape == (4, 3, 5, 6)
    torch.testing.assert_close(data.inputs[0], torch.tensor(expected).float().permute(0, 3, 1, 2))


def test_mean_and_std_that_dont_fit_are_named(tmp_path: Path) -> None:
    np.savez(tmp_path / "images.npz", x=np.zeros((4, 5, 6, 3), np.uint8))
    with pytest.raises(UsageError, match="--mean has 3 values, the inputs 5 channels") as caught:
        read(tmp_path / "images.npz", mean=(0.1, 0.2, 0.3))
    assert "nhwc" in caught.value.hint
    with pytest.raises(UsageError, match="--std has 0"):
        read(tmp_path / "images.npz", std=(0.0,))
    np.savez(tmp_path / "tokens.npz", x=np.zeros((4, 5), np.int64))
    with pytest.raises(UsageError, match=r"don't fit inputs of dtype int64 and shape \[4, 5\]"):
        read(tmp_path / "tokens.npz", mean=(0.1,))
    with pytest.raises(UsageError, match="--layout nhwc needs images"):
        read(tmp_path / "tokens.npz", layout="nhwc")


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_float_inputs_become_float32_and_tokens_stay(tmp_path: Path, dtype: type) -> None:
    np.savez(tmp_path / "floats.npz", x=np.ones((4, 5), dtype))
    assert read(tmp_path / "floats.npz").inputs[0].dtype == torch.float32
    np.savez(tmp_path / "tokens.npz", x=np.zeros((4, 5), np.int32))
    assert read(tmp_path / "tokens.npz").inputs[0].dtype == torch.int32


# -- sampling --------------------------------------------------------------------------------------------------------


def test_a_sample_is_deterministic_and_keeps_rows_together() -> None:
    data = Data((torch.arange(100), torch.arange(100) * 2), torch.arange(100) * 3, "d")
    first, again, other = data.sample(10, 1), data.sample(10, 1), data.sample(10, 2)
    assert torch.equal(first.inputs[0], again.inputs[0]) and not torch.equal(first.inputs[0], other.inputs[0])
    assert first.targets is not None
    assert torch.equal(first.inputs[0] * 2, first.inputs[1]) and torch.equal(first.inputs[0] * 3, first.targets)
    assert len(set(first.inputs[0].tolist())) == 10
    assert data.sample(100, 0) is data


def test_batches_hold_every_example_once() -> None:
    data = Data((torch.arange(10),), torch.arange(10), "d")
    parts = list(data.batches(4))
    assert [len(part) for part in parts] == [4, 4, 2]
    assert torch.equal(torch.cat([part.inputs[0] for part in parts]), data.inputs[0])


def test_the_hash_changes_with_any_bit_dtype_shape_or_role() -> None:
    x, y = torch.arange(12, dtype=torch.float32).reshape(3, 4), torch.tensor([0, 1, 2])
    flipped = x.clone()
    flipped.view(torch.int32)[2, 3] ^= 1
    variants = [
        Data((x,), y, "d"),
        Data((flipped,), y, "d"),
        Data((x.reshape(3, 2, 2),), y, "d"),
        Data((x.view(torch.int32),), y, "d"),
        Data((x,), torch.tensor([0, 1, 3]), "d"),
        Data((x,), y.int(), "d"),
        Data((x,), None, "d"),
        Data((x, y), None, "d"),
    ]
    hashes = [data.sha256() for data in variants]
    assert len(set(hashes)) == len(hashes)
    assert Data((x.t().contiguous().t(),), y, "other name").sha256() == hashes[0]


# -- tasks -----------------------------------------------------------------------------------------------------------


def test_the_task_follows_from_the_data() -> None:
    x, ids = torch.zeros(3, 4), torch.zeros(3, 4, dtype=torch.int64)
    assert task.guess_kind(Data((x,), torch.tensor([0, 1, 2]), "d")) == "classification"
    assert task.guess_kind(Data((ids,), torch.tensor([0, 1, 2]), "d")) == "classification"
    assert task.guess_kind(Data((x,), torch.zeros(3), "d")) == "regression"
    assert task.guess_kind(Data((ids,), None, "d")) == "causal-lm"
    assert task.guess_kind(Data((ids.bool(),), None, "d")) == "classification"
    assert isinstance(load_task(None, None), Classification)


def test_accuracy_is_the_share_of_right_labels() -> None:
    outputs = torch.tensor([[0.1, 0.9], [0.8, 0.2], [0.3, 0.7]])
    assert Classification().score(outputs, torch.tensor([1, 1, 1])).tolist() == [100.0, 0.0, 100.0]


def prepared(targets: torch.Tensor) -> Data:
    return Classification().prepare(Data((torch.zeros(len(targets), 2),), targets, "labels.npz"))


def test_integer_labels_of_any_width_are_classes() -> None:
    for dtype in (torch.uint8, torch.int32, torch.bool):
        targets = prepared(torch.tensor([0, 1], dtype=dtype)).targets
        assert targets is not None and targets.dtype == torch.int64


def test_labels_of_another_form_are_named() -> None:
    with pytest.raises(UsageError, match=r"labels have dtype float32 and shape \[3\]") as caught:
        prepared(torch.zeros(3))
    assert "--task regression" in caught.value.hint
    for dtype in (torch.int64, torch.float32):
        with pytest.raises(UsageError, match=r"shape \[3, 4\]") as caught:
            prepared(torch.eye(4, dtype=dtype)[:3])
        assert "one-hot" in caught.value.hint and "y.argmax(1)" in caught.value.hint
    with pytest.raises(UsageError, match="label -1 is negative"):
        prepared(torch.tensor([0, -1]))


def test_labels_beyond_the_classes_and_outputs_that_arent_logits_are_named() -> None:
    with pytest.raises(UsageError, match="label 7 is out of range: the network has 5 classes") as caught:
        Classification().score(torch.zeros(2, 5), torch.tensor([0, 7]))
    assert "0 to 4" in caught.value.hint
    for outputs in (torch.zeros(2), torch.zeros(2, 1), torch.zeros(2, 5, 2)):
        with pytest.raises(UsageError, match=r"needs logits \[n, classes\]"):
            Classification().score(outputs, torch.tensor([0, 1]))
    with pytest.raises(UsageError, match="gives a tuple of Tensor, Tensor, the task scores one tensor"):
        Classification().score((torch.zeros(2, 5), torch.zeros(2)), torch.tensor([0, 1]))  # type: ignore[arg-type]


def test_regression_is_the_mean_squared_error_of_each_example() -> None:
    outputs, targets = torch.randn(5, 3), torch.randn(5, 3)
    expected = ((outputs - targets) ** 2).mean(1)
    torch.testing.assert_close(Regression().score(outputs, targets).float(), expected)
    assert Regression().score(torch.zeros(5, 1), torch.ones(5)).tolist() == [1.0] * 5
    with pytest.raises(UsageError, match=r"targets have shape \[5\], the outputs \[5, 3\]"):
        Regression().score(outputs, torch.zeros(5))
    data = Regression().prepare(Data((torch.zeros(2, 1),), torch.tensor([1, 2]), "d"))
    assert data.targets is not None and data.targets.dtype == torch.float32


def test_causal_lm_shifts_windows_and_averages_nats(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.randint(0, 7, (4, 6), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    data = CausalLM().prepare(Data((ids,), None, "d"))
    assert data.targets is not None
    assert torch.equal(data.inputs[0], ids[:, :-1].long()) and torch.equal(data.targets, ids[:, 1:].long())
    logits = torch.randn(4, 5, 7)
    expected = F.cross_entropy(logits.double().transpose(1, 2), data.targets, reduction="none").mean(1)
    torch.testing.assert_close(CausalLM().score(logits, data.targets), expected)
    monkeypatch.setattr(task, "LOSS_CHUNK", 21)  # three rows at a time
    torch.testing.assert_close(CausalLM().score(logits, data.targets), expected)


def test_causal_lm_names_what_doesnt_fit() -> None:
    for ids in (torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64), torch.zeros(3, 1, dtype=torch.int64)):
        with pytest.raises(UsageError, match="token ids have dtype"):
            CausalLM().prepare(Data((ids,), None, "d"))
    with pytest.raises(UsageError, match="token 9 is out of range: the network has 7 tokens"):
        CausalLM().score(torch.zeros(1, 2, 7), torch.tensor([[1, 9]]))
    with pytest.raises(UsageError, match=r"needs logits \[1, 2, 'vocabulary'\]; the network gives \[1, 7\]"):
        CausalLM().score(torch.zeros(1, 7), torch.tensor([[1, 2]]))


TASKS = """
import torch

class Both:
    name, unit, higher_is_better = "both", "points", True
    def loss(self, outputs, targets): return outputs[0].mean()
    def score(self, outputs, targets): return (outputs[0].argmax(1) == targets).float() + outputs[1][:, 0]

class Prepared(Both):
    def prepare(self, data): return type(data)(data.inputs, data.targets + 1, data.name)

class Lacking:
    name = "lacking"

class Raising:
    def __init__(self): raise RuntimeError("no labels file")

class NeedsArgument(Both):
    def __init__(self, size): self.size = size
"""


def test_a_task_of_the_users_own_scores_all_outputs(tmp_path: Path) -> None:
    (tmp_path / "tasks.py").write_text(TASKS)
    data = Data((torch.zeros(2, 2),), torch.tensor([0, 1]), "d")
    both = load_task(f"{tmp_path / 'tasks.py'}:Both", data)
    assert both.prepare(data) is data
    assert data.targets is not None
    score = both.score((torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[0.5], [0.25]])), data.targets)
    assert score.tolist() == [1.5, 0.25]
    shifted = load_task(f"{tmp_path / 'tasks.py'}:Prepared", data).prepare(data).targets
    assert shifted is not None and shifted.tolist() == [1, 2]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Lacking", "lacks unit, higher_is_better, loss, score"),
        ("Raising", r"failed \(RuntimeError: no labels file\)"),
        ("NeedsArgument", r"failed \(TypeError"),
        ("Missing", "has no 'Missing'"),
    ],
)
def test_a_task_that_isnt_one_is_named(tmp_path: Path, name: str, words: str) -> None:
    (tmp_path / "tasks.py").write_text(TASKS)
    with pytest.raises(UsageError, match=words) as caught:
        load_task(f"{tmp_path / 'tasks.py'}:{name}", None)
    assert caught.value.hint


def test_an_unknown_task_lists_the_choices() -> None:
    with pytest.raises(UsageError, match="task 'detection' is unknown") as caught:
        load_task("detection", None)
    assert "classification, regression, causal-lm" in caught.value.hint


# -- the network on the data -----------------------------------------------------------------------------------------


class Asserting(nn.Module):
    def forward(self, image: torch.Tensor) -> torch.Tensor:
        assert image.shape[1] == 3, "three channels"
        return image.add_(1)


def test_data_that_the_network_doesnt_take_are_named() -> None:
    data = Data((torch.zeros(4, 5),), None, "data.npz")
    with pytest.raises(UsageError, match=r"doesn't take data\.npz of shape \[2, 5\] float32 \(mat1 and mat2") as caught:
        check_forward(nn.Linear(4, 2), data, "--data")
    assert "forward(input" in caught.value.hint
    with pytest.raises(UsageError, match="three channels"):
        check_forward(Asserting(), data, "--data")


def test_a_forward_that_writes_into_its_input_leaves_the_data() -> None:
    data = Data((torch.zeros(4, 3),), None, "d")
    check_forward(Asserting(), data, "--data")
    assert not data.inputs[0].any()


def test_a_forward_that_fixes_its_batch_is_said_with_its_line() -> None:
    class One(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x.view(1, 5))

    data = Data((torch.randn(4, 5),), None, "data.npz")
    with pytest.raises(
        UsageError, match=r"takes one example of data\.npz, and not two at once .*x\.view\(1, 5\)"
    ) as caught:
        check_forward(One(5, 3), data, "--data")
    assert "x.shape[0]" in caught.value.hint
