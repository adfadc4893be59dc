"""Floats that are stored in 16 bits: the weights of the files, and the network that computes with them in float32."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from .apply import Compressed, Tensors, assemble
from .errors import NumericsError
from .formats.packed import QuantizedTensor
from .graph.rewrite import put_tensor, tensor_at, tensor_names
from .graph.trace import Graph

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
FOLDED = "folded_bias"  # what a batch norm leaves of itself


def assemble_stored(
    graph: Graph, compressed: Compressed, dtype: torch.dtype, *, float_addends: bool = False
) -> tuple[Compressed, fx.GraphModule]:
    """The tensors as they will be stored, and the network of them, which computes in float32.

    Where a batch norm is folded into a float weight, the network holds the product, rounded once more. Scales stay
    float32, and so do constants that aren't in the state dict.

    Args:
        dtype: Of the float32 tensors: float32 itself leaves all as it is.
        float_addends: As ``assemble`` takes it.

    Raises:
        NumericsError: A value is beyond the dtype; names the tensor.
    """
    if dtype == torch.float32:
        return compressed, assemble(graph, compressed, float_addends=float_addends)
    stored = Compressed(_stored(compressed.tensors, dtype), compressed.plan)
    widened = {k: v.float() if isinstance(v, Tensor) and v.dtype == dtype else v for k, v in stored.tensors.items()}
    module = assemble(graph, Compressed(widened, compressed.plan), float_addends=float_addends)
    for name in sorted(tensor_names(module)):
        if name in widened or name.endswith(FOLDED):
            value = tensor_at(module, name)
            if value.dtype == torch.float32:
                put_tensor(module, name, _rounded(name, value, dtype).float())
    return stored, module


def _stored(tensors: Tensors, dtype: torch.dtype) -> Tensors:
    """The float32 tensors in ``dtype``; two names of one memory stay that."""
    found: Tensors = {}
    known: dict[object, Tensor] = {}
    for name, value in tensors.items():
        if isinstance(value, QuantizedTensor) or value.dtype != torch.float32:
            found[name] = value
            continue
        memory = (value.data_ptr(), value.shape, value.stride())
        if memory not in known:
            known[memory] = _rounded(name, value, dtype)
        found[name] = known[memory]
    return found


def _rounded(name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    half = value.to(dtype)
    if bool((torch.isinf(half) & torch.isfinite(value)).any()):
        raise NumericsError(
            f"{name} has values to {float(value.abs().max()):.3g}, beyond the {torch.finfo(dtype).max:.5g} of {dtype}",
            hint=f"use --float-storage {'bf16 or ' if dtype == torch.float16 else ''}fp32",
        )
    return half
