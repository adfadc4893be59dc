"""Quantized linear layers in the layout that vLLM and transformers read: ``compressed-tensors``, ``pack-quantized``.

A layer ``L`` has ``L.weight_packed`` (int32 ``[n, ceil(k b / 32)]``: levels plus ``2**(b - 1)``, the first in the
lowest bits, each row filled up with zero bits), ``L.weight_scale`` (float32 ``[n, 1]``, or ``[n, m]`` of groups) and
``L.weight_shape`` (int64 ``[n, k]``). ``quantization_config`` in config.json names the layers of each width and group
size. All other tensors are ordinary entries.
Source: https://github.com/vllm-project/compressed-tensors. Cost: one pass over each weight.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import UsageError, escape
from ..widths import Width, shown
from .packed import QuantizedTensor

NAME = "compressed-tensors"
FORMAT = "pack-quantized"
WIDTHS = (4, 8)  # that the readers' kernels take
WORD = 4  # bytes
WEIGHT = ".weight"


@dataclass(frozen=True, slots=True)
class Layout:
    """What the files hold.

    Attributes:
        tensors: By name, each in memory of its own.
        config: ``quantization_config`` of config.json.
        packed: Names of the weights that are packed.
        floats: Names of the quantized weights that the layout has no place for: they are floats, of the same values.
        tied: Names that are left out, as another one holds the data.
    """

    tensors: dict[str, Tensor]
    config: dict[str, Any]
    packed: tuple[str, ...]
    floats: tuple[str, ...]
    tied: tuple[str, ...]


def lay_out(tensors: Mapping[str, Tensor | QuantizedTensor], linear: Collection[str]) -> Layout:
    """The tensors of a network in the layout.

    Args:
        tensors: As ``packed.decode`` gives them: tied names are one object.
        linear: Weights of linear layers. One that is tied to another name, as an embedding is, stays float.

    Raises:
        UsageError: A linear weight has a width or groups that the layout's readers don't take, or none is left to pack.
    """
    owners: dict[int, str] = {}
    for name, value in tensors.items():
        owners.setdefault(id(value), name)
    tied = tuple(name for name, value in tensors.items() if owners[id(value)] != name)
    shared = {owners[id(tensors[name])] for name in tied}
    state: dict[str, Tensor] = {}
    packed, floats = [], []
    targets: dict[tuple[int, int | None], list[str]] = {}
    for name, value in tensors.items():
        if name in tied:
            continue
        if not isinstance(value, QuantizedTensor):
            state[name] = value.clone(memory_format=torch.contiguous_format)
        elif name in linear and name not in shared and name.endswith(WEIGHT):
            bits = _width(name, value)
            module = name.removesuffix(WEIGHT)
            state[f"{module}.weight_packed"] = _packed(value.levels, bits)
            state[f"{module}.weight_scale"] = _scale(value)
            state[f"{module}.weight_shape"] = torch.tensor(value.levels.shape)
            targets.setdefault((bits, value.group_size), []).append(module)
            packed.append(name)
        else:
            state[name] = value.dequantize()
            floats.append(name)
    if not packed:
        raise UsageError(
            f"no weight of a linear layer of its own is quantized, and {NAME} packs no others",
            hint="export a run of hcompress quantize whose network has linear layers",
        )
    return Layout(state, _config(targets), tuple(packed), tuple(floats), tied)


def _width(name: str, value: QuantizedTensor) -> int:
    """Bits of a weight that has a place in the layout."""
    bits: Width = value.bits
    if not isinstance(bits, int) or bits not in WIDTHS:
        raise UsageError(
            f"{escape(name)} has {shown(bits)}, and readers of {NAME} take 4 or 8 bits",
            hint="quantize again with --method uniform --budget 4bit (or 8bit), or --exclude the layer",
        )
    if value.group_size is not None and value.levels.shape[1] % value.group_size:
        raise UsageError(
            f"{escape(name)} has rows of {value.levels.shape[1]} inputs, no whole groups of {value.group_size}, which "
            f"readers of {NAME} ask for",
            hint="quantize again with a smaller --group-size, with none, or --exclude the layer",
        )
    return bits


def _packed(levels: Tensor, bits: int) -> Tensor:
    """int32 ``[n, ceil(k bits / 32)]`` of levels ``[n, k]``."""
    unsigned: NDArray[np.uint8] = (levels.numpy().astype(np.int16) + (1 << (bits - 1))).astype(np.uint8)
    per_word = 8 * WORD // bits
    unsigned = np.pad(unsigned, ((0, 0), (0, -unsigned.shape[1] % per_word)))
    if bits < 8:
        unsigned = unsigned[:, ::2] | np.left_shift(unsigned[:, 1::2], bits, dtype=np.uint8)
    return torch.from_numpy(np.ascontiguousarray(unsigned).view("<i4").copy())


def _scale(value: QuantizedTensor) -> Tensor:
    """float32 ``[n, 1]``, or ``[n, m]`` of groups."""
    rows = len(value.levels)
    return (value.scale.expand(rows) if value.axis is None else value.scale).reshape(rows, -1).contiguous()


def _config(targets: Mapping[tuple[int, int | None], list[str]]) -> dict[str, Any]:
    groups = {}
    for number, ((bits, size), modules) in enumerate(targets.items()):
        weights = {"num_bits": bits, "type": "int", "symmetric": True, "dynamic": False, "group_size": size}
        weights["strategy"] = "channel" if size is None else "group"
        groups[f"group_{number}"] = {"targets": modules, "weights": weights, "input_activations": None}
    return {
        "quant_method": NAME,
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [],
    }
