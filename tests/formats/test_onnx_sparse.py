"""Weights without their zeros: the plain file's outputs and kernels, in nearly the entropy of what is left."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper
from onnx_networks import SHAPES, Array, assert_same_network, network, of_levels, resnet20_weights, run

from compress.formats import onnx_build
from compress.formats.onnx_sparse import expected_bits, expected_bytes, sparse_bytes, sparsify

DENSITIES = [0.0, 0.001, 0.02, 0.3, 1.0]


def thinned(array: Array, density: float, seed: int = 0) -> Array:
    """The array with a share of its values, the others zero."""
    return np.where(np.random.default_rng(seed).random(array.shape) < density, array, array.dtype.type(0))


def of_arrays(arrays: dict[str, Array]) -> onnx.ModelProto:
    """A model whose outputs are its initializers, in floats where they are float32 and else as scaled levels."""
    floats = {name: array for name, array in arrays.items() if array.dtype == np.float32}
    levels = {name: array for name, array in arrays.items() if array.dtype == np.int8}
    model = of_levels(levels, {name: np.ones(len(array), np.float32) for name, array in levels.items()})
    for name, array in floats.items():
        model.graph.initializer.append(numpy_helper.from_array(array, name))
        model.graph.node.append(helper.make_node("Identity", [name], [f"{name}.y"]))
        model.graph.output.append(helper.make_tensor_value_info(f"{name}.y", onnx.TensorProto.FLOAT, array.shape))
    return model


def assert_restored(arrays: dict[str, Array]) -> onnx.ModelProto:
    """The sparse file gives the arrays, to the bit; returns it."""
    plain = of_arrays(arrays)
    sparse = sparsify(plain, list(arrays))
    onnx.checker.check_model(sparse, full_check=True)
    count = len(plain.graph.output)
    for found, expected in zip(run(sparse)[:count], run(plain)[:count], strict=True):
        assert found.tobytes() == expected.tobytes()
    return sparse


@pytest.mark.parametrize("density", [0.0, 0.01, 0.1, 0.5, 1.0])
@pytest.mark.parametrize(("kind", "suffix"), [("float", ".w"), ("weights", ""), ("integer", "")])
def test_sparse_weights_run_as_the_dense_file(kind: str, suffix: str, density: float, tmp_path: Path) -> None:
    levels = np.random.default_rng(9)
    plain = network({n: levels.integers(-128, 128, s).astype(np.int8) for n, s in SHAPES.items()}, kind)
    names = [f"{name}{suffix}" for name in SHAPES]
    for tensor in plain.graph.initializer:
        if tensor.name in names:
            array = thinned(numpy_helper.to_array(tensor), density)
            if density and array.dtype == np.float32:
                array.reshape(-1)[0] = -0.0
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    sparse = sparsify(plain, names)
    assert sparse.SerializeToString() == sparsify(plain, names[::-1]).SerializeToString()
    found = assert_same_network(sparse, plain, tmp_path)
    if kind == "integer":
        assert (found["QLinearConv"], found["QLinearMatMul"]) == (3, 1)


@settings(deadline=None, max_examples=40)
@given(
    sizes=st.lists(st.integers(1, 3000), min_size=1, max_size=3),
    density=st.sampled_from(DENSITIES),
    bits=st.sampled_from([0, 1, 7, 10, 23]),
    spread=st.integers(0, 20),
    seed=st.integers(0, 999),
)
def test_floats_are_restored(sizes: list[int], density: float, bits: int, spread: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    arrays: dict[str, Array] = {}
    for i, size in enumerate(sizes):
        mantissa = 1 + random.integers(0, 1 << bits, size) / (1 << bits)
        signs = random.choice([-1, 1], size)
        values = np.ldexp(mantissa * signs, random.integers(-spread, spread + 1, size))
        arrays[f"{i}"] = thinned(values.astype(np.float32), density, seed)
    assert_restored(arrays)


@settings(deadline=None, max_examples=20)
@given(
    sizes=st.lists(st.integers(1, 3000), min_size=1, max_size=3),
    density=st.sampled_from(DENSITIES),
    seed=st.integers(0, 999),
)
def test_floats_of_any_bits_are_restored(sizes: list[int], density: float, seed: int) -> None:
    random = np.random.default_rng(seed)
    assert_restored(
        {
            f"{i}": thinned(random.integers(0, 2**32, size, dtype=np.uint32).view(np.float32), density, seed)
            for i, size in enumerate(sizes)
        }
    )


@settings(deadline=None, max_examples=40)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 50), st.integers(1, 60)), min_size=1, max_size=3),
    density=st.sampled_from(DENSITIES),
    most=st.sampled_from([1, 3, 20, 127]),
    seed=st.integers(0, 999),
)
def test_levels_are_restored(sizes: list[tuple[int, int]], density: float, most: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    levels = [random.integers(-most - 1, most + 1, size).astype(np.int8) for size in sizes]
    assert_restored({f"{i}": thinned(array, density, seed) for i, array in enumerate(levels)})


@pytest.mark.parametrize("where", [0, 1, 4_999, 9_999])
def test_one_survivor_is_restored_wherever_it_is(where: int) -> None:
    for kind in (np.float32, np.int8):
        array = np.zeros((100, 100), kind)
        array.reshape(-1)[where] = 3
        assert_restored({"w": array})


@pytest.mark.parametrize("value", [-0.0, 1e-45, 2.0**-126, 2.0**-104, 2.0**-103, 2.0**127, np.inf, -np.inf])
def test_extreme_floats_are_restored(value: float) -> None:
    array = thinned(np.random.default_rng(0).standard_normal(4_000, dtype=np.float32), 0.5)
    array[1] = value
    assert_restored({"w": array})


def test_a_large_weight_is_made_of_pieces_and_a_stream_is_cut_between_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_build, "STREAM_WEIGHTS", 500)
    random = np.random.default_rng(0)
    arrays: dict[str, Array] = {
        f"{size}": thinned(random.standard_normal(size, dtype=np.float32), 0.1) for size in (200, 250, 300, 501, 1700)
    }
    arrays["empty"] = np.zeros(600, np.float32)
    ops = Counter(node.op_type for node in assert_restored(arrays).graph.node)
    assert (ops["ScatterElements"], ops["Concat"]) == (1 + 1 + 2 + 4, 3)


def entropy(values: Array) -> float:
    """Bytes of ``values`` at their entropy."""
    counts = np.unique(values, return_counts=True)[1]
    return float(-(counts * np.log2(counts / values.size)).sum() / 8)


def assert_nearly(model: onnx.ModelProto, expected: float) -> None:
    """The file has no more than 5 % beyond, and the nodes that take it apart."""
    assert expected < model.ByteSize() < 1.05 * expected + 3_000


@pytest.mark.parametrize("density", [0.01, 0.1, 0.3])
@pytest.mark.parametrize(("kind", "bits"), [(np.float32, 24), (np.float16, 11)])
def test_floats_take_the_bits_of_mantissas_and_the_entropy_of_the_rest(
    density: float, kind: type[np.floating[Any]], bits: int
) -> None:
    values = np.random.default_rng(0).standard_normal(200_000).astype(kind).astype(np.float32)
    array = thinned(values, density)
    survivors = array[array != 0]
    made = sparsify(of_arrays({"w": array}), ["w"])
    assert_nearly(made, entropy(array != 0) + survivors.size * bits / 8 + entropy(np.frexp(survivors)[1]))
    assert abs(made.ByteSize() - sparse_bytes(array)) < 3_000


def test_levels_take_nearly_their_entropy() -> None:
    levels = np.clip(np.rint(np.random.default_rng(0).standard_normal((400, 500)) * 30), -127, 127).astype(np.int8)
    array = np.where(abs(levels) < 49, 0, levels).astype(np.int8)
    scales = 400 * 4
    made = sparsify(of_arrays({"w": array}), ["w"])
    assert_nearly(made, entropy(array != 0) + entropy(array[array != 0]) + scales)


@pytest.mark.parametrize("name", ["x", "count", "other"])
def test_only_weights_are_made_sparse(name: str) -> None:
    model = network({n: np.ones(shape, np.int8) for n, shape in SHAPES.items()}, "integer")
    model.graph.initializer.append(numpy_helper.from_array(np.zeros(3, np.int64), "count"))
    with pytest.raises(ValueError, match=f"{name} is not a float32 or int8 initializer of the model"):
        sparsify(model, [name])


@pytest.mark.parametrize("density", [0.001, 0.03, 0.1, 0.5, 0.9])
def test_the_expected_size_is_that_of_survivors_at_random_places(density: float) -> None:
    values = np.random.default_rng(0).standard_normal(300_000, dtype=np.float32)
    array = thinned(values, density)
    expected = expected_bytes(array.size, np.count_nonzero(array), expected_bits(values, 24))
    assert expected == pytest.approx(sparse_bytes(array), rel=0.01)
    assert expected_bytes(array.size, 0, 26.0) == 0


@pytest.mark.data
def test_resnet20_without_nine_tenths_of_its_weights_is_restored() -> None:
    weights = resnet20_weights()
    threshold = np.quantile(np.concatenate([abs(array).reshape(-1) for array in weights.values()]), 0.9)
    arrays = {n: np.where(abs(array) > threshold, array, np.float32(0)) for n, array in weights.items()}
    sparse = assert_restored(arrays)
    places = sum(map(np.count_nonzero, arrays.values()))
    print(f"ResNet-20 at sparsity 0.9: {sparse.ByteSize()} B of ONNX, {places} survivors")
    assert sparse.ByteSize() < places * 26.1 / 8 + 16_300 + 4_500
