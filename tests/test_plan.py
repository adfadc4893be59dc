"""A plan survives its file byte for byte, and a file that is no plan is refused by the key that is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from compress import canonical
from compress.apply import apply_plan
from compress.budget import Budget
from compress.errors import InputError
from compress.formats.packed import QuantizedTensor
from compress.numerics.rounding import round_weight
from compress.plan import BY_CHANNEL, RANGES, SCHEMA, CorrectBias, Decision, MaskWeights, Plan, Quantize, read_plan

NAMES = st.text(st.characters(codec="utf-8"), min_size=1, max_size=20)
SHA = "0" * 64


@st.composite
def masks(draw: st.DrawFn) -> MaskWeights:
    total = draw(st.integers(0, 10**9))
    return MaskWeights(
        draw(NAMES), draw(st.integers(0, total)), total, draw(st.sampled_from(["unstructured", "2:4", "16x1"])), SHA
    )


@st.composite
def roundings(draw: st.DrawFn) -> Quantize:
    bits = draw(st.integers(2, 8))
    if draw(st.booleans()):
        letters = st.text(st.sampled_from(list(RANGES.values())), min_size=1, max_size=20)
        found = draw(st.sampled_from(list(RANGES)) | letters.map(BY_CHANNEL.__add__))
        scheme = draw(st.sampled_from(["symmetric", "symmetric_reduced"] if bits > 2 else ["symmetric"]))
        return Quantize(draw(NAMES), "weight", bits, scheme, draw(st.none() | st.integers(0, 3)), found)
    ends = st.floats(allow_nan=False, allow_infinity=False)
    return Quantize(draw(NAMES), "activation", bits, "asymmetric", None, (draw(ends), draw(ends)))


@st.composite
def corrections(draw: st.DrawFn) -> CorrectBias:
    return CorrectBias(draw(NAMES), SHA)


def make_plan(*decisions: Decision) -> Plan:
    return Plan("uniform", {"range": "mse"}, 0, SHA, None, Budget("bits", 4.0), decisions, {"average_bits": 4.0})


def written(folder: Path, changes: dict[str, Any], *, without: str = "") -> Path:
    record = canonical.plain(make_plan(Quantize("w", "weight", 4, "symmetric", 0, "mse"))) | changes
    record.pop(without, None)
    path = folder / "plan.json"
    path.write_text(json.dumps(record))
    return path


@given(decisions=st.lists(masks() | roundings() | corrections(), max_size=5))
def test_read_gives_back_what_was_written_in_the_same_bytes(
    decisions: list[Decision], tmp_path_factory: pytest.TempPathFactory
) -> None:
    plan = make_plan(*decisions)
    path = tmp_path_factory.getbasetemp() / "plan.json"
    path.write_text(canonical.dumps(plan))
    assert read_plan(path) == plan
    assert canonical.dumps(read_plan(path)) == path.read_text()


def test_decisions_are_found_by_tensor() -> None:
    mask = MaskWeights("w", 1, 4, "unstructured", SHA)
    weight = Quantize("w", "weight", 4, "symmetric", 0, "mse")
    activation = Quantize("relu", "activation", 8, "asymmetric", None, (0.0, 6.0))
    plan = make_plan(mask, weight, activation)
    assert plan.masks() == {"w": mask}
    assert plan.quantized("weight") == {"w": weight}
    assert plan.quantized("activation") == {"relu": activation}


def decision(**changes: Any) -> dict[str, Any]:
    base = {"kind": "quantize", "tensor": "w", "target": "weight", "bits": 4}
    return base | {"scheme": "symmetric", "axis": 0, "range": "mse"} | changes


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (decision(kind="shrink"), "unknown decision kind shrink"),
        (decision(bits=9), "w has 9 bits"),
        (decision(bits=1), "w has 1 bits"),
        (decision(target="bias"), "w has target bias"),
        (decision(scheme="asymmetric"), "w has scheme asymmetric with 4 bits"),
        (decision(scheme="symmetric_reduced", bits=2), "w has scheme symmetric_reduced with 2 bits"),
        (decision(target="activation", range=[0, 1]), "w has scheme symmetric with 4 bits"),
        (decision(range="wide"), "w has range 'wide'"),
        (decision(range=5), "w has range '5'"),
        (decision(range="p42"), "w has range 'p42'"),
        (decision(range="channels:"), "w has range 'channels:'"),
        (decision(range="channels:msam?s"), "w has the range letter '?' for channel 4"),
        (decision(range=[0, 1]), "w has range (0.0, 1.0)"),
        (decision(target="activation", scheme="asymmetric"), "w has range 'mse'"),
        (decision(range=[0, 1, 2]), "bad value ("),
        (decision(group_size=48), "w has groups of 48"),
        (decision(group_size="32"), "w has groups of 32"),
        (decision(group_size=32, axis=1), "w has groups of 32"),
        (decision(group_size=32, bits=8, scheme="symmetric_reduced"), "w has groups, and symmetric_reduced levels"),
        (decision(group_size=32, bits="channels:34"), "w has groups, and symmetric levels of 3.5 bits by channel"),
        (decision(colour="red"), "bad value ("),
        ({"kind": "mask", "tensor": "w"}, "bad value ("),
        (
            {"kind": "mask", "tensor": "w", "kept": 5, "total": 4, "pattern": "unstructured", "mask_sha256": SHA},
            "w keeps 5 of 4",
        ),
        (
            {"kind": "mask", "tensor": "w", "kept": 1, "total": 4, "pattern": "4by1", "mask_sha256": SHA},
            "w has pattern 4by1",
        ),
    ],
)
def test_a_decision_that_is_wrong_is_named(tmp_path: Path, entry: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        read_plan(written(tmp_path, {"decisions": [entry]}))
    assert message in caught.value.message
    assert caught.value.hint


def test_groups_with_rounded_activations_are_refused(tmp_path: Path) -> None:
    rounded = decision(tensor="x", target="activation", scheme="asymmetric", axis=None, range=[0, 1])
    with pytest.raises(InputError, match="w has groups, and activations are rounded"):
        read_plan(written(tmp_path, {"decisions": [decision(group_size=32), rounded]}))


def test_groups_are_applied_without_data_and_only_to_matrices() -> None:
    plan = make_plan(Quantize("weight", "weight", 4, "symmetric", 0, "channels:sam", group_size=32))
    found = apply_plan(linear(0), (), plan, {}).tensors["weight"]
    assert isinstance(found, QuantizedTensor) and list(found.scale.shape) == [3, 2] and found.group_size == 32
    levels, scale = round_weight(linear(0).weight.detach(), 4, axis=0, search="channels:sam", group_size=32)
    assert torch.equal(found.levels, levels) and torch.equal(found.scale, scale)
    with pytest.raises(InputError, match="plan: weight has groups, but 3 dimensions"):
        apply_plan(nn.Conv1d(32, 3, 1), (), plan, {})


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="key 'predicted' is missing"):
        read_plan(written(tmp_path, {}, without="predicted"))


def test_another_schema_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"schema is hcompress.plan/9, expected {SCHEMA}"):
        read_plan(written(tmp_path, {"schema": "hcompress.plan/9"}))


def linear(seed: int) -> nn.Linear:
    layer = nn.Linear(50, 3)
    generator = torch.Generator().manual_seed(seed)
    layer.load_state_dict({"weight": torch.randn(3, 50, generator=generator), "bias": torch.zeros(3)})
    return layer


def test_ranges_by_channel_are_applied_to_any_weight_of_that_shape_without_data() -> None:
    plan = make_plan(Quantize("weight", "weight", 4, "symmetric", 0, "channels:sam"))
    for layer in (linear(0), linear(1), linear(0)):
        before = layer.weight.detach().clone()
        found = apply_plan(layer, (), plan, {}).tensors["weight"]
        assert isinstance(found, QuantizedTensor) and torch.equal(layer.weight, before)
        for channel, search in enumerate(("mse", "p99.9", "minmax")):
            levels, scale = round_weight(before, 4, axis=0, search=search)
            assert torch.equal(found.levels[channel], levels[channel])
            assert torch.equal(found.scale[channel], scale[channel])


@pytest.mark.parametrize(
    ("axis", "letters", "counts"),
    [(0, "msam", "for 4 channels, the checkpoint's has 3"), (None, "ms", "for 2 channels, the checkpoint's has 1")],
)
def test_ranges_for_another_number_of_channels_are_refused(axis: int | None, letters: str, counts: str) -> None:
    plan = make_plan(Quantize("weight", "weight", 4, "symmetric", axis, BY_CHANNEL + letters))
    with pytest.raises(InputError, match=f"plan: weight has ranges {counts}"):
        apply_plan(linear(0), (), plan, {})
