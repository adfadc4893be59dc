"""Shape, stride and offset of a tensor against the storage that holds it, in exact integers."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..errors import InputError

MAX_DIMENSIONS = 64
MAX_EMPTY_EXTENT = 2**31


def check_extent(
    shape: Sequence[object], stride: Sequence[object], offset: object, *, num_stored: int, label: str, key: str
) -> None:
    """Refuse a tensor that reaches outside its storage or repeats it beyond its size.

    Args:
        num_stored: Elements in the storage.
        label: How messages call the file.
        key: How messages call the tensor; escaped by the caller.

    Raises:
        InputError: Names the tensor, what it declares and what is stored.
    """
    sizes = [size for size in shape if type(size) is int and size >= 0]
    steps = [step for step in stride if type(step) is int and step >= 0]
    is_whole = len(sizes) == len(shape) == len(steps) == len(stride) <= MAX_DIMENSIONS
    if not is_whole or type(offset) is not int or offset < 0:
        raise InputError(f"{label}: {key!r} has a shape, stride or offset that no tensor can have")
    numel = math.prod(sizes)
    if numel == 0:
        if math.prod(max(1, size) for size in sizes) > MAX_EMPTY_EXTENT:
            raise InputError(f"{label}: {key!r} declares shape {sizes}, which overflows although it has no elements")
        return
    reach = offset + sum((size - 1) * step for size, step in zip(sizes, steps, strict=True)) + 1
    if max(numel, reach) > num_stored:
        raise InputError(
            f"{label}: {key!r} declares {numel} elements reaching element {reach} of a storage of {num_stored}",
            hint="the file is damaged or made to exhaust memory; save the state dict again from its source",
        )
