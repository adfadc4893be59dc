"""Float initializers of an ONNX model stored in 16 bits, and cast to float32 when the file is loaded.

The runtime folds the Cast and computes in float32. What 16 bits would change stays as it is: the network is to hold
rounded values already. So do the scales and zero points of QuantizeLinear and DequantizeLinear, which are few.
Cost: 2 bytes less a value, about 80 bytes more a tensor.
"""

from __future__ import annotations

from typing import Any

import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

MIN_ELEMENTS = 64  # Below, a Cast and its names take more bytes than 16 bits save.
QUANTIZERS = ("QuantizeLinear", "DequantizeLinear")
TYPES = {torch.float16: TensorProto.FLOAT16, torch.bfloat16: TensorProto.BFLOAT16}


def store_halves(model: onnx.ModelProto, dtype: torch.dtype, *, exact: bool = True) -> onnx.ModelProto:
    """A model of the same outputs whose float32 initializers take 16 bits where they can.

    Args:
        model: Left as it is.
        dtype: ``torch.float16`` or ``torch.bfloat16``.
        exact: False rounds what 16 bits would change, which tells the size of a rounded network's file.
    """
    stored = onnx.ModelProto()
    stored.CopyFrom(model)
    graph = stored.graph
    grids = {name for node in graph.node if node.op_type in QUANTIZERS for name in node.input[1:]}
    casts = []
    for tensor in graph.initializer:
        if tensor.data_type != TensorProto.FLOAT or tensor.name in grids or _num_elements(tensor) < MIN_ELEMENTS:
            continue
        values = torch.from_numpy(numpy_helper.to_array(tensor).copy())
        half = values.to(dtype)
        if exact and not _is_same(half.float(), values):
            continue
        name = f"{tensor.name}_{'bf16' if dtype == torch.bfloat16 else 'fp16'}"
        casts.append(helper.make_node("Cast", [name], [tensor.name], name=f"{name}_cast", to=TensorProto.FLOAT))
        tensor.CopyFrom(_half_tensor(half, name))
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    return stored


def _num_elements(tensor: TensorProto) -> int:
    return int(torch.Size(tensor.dims).numel())


def _is_same(one: Tensor, other: Tensor) -> bool:
    """Equal to the bit, so that the sign of a zero stays."""
    return torch.equal(one.view(torch.int32), other.view(torch.int32))


def _half_tensor(half: Tensor, name: str) -> TensorProto:
    raw: Any = half.contiguous().view(torch.int16).numpy()
    return TensorProto(
        name=name, data_type=TYPES[half.dtype], dims=list(half.shape), raw_data=raw.astype("<i2").tobytes()
    )
