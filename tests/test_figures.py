"""A report's figures, from their definitions, and what inspect says of a network."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from compress import __version__, figures, inspection
from compress.apply import Tensors, mask_sha256, pack_mask
from compress.budget import Budget
from compress.data import Data
from compress.formats.checkpoint import read_checkpoint
from compress.formats.packed import QuantizedTensor
from compress.graph.trace import Graph, trace_graph
from compress.model import Source
from compress.plan import MaskWeights, Plan, Quantize
from compress.task import Classification
from compress.verify import INTEGER_TOLERANCE, MEAN_TOLERANCE, Parity


class Tied(nn.Module):
    """An embedding that is also the head, and a layer between."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.hidden = nn.Embedding(6, 4), nn.Linear(4, 4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(torch.relu(self.hidden(self.embedding(ids))))
        return logits


def traced(module: nn.Module, x: torch.Tensor) -> tuple[Source, Graph]:
    module.eval().requires_grad_(False)
    source = Source(Path("net.pt"), "0" * 64, module, "torch", None, {}, {}, ())
    return source, trace_graph(module, (x,))


@pytest.fixture
def dense() -> tuple[Source, Graph]:
    torch.manual_seed(0)
    return traced(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(2, 4))


def test_a_dense_network_has_32_bits_and_its_own_zeros(dense: tuple[Source, Graph]) -> None:
    source, graph = dense
    with torch.no_grad():
        source.module.get_parameter("0.weight")[:2] = 0
    layers = figures.layer_records(source, graph, dict(source.module.state_dict()), None)
    assert [(layer["tensor"], layer["bits"], layer["decision"]) for layer in layers] == [
        ("0.weight", 32, "keep"),
        ("2.weight", 32, "keep"),
    ]
    assert all(layer["relative_error"] == 0 and layer["why"] == "exported as it is" for layer in layers)
    assert figures.totals(layers) == {"average_bits": 32.0, "sparsity": 8 / 48}


def test_totals_weigh_layers_by_their_elements(dense: tuple[Source, Graph]) -> None:
    source, graph = dense
    tensors: Tensors = dict(source.module.state_dict())
    weight = source.module.get_parameter("2.weight")
    mask = torch.arange(16).reshape(2, 8) % 4 == 0
    tensors["2.weight"] = weight * mask
    levels = torch.arange(-16, 16, dtype=torch.int8).reshape(8, 4).clamp(-7, 7)
    tensors["0.weight"] = QuantizedTensor(levels, 4, torch.full((8,), 0.1), 0)
    decisions = (
        Quantize("0.weight", "weight", 4, "symmetric", 0, "mse"),
        MaskWeights("2.weight", 4, 16, "unstructured", mask_sha256(pack_mask(mask))),
    )
    plan = Plan("mixed", {"scope": "global"}, 0, source.sha256, None, None, decisions, {})
    layers = figures.layer_records(source, graph, tensors, plan)
    assert [(layer["bits"], layer["decision"]) for layer in layers] == [(4, "quantize"), (32, "mask")]
    assert layers[0]["why"].startswith("mixed chose 4 bits with mse ranges: the weights move by ")
    assert layers[1]["why"] == "12 of 16 weights zeroed: those below the magnitude that all layers share"
    expected = float((weight * ~mask).norm() / weight.norm())
    assert layers[1]["relative_error"] == pytest.approx(expected, rel=1e-5)
    totals = figures.totals(layers)
    assert totals["average_bits"] == pytest.approx((32 * 4 + 16 * 32) / 48)
    assert totals["sparsity"] == pytest.approx((1 + 12) / 48)


def test_a_network_without_layers_has_no_division_by_zero() -> None:
    assert figures.totals([]) == {"average_bits": 32.0, "sparsity": 0.0}


def test_a_tied_weight_counts_once() -> None:
    source, graph = traced(Tied(), torch.zeros(2, 3, dtype=torch.int64))
    layers = figures.layer_records(source, graph, dict(source.module.state_dict()), None)
    assert sorted(layer["elements"] for layer in layers) == [16, 24]


def test_parity_checks_say_which_figure_failed() -> None:
    good, wide = Parity(1, 0.1, 0.01, 0.001, 1.0), Parity(3, 9.0, 0.5, 0.001, 1.0)
    shifted = Parity(7, 0.5, 0.05, 0.04, 1.0)
    checks = figures.parity_checks([good, wide, shifted], True)
    assert [(c.name, c.ok, c.limit) for c in checks] == [
        ("parity_batch_1", True, INTEGER_TOLERANCE),
        ("parity_batch_3", False, INTEGER_TOLERANCE),
        ("parity_batch_7", True, INTEGER_TOLERANCE),
        ("parity_mean_batch_7", False, MEAN_TOLERANCE),
    ]
    assert all(c.ok == (c.value <= c.limit) for c in checks)
    assert [c.ok for c in figures.parity_checks([good], False)] == [False]
    assert figures.parity_record(good) == {"batch": 1, "max_abs": 0.1, "argmax_agreement": 1.0}


@pytest.mark.parametrize(
    ("budget", "ok"),
    [
        (Budget("bytes", 100), True),
        (Budget("bytes", 99), False),
        (Budget("bits", 4.0), True),
        (Budget("bits", 3.9), False),
        (Budget("sparsity", 0.5), True),
        (Budget("sparsity", 0.51), False),
    ],
)
def test_budget_checks(budget: Budget, ok: bool) -> None:
    (check,) = figures.budget_checks(budget, 100, 400, {"average_bits": 4.0, "sparsity": 0.5})
    assert check.name == "budget" and check.ok is ok
    assert figures.budget_checks(None, 100, 400, {}) == []


def test_the_metric_record_names_the_runtime_and_the_data() -> None:
    data = Data((torch.zeros(3, 2),), torch.tensor([0, 1, 1]), "d")
    record = figures.metric_record(Classification(), 90.0, 89.0, data)
    assert record["runtime"].startswith("onnxruntime ") and record["num_examples"] == 3
    assert (record["name"], record["unit"], record["dense"], record["compressed"]) == ("accuracy", "%", 90.0, 89.0)
    assert record["data_sha256"] == data.sha256()


def test_versions_name_what_a_result_depends_on() -> None:
    versions = figures.versions()
    assert versions["hcompress"] == __version__ and versions["torch"].startswith("2.")
    assert {"python", "onnx", "onnxruntime", "safetensors", "numpy"} <= versions.keys()


# -- inspect ---------------------------------------------------------------------------------------------------------


def test_inspect_lists_layers_ties_and_dtypes() -> None:
    source, graph = traced(Tied(), torch.zeros(2, 3, dtype=torch.int64))
    record = inspection.describe_network(Path("net.pt"), source, graph, ["a note"])
    assert record["parameters"] == 6 * 4 + 4 * 4 + 4
    assert record["tied"] == [["embedding.weight", "head.weight"]]
    assert record["macs"] == 3 * (16 + 24) and record["input_shape"] == [[3]]
    assert record["dtypes"] == {"float32": 4} and record["notes"] == ["a note"]
    assert {layer["name"] for layer in record["layers"]} == {"embedding.weight", "hidden.weight"}


class Buffered(nn.Module):
    """A linear layer whose weight is a buffer that isn't saved."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.randn(3, 4), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.get_buffer("weight"))


def test_a_weight_that_isnt_saved_is_inspected_too() -> None:
    source, graph = traced(Buffered(), torch.randn(2, 4))
    record = inspection.describe_network(Path("net.pt"), source, graph, [])
    assert [layer["dtype"] for layer in record["layers"]] in ([], ["float32"])
    assert figures.layer_records(source, graph, dict(source.module.state_dict()), None) == []


def test_inspect_without_an_architecture_lists_tensors(tmp_path: Path) -> None:
    torch.save({"weight": torch.ones(2, 3).half(), "steps": torch.tensor(3)}, tmp_path / "net.pt")
    record = inspection.describe_tensors(read_checkpoint(tmp_path / "net.pt"))
    assert record["parameters"] == 6 and record["macs"] is None
    assert record["dtypes"] == {"float16": 1, "int64": 1}
    assert record["layers"][0] == {
        "name": "weight", "op": "tensor", "shape": [2, 3], "parameters": 6, "macs": None, "dtype": "float16",
    }  # fmt: skip
    assert "pass --model FILE.py:FACTORY" in record["notes"][-1]
