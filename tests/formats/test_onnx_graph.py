"""Short files: what no runtime reads is left out, and what is left gives the same."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
import onnxruntime as ort

from compress.formats.onnx_graph import reads, shorten

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
