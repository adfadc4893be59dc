"""Packed safetensors: lossless to the bit, compact, readable by anybody, and safe against a damaged index."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import random
from collections.abc import Mapping
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from compress.errors import InputError
from compress.formats.packed import DTYPES, GROUP_SCALES, INDEX_KEY, SCALES, STREAM, QuantizedTensor, decode, encode
from compress.numerics.rounding import level_ranges
from compress.widths import WIDTHS, Width, by_channel

Tensors = dict[str, Tensor | QuantizedTensor]


def read(data: bytes) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The entries and the metadata, as safetensors itself reads them."""
    size = int.from_bytes(data[:8], "little")
    return safetensors.torch.load(data), json.loads(data[8 : 8 + size]).get("__metadata__", {})


def random_tensor(dtype: torch.dtype, shape: list[int], seed: int, density: float) -> Tensor:
    """Random bytes, NaN and -0.0 among them, with a share of true zeros."""
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.rand(shape, generator=generator) < density
    num_elements = math.prod(shape)
    raw = torch.randint(0, 256, (num_elements, dtype.itemsize), generator=generator, dtype=torch.uint8)
    raw[torch.rand(num_elements, generator=generator) >= density] = 0
    return raw.reshape(-1).view(dtype).reshape(shape)


def random_quantized(
    shape: list[int], bits: Width, axis: int | None, seed: int, *, density: float = 1.0, dtype: torch.dtype = torch.int8
) -> QuantizedTensor:
    generator = torch.Generator().manual_seed(seed)
    if isinstance(bits, int):
        half = 2 ** (bits - 1)
        levels = torch.randint(-half, half, shape, generator=generator)
    else:
        assert axis is not None
        low, high = level_ranges(bits, axis, len(shape))
        levels = (low + torch.rand(shape, generator=generator) * (high - low + 1)).floor()
    levels = torch.where(torch.rand(shape, generator=generator) < density, levels, 0).to(dtype)
    scale = torch.randn([] if axis is None else [shape[axis]], generator=generator)
    return QuantizedTensor(levels, bits, scale, axis)


def random_grouped(shape: list[int], bits: int, group_size: int, seed: int, *, density: float = 1.0) -> QuantizedTensor:
    found = random_quantized(shape, bits, 0, seed, density=density)
    scale = torch.randn(shape[0], -(-shape[1] // group_size), generator=torch.Generator().manual_seed(seed))
    return QuantizedTensor(found.levels, bits, scale.bfloat16().float(), 0, group_size)


def assert_same(
    found: Mapping[str, Tensor | QuantizedTensor], expected: Mapping[str, Tensor | QuantizedTensor]
) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        other = found[name]
        if isinstance(tensor, QuantizedTensor):
            assert isinstance(other, QuantizedTensor)
            assert (other.bits, other.axis, other.group_size) == (tensor.bits, tensor.axis, tensor.group_size)
            assert_same(
                {"levels": other.levels, "scale": other.scale}, {"levels": tensor.levels, "scale": tensor.scale}
            )
        else:
            assert isinstance(other, Tensor)
            assert (other.dtype, other.shape) == (tensor.dtype, tensor.shape)
            raw = [
                t.clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8) for t in (other, tensor)
            ]
            assert torch.equal(*raw), name


SHAPES = st.lists(st.integers(0, 6), max_size=4)
DENSITIES = st.sampled_from([0.0, 0.1, 0.6, 1.0])


@st.composite
def tensor_maps(draw: st.DrawFn) -> Tensors:
    tensors: Tensors = {}
    for name in draw(st.sets(st.text('ab.é"\\', min_size=1, max_size=6), max_size=5)):
        shape, seed, density = draw(SHAPES), draw(st.integers(0, 999)), draw(DENSITIES)
        if draw(st.booleans()) and len(shape) == 2:
            size = draw(st.sampled_from([1, 2, 3, 32]))
            tensors[name] = random_grouped(shape, draw(st.integers(2, 8)), size, seed, density=density)
        elif draw(st.booleans()):
            axis = draw(st.sampled_from([None, *range(len(shape))]))
            dtype = draw(st.sampled_from([torch.int8, torch.int16]))
            bits: Width = draw(st.integers(2, 8))
            if axis is not None and shape[axis] and draw(st.booleans()):
                bits = by_channel([draw(st.sampled_from(list(WIDTHS))) for _ in range(shape[axis] - 1)] + ["t"])
            tensors[name] = random_quantized(shape, bits, axis, seed, density=density, dtype=dtype)
        else:
            tensors[name] = random_tensor(draw(st.sampled_from(list(DTYPES.values()))), shape, seed, density)
    if tensors and draw(st.booleans()):
        tensors["tied"] = next(iter(tensors.values()))
    return tensors


@settings(deadline=None, max_examples=150)
@given(tensors=tensor_maps())
def test_decode_gives_back_what_encode_was_given(tensors: Tensors) -> None:
    data = encode(tensors, {"format": "pt", "b": "2"})
    found = decode(*read(data))
    assert_same(found, tensors)
    assert encode(found, {"b": "2", "format": "pt"}) == data


def test_a_file_without_an_index_decodes_to_its_tensors() -> None:
    tensors = {"weight": torch.randn(3, 2), "count": torch.tensor(5)}
    state, metadata = read(safetensors.torch.save(tensors))
    assert_same(decode(state, metadata), tensors)
    assert INDEX_KEY not in read(encode({"weight": torch.randn(3, 2)}, {INDEX_KEY: "of the source"}))[1]


def test_widths_by_channel_take_their_bits() -> None:
    found = len(encode({"weight": random_quantized([64, 1200], "channels:" + "0t3s" * 16, 0, 0)}, {}))
    assert found < 16 * 1200 * (1.6 + 3 + 8 / 3) / 8 + 64 * 5 + 400


@pytest.mark.parametrize(
    ("bits", "shape", "message"),
    [
        ("channels:000", [3, 2], "has channels:000 bits"),
        ("channels:0x3", [3, 2], "has channels:0x3 bits"),
        ("channels:33", [3, 2], "has bits for 2 channels, not those of its axis"),
        ("channels:" + "0" * 3 + "4", [4, 2**40], "weight needs 549755813888 more elements"),
    ],
)
def test_widths_by_channel_of_an_untrusted_file_are_checked(bits: str, shape: list[int], message: str) -> None:
    streams = {STREAM: torch.zeros(8, dtype=torch.uint8), SCALES: torch.zeros(len(bits))}
    index = json.dumps({"version": 1, "quantized": {"weight": [bits, 0, shape, None]}})
    with pytest.raises(InputError, match=message):
        decode(streams, {INDEX_KEY: index})


def test_groups_take_two_bytes_each() -> None:
    groups = len(encode({"weight": random_grouped([64, 320], 4, 32, 0)}, {}))
    channels = len(encode({"weight": random_quantized([64, 320], 4, 0, 0)}, {}))
    assert 64 * (10 * 2 - 4) <= groups - channels <= 64 * (10 * 2 - 4) + 100


def test_a_group_has_its_own_scale_and_the_last_one_may_be_shorter() -> None:
    levels = torch.tensor([[1, 2, 3], [-4, -5, -6]], dtype=torch.int8)
    tensor = QuantizedTensor(levels, 4, torch.tensor([[2.0, 0.5], [1.0, -1.0]]), 0, 2)
    assert torch.equal(tensor.dequantize(), torch.tensor([[2.0, 4.0, 1.5], [-4.0, -5.0, 6.0]]))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (QuantizedTensor(torch.zeros(2, 3, dtype=torch.int8), 4, torch.ones(2, 1), 1, 2), "a matrix with axis 0"),
        (QuantizedTensor(torch.zeros(2, 3, dtype=torch.int8), 4, torch.ones(2, 1), 0, 2), r"expected float32 \[2, 2\]"),
        (QuantizedTensor(torch.zeros(1, 2, dtype=torch.int8), 4, torch.tensor([[0.1]]), 0, 2), "stored in bfloat16"),
    ],
)
def test_groups_that_the_file_has_no_place_for_are_refused(value: QuantizedTensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encode({"weight": value}, {})


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ([4, 0, [4, 9], None, 0], r"a has groups of 0 in the shape \[4, 9\]"),
        ([4, 0, [4, 9], None, True], "a has groups of True"),
        ([4, 1, [4, 9], None, 4], "a has groups of 4"),
        ([4, 0, [36], None, 4], "a has groups of 4"),
        ([4, 0, [4, 9], None, 3], "a needs 12 more elements of hcompress.group_scales, which has 8 left"),
        ([4, 0, [4, 9], None, 9], "4 elements of hcompress.group_scales belong to no tensor"),
        ([4, 0, [4, 9], None], "a needs 4 more elements of hcompress.scales"),
        ([4, 0, [4, 9], None, 5, 5], "a has no entry of"),
    ],
)
def test_groups_of_an_untrusted_file_are_checked(entry: list[object], message: str) -> None:
    state, _ = read(encode({"a": random_grouped([4, 9], 4, 5, 0)}, {}))
    with pytest.raises(InputError, match=f"index of the packed tensors is damaged: .*{message}"):
        decode(state, {INDEX_KEY: json.dumps({"version": 1, "quantized": {"a": entry}})})
    misshapen = {**state, GROUP_SCALES: torch.zeros(8)}
    with pytest.raises(InputError, match=f"no one-dimensional torch.bfloat16 tensor {GROUP_SCALES}"):
        decode(misshapen, {INDEX_KEY: json.dumps({"version": 1, "quantized": {"a": entry}})})


def test_ordinary_tensors_stay_readable_by_anybody() -> None:
    bias = torch.randn(8)
    data = encode({"bias": bias, "weight": random_quantized([8, 9], 4, 0, 0)}, {})
    assert torch.equal(safetensors.torch.load(data)["bias"], bias)


def test_dequantize_multiplies_along_the_axis() -> None:
    tensor = QuantizedTensor(torch.tensor([[1, -2], [3, 0]], dtype=torch.int8), 3, torch.tensor([2.0, -1.0]), 1)
    assert torch.equal(tensor.dequantize(), torch.tensor([[2.0, 2.0], [6.0, -0.0]]))
    whole = QuantizedTensor(tensor.levels, 3, torch.tensor(0.5), None)
    assert torch.equal(whole.dequantize(), torch.tensor([[0.5, -1.0], [1.5, 0.0]]))


def test_tied_tensors_are_stored_once_and_come_back_tied() -> None:
    weight = torch.randn(100, 10)
    data = encode({"embedding": weight, "head": weight}, {})
    assert len(data) < 4400
    found = decode(*read(data))
    assert found["embedding"] is found["head"]


def test_zeros_cost_a_bit_each_and_negative_zero_is_kept() -> None:
    weight = torch.zeros(100, 100)
    weight[0, :50] = -0.0
    data = encode({"weight": weight}, {})
    assert len(data) < 10_000 // 8 + 50 * 4 + 400
    assert_same(decode(*read(data)), {"weight": weight})
    sparse = random_quantized([100, 100], 8, 0, 0, density=0.1)
    assert len(encode({"weight": sparse}, {})) < 10_000 // 8 + 1_100 + 400 + 400


def test_a_level_outside_of_its_bits_is_refused() -> None:
    tensor = QuantizedTensor(torch.tensor([8], dtype=torch.int8), 4, torch.tensor(1.0), None)
    with pytest.raises(ValueError, match=r"weight: a level is outside of \[-8, 7\], the range of 4 bits"):
        encode({"weight": tensor}, {})


def test_a_number_beyond_the_levels_of_a_code_by_stages_is_refused() -> None:
    levels = torch.tensor([[4, 0, 0, 0]], dtype=torch.int8)
    state, metadata = read(encode({"w": QuantizedTensor(levels, "channels:b", torch.ones(1), 0)}, {}))
    assert state["hcompress.stream"].tolist() == [3, 3, 1]
    state["hcompress.stream"] = torch.tensor([3, 3, 3], dtype=torch.uint8)
    with pytest.raises(InputError, match="w has a number beyond the 9 levels"):
        decode(state, metadata)
    state["hcompress.stream"] = torch.tensor([3, 3], dtype=torch.uint8)
    with pytest.raises(InputError, match="w needs 1 more elements"):
        decode(state, metadata)


def test_a_scale_of_another_shape_is_refused() -> None:
    tensor = QuantizedTensor(torch.zeros(2, 3, dtype=torch.int8), 4, torch.ones(3), 0)
    with pytest.raises(ValueError, match=r"weight: scale is torch.float32 \[3\], expected float32 \[2\]"):
        encode({"weight": tensor}, {})


def test_a_reserved_name_is_refused() -> None:
    with pytest.raises(InputError, match=r"the tensor name hcompress.stream is reserved"):
        encode({STREAM: torch.ones(1)}, {})


def test_a_tensor_of_stride_zero_and_an_empty_sparse_one_are_read() -> None:
    one = {"one": torch.tensor(5.0).expand(1), "many": torch.tensor(5.0).expand(3, 2)}
    assert_same(decode(*read(encode(one, {}))), one)
    streams = {STREAM: torch.zeros(0, dtype=torch.uint8), SCALES: torch.zeros(0)}
    found = decode(streams, {INDEX_KEY: json.dumps({"version": 1, "sparse": {"none": ["F32", [0, 3], 0]}})})
    assert_same(found, {"none": torch.zeros(0, 3)})


def test_a_dtype_that_safetensors_has_no_name_for_is_refused() -> None:
    with pytest.raises(InputError, match=r"^a is torch.complex128; a file holds F64, "):
        encode({"a": torch.ones(1, dtype=torch.complex128)}, {})


def example() -> tuple[dict[str, Tensor], dict[str, str]]:
    tied = torch.randn(4)
    tensors: Tensors = {
        "a": random_quantized([4, 9], 4, 0, 0),
        "b": random_quantized([40, 3], 3, None, 1, density=0.1, dtype=torch.int16),
        "c": random_tensor(torch.float32, [64], 2, 0.1),
        "d": tied,
        "e": tied,
    }
    return read(encode(tensors, {}))


def damaged(**parts: object) -> dict[str, str]:
    return {INDEX_KEY: json.dumps(json.loads(example()[1][INDEX_KEY]) | {"wide": []} | parts)}


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"version": 2}, "its version is 2, expected 1"),
        ({"more": {}}, "a part more that this version doesn't know"),
        ({"quantized": []}, "a part quantized that this version doesn't know"),
        ({"quantized": {"a": [4, 0, [4, 9]]}}, "a has no entry of bits, axis, shape, survivors"),
        ({"quantized": {"a": [9, 0, [4, 9], None]}}, "a has 9 bits; 2 to 8 are possible"),
        ({"quantized": {"a": [True, 0, [4, 9], None]}}, "a has True bits"),
        ({"quantized": {"a": [4, 2, [4, 9], None]}}, "a has a scale along dimension 2 of 2"),
        ({"quantized": {"a": [4, 0, [4, -9], None]}}, r"a has the shape \[4, -9\]"),
        ({"quantized": {"a": [4, 0, [4, [9]], None]}}, "a has the shape a nested value"),
        ({"quantized": {"a": [4, 0, [2**40, 2**40], None]}}, "more than 281474976710656 elements"),
        ({"quantized": {"a": [4, 0, [2**40], None]}}, "a needs 549755813888 more elements of hcompress.stream"),
        ({"quantized": {"a": [4, 0, [0, 5], 1]}}, "a has 0 ones in its mask and 1 survivors"),
        ({"quantized": {"d": [4, 0, [4, 9], None]}}, "d is there twice"),
        ({"sparse": {}}, "elements of hcompress.stream belong to no tensor"),
        ({"sparse": {"c": ["F31", [64], 5]}}, "c has dtype F31; a file holds F64"),
        ({"sparse": {"c": ["F32", [64], 1]}}, "ones in its mask and 1 survivors"),
        ({"sparse": {"c": ["F32", [2**43], 1]}}, "c needs 1099511627776 more elements of hcompress.stream"),
        ({"wide": ["c"]}, "its part wide names a tensor that is not quantized"),
        ({"wide": [[]]}, "its part wide names a tensor that is not quantized"),
        ({"tied": {"e": "nobody"}}, "e is tied to nobody, which the file doesn't hold"),
        ({"tied": {"d": "a"}}, "d is there twice"),
        ({"tied": {"e": ["d"]}}, "e is tied to"),
    ],
)
def test_a_wrong_index_is_an_input_error(parts: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=f"index of the packed tensors is damaged: .*{message}"):
        decode(example()[0], damaged(**parts))


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 5000, '{"version":1,"version":1}', "1" * 5000, "NaN"])
def test_an_index_that_is_no_object_is_an_input_error(text: str) -> None:
    with pytest.raises(InputError, match="index of the packed tensors is damaged"):
        decode(example()[0], {INDEX_KEY: text})


@pytest.mark.parametrize("name", [STREAM, SCALES])
def test_a_missing_or_misshapen_stream_is_an_input_error(name: str) -> None:
    state, metadata = example()
    for other in ({}, {name: torch.zeros(5, 5)}, {name: torch.zeros(5, dtype=torch.int64)}):
        rest = {key: tensor for key, tensor in state.items() if key != name}
        with pytest.raises(InputError, match=f"no one-dimensional .* tensor {name}"):
            decode(rest | other, metadata)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.sampled_from(["a", "c", "F32", "e"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from("abcde"), inner, max_size=3),
    max_leaves=6,
)


def replace_somewhere(value: object, new: object, choose: random.Random) -> object:
    """``value`` with one random part of it replaced by ``new``."""
    if isinstance(value, dict) and value and choose.random() < 0.85:
        key = choose.choice(sorted(value))
        return value | {key: replace_somewhere(value[key], new, choose)}
    if isinstance(value, list) and value and choose.random() < 0.85:
        at = choose.randrange(len(value))
        return [*value[:at], replace_somewhere(value[at], new, choose), *value[at + 1 :]]
    return new


@settings(deadline=None, max_examples=400, suppress_health_check=[HealthCheck.too_slow])
@given(new=JSON_VALUES, choose=st.randoms(use_true_random=False))
def test_a_corrupted_index_is_decoded_or_refused_in_one_sentence(new: object, choose: random.Random) -> None:
    state, metadata = example()
    index = replace_somewhere(json.loads(metadata[INDEX_KEY]), new, choose)
    try:
        decode(state, {INDEX_KEY: json.dumps(index)})
    except InputError as error:
        assert "\n" not in error.message


@settings(deadline=None, max_examples=200)
@given(at=st.integers(0, 10_000), char=st.characters())
def test_a_flipped_character_is_decoded_or_refused(at: int, char: str) -> None:
    state, metadata = example()
    text = metadata[INDEX_KEY]
    at %= len(text)
    try:
        decode(state, {INDEX_KEY: text[:at] + char + text[at + 1 :]})
    except InputError as error:
        assert "\n" not in error.message


@pytest.mark.data
def test_resnet20_at_4_bits_takes_under_159_000_bytes() -> None:
    folder = os.environ.get("HCOMPRESS_TEST_DATA")
    if not folder:
        pytest.skip("HCOMPRESS_TEST_DATA is not set: the real ResNet-20 is not here")
    spec = importlib.util.spec_from_file_location("resnet_cifar", Path(folder) / "resnet_cifar.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    network = module.resnet20()
    path = Path(folder) / "cifar10" / "resnet20-12fca82f.th"
    saved = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    network.load_state_dict({name.removeprefix("module."): tensor for name, tensor in saved.items()}, strict=False)
    tensors: Tensors = dict(network.state_dict())
    for name, weight in network.state_dict().items():
        if weight.dtype == torch.int64:
            tensors[name] = torch.tensor(391)  # The old checkpoint has no counts of batches; a new one does.
        if weight.dim() > 1:
            scale = weight.flatten(1).abs().amax(1) / 7
            levels = (weight / scale.reshape(-1, *[1] * (weight.dim() - 1))).round().clamp(-8, 7).to(torch.int8)
            tensors[name] = QuantizedTensor(levels, 4, scale, 0)
    data = encode(tensors, {"format": "pt"})
    assert_same(decode(*read(data)), tensors)
    print(f"ResNet-20 at 4 bits: {len(data)} B")
    assert len(data) < 159_000
