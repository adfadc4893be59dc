"""Data files: named arrays of .npz and .safetensors, as tensors of the dtype they were stored in."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError, escape
from . import safetensors
from .archive import DAMAGED, opened_archive, read_member
from .finite import check_finite

SUFFIXES = (".npz", ".safetensors")
MAX_BYTES = 8 * 10**9
ACCEPTED = "pass a .npz (numpy.savez(path, x=..., y=...)) or a .safetensors file"


def read_arrays(path: Path) -> dict[str, Tensor]:
    """The arrays of ``path`` by name, such as ``x`` and ``y``; the bytes decide the format, not the suffix.

    Raises:
        InputError: Unreadable, damaged, larger than ``MAX_BYTES``, of Python objects, or with NaN; names the array.
    """
    try:
        with path.open("rb") as stream:
            start = stream.read(16)
        if start.startswith(b"PK"):
            arrays: Mapping[str, Tensor] = _read_npz(path)
        elif start[8:9] == b"{":
            arrays, _ = safetensors.read(path)
        else:
            raise InputError(f"{path}: is neither an .npz archive nor a safetensors file", hint=ACCEPTED)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise InputError(f"{path}: is a folder, not a data file", hint=ACCEPTED) from None
    except OSError as error:
        raise InputError(f"{path}: can't be read ({error.strerror})") from None
    check_finite(arrays, path, hint=_bad_rows(arrays))
    return dict(arrays)


def _bad_rows(arrays: Mapping[str, Tensor]) -> str:
    """Where the first array that isn't finite isn't: a hint for who has to clean it."""
    for array in arrays.values():
        if array.is_floating_point() and array.dim() and array.numel():
            is_bad = ~torch.isfinite(array.float()).reshape(len(array), -1).all(1)
            if is_bad.any():
                return f"clean the data; the first bad row is {int(is_bad.nonzero()[0])}"
    return "clean the data"


def _read_npz(path: Path) -> dict[str, Tensor]:
    with path.open("rb") as stream, opened_archive(stream, str(path), compressed=True) as archive:
        # A single array has its own name as the archive's common folder only if the name holds a slash.
        entries = {entry.filename: entry for entry in archive.members.values()}
        size_bytes = sum(entry.file_size for entry in entries.values())
        if size_bytes > MAX_BYTES:
            raise InputError(f"{path}: its arrays inflate to {size_bytes} bytes, more than {MAX_BYTES}")
        others = [escape(name) for name in entries if not name.endswith(".npy")]
        if others or not entries:
            raise InputError(
                f"{path}: is not an archive of numpy arrays (it has {', '.join(others[:3]) or 'none'})", hint=ACCEPTED
            )
        return {
            entry.filename.removesuffix(".npy"): _array(
                read_member(archive, name), f"{path}: {escape(entry.filename)!r}"
            )
            for name, entry in archive.members.items()
        }


def _array(content: bytearray, label: str) -> Tensor:
    stream = io.BytesIO(content)
    try:
        version = np.lib.format.read_magic(stream)
        readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        shape, is_fortran, dtype = readers[version](stream)
    except (ValueError, KeyError, TypeError, SyntaxError, RecursionError, EOFError, MemoryError):
        raise InputError(f"{label} is not a numpy array", hint=DAMAGED) from None
    if dtype.hasobject or dtype.names or dtype.kind not in "biuf":
        raise InputError(
            f"{label} has dtype {escape(str(dtype))}; hcompress reads numbers, never Python objects",
            hint="convert it with astype before numpy.savez",
        )
    declared = math.prod(int(size) for size in shape) * dtype.itemsize
    if declared != len(content) - stream.tell():
        raise InputError(
            f"{label} declares shape {shape} = {declared} bytes and has {len(content) - stream.tell()}", hint=DAMAGED
        )
    flat = np.frombuffer(content, dtype, offset=stream.tell()) if declared else np.empty(0, dtype)
    try:
        array = flat.reshape(shape, order="F" if is_fortran else "C")
        return torch.from_numpy(np.asarray(array, dtype=dtype.newbyteorder("="), order="C"))
    except (TypeError, ValueError):
        raise InputError(f"{label} has dtype {dtype}, which torch can't hold", hint="convert it with astype") from None
