"""Uniform plans: widths, ranges, activations, and what they refuse."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zoo import named

from compress.apply import apply_plan, assemble, float_module
from compress.budget import Budget
from compress.context import Context, Storage
from compress.data import Data
from compress.errors import BudgetError, NumericsError, UsageError
from compress.figures import activation_records
from compress.formats.packed import QuantizedTensor
from compress.graph.rewrite import activation_points, feeds_layer
from compress.graph.trace import Graph, trace_graph
from compress.model import Source
from compress.plan import Plan, Quantize
from compress.quantize import correct, hawq, uniform
from compress.quantize.calibrate import activation_ranges
from compress.task import Calibration, Classification, divergence

NETWORK = named("plain_cnn")
WEIGHTS = ("0.0.weight", "1.0.weight", "2.2.weight")


def model_bytes(choices: Mapping[str, Storage]) -> int:
    return 5000 + sum(storage.kept * (storage.bits - 32) // 8 for storage in choices.values())


def plan_for(budget: Budget | None, *, data: Data | None = None, **options: Any) -> Plan:
    module, graph = traced()
    source = Source(Path("model.pt"), "0" * 64, module, "torch", None, {}, {}, ())
    context = Context(torch.Generator(), torch.device("cpu"), lambda *_: None, model_bytes, [])
    calibration = None if data is None else Calibration(Classification(), data)
    given = {
        "activations": "float",
        "activation_range": "auto",
        "reconstruction": "none",
        "bias_correction": "off",
        **options,
    }
    plan, sidecar = uniform.plan(source, graph, {}, calibration, budget, given, context)
    assert sidecar == {}
    return plan


def traced() -> tuple[nn.Module, Graph]:
    module = NETWORK.make()
    return module, trace_graph(module, NETWORK.inputs(2))


def widths(plan: Plan) -> dict[str, int]:
    return {name: decision.bits for name, decision in plan.quantized("weight").items()}


@pytest.mark.parametrize(("budget", "bits"), [(None, 8), (8.0, 8), (5.9, 5), (2.0, 2)])
def test_the_widest_that_fits_is_chosen_for_every_layer(budget: float | None, bits: int) -> None:
    plan = plan_for(None if budget is None else Budget("bits", budget))
    assert widths(plan) == dict.fromkeys(WEIGHTS, bits)
    assert plan.predicted["average_bits"] == bits


def test_a_byte_budget_chooses_the_widest_file_that_fits() -> None:
    total = 216 + 864 + 60
    plan = plan_for(Budget("bytes", 5000 - total * 28 / 8))
    assert widths(plan) == dict.fromkeys(WEIGHTS, 4)


def test_a_byte_budget_out_of_reach_gives_the_smallest_plan() -> None:
    assert widths(plan_for(Budget("bytes", 10.0))) == dict.fromkeys(WEIGHTS, 2)


def test_excluded_layers_count_with_32_bits() -> None:
    plan = plan_for(Budget("bits", 10.0), exclude=["0.*"])
    assert set(widths(plan)) == set(WEIGHTS[1:])
    assert plan.predicted["average_bits"] == pytest.approx((216 * 32 + 924 * 4) / 1140)


def test_ranges_of_activations_are_their_extremes_over_the_data() -> None:
    data = Data(NETWORK.inputs(100), None, "zoo")
    plan = plan_for(None, data=data, activations="8", activation_range="minmax")
    _, graph = traced()
    module = float_module(graph)
    points = [node.name for node in activation_points(module)]
    decisions = plan.quantized("activation")
    assert list(decisions) == points
    (x,) = data.inputs
    first = decisions[points[0]]
    assert first.range == (float(x.min()), float(x.max()))
    assert all(isinstance(d, Quantize) and d.bits == 8 and d.scheme == "asymmetric" for d in decisions.values())


@pytest.mark.parametrize("bits", [4, 6])
def test_fewer_bits_are_those_of_what_layers_read(bits: int) -> None:
    network = named("padded_residual")
    module = network.make()
    graph = trace_graph(module, network.inputs(2))
    data = Data(network.inputs(64), None, "zoo")
    source = Source(Path("model.pt"), "0" * 64, module, "torch", None, {}, {}, ())
    context = Context(torch.Generator(), torch.device("cpu"), lambda *_: None, model_bytes, [])
    given = {"range": "minmax", "activation_range": "mse", "reconstruction": "none", "bias_correction": "off"}
    plans = [
        uniform.plan(source, graph, {}, Calibration(Classification(), data), None, {**given, "activations": a}, context)
        for a in ("8", str(bits))
    ]
    whole, narrow = (plan.quantized("activation") for plan, _ in plans)
    shared = {name: name.removesuffix("_read") for name in narrow if name.endswith("_read")}
    assert set(shared.values()) == {"relu", "relu_2"}  # what a shortcut reads besides
    assert set(narrow) == {*whole, *shared}
    read = {node.name for node in float_module(graph).graph.nodes if feeds_layer(node) and node.op != "placeholder"}
    for name, decision in narrow.items():
        assert decision.bits == (bits if name in read else 8)
        (low, high), (least, most) = decision.range, whole[shared.get(name, name)].range
        slack = 1 + 1 / 15 if name in shared else 1  # scales that are odd parts of the value's
        assert slack * least <= low <= 0 <= high <= slack * most
        assert (low, high) == (least, most) or name in read
    assert any(narrow[name].range != whole[name].range for name in (read & narrow.keys()) - shared.keys())
    readers = [{r["tensor"]: r["read_by"] for r in activation_records(graph, plan)} for plan, _ in plans]
    assert readers[0]["relu"] == readers[1]["relu_read"] == ["1.conv1.weight"]
    assert readers[1]["relu"] == []


def test_a_shared_values_own_grid_keeps_its_bits_and_a_plan_may_still_narrow_it() -> None:
    network = named("padded_residual")
    module = network.make()
    graph = trace_graph(module, network.inputs(2))
    x = network.inputs(16)
    grids = activation_ranges(float_module(graph), ["relu_2"], Data(x, None, "zoo"), lambda *_: None)

    def output(**bits: int) -> Tensor:
        decisions = (Quantize(name, "activation", b, "asymmetric", None, grids["relu_2"]) for name, b in bits.items())
        plan = Plan("uniform", {}, 0, "0" * 64, None, None, tuple(decisions), {})
        return assemble(graph, apply_plan(module, graph.tied, plan, {}))(*x)

    dense = output()
    both, layers = output(relu_2=4), output(relu_2=8, relu_2_read=4)
    assert not torch.equal(both, layers)
    assert (layers - dense).square().sum() < (both - dense).square().sum()
    assert torch.equal(output(relu_2=4, relu_2_read=4), both)


def test_its_last_step_is_that_of_hawq() -> None:
    assert uniform.correct is hawq.correct is correct.correct


def test_a_range_holds_zero() -> None:
    _, graph = traced()
    data = Data((torch.rand(4, 3, 8, 8) + 1,), None, "positive")
    module = float_module(graph)
    (name, *_) = (node.name for node in activation_points(module))
    assert activation_ranges(module, [name], data, lambda *_: None)[name][0] == 0.0


def test_without_data_weights_are_clipped_by_their_own_error() -> None:
    assert {d.range for d in plan_for(Budget("bits", 4)).decisions} == {"mse"}


def test_with_data_the_search_is_measured_and_recorded() -> None:
    plan = plan_for(Budget("bits", 3), data=Data(NETWORK.inputs(32), None, "zoo"), range="auto")
    assert plan.options["range"] in ("minmax", "mse")
    assert plan.task_sha256 is not None


def test_divergence_is_zero_for_equal_outputs_alone() -> None:
    logits = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
    assert divergence(logits, logits, are_logits=True) == 0
    assert divergence(logits, logits + 1, are_logits=True) == pytest.approx(0, abs=1e-6)
    assert divergence(logits, -logits, are_logits=True) > 0.1
    assert divergence(logits[:, :1], logits[:, :1] + 2, are_logits=True) == pytest.approx(4, rel=1e-5)


def test_what_cannot_be_done_is_said() -> None:
    with pytest.raises(BudgetError, match="uniform goes down to 2 average bits"):
        plan_for(Budget("bits", 1.5))
    with pytest.raises(UsageError, match="no float weight to quantize"):
        plan_for(None, exclude=["*"])
    with pytest.raises(UsageError, match="8-bit activations are calibrated on data"):
        plan_for(None, activations="8")
    with pytest.raises(NumericsError, match="isn't finite on examples 0, 1, 2, 3 of huge"):
        plan_for(None, activations="8", data=Data((torch.full((4, 3, 8, 8), 3e38),), None, "huge"))


def test_no_pair_of_products_leaves_sixteen_bits_where_eight_bits_meet() -> None:
    data = Data(NETWORK.inputs(100), None, "zoo")
    module, graph = traced()
    for search in ("minmax", "mse", "auto"):
        plan = plan_for(None, data=data, activations="8", range=search)
        assert {d.scheme for d in plan.quantized("weight").values()} == {"symmetric_reduced"}
        for name, value in apply_plan(module, graph.tied, plan, {}).tensors.items():
            if name in WEIGHTS:
                assert isinstance(value, QuantizedTensor) and value.bits == 8
                assert 2 * 255 * int(value.levels.abs().max()) < 2**15


def test_all_levels_are_used_where_nothing_can_overflow() -> None:
    data = Data(NETWORK.inputs(100), None, "zoo")
    for budget, activations in ((Budget("bits", 8), "float"), (Budget("bits", 7), "8")):
        plan = plan_for(budget, data=data, activations=activations)
        assert {d.scheme for d in plan.quantized("weight").values()} == {"symmetric"}
