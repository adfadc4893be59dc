"""Packed ONNX weights: the plain file's outputs and kernels in ONNX Runtime, in a file of nearly the packed bits."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnx_networks import (
    AXES,
    SHAPES,
    Array,
    Levels,
    assert_same_network,
    finish,
    network,
    of_levels,
    resnet20_weights,
    run,
)

from compress.formats import onnx_build, onnx_packed
from compress.formats.onnx_packed import pack_weights
from compress.numerics.rounding import level_range
from compress.widths import Width


def channels_of(name: str, letters: str) -> str:
    """A width for each channel, of these in turn."""
    count = SHAPES[name][AXES[name]]
    return "channels:" + (letters * count)[:count]


def random_levels(bits: dict[str, int] | dict[str, Width], seed: int, *, flipped: tuple[str, ...] = ()) -> Levels:
    """Levels of every value that the widths allow; every second channel of a flipped layer reaches ``2**(b - 1)``."""
    random = np.random.default_rng(seed)
    levels: Levels = {}
    for name, width in bits.items():
        if isinstance(width, str):
            values = np.zeros(SHAPES[name], np.int8)
            for i, channel in enumerate(np.moveaxis(values, AXES[name], 0)):
                least, most = level_range(width.removeprefix("channels:")[i])
                channel[:] = random.integers(least, most + 1, channel.shape)
                channel[0] = least
                channel *= -1 if name in flipped and i % 2 else 1
            levels[name] = values
            continue
        half = 2 ** (width - 1)
        values = random.integers(-half, half, SHAPES[name]).astype(np.int8)
        if name in flipped:
            channels = np.moveaxis(values, AXES[name], 0)[::2]
            channels[:, 0] = -half
            channels *= -1
        levels[name] = values
    return levels


CASES = [
    *(pytest.param(dict.fromkeys(SHAPES, bits), (), id=f"{bits} bits") for bits in range(2, 9)),
    *(pytest.param(dict.fromkeys(SHAPES, bits), tuple(SHAPES), id=f"{bits} bits flipped") for bits in range(2, 8)),
    pytest.param({"conv1": 8, "conv2": 3, "conv3": 2, "head": 5}, (), id="mixed"),
    pytest.param({"conv1": 4, "conv2": 4, "conv3": 7, "head": 6}, ("conv2", "head"), id="mixed, some flipped"),
]


@pytest.mark.parametrize(
    ("few_bytes", "together"), [(2**17, 2**21), (2**17, 100), (0, 0)], ids=["together", "some alone", "planes alone"]
)
@pytest.mark.parametrize(("bits", "flipped"), CASES)
def test_integer_kernels_and_outputs_are_those_of_the_plain_file(
    bits: dict[str, int],
    flipped: tuple[str, ...],
    few_bytes: int,
    together: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(onnx_build, "FEW_BYTES", few_bytes)
    monkeypatch.setattr(onnx_build, "MOST_TOGETHER", together)
    plain = network(random_levels(bits, 0, flipped=flipped), "integer")
    found = assert_same_network(pack_weights(plain, bits), plain, tmp_path)
    assert found["QLinearConv"] == 3
    assert found["QLinearMatMul"] == 1


BY_CHANNEL = [
    pytest.param("0t2s345678abcdefghijklm", (), id="every width"),
    pytest.param("0t2s34567abcdefghijklm", tuple(SHAPES), id="every width, flipped"),
    pytest.param("t", (), id="three levels"),
    pytest.param("bcde", (), id="one code by stages"),
    pytest.param("s", ("conv2",), id="six levels, one flipped"),
]


@pytest.mark.parametrize(
    ("most_places", "few_bytes"),
    [(256, 2**17), (3, 2**17), (256, 0)],
    ids=["a byte a place", "places from widths", "planes alone"],
)
@pytest.mark.parametrize(("letters", "flipped"), BY_CHANNEL)
def test_channels_have_widths_of_their_own(
    letters: str,
    flipped: tuple[str, ...],
    most_places: int,
    few_bytes: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(onnx_packed, "MOST_PLACES", most_places)
    monkeypatch.setattr(onnx_build, "FEW_BYTES", few_bytes)
    bits: dict[str, Width] = {name: channels_of(name, letters) for name in SHAPES}
    levels = random_levels(bits, 0, flipped=flipped)
    plain = network(levels, "integer")
    found = assert_same_network(pack_weights(plain, bits), plain, tmp_path)
    assert (found["QLinearConv"], found["QLinearMatMul"]) == (3, 1)
    folded = pack_weights(network(levels, "weights"), {**bits, "conv1": 8}, dequantize="fold")
    assert "DequantizeLinear" not in assert_same_network(folded, network(levels, "float"), tmp_path)


@pytest.mark.parametrize(("count", "own_bytes"), [(64, 1 + 1 / 8), (1024, 2 / 8 + 1 / 8)])
def test_widths_by_channel_cost_their_bits_and_little_more(count: int, own_bytes: float) -> None:
    """A sign, and a place of few channels, or the width of one of many, of which there are four."""
    bits = "channels:" + "".join(letter * count for letter in "0t3s")
    levels = np.random.default_rng(0).integers(-1, 2, (4 * count, 1200)).astype(np.int8)
    levels[:count] = 0
    levels[2 * count : 3 * count, 0] = 4  # flipped
    packed = pack_weights(of_levels({"w": levels}, {"w": np.ones(4 * count, np.float32)}), {"w": bits})
    assert packed.ByteSize() < count * 1200 * (1.6 + 3 + 8 / 3) / 8 + 4 * count * (4 + own_bytes) + 2_300


def test_widths_of_other_channels_are_refused() -> None:
    levels = {"w": np.zeros((4, 5), np.int8)}
    model = of_levels(levels, {"w": np.ones(4, np.float32)})
    with pytest.raises(ValueError, match="w: widths for 3 channels, not for 4"):
        pack_weights(model, {"w": "channels:333"})
    levels["w"][1] = 2
    with pytest.raises(ValueError, match="w: levels 0 to 2 don't fit channels:3t33"):
        pack_weights(of_levels(levels, {"w": np.ones(4, np.float32)}), {"w": "channels:3t33"})


@pytest.mark.parametrize(("bits", "flipped"), CASES)
def test_folded_weights_run_as_the_float_file(bits: dict[str, int], flipped: tuple[str, ...], tmp_path: Path) -> None:
    levels = random_levels(bits, 1, flipped=flipped)
    folded = pack_weights(network(levels, "weights"), bits, dequantize="fold")
    assert "DequantizeLinear" not in assert_same_network(folded, network(levels, "float"), tmp_path)


def test_linear_keeps_the_kernels_of_a_weight_only_file(tmp_path: Path) -> None:
    bits = dict.fromkeys(SHAPES, 3)
    plain = network(random_levels(bits, 2), "weights")
    assert assert_same_network(pack_weights(plain, bits), plain, tmp_path)["DequantizeLinear"]


@settings(deadline=None, max_examples=40)
@given(
    layers=st.lists(st.tuples(st.integers(2, 8), st.integers(1, 5), st.integers(1, 9), st.booleans()), max_size=5),
    seed=st.integers(0, 999),
    dequantize=st.sampled_from(["linear", "fold"]),
)
def test_unpacked_weights_are_levels_times_scale(
    layers: list[tuple[int, int, int, bool]], seed: int, dequantize: onnx_packed.Dequantize
) -> None:
    random = np.random.default_rng(seed)
    levels: Levels = {}
    for i, (bits, rows, columns, is_flipped) in enumerate(layers):
        half = 2 ** (bits - 1)
        levels[f"{i}"] = random.integers(-half, half, (rows, columns)).astype(np.int8)
        levels[f"{i}"][0] *= -1 if is_flipped and bits < 8 else 1
    scales = {name: random.standard_normal(len(array)).astype(np.float32) for name, array in levels.items()}
    packed = pack_weights(
        of_levels(levels, scales), {f"{i}": layer[0] for i, layer in enumerate(layers)}, dequantize=dequantize
    )
    onnx.checker.check_model(packed, full_check=True)
    if layers:
        found = run(packed)[: len(layers)]
        for output, name in zip(found, levels, strict=True):
            assert output.tobytes() == (levels[name].astype(np.float32) * scales[name][:, None]).tobytes()


def test_equal_models_give_equal_bytes_and_the_model_is_left_as_it_is() -> None:
    bits = {"conv1": 3, "conv2": 5, "conv3": 4, "head": 4}
    plain = network(random_levels(bits, 3), "integer")
    before = plain.SerializeToString()
    packed = pack_weights(plain, bits).SerializeToString()
    assert packed == pack_weights(plain, dict(reversed(bits.items()))).SerializeToString()
    assert plain.SerializeToString() == before


@pytest.mark.parametrize("bits", range(2, 8))
def test_a_file_takes_nearly_the_packed_bits(bits: int) -> None:
    levels = {"w": np.random.default_rng(0).integers(-2, 2, (256, 1000)).astype(np.int8)}
    packed = pack_weights(of_levels(levels, {"w": np.ones(256, np.float32)}), {"w": bits})
    assert packed.ByteSize() < 256_000 * bits // 8 + 256 * 4 + 2_000


def test_names_that_are_taken_are_avoided(tmp_path: Path) -> None:
    bits = dict.fromkeys(SHAPES, 5)
    plain = network(random_levels(bits, 4), "integer")
    for node in plain.graph.node:
        node.input[:] = ["hc0" if name == "mean" else name for name in node.input]
        node.output[:] = ["hc0" if name == "mean" else name for name in node.output]
    packed = pack_weights(plain, bits)
    made = [name for node in packed.graph.node for name in node.output]
    assert len(set(made)) == len(made)
    assert_same_network(packed, plain, tmp_path)


def test_a_stream_beyond_the_cap_is_cut_between_layers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(onnx_build, "STREAM_WEIGHTS", 300)
    bits = dict.fromkeys(SHAPES, 3)
    plain = network(random_levels(bits, 5), "integer")
    packed = pack_weights(plain, bits)
    assert Counter(node.op_type for node in packed.graph.node)["Split"] == 3 + 2  # and of the planes of either width
    assert_same_network(packed, plain, tmp_path)


def test_constants_that_only_a_removed_node_read_leave_the_file() -> None:
    bits = {"conv1": 8, "conv2": 4}
    folded = pack_weights(network(random_levels(dict.fromkeys(SHAPES, 2), 6), "weights"), bits, dequantize="fold")
    names = {tensor.name for tensor in folded.graph.initializer}
    assert not {"conv1.scale", "conv2.scale", "conv2", "zeros8", "zeros12"} & names
    assert {"conv1", "conv3", "conv3.scale", "zeros5"} <= names


def test_a_weight_of_matmul_integer_is_packed(tmp_path: Path) -> None:
    levels = random_levels({"head": 4}, 7)["head"]
    nodes = [
        helper.make_node("ReduceMean", ["x", "axes"], ["mean"], keepdims=0),
        helper.make_node("Gemm", ["mean", "widen"], ["wide"]),
        helper.make_node("DynamicQuantizeLinear", ["wide"], ["q", "step", "zero"]),
        helper.make_node("MatMulInteger", ["q", "head", "zero"], ["sum"]),
        helper.make_node("Cast", ["sum"], ["y"], to=TensorProto.FLOAT),
    ]
    constants: dict[str, Array] = {"axes": np.array([2, 3]), "widen": np.ones((3, 5), np.float32), "head": levels}
    plain = finish(nodes, constants, [("x", ["n", 3, 12, 12])], [("y", ["n", 7])])
    assert_same_network(pack_weights(plain, {"head": 4}), plain, tmp_path)


@pytest.mark.parametrize(
    ("bits", "message"),
    [
        ({"conv9": 4}, "conv9 is not an int8 initializer of the model"),
        ({"conv1.scale": 4}, "conv1.scale is not an int8 initializer"),
        ({"conv1": 1}, "conv1: 1 bits; 2 to 8 are possible"),
        ({"conv1": 3}, "conv1: levels -8 to 7 don't fit 3 bits"),
    ],
)
def test_what_cannot_be_packed_is_refused(bits: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pack_weights(network(random_levels(dict.fromkeys(SHAPES, 4), 8), "integer"), bits)


def test_a_zero_point_is_refused() -> None:
    plain = network(random_levels(dict.fromkeys(SHAPES, 4), 8), "integer")
    zeros = next(tensor for tensor in plain.graph.initializer if tensor.name == "zeros8")
    zeros.CopyFrom(numpy_helper.from_array(np.ones(8, np.int8), "zeros8"))
    with pytest.raises(ValueError, match="a float32 scale of at most one dimension and no zero point is expected"):
        pack_weights(plain, {"conv1": 4})


@pytest.mark.data
def test_resnet20_at_4_bits_unpacks_to_its_levels() -> None:
    weights = resnet20_weights()
    scales = {name: abs(w).reshape(len(w), -1).max(1) / np.float32(7) for name, w in weights.items()}
    levels = {n: np.rint((w.T / scales[n]).T).astype(np.int8) for n, w in weights.items()}
    packed = pack_weights(of_levels(levels, scales), dict.fromkeys(levels, 4))
    for output, name in zip(run(packed)[: len(levels)], levels, strict=True):
        assert np.array_equal(output.T, levels[name].T.astype(np.float32) * scales[name])
    print(f"ResNet-20's weights at 4 bits: {packed.ByteSize()} B of ONNX, 134168 B of bits")
    assert packed.ByteSize() < 145_000
