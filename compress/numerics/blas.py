"""Products of symmetric and triangular matrices on the processor, by BLAS, which torch has only as whole products.

Half of the operations of a whole product are done, at its rate: BLAS leaves out what is beyond the triangle inside its
kernels, where torch can only call one product a rectangle. It is scipy's, called by address as compiled code calls it,
as scipy's Python functions copy what isn't contiguous. For one thread: with more, those of torch would keep the cores
busy as they wait for work, and take longer together than the rectangles do.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

SCALARS = {torch.float32: ("s", ctypes.c_float), torch.float64: ("d", ctypes.c_double)}


def applies(part: Tensor) -> bool:
    """Whether these products are for ``part``: on the processor, where torch has one thread."""
    return part.device.type == "cpu" and torch.get_num_threads() == 1


def add_gram(sums: Tensor, part: Tensor) -> None:
    """Add ``part @ part^T`` to the lower triangle of ``sums``, in place; what is above it stays.

    Args:
        sums: ``[r, r]``, float32 or float64, contiguous.
        part: ``[r, k]``, of the same dtype.
    """
    part = part if 1 in part.stride() else part.contiguous()
    # BLAS counts along columns first: all that it is given is the transpose of what torch sees.
    kind = "T" if part.stride(1) == 1 else "N"
    _call("syrk", sums.dtype, "U", kind, *part.shape, 1.0, *_matrix(part), 1.0, *_matrix(sums))


def triangular_product(root: Tensor, part: Tensor) -> Tensor:
    """``root @ part`` of a lower triangular ``root`` ``[r, r]`` and ``part`` ``[r, k]``; what is above isn't read."""
    root, result = root.contiguous(), part.clone(memory_format=torch.contiguous_format)
    _call("trmm", root.dtype, "R", "U", "N", "N", *part.mT.shape, 1.0, *_matrix(root), *_matrix(result))
    return result


def _matrix(matrix: Tensor) -> tuple[ctypes.c_void_p, int]:
    """Where it begins, and how far its rows (or columns, if these are the ones that are contiguous) are apart."""
    across = 0 if matrix.stride(1) == 1 else 1
    return ctypes.c_void_p(matrix.data_ptr()), max(matrix.stride(across), matrix.shape[1 - across])


def _call(name: str, dtype: torch.dtype, *arguments: str | float | ctypes.c_void_p) -> None:
    prefix, scalar = SCALARS[dtype]
    pointers: list[Any] = []
    for argument in arguments:
        if isinstance(argument, ctypes.c_void_p):
            pointers.append(argument)
        elif isinstance(argument, str):
            pointers.append(ctypes.c_char_p(argument.encode()))
        else:
            pointers.append(ctypes.byref(ctypes.c_int(argument) if isinstance(argument, int) else scalar(argument)))
    function = _function(prefix + name)
    with _libraries().limit(limits=1):
        function(*pointers)


@functools.cache
def _function(name: str) -> Any:
    """Of scipy's table for compiled code."""
    from scipy.linalg import cython_blas  # takes a quarter of a second, which only M-FAC should

    capsule = cython_blas.__pyx_capi__[name]
    signature, address = ctypes.pythonapi.PyCapsule_GetName, ctypes.pythonapi.PyCapsule_GetPointer
    signature.restype, signature.argtypes = ctypes.c_char_p, [ctypes.py_object]
    address.restype, address.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    return ctypes.CFUNCTYPE(None)(address(capsule, signature(capsule)))


@functools.cache
def _libraries() -> Any:
    """The BLAS of scipy, which is loaded by now, and others; a search of the whole process, hence once."""
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController().select(user_api="blas")
