"""State dicts of safetensors files, their header checked by our own code before the library reads it.

Source: https://huggingface.co/docs/safetensors (8-byte length, JSON header, raw little-endian data).
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from ..errors import InputError, escape
from .archive import DAMAGED
from .extents import MAX_EMPTY_EXTENT

SUFFIXES = (".safetensors",)
MAX_HEADER_BYTES = 100 * 10**6
MAX_TENSORS = 100_000
DTYPE_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "U16": 2,
    "I16": 2,
    "F16": 2,
    "BF16": 2,
    "U32": 4,
    "I32": 4,
    "F32": 4,
    "U64": 8,
    "I64": 8,
    "F64": 8,
}


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of ``path`` by key, and the strings of its ``__metadata__``.

    Raises:
        InputError: The header is not JSON, doubles a key, or declares what the data can't hold; names the tensor.
    """
    metadata = check_header(path)
    try:
        return safetensors.torch.load_file(path), metadata
    except (safetensors.SafetensorError, KeyError, OSError, RuntimeError, ValueError) as error:
        raise InputError(f"{path}: safetensors can't read it ({escape(str(error))})", hint=DAMAGED) from None


def check_header(path: Path) -> dict[str, str]:
    """Check names, dtypes, shapes and offsets against the file's size; gives the metadata."""
    file_bytes = path.stat().st_size
    with path.open("rb") as stream:
        prefix = stream.read(8)
        header_bytes = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or header_bytes > file_bytes - 8:
            raise InputError(f"{path}: the file is truncated: its header needs {header_bytes} bytes", hint=DAMAGED)
        if header_bytes > MAX_HEADER_BYTES:
            raise InputError(f"{path}: its header has {header_bytes} bytes, more than {MAX_HEADER_BYTES}")
        text = stream.read(header_bytes)
    entries = _parse(text, path)
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise InputError(f"{path}: its __metadata__ must map strings to strings")
    if len(entries) > MAX_TENSORS:
        raise InputError(f"{path}: its header lists {len(entries)} tensors, more than {MAX_TENSORS}")
    spans = sorted(_span(key, entry, path) for key, entry in entries.items())
    position = 0
    for start, end, key in spans:
        if start != position:
            what = "overlaps the tensor before it" if start < position else "leaves a hole before it"
            raise InputError(f"{path}: {escape(key)!r} {what} in the data (byte {start}, expected {position})")
        position = end
    data_bytes = file_bytes - 8 - header_bytes
    if position > data_bytes:
        raise InputError(
            f"{path}: the file is truncated: its tensors need {position} bytes and it has {data_bytes}", hint=DAMAGED
        )
    if position < data_bytes:
        raise InputError(f"{path}: has {data_bytes - position} bytes after its last tensor", hint=DAMAGED)
    return metadata


def _parse(text: bytes, path: Path) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            doubled = next(name for name in names if names.count(name) > 1)
            raise InputError(
                f"{path}: its header has the key {escape(doubled)!r} twice; readers would differ on which holds"
            )
        return found

    try:
        entries = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError):
        raise InputError(f"{path}: its header is not JSON", hint=DAMAGED) from None
    if not isinstance(entries, dict):
        raise InputError(f"{path}: its header is not a JSON object", hint=DAMAGED)
    return entries


def _span(key: str, entry: Any, path: Path) -> tuple[int, int, str]:
    """Where one tensor's bytes lie, which its dtype and shape must fill exactly."""
    name = escape(key)
    if not key.isprintable():
        raise InputError(f"{path}: the tensor name '{name}' has control characters", hint="rename it and save again")
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise InputError(f"{path}: {name!r} must have exactly dtype, shape and data_offsets in the header")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise InputError(
            f"{path}: {name!r} has dtype {escape(str(dtype))}, which is none of {', '.join(DTYPE_BYTES)}",
            hint="save the float model's state dict",
        )
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2 or len(shape) > 64:
        raise InputError(f"{path}: {name!r} has a shape or data_offsets that no tensor can have")
    size_bytes = math.prod(shape) * DTYPE_BYTES[dtype]
    if math.prod(max(1, size) for size in shape) > max(MAX_EMPTY_EXTENT, size_bytes):
        raise InputError(f"{path}: {name!r} declares shape {shape}, which overflows although it has no elements")
    start, end = offsets
    if end - start != size_bytes:
        raise InputError(
            f"{path}: {name!r} declares shape {shape} of {dtype} = {size_bytes} bytes, its offsets hold {end - start}"
        )
    return start, end, key


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)
