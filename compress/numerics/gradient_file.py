"""Gradients that are more than one memory may hold: a matrix in column chunks, in a temporary file or on a device.

A file is mapped into memory, so that the system keeps of it what there is room for, and reads as a tensor ``[m, d]``
does where M-FAC reads one. It has no name: whatever ends the process, the system takes it away. Its whole length is
claimed at the start, so that a full disk is an error then, and no signal later. On an accelerator, rows of a chunk are
near one another, which its products are faster for.
Cost: a copy of the columns that are asked for, where they aren't those of one chunk.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from dataclasses import dataclass

import torch
from torch import Tensor

from ..budget import format_bytes
from ..errors import DiskError

CPU = torch.device("cpu")
ZEROS = 2**24  # bytes written at once where a file can't be claimed otherwise


@dataclass(frozen=True, slots=True, eq=False)
class ChunkedGradients:
    """``G`` ``[m, d]`` as chunks ``[m, width]`` of consecutive columns, the last one what is left.

    It has of a tensor what M-FAC needs. What it gives are views where they can be, else copies, on ``device``.
    """

    chunks: tuple[Tensor, ...]
    device: torch.device = CPU

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.chunks[0]), sum(chunk.shape[1] for chunk in self.chunks)

    @property
    def dtype(self) -> torch.dtype:
        return self.chunks[0].dtype

    @property
    def width(self) -> int:
        """Columns of every chunk but the last."""
        return self.chunks[0].shape[1]

    def __len__(self) -> int:
        return len(self.chunks[0])

    def dim(self) -> int:
        return 2

    def numel(self) -> int:
        return self.shape[0] * self.shape[1]

    def detach(self) -> ChunkedGradients:
        return self

    def __getitem__(self, rows: slice) -> ChunkedGradients:
        """Some of the rows: a view."""
        return ChunkedGradients(tuple(chunk[rows] for chunk in self.chunks), self.device)

    def __setitem__(self, at: tuple[slice, slice], values: Tensor) -> None:
        """Write rows and consecutive columns."""
        rows, columns = at
        start, stop = columns.start, columns.stop
        while start < stop:
            number, inside = divmod(start, self.width)
            end = min(stop, (number + 1) * self.width)
            from_start = start - columns.start
            self.chunks[number][rows, inside : inside + end - start] = values[:, from_start : from_start + end - start]
            start = end

    def narrow(self, dim: int, start: int, length: int) -> Tensor:
        """Consecutive columns ``[m, length]``."""
        first, last = start // self.width, (start + length - 1) // self.width
        parts = []
        for number in range(first, last + 1):
            offset = number * self.width
            chunk = self.chunks[number]
            low, high = max(start - offset, 0), min(start + length - offset, chunk.shape[1])
            parts.append(chunk[:, low:high].to(self.device))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim)

    def index_select(self, dim: int, index: Tensor) -> Tensor:
        """Columns in any order ``[m, k]``: a copy."""
        ordered, place = torch.sort(index, stable=True)
        numbers, counts = torch.unique_consecutive(
            torch.div(ordered, self.width, rounding_mode="floor"), return_counts=True
        )
        parts = [
            self._chosen(number, inside - number * self.width)
            for number, inside in zip(numbers.tolist(), torch.split(ordered, counts.tolist()), strict=True)
        ]
        found = torch.cat(parts, dim)
        return found if bool((place[1:] > place[:-1]).all()) else found.index_select(1, torch.argsort(place))

    def _chosen(self, number: int, index: Tensor) -> Tensor:
        chunk = self.chunks[number]
        return chunk.index_select(1, index.to(chunk.device)).to(self.device)


def held_gradients(
    m: int, d: int, dtype: torch.dtype, width: int, device: torch.device, *, is_there: bool
) -> ChunkedGradients:
    """Zeros ``[m, d]`` on ``device`` where they are to lie there, else in memory: chunks go there as they are read."""
    home = device if is_there else CPU
    widths = [min(width, d - at) for at in range(0, d, width)]
    chunks = (torch.zeros(m, columns, dtype=dtype, device=home, pin_memory=not is_there) for columns in widths)
    return ChunkedGradients(tuple(chunks), device)


def file_gradients(m: int, d: int, dtype: torch.dtype, *, width: int, device: torch.device = CPU) -> ChunkedGradients:
    """Zeros ``[m, d]`` in a file of their own, in the folder for temporary files.

    Args:
        device: To which each chunk goes whenever it is read.

    Raises:
        DiskError: There is no room; names the folder and the size.
    """
    size = m * d * dtype.itemsize
    try:
        with tempfile.TemporaryFile(prefix="hcompress-gradients-") as file:
            _claim(file.fileno(), size)
            mapped = mmap.mmap(file.fileno(), size)
    except OSError as error:
        raise DiskError(
            f"{tempfile.gettempdir()}: no room for {format_bytes(size)} of gradients ({error.strerror or error})",
            hint="free space, point TMPDIR to a larger disk, raise --memory, or lower --num-calibration",
        ) from error
    flat = torch.frombuffer(mapped, dtype=dtype)
    columns = [min(width, d - start) for start in range(0, d, width)]
    parts = torch.split(flat, [m * count for count in columns])
    return ChunkedGradients(tuple(part.view(m, count) for part, count in zip(parts, columns, strict=True)), device)


def _claim(file: int, size: int) -> None:
    """Give a file its length, every block of it."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, size)
        return
    for start in range(0, size, ZEROS):
        os.write(file, bytes(min(ZEROS, size - start)))
