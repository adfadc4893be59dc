import numpy as np
import onnx
import onnxruntime
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from compress.formats.onnx_rereads import rereads_as_sums


def reread(own: tuple[float, int], grid: tuple[float, int], bits: int, own_bits: int = 8) -> onnx.ModelProto:
    """Floats rounded to a grid, which are an output, and once more to a narrower one."""
    tops = {"own_top": 2**own_bits - 1, "top": 2**bits - 1, "bottom": 0}
    scales = {"own_scale": own[0], "scale": grid[0]}
    zeros = {"own_zero": own[1], "zero": grid[1]}
    constants = [numpy_helper.from_array(np.array(v, np.uint8), n) for n, v in (tops | zeros).items()]
    constants += [numpy_helper.from_array(np.array(v, np.float32), n) for n, v in scales.items()]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "own_scale", "own_zero"], ["a"]),
        helper.make_node("Clip", ["a", "bottom", "own_top"], ["b"]),
        helper.make_node("DequantizeLinear", ["b", "own_scale", "own_zero"], ["stream"]),
        helper.make_node("QuantizeLinear", ["stream", "scale", "zero"], ["c"]),
        helper.make_node("Clip", ["c", "bottom", "top"], ["d"]),
        helper.make_node("DequantizeLinear", ["d", "scale", "zero"], ["read"]),
    ]
    ends = {n: helper.make_tensor_value_info(n, TensorProto.FLOAT, [None]) for n in ("x", "stream", "read")}
    graph = helper.make_graph(nodes, "g", [ends["x"]], [ends["stream"], ends["read"]], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def outputs(model: onnx.ModelProto, x: NDArray[np.float32], *, is_optimized: bool) -> list[NDArray[np.float32]]:
    options = onnxruntime.SessionOptions()
    if not is_optimized:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    stream, read = session.run(None, {"x": x})
    return [stream, read]


def count(model: onnx.ModelProto, op: str) -> int:
    return sum(node.op_type == op for node in model.graph.node)


grids = st.tuples(st.floats(0.0078125, 4.0, width=32), st.integers(0, 255))


@given(own=grids, grid=grids, bits=st.integers(2, 7), own_bits=st.integers(2, 8))
def test_a_second_rounding_is_a_sum_with_zero_of_the_same_values(
    own: tuple[float, int], grid: tuple[float, int], bits: int, own_bits: int
) -> None:
    own, grid = (own[0], own[1] % 2**own_bits), (grid[0], grid[1] % 2**bits)
    plain = reread(own, grid, bits, own_bits)
    before = plain.SerializeToString(deterministic=True)
    changed = rereads_as_sums(plain)
    assert plain.SerializeToString(deterministic=True) == before
    onnx.checker.check_model(changed, full_check=True)
    assert count(changed, "Add") == 1
    x = np.arange(-20 - own[1], 2**own_bits + 20 - own[1], dtype=np.float32) * np.float32(own[0])  # beyond all levels
    want, got = (outputs(model, x, is_optimized=False) for model in (plain, changed))
    assert np.array_equal(got[0], want[0])
    assert np.array_equal(got[1], want[1])
    # Integer kernels multiply by a quotient of scales: a tie may go the other way, by one level and no more.
    fast = outputs(changed, x, is_optimized=True)
    ties = np.abs(np.abs(want[0] / np.float32(grid[0])) % 1 - 0.5) < 1e-3
    assert np.allclose(fast[1][~ties], want[1][~ties], rtol=1e-6, atol=0)
    assert (np.abs(fast[1] - want[1]) <= grid[0] * 1.0001).all()


def test_the_clip_stays_where_values_are_beyond_both_ends() -> None:
    nonnegative = rereads_as_sums(reread((0.1, 0), (0.5, 0), 4))
    negative = rereads_as_sums(reread((0.1, 255), (0.5, 15), 4))
    both = rereads_as_sums(reread((0.1, 128), (0.5, 7), 4))
    inside = rereads_as_sums(reread((0.1, 128), (5.0, 7), 4))
    assert [count(model, "Clip") for model in (nonnegative, negative, both, inside)] == [1, 1, 2, 1]


def test_a_clip_of_one_end_stays_and_what_nothing_reads_is_no_error() -> None:
    plain = reread((0.1, 0), (0.5, 0), 4)
    next(node for node in plain.graph.node if node.output[0] == "d").input[1] = ""
    changed = rereads_as_sums(plain)
    assert [count(changed, op) for op in ("Clip", "Add")] == [2, 1]
    x = np.arange(0, 30, 0.1, dtype=np.float32)
    want, got = (outputs(model, x, is_optimized=False) for model in (plain, changed))
    assert np.array_equal(got[1], want[1])
    unread = reread((0.1, 0), (0.5, 0), 4)
    del unread.graph.node[4:], unread.graph.output[1:]
    assert count(rereads_as_sums(unread), "Add") == 0  # dropped, as what it makes is


def test_what_is_rounded_once_stays() -> None:
    plain = reread((0.1, 0), (0.5, 0), 4)
    del plain.graph.node[3:], plain.graph.output[1:]
    assert rereads_as_sums(plain).SerializeToString() == plain.SerializeToString()
