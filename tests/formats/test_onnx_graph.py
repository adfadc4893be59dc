"""Short files: what no runtime reads is left out, and what is left gives the same."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
import onnxruntime as ort

from compress.formats.onnx_graph import merge_equal, reads, shorten

BRANCHES = """
<ir_version: 10, opset_import: ["" : 21]>
network (float[N, 4] x, bool flag) => (float[N, 4] y)
<float[4] weight = {1, 2, 3, 4}, float[1] _a = {0.5}>
{
    a_long_name_of_a_value = Mul(x, weight)
    chosen = If (flag) <
        then_branch = yes () => (float[N, 4] of_then) { of_then = Add(a_long_name_of_a_value, _a) },
        else_branch = no () => (float[N, 4] _b) { _b = Neg(a_long_name_of_a_value) }
    >
    flat = Flatten <axis = 1> (chosen)
    y = Softmax <axis = 1> (flat)
}
"""


def test_short_names_and_usual_attributes_change_no_output() -> None:
    model = onnx.parser.parse_model(BRANCHES)
    for number, node in enumerate(model.graph.node):
        node.name = f"node_of_the_number_{number}"
    before = onnx.ModelProto.FromString(model.SerializeToString())
    shorten(model)
    onnx.checker.check_model(model, full_check=True)
    assert model.ByteSize() < before.ByteSize() and not any(node.name for node in model.graph.node)
    axes = {node.op_type: [a.i for a in node.attribute] for node in model.graph.node if node.op_type != "If"}
    assert axes == {"Mul": [], "Flatten": [], "Softmax": [1]}  # 1 is what Flatten has anyway, and Softmax hasn't
    assert [value.name for value in (*model.graph.input, *model.graph.output)] == ["x", "flag", "y"]
    assert {"weight", "_a"} <= set(reads(model.graph)) and "a_long_name_of_a_value" not in set(reads(model.graph))
    names = [name for node in model.graph.node for name in node.output]
    assert len(set(names)) == len(names) and not {"_a", "_b"} & set(names)
    sessions = [ort.InferenceSession(one.SerializeToString()) for one in (before, model)]
    x = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    for flag in (np.array(True), np.array(False)):
        first, second = (session.run(None, {"x": x, "flag": flag})[0] for session in sessions)
        np.testing.assert_array_equal(first, second)


EQUAL = """
<ir_version: 10, opset_import: ["" : 21]>
network (float[N, 4] x) => (float[N, 4] y, float[N, 4] z)
<float[4] one = {1, 2, 3, 4}, float[4] other = {1, 2, 3, 4}, float[1] half = {0.5}>
{
    a = Mul(x, one)
    b = Mul(x, other)
    c = Relu(a)
    d = Relu(b)
    e = Add(c, d)
    f = Mul(half, e)
    y = Mul(x, half)
    z = Mul(y, f)
}
"""


def test_equal_constants_and_equal_nodes_of_some_kinds_are_merged() -> None:
    model = onnx.parser.parse_model(EQUAL)
    before = ort.InferenceSession(model.SerializeToString())
    merge_equal(model, ("Mul",))
    onnx.checker.check_model(model, full_check=True)
    assert [node.op_type for node in model.graph.node] == ["Mul", "Relu", "Relu", "Add", "Mul", "Mul", "Mul"]
    assert [tensor.name for tensor in model.graph.initializer] == ["one", "half"]
    x = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    for one, other in zip(
        before.run(None, {"x": x}), ort.InferenceSession(model.SerializeToString()).run(None, {"x": x}), strict=True
    ):
        np.testing.assert_array_equal(one, other)


WINDOWS = """
<ir_version: 10, opset_import: ["" : 21]>
network (float[N, 2, 9, 9] x) => (float[N, 2, M, K] y)
<float[2, 2, 2, 2] w = {1, 2, 3, 4, 5, 6, 7, 8, 1, 2, 3, 4, 5, 6, 7, 8}>
{
    a = Conv <dilations = [1, 1], strides = [1, 1], pads = [0, 0, 0, 0], kernel_shape = [2, 2], group = 1> (x, w)
    b = Conv <dilations = [1, 2], strides = [2, 1], pads = [0, 0, 1, 0]> (a, w)
    y = MaxPool <kernel_shape = [1, 1], strides = [1, 1]> (b)
}
"""


def test_numbers_of_windows_that_are_the_usual_ones_are_left_out() -> None:
    model = onnx.parser.parse_model(WINDOWS)
    before = ort.InferenceSession(model.SerializeToString())
    shorten(model)
    found = [{attribute.name for attribute in node.attribute} for node in model.graph.node]
    assert found == [{"kernel_shape"}, {"dilations", "strides", "pads"}, {"kernel_shape"}]
    x = np.random.default_rng(0).normal(size=(1, 2, 9, 9)).astype(np.float32)
    after = ort.InferenceSession(model.SerializeToString())
    np.testing.assert_array_equal(before.run(None, {"x": x})[0], after.run(None, {"x": x})[0])


def test_initializers_get_short_names_where_theirs_say_nothing() -> None:
    model = onnx.parser.parse_model(BRANCHES)
    shorten(model, has_own_names=False)
    onnx.checker.check_model(model, full_check=True)
    assert [tensor.name for tensor in model.graph.initializer] != ["weight", "_a"]
    assert max(len(tensor.name) for tensor in model.graph.initializer) == 1
    session = ort.InferenceSession(model.SerializeToString())
    before = ort.InferenceSession(onnx.parser.parse_model(BRANCHES).SerializeToString())
    x = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    for flag in (np.array(True), np.array(False)):
        feed = {"x": x, "flag": flag}
        np.testing.assert_array_equal(session.run(None, feed)[0], before.run(None, feed)[0])
