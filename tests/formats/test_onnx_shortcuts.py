from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import helper, numpy_helper
from torch import Tensor, nn
from torch.nn import functional as F

from compress.export import to_onnx
from compress.formats.onnx_packed import pack_weights
from compress.formats.onnx_shortcuts import SHORTCUT_BITS, shortcuts_as_convolutions


class Shortcut(nn.Module):
    """Every n-th row and column of a convolution's output, with channels of zeros around it."""

    def __init__(self, rows: slice, columns: slice, pads: tuple[int, ...], value: float = 0.0, is_read: bool = False):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.rows, self.columns, self.pads, self.value, self.is_read = rows, columns, pads, value, is_read

    def forward(self, x: Tensor) -> Tensor:
        taken = torch.relu(self.conv(x))[:, :, self.rows, self.columns]
        y = F.pad(taken, self.pads, value=self.value)
        return y + taken.mean() if self.is_read else y


def exported(module: nn.Module) -> onnx.ModelProto:
    x = torch.randn(2, 3, 9, 8, generator=torch.Generator().manual_seed(0))
    return to_onnx(module.eval(), (x,))


def ops(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node if node.op_type in ("Slice", "Pad", "Conv")]


@pytest.mark.parametrize(
    ("rows", "columns", "pads"),
    [
        (slice(None, None, 2), slice(None, None, 2), (0, 0, 0, 0, 2, 2)),
        (slice(None, None, 2), slice(None, None, 3), (0, 0, 0, 0, 0, 5)),
        (slice(None), slice(None, None, 2), (0, 0, 0, 0, 1, 0)),
    ],
)
def test_a_strided_padded_shortcut_is_one_convolution_of_the_same_values(
    rows: slice, columns: slice, pads: tuple[int, ...]
) -> None:
    plain = exported(Shortcut(rows, columns, pads))
    changed, integers = shortcuts_as_convolutions(plain)
    assert not integers
    assert "Pad" in ops(plain)
    assert ops(changed) == ["Conv", "Conv"]
    onnx.checker.check_model(changed, full_check=True)
    for batch in (1, 3):
        x = np.random.default_rng(0).normal(size=(batch, 3, 9, 8)).astype(np.float32)
        want, got = (
            onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(
                None, {model.graph.input[0].name: x}
            )
            for model in (plain, changed)
        )
        assert np.array_equal(got[0], want[0])


@pytest.mark.parametrize(
    "module",
    [
        Shortcut(slice(1, None, 2), slice(1, None, 2), (0, 0, 0, 0, 2, 2)),  # from the second on
        Shortcut(slice(None, 6, 2), slice(None, 6, 2), (0, 0, 0, 0, 2, 2)),  # a part of the image
        Shortcut(slice(None, None, 2), slice(None, None, 2), (1, 1, 0, 0, 2, 2)),  # columns are added too
        Shortcut(slice(None, None, 2), slice(None, None, 2), (0, 0, 0, 0, 2, 2), value=1.0),  # not zeros
        Shortcut(slice(None), slice(None), (0, 0, 0, 0, 2, 2)),  # nothing is left out
        Shortcut(slice(None, None, 2), slice(None, None, 2), (0, 0, 0, 0, 2, 2), is_read=True),
    ],
    ids=["offset", "part", "columns", "ones", "dense", "read"],
)
def test_what_does_more_stays(module: nn.Module) -> None:
    plain = exported(module)
    assert ops(shortcuts_as_convolutions(plain)[0]) == ops(plain)
    before = plain.SerializeToString(deterministic=True)
    assert shortcuts_as_convolutions(plain)[0].SerializeToString(deterministic=True) == before


def rounded(plain: onnx.ModelProto) -> onnx.ModelProto:
    """The network with uint8 before and after its shortcut."""
    changed = onnx.ModelProto()
    changed.CopyFrom(plain)
    graph = changed.graph
    slices = [node for node in graph.node if node.op_type == "Slice"]
    pad = next(node for node in graph.node if node.op_type == "Pad")
    constants = {"s1": np.float32(0.021), "s2": np.float32(0.0173), "z": np.uint8(0)}
    graph.initializer.extend(numpy_helper.from_array(np.array(v), n) for n, v in constants.items())
    nodes = []
    for node in graph.node:
        if node is slices[0]:
            nodes += [
                helper.make_node("QuantizeLinear", [node.input[0], "s1", "z"], ["q1"]),
                helper.make_node("DequantizeLinear", ["q1", "s1", "z"], ["d1"]),
            ]
            node.input[0] = "d1"
        nodes.append(node)
    end = pad.output[0]
    pad.output[0] = "padded"
    nodes += [
        helper.make_node("QuantizeLinear", ["padded", "s2", "z"], ["q2"]),
        helper.make_node("DequantizeLinear", ["q2", "s2", "z"], [end]),
    ]
    del graph.node[:]
    graph.node.extend(nodes)
    return changed


def test_between_rounded_activations_it_is_an_integer_convolution(tmp_path: Path) -> None:
    plain = rounded(exported(Shortcut(slice(None, None, 2), slice(None, None, 2), (0, 0, 0, 0, 2, 2))))
    changed, integers = shortcuts_as_convolutions(plain, floats=False)
    assert [t.data_type for t in changed.graph.initializer if t.name in integers] == [onnx.TensorProto.INT8]
    packed = pack_weights(changed, dict.fromkeys(integers, SHORTCUT_BITS))
    onnx.checker.check_model(packed, full_check=True)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    for batch in (1, 3):
        x = np.random.default_rng(0).normal(size=(batch, 3, 9, 8)).astype(np.float32)
        want, got = (
            onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"]).run(
                None, {model.graph.input[0].name: x}
            )[0]
            for model in (plain, packed)
        )
        assert np.array_equal(got, want)
        assert want.any()
    optimized = onnx.load(str(tmp_path / "optimized.onnx"))
    assert [node.op_type for node in optimized.graph.node].count("QLinearConv") == 1


def test_a_float_shortcut_beside_rounded_activations_stays() -> None:
    plain = exported(Shortcut(slice(None, None, 2), slice(None, None, 2), (0, 0, 0, 0, 2, 2)))
    changed, integers = shortcuts_as_convolutions(plain, floats=False)
    assert ops(changed) == ops(plain)
    assert not integers
