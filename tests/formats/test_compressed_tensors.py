"""The layout of Hugging Face folders: the levels and scales of a run, read by the package that defines it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from compress.errors import UsageError
from compress.formats.compressed_tensors import lay_out
from compress.formats.packed import QuantizedTensor


def quantized(rows: int, k: int, bits: int, group_size: int | None, seed: int = 0) -> QuantizedTensor:
    generator = torch.Generator().manual_seed(seed)
    half = 2 ** (bits - 1)
    levels = torch.randint(-half, half, (rows, k), generator=generator, dtype=torch.int8)
    groups = [] if group_size is None else [-(-k // group_size)]
    scale = torch.randn([rows, *groups], generator=generator).bfloat16().float()
    return QuantizedTensor(levels, bits, scale, 0, group_size)


def read_layer(tensors: Mapping[str, Tensor], config: Mapping[str, Any], module: str) -> Tensor:
    """A layer's weight by the documented layout alone, bit by bit."""
    (scheme,) = [group for group in config["config_groups"].values() if module in group["targets"]]
    bits = scheme["weights"]["num_bits"]
    rows, k = tensors[f"{module}.weight_shape"].tolist()
    words = tensors[f"{module}.weight_packed"]
    assert words.dtype == torch.int32 and list(words.shape) == [rows, -(-k * bits // 32)]
    levels = torch.zeros(rows, k)
    for row in range(rows):
        stream = sum((int(word) & 0xFFFFFFFF) << (32 * place) for place, word in enumerate(words[row].tolist()))
        for column in range(k):
            levels[row, column] = (stream >> (bits * column)) % 2**bits - 2 ** (bits - 1)
    scale = tensors[f"{module}.weight_scale"]
    size = scheme["weights"]["group_size"]
    assert (scheme["weights"]["strategy"], scale.shape[1]) == (("channel", 1) if size is None else ("group", k // size))
    return levels * scale.repeat_interleave(k // scale.shape[1], 1)


@given(
    rows=st.integers(1, 5),
    k=st.integers(1, 40),
    bits=st.sampled_from([4, 8]),
    groups=st.sampled_from([None, 1, 4]),
    seed=st.integers(0, 99),
)
def test_a_layer_is_read_back(rows: int, k: int, bits: int, groups: int | None, seed: int) -> None:
    size = None if groups is None else 32 // groups
    value = quantized(rows, k if size is None else k * size, bits, size, seed)
    layout = lay_out({"a.b.weight": value, "a.b.bias": torch.ones(rows)}, {"a.b.weight"})
    assert layout.packed == ("a.b.weight",) and "a.b.weight" not in layout.tensors
    assert torch.equal(read_layer(layout.tensors, layout.config, "a.b"), value.dequantize())


def test_the_package_reads_what_was_written() -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationConfig

    values = {"a.weight": quantized(6, 37, 4, None), "b.weight": quantized(5, 64, 8, 32, 1)}
    values |= {"c.weight": quantized(7, 37, 8, None, 2), "d.weight": quantized(4, 96, 4, 32, 3)}
    layout = lay_out(values, set(values))
    config = QuantizationConfig.model_validate(json.loads(json.dumps(layout.config)))
    assert (config.quant_method, config.format) == ("compressed-tensors", "pack-quantized")
    assert len(config.config_groups) == 4
    for name, value in values.items():
        module = name.removesuffix(".weight")
        (scheme,) = [group for group in config.config_groups.values() if module in group.targets]
        local = {key.removeprefix(f"{module}."): t for key, t in layout.tensors.items() if key.startswith(f"{module}.")}
        found = PackedQuantizationCompressor.decompress(local, scheme)["weight"]
        assert torch.equal(found, value.dequantize())


def test_what_the_layout_has_no_place_for_stays_in_floats_and_is_named() -> None:
    tied, convolution = (
        quantized(4, 8, 4, None),
        QuantizedTensor(torch.ones(2, 1, 3, dtype=torch.int8), 4, torch.ones(2), 0),
    )
    tensors = {"e.weight": tied, "head.weight": tied, "conv.weight": convolution, "l.weight": quantized(4, 8, 8, None)}
    layout = lay_out(tensors, {"e.weight", "l.weight"})
    assert (layout.packed, layout.floats) == (("l.weight",), ("e.weight", "conv.weight"))
    assert layout.tied == ("head.weight",) and "head.weight" not in layout.tensors
    assert torch.equal(layout.tensors["e.weight"], tied.dequantize())
    assert torch.equal(layout.tensors["conv.weight"], convolution.dequantize())


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (quantized(4, 8, 3, None), "a.weight has 3 bits, and readers of compressed-tensors take 4 or 8 bits"),
        (
            QuantizedTensor(torch.zeros(2, 4, dtype=torch.int8), "channels:4t", torch.ones(2), 0),
            "a.weight has 2.8 bits by channel",
        ),
        (quantized(4, 40, 4, 32), "a.weight has rows of 40 inputs, no whole groups of 32"),
        (torch.ones(3, 3), "no weight of a linear layer of its own is quantized"),
    ],
)
def test_what_readers_do_not_take_is_refused(value: Tensor | QuantizedTensor, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        lay_out({"a.weight": value}, {"a.weight"})
    assert "quantize" in str(caught.value.hint)
