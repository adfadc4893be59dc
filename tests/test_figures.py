"""A report's figures, from their definitions, and what inspect says of a network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from compress import __version__, figures, inspection
from compress.apply import Tensors, mask_sha256, pack_mask
from compress.budget import Budget
from compress.data import Data
from compress.figures import LATENCY_SLACK, MAX_POINTS
from compress.formats.checkpoint import read_checkpoint
from compress.formats.packed import QuantizedTensor
from compress.frontier import FLOAT_BITS, Choice, FrontierRecord, Item
from compress.graph.trace import Graph, trace_graph
from compress.model import Source
from compress.plan import MaskWeights, Plan, PruneChannels, Quantize, Replace
from compress.sensitivity import Estimate, Sensitivity
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


def make_frontier(**changes: Any) -> FrontierRecord:
    """Two items of the network below, 4 bits or floats, at the second of its four points: 4 bits in the first layer."""
    choices = (
        (Choice(4, 10, 0.5, ("mse",)), Choice(FLOAT_BITS, 80, 0.0, ())),
        (Choice(4, 5, 0.25, ("mse",)), Choice(FLOAT_BITS, 40, 0.0, ())),
    )
    values: dict[str, Any] = {
        **{"method": "hawq", "quantity": "bytes", "scale": 10.0, "fixed": 10, "dense_amount": 10_000.0},
        **{"items": tuple(Item((f"{n}.weight",), c) for n, c in zip("02", choices, strict=True)), "loss_unit": "nats"},
        **{"costs": (15, 50, 85, 120), "losses": (0.75, 0.5, 0.25, 0.0), "index": 1, "chosen": (0, 1)},
        **{"activations": {}},
    }
    return FrontierRecord(**values | changes)


@pytest.fixture
def dense() -> tuple[Source, Graph]:
    torch.manual_seed(0)
    return traced(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(2, 4))


def test_a_dense_network_has_32_bits_and_its_own_zeros(dense: tuple[Source, Graph]) -> None:
    source, graph = dense
    with torch.no_grad():
        source.module.get_parameter("0.weight")[:2] = 0
    layers = figures.layer_records(source.module.state_dict(), graph, dict(source.module.state_dict()), None)
    assert [(layer["tensor"], layer["bits"], layer["decision"]) for layer in layers] == [
        ("0.weight", 32, "keep"),
        ("2.weight", 32, "keep"),
    ]
    assert all(layer["relative_error"] == 0 and layer["why"] == "exported as it is" for layer in layers)
    assert figures.totals(layers) == {"average_bits": 32.0, "sparsity": 8 / 48}


def test_a_layer_that_loses_no_channel_says_whether_its_values_are_new(dense: tuple[Source, Graph]) -> None:
    source, graph = dense
    decisions = (PruneChannels("other", 8, (0,)), Replace("0.weight", "0" * 64))
    plan = Plan("structured-obs", {}, 0, source.sha256, None, None, decisions, {})
    state = dict(source.module.state_dict())
    first, second = (layer["why"] for layer in figures.layer_records(state, graph, state, plan))
    assert first == "none of its channels is cut; its values are fitted or trained anew"
    assert second == "none of its channels is cut"


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
    layers = figures.layer_records(source.module.state_dict(), graph, tensors, plan)
    assert [(layer["bits"], layer["decision"]) for layer in layers] == [(4, "quantize"), (32, "mask")]
    assert layers[0]["why"].startswith("mixed chose 4 bits with mse ranges: the weights move by ")
    assert layers[1]["why"] == "12 of 16 weights zeroed: those below the magnitude that all layers share"
    expected = float((weight * ~mask).norm() / weight.norm())
    assert layers[1]["relative_error"] == pytest.approx(expected, rel=1e-5)
    totals = figures.totals(layers)
    assert totals["average_bits"] == pytest.approx((32 * 4 + 16 * 32) / 48)
    assert totals["sparsity"] == pytest.approx((1 + 12) / 48)


@pytest.mark.parametrize(
    ("pattern", "scope", "values", "why"),
    [
        ("4x1", "global", None, "the smallest of the 4x1 blocks of all layers"),
        ("1x4", "layer", None, "the smallest of the 1x4 blocks of this layer"),
        (
            "4x1",
            "global",
            "0" * 64,
            "the least salient of the 4x1 blocks of all layers; the others moved to make up for them",
        ),
        ("2:4", "global", None, "the smallest of each group along the inputs, pattern 2:4"),
    ],
)
def test_a_masked_layer_says_which_of_its_weights_went(
    pattern: str, scope: str, values: str | None, why: str, dense: tuple[Source, Graph]
) -> None:
    source, graph = dense
    mask = MaskWeights("2.weight", 8, 16, pattern, "0" * 64, values)
    plan = Plan("layerwise", {"scope": scope}, 0, source.sha256, None, None, (mask,), {})
    state = dict(source.module.state_dict())
    assert figures.layer_records(state, graph, state, plan)[1]["why"] == f"8 of 16 weights zeroed: {why}"


def test_a_network_of_which_nothing_is_left_says_so() -> None:
    layers = [{"tensor": name, "sparsity": 1} for name in ("a", "b")]
    assert figures.warnings(layers) == ["nothing is left: every weight of every layer is zero"]
    assert figures.warnings([*layers, {"tensor": "c", "sparsity": 0.9}]) == ["every weight of a, b is zero"]
    assert figures.warnings([]) == []


def test_a_layer_has_its_own_sensitivity_and_what_else_there_was(dense: tuple[Source, Graph]) -> None:
    source, graph = dense
    whole = {("0.weight", ""): Estimate(2.0, 0.5)}
    by_width = {(f"{n}.weight", "4"): Estimate(1.0) for n in (0, 2)}
    records = {
        "hessian-trace": Sensitivity("hessian-trace", "loss per squared weight", source.sha256, None, whole),
        "weight-error": Sensitivity("weight-error", "squared weight", source.sha256, None, by_width),
    }
    state = dict(source.module.state_dict())
    first, second = figures.layer_records(source.module.state_dict(), graph, state, None, make_frontier(), records)
    assert first["sensitivity"] == {
        "measure": "hessian-trace", "value": 2.0, "stderr": 0.5, "unit": "loss per squared weight",
    }  # fmt: skip
    assert second["sensitivity"] is None, "a measure of every width has no value of the layer"
    assert first["alternatives"] == [
        {"option": "4 bits", "cost": 100.0, "unit": "bytes", "loss": 0.5, "chosen": True},
        {"option": "float", "cost": 800.0, "unit": "bytes", "loss": 0.0, "chosen": False},
    ]
    assert [entry["chosen"] for entry in second["alternatives"]] == [False, True]
    alone, _ = figures.layer_records(source.module.state_dict(), graph, state, None)
    assert alone["sensitivity"] is None and alone["alternatives"] == []


def test_tied_tensors_share_their_alternatives_and_bits_are_not_scaled(dense: tuple[Source, Graph]) -> None:
    source, graph = dense
    item = Item(("0.weight", "2.weight"), (Choice(3, 3, 0.5, ("mse", "mse")), Choice(8, 8, 0.0, ("mse", "mse"))))
    frontier = make_frontier(quantity="bits", scale=0.02, items=(item,), chosen=(1,))
    layers = figures.layer_records(source.module.state_dict(), graph, dict(source.module.state_dict()), None, frontier)
    expected = [
        {"option": "3 bits", "cost": 3.0, "unit": "bits", "loss": 0.5, "chosen": False},
        {"option": "8 bits", "cost": 8.0, "unit": "bits", "loss": 0.0, "chosen": True},
    ]
    assert [layer["alternatives"] for layer in layers] == [expected, expected]


def test_the_frontier_of_a_report_has_its_point_its_curve_and_one_width_everywhere() -> None:
    assert figures.frontier_figures(make_frontier()) == {
        **{"quantity": "bytes", "unit": "bytes", "loss_unit": "nats", "num_points": 4, "index": 1},
        **{"cost": 600.0, "loss": 0.5},
        "points": [[250.0, 0.75], [600.0, 0.5], [950.0, 0.25], [1300.0, 0.0]],
        "rivals": [{"name": "4 bits", "cost": 250.0, "loss": 0.75}, {"name": "float", "cost": 1300.0, "loss": 0.0}],
    }


@pytest.mark.parametrize("num_points", [MAX_POINTS, MAX_POINTS + 1, 5321])
def test_a_long_frontier_is_thinned_but_keeps_its_ends_and_its_point(num_points: int) -> None:
    costs, losses = tuple(range(num_points)), tuple(1 / (n + 1) for n in range(num_points))
    index = num_points // 3 + 1
    record = figures.frontier_figures(make_frontier(costs=costs, losses=losses, index=index))
    assert record["num_points"] == num_points and len(record["points"]) <= MAX_POINTS + 2
    shown = [cost for cost, _ in record["points"]]
    assert shown == sorted(shown)
    assert {100.0, 10.0 * (10 + index), 10.0 * (num_points + 9)} <= set(shown)


def test_a_range_for_each_channel_is_not_spelled_out_in_a_reason(dense: tuple[Source, Graph]) -> None:
    source, graph = dense
    tensors: Tensors = dict(source.module.state_dict())
    levels = torch.ones(8, 4, dtype=torch.int8)
    tensors["0.weight"] = QuantizedTensor(levels, 4, torch.full((8,), 0.1), 0)
    decisions = (Quantize("0.weight", "weight", 4, "symmetric", 0, "channels:mmmsssss"),)
    plan = Plan("hawq", {}, 0, source.sha256, None, None, decisions, {})
    layers = figures.layer_records(source.module.state_dict(), graph, tensors, plan)
    assert layers[0]["why"].startswith("hawq chose 4 bits with a range for each channel: the weights move by ")


def test_a_network_without_layers_has_no_division_by_zero() -> None:
    assert figures.totals([]) == {"average_bits": 32.0, "sparsity": 0.0}


def test_a_tied_weight_counts_once() -> None:
    source, graph = traced(Tied(), torch.zeros(2, 3, dtype=torch.int64))
    layers = figures.layer_records(source.module.state_dict(), graph, dict(source.module.state_dict()), None)
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
        (Budget("bytes", 0.25, of="dense"), True),
        (Budget("bytes", 0.24, of="dense"), False),
        (Budget("latency", 2.0), True),
        (Budget("latency", 2.0 / LATENCY_SLACK - 0.01), False),
        (Budget("latency", 0.5, of="dense"), True),
        (Budget("latency", 0.25, of="dense"), False),
        (Budget("bops", 600.0), True),
        (Budget("bops", 599.0), False),
        (Budget("bops", 0.06, of="dense"), True),
        (Budget("bops", 0.05, of="dense"), False),
    ],
)
def test_budget_checks(budget: Budget, ok: bool) -> None:
    reached = {"bytes": 100, "average_bits": 4.0, "sparsity": 0.5, "latency": 2.0}
    dense = {"bytes": 400, "latency": 4.0}
    (check,) = figures.budget_checks(budget, reached, dense, make_frontier(quantity="bops"))
    assert check.name == "budget" and check.ok is ok
    assert figures.budget_checks(None, reached, dense, None) == []


def test_bit_operations_are_not_checked_without_their_frontier() -> None:
    assert figures.budget_checks(Budget("bops", 1.0), {}, {}, None) == []


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
    assert figures.layer_records(source.module.state_dict(), graph, dict(source.module.state_dict()), None) == []


def test_inspect_without_an_architecture_lists_tensors(tmp_path: Path) -> None:
    torch.save({"weight": torch.ones(2, 3).half(), "steps": torch.tensor(3)}, tmp_path / "net.pt")
    record = inspection.describe_tensors(read_checkpoint(tmp_path / "net.pt"))
    assert record["parameters"] == 6 and record["macs"] is None
    assert record["dtypes"] == {"float16": 1, "int64": 1}
    assert record["layers"][0] == {
        "name": "weight", "op": "tensor", "shape": [2, 3], "parameters": 6, "macs": None, "dtype": "float16",
    }  # fmt: skip
    assert "pass --model FILE.py:FACTORY" in record["notes"][-1]


def test_channels_of_their_own_width_are_counted_by_bits_and_activations_have_theirs(
    dense: tuple[Source, Graph],
) -> None:
    source, graph = dense
    tensors: Tensors = dict(source.module.state_dict())
    width = "channels:0tt33337"
    levels = torch.zeros(8, 4, dtype=torch.int8)
    tensors["0.weight"] = QuantizedTensor(levels, width, torch.ones(8), 0)
    decisions = (
        Quantize("0.weight", "weight", width, "symmetric", 0, "mse"),
        Quantize("relu", "activation", 6, "asymmetric", None, (0.0, 2.5)),
    )
    plan = Plan("output-change", {}, 0, source.sha256, None, None, decisions, {})
    mixed, whole = figures.layer_records(source.module.state_dict(), graph, tensors, plan)
    assert mixed["channel_bits"] == [[0.0, 1], [1.6, 2], [3.0, 4], [7.0, 1]]
    assert mixed["bits"] == pytest.approx((2 * 1.6 + 4 * 3 + 7) / 8)
    assert whole["channel_bits"] == []
    (activation,) = figures.activation_records(graph, plan)
    assert activation["tensor"] == "relu" and activation["bits"] == 6 and activation["range"] == (0.0, 2.5)
    assert activation["read_by"] == ["2.weight"] and activation["alternatives"] == []
    assert figures.activation_records(graph, None) == []
