"""The proof itself is proved: metrics equal brute force, and a model that is wrong doesn't pass."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

import compress
from compress import pipeline, settings, verify
from compress.data import Data
from compress.demo.network import fashion_net
from compress.errors import InputError, NumericsError, UsageError
from compress.export import serialize, to_onnx
from compress.task import CausalLM, Classification, Regression
from compress.verify import Parity, evaluate, measure_parity, open_session, parity_holds, run_session, runtime_forward


def silent(*_: object) -> None:
    """No progress."""


class TwoOutputs(nn.Module):
    """Logits and features of two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.head = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        features = torch.relu(self.hidden(left + right))
        return self.head(features), features


@pytest.fixture(scope="module")
def perceptron() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval()


@pytest.fixture(scope="module")
def proto(perceptron: nn.Module) -> onnx.ModelProto:
    return to_onnx(perceptron, (torch.randn(2, 4),))


@pytest.fixture
def x() -> Tensor:
    return torch.randn(37, 4, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def y() -> Tensor:
    return torch.randint(0, 3, (37,), generator=torch.Generator().manual_seed(4))


def session_of(proto: onnx.ModelProto) -> verify.Session:
    return open_session(serialize(proto), 1)


# -- the metric ------------------------------------------------------------------------------------------------------


def test_accuracy_equals_brute_force(perceptron: nn.Module, proto: onnx.ModelProto, x: Tensor, y: Tensor) -> None:
    hits = sum(int(perceptron(x[i : i + 1]).argmax()) == int(y[i]) for i in range(len(x)))
    found = evaluate(runtime_forward(session_of(proto)), Data((x,), y, "d"), Classification(), "s", silent)
    assert found == pytest.approx(100 * hits / 37, abs=1e-9)


def test_squared_error_equals_brute_force(perceptron: nn.Module, x: Tensor) -> None:
    targets = torch.randn(37, 3)
    with torch.no_grad():
        expected = float(((perceptron(x) - targets) ** 2).mean())
    assert evaluate(perceptron, Data((x,), targets, "d"), Regression(), "s", silent) == pytest.approx(
        expected, rel=1e-5
    )


def test_the_loss_of_a_language_model_equals_brute_force() -> None:
    network = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7))
    ids = torch.randint(0, 7, (21, 9))
    log_p = torch.log_softmax(network(ids[:, :-1]).detach().double(), -1)
    losses = [-float(log_p[i, range(8), row[1:]].mean()) for i, row in enumerate(ids)]
    data = CausalLM().prepare(Data((ids,), None, "d"))
    assert evaluate(network, data, CausalLM(), "s", silent) == pytest.approx(sum(losses) / 21, rel=1e-6)


def test_large_outputs_run_in_small_batches(monkeypatch: pytest.MonkeyPatch, x: Tensor, y: Tensor) -> None:
    monkeypatch.setattr(verify, "BATCH_OUTPUTS", 3 * 5)
    sizes = []

    def forward(part: Tensor) -> Tensor:
        sizes.append(len(part))
        return part[:, :3]

    evaluate(forward, Data((x,), y, "d"), Classification(), "s", silent)
    assert sizes == [1, *[5] * 7, 2]
    assert verify._batch_size(torch.zeros(1, 10**3)) <= verify.BATCH
    assert verify._batch_size((torch.zeros(1, 10**3), {"a": torch.zeros(1, 10**3)})) == 1


def test_progress_counts_examples(perceptron: nn.Module, x: Tensor, y: Tensor) -> None:
    seen: list[tuple[str, int, int | None]] = []
    evaluate(perceptron, Data((x,), y, "d"), Classification(), "stage", lambda *step: seen.append(step))
    assert seen[0] == ("stage", 0, 37) and seen[-1] == ("stage", 37, 37)


def test_data_without_labels_cant_be_evaluated(perceptron: nn.Module, x: Tensor) -> None:
    with pytest.raises(UsageError, match=r"images\.npz has no labels") as caught:
        evaluate(perceptron, Data((x,), None, "images.npz"), Classification(), "s", silent)
    assert "keys x and y" in caught.value.hint


def test_nan_outputs_are_a_numerical_failure(x: Tensor, y: Tensor) -> None:
    def forward(part: Tensor) -> Tensor:
        return torch.where(part[:, :3] > 2, torch.nan, part[:, :3])

    with pytest.raises(NumericsError, match=r"outputs on d\.npz hold NaN"):
        evaluate(forward, Data((x + 1,), y, "d.npz"), Classification(), "s", silent)


def test_an_infinite_metric_is_a_numerical_failure(x: Tensor) -> None:
    with pytest.raises(NumericsError, match="mse on d is inf"):
        evaluate(lambda part: part / 0, Data((x,), torch.zeros(37, 4), "d"), Regression(), "s", silent)


class Scoring(Classification):
    """A user's task whose score does what ``result`` says."""

    def __init__(self, result: Any) -> None:
        self.result = result

    def score(self, outputs: Tensor, targets: Tensor) -> Tensor:
        if isinstance(self.result, Exception):
            raise self.result
        found: Tensor = self.result
        return found


@pytest.mark.parametrize(
    ("result", "words"),
    [
        (KeyError("logits"), r"can't score d \('logits'\)"),
        (AssertionError(), r"can't score d \(AssertionError\)"),
        (0.5, "score gives float for 16 examples"),
        (torch.tensor(0.5), r"score gives a tensor \[\] for 16 examples"),
        (torch.zeros(16, 2), r"score gives a tensor \[16, 2\]"),
    ],
)
def test_a_task_that_cant_score_is_named(perceptron: nn.Module, x: Tensor, y: Tensor, result: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        evaluate(perceptron, Data((x,), y, "d"), Scoring(result), "s", silent)
    assert caught.value.hint


def test_labels_out_of_range_are_named(perceptron: nn.Module, x: Tensor) -> None:
    with pytest.raises(UsageError, match="label 5 is out of range: the network has 3 classes"):
        evaluate(perceptron, Data((x,), torch.full((37,), 5), "d"), Classification(), "s", silent)


# -- the session -----------------------------------------------------------------------------------------------------


def test_data_of_the_wrong_shape_dtype_or_number_are_named(proto: onnx.ModelProto, x: Tensor) -> None:
    session = session_of(proto)
    with pytest.raises(UsageError, match=r"the model takes input \['batch', 4\].*; the data are \[37, 3\] float32"):
        run_session(session, (x[:, :3],))
    with pytest.raises(UsageError, match=r"the data are \[37, 4\] float64") as caught:
        run_session(session, (x.double(),))
    assert caught.value.hint == "check --eval" and "\n" not in caught.value.message
    with pytest.raises(UsageError, match="takes input; the data have 2 inputs"):
        run_session(session, (x, x))


def test_a_file_that_the_runtime_refuses_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"not a model")
    with pytest.raises(InputError, match=r"model\.onnx: ONNX Runtime refuses it"):
        open_session(tmp_path / "model.onnx", 1)
    with pytest.raises(InputError, match="ONNX Runtime refuses it"):
        open_session(tmp_path / "none.onnx", None)


def test_several_inputs_and_outputs_keep_their_order(x: Tensor) -> None:
    network = TwoOutputs().eval()
    session = session_of(to_onnx(network, (x[:2], x[2:4])))
    assert [value.name for value in session.get_inputs()] == ["left", "right"]
    found = runtime_forward(session)(x[:5], x[5:10])
    for a, b in zip(network(x[:5], x[5:10]), found, strict=True):
        torch.testing.assert_close(a, b)
    assert all(parity_holds(p, False) for p in measure_parity(network, session, (x, x.flip(0))))


# -- parity ----------------------------------------------------------------------------------------------------------


def test_a_faithful_export_has_parity_at_every_batch(perceptron: nn.Module, proto: onnx.ModelProto, x: Tensor) -> None:
    parity = measure_parity(perceptron, session_of(proto), (x[:2],))  # fewer rows than the largest batch
    assert [p.batch for p in parity] == [1, 3, 7]
    assert all(parity_holds(p, False) and p.argmax_agreement == 1.0 for p in parity)


def test_one_changed_weight_breaks_parity(perceptron: nn.Module, proto: onnx.ModelProto, x: Tensor) -> None:
    changed = onnx.ModelProto.FromString(proto.SerializeToString())
    tensor = next(t for t in changed.graph.initializer if tuple(t.dims) == (3, 8))
    hidden = torch.relu(perceptron.get_submodule("0")(x[:7])).sum(0)
    values = numpy_helper.to_array(tensor).copy()
    values[0, int(hidden.argmax())] *= 1.1  # a weight that these examples use
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    parity = measure_parity(perceptron, session_of(changed), (x,))
    assert not parity_holds(parity[-1], False) and parity_holds(
        measure_parity(perceptron, session_of(proto), (x,))[-1], False
    )


def test_swapped_classes_break_parity_and_agreement(perceptron: nn.Module, proto: onnx.ModelProto, x: Tensor) -> None:
    swapped = nn.Sequential(perceptron, nn.Identity())
    parity = measure_parity(lambda part: swapped(part).flip(1), session_of(proto), (x,))  # type: ignore[arg-type]
    assert not any(parity_holds(p, integer) for p in parity for integer in (False, True))
    assert parity[-1].argmax_agreement is not None and parity[-1].argmax_agreement < 1


@pytest.mark.parametrize(
    ("max_relative", "mean_relative", "floats", "integers"),
    [
        (1e-5, 1e-6, True, True),
        (0.022, 0.0105, False, True),  # ResNet-20, the worst of 150 batches
        (0.37, 0.001, False, False),
        (0.09, 0.07, False, False),
    ],
)
def test_tolerances(max_relative: float, mean_relative: float, floats: bool, integers: bool) -> None:
    parity = Parity(1, 1.0, max_relative, mean_relative, 1.0)
    assert (parity_holds(parity, False), parity_holds(parity, True)) == (floats, integers)


def test_nan_breaks_parity_with_a_numerical_failure() -> None:
    good, bad = torch.ones(1, 3), torch.tensor([[1.0, torch.nan, 1.0]])
    for pair in ((good, bad), (bad, good), (bad, bad)):
        with pytest.raises(NumericsError, match="outputs at batch 1 aren't finite"):
            verify._compare(1, [pair[0]], [pair[1]])
    with pytest.raises(NumericsError):
        verify._compare(1, [good], [good / 0])


def test_masked_logits_are_equal_where_both_are_infinite() -> None:
    masked = torch.tensor([[1.0, -torch.inf, 4.0]])
    parity = verify._compare(1, [masked], [masked + 0.4])
    assert parity.max_abs == pytest.approx(0.4) and parity.max_relative == pytest.approx(0.1)


def test_outputs_of_another_shape_are_named() -> None:
    with pytest.raises(
        InputError, match=r"at batch 3 the runtime's outputs have shapes \[\[3, 2\]\], torch's \[\[3, 4"
    ):
        verify._compare(3, [torch.zeros(3, 4)], [torch.zeros(3, 2)])
    with pytest.raises(InputError, match="outputs are empty"):
        verify._compare(3, [torch.zeros(3, 0)], [torch.zeros(3, 0)])


def test_agreement_is_none_without_classes() -> None:
    assert verify._compare(2, [torch.ones(2, 1)], [torch.ones(2, 1)]).argmax_agreement is None
    flipped = verify._compare(2, [torch.tensor([[0.0, 1.0], [0.0, 1.0]])], [torch.tensor([[0.0, 1.0], [1.0, 0.0]])])
    assert flipped.argmax_agreement == 0.5


# -- parity with integer activations ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's network in 8 bits, activations too."""
    folder = tmp_path_factory.mktemp("quantized")
    demo = resources.files("compress.demo")
    for name in ("calibration", "evaluation"):
        with np.load(str(demo / f"{name}.npz")) as arrays:
            np.savez(folder / f"{name}.npz", x=arrays["x"][:32], y=arrays["y"][:32])
    torch.save(fashion_net_state(), folder / "net.pt")
    given = {
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
        folder / "net.pt",
        settings.resolve(given, environment={}, folder=None),
        force=False,
        dry_run=False,
        plan=None,
        command=[],
        progress=silent,
    )
    return folder / "out"


def fashion_net_state() -> dict[str, Tensor]:
    network = fashion_net()
    checkpoint = resources.files("compress.demo") / "fashion_net.safetensors"
    from safetensors.torch import load_file

    network.load_state_dict(load_file(str(checkpoint)))
    return network.state_dict()


def test_a_quantized_network_with_one_wrong_layer_breaks_parity(quantized: Path) -> None:
    with np.load(quantized.parent / "evaluation.npz") as arrays:
        x = (torch.from_numpy(arrays["x"]).float() / 255 - 0.286) / 0.353
    session, network = open_session(quantized / "model.onnx", 1), compress.load(quantized)
    assert all(parity_holds(p, True) for p in measure_parity(network, session, (x,)))
    levels = {n: t for n, t in network.named_buffers() if t.dtype == torch.int8 and t.dim() >= 2}
    assert len(levels) >= 8
    for name, tensor in levels.items():
        original = tensor.clone()
        tensor.copy_(original.roll(1, 0))  # the channels in the wrong order
        assert not any(parity_holds(p, True) for p in measure_parity(network, session, (x,))), name
        tensor.copy_(original)
