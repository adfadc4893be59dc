"""Packed safetensors: low-bit, sparse and tied tensors in a standard file whose other tensors anybody can read.

Layout. ``__metadata__["hcompress.packed"]`` is an index in JSON: ``{"version": 1, "quantized": {name: [bits, axis,
shape, survivors]}, "sparse": {name: [dtype, shape, survivors]}, "wide": [names of int16 levels], "tied": {alias:
name}}``, where an empty part is left out. The uint8 tensor ``hcompress.stream`` holds the quantized tensors, then the
sparse ones, in the index's order; the float32 tensor ``hcompress.scales`` the quantized tensors' scales in the same
order, ``c`` for an axis and one for ``null``. An entry with a fifth number, a group size, has a scale for each group of
so many elements of a row instead, the last one of a row for what is left: they are in the bfloat16 tensor
``hcompress.group_scales``, row by row. A quantized tensor is its levels plus ``2**(bits - 1)`` in the planes of
``planes.py``; a sparse one its elements, little endian. Bits by channel are a text (``widths.py``): the levels of all
channels of one width, less their lowest or as ``planes.numbers_of`` numbers them, follow each other, the widths in the
order of ``widths.WIDTHS``; a channel of width ``0`` has none. Where ``survivors`` is not ``null``, a bit mask of one
plane comes first, and only the elements under its ones, so many, follow. A tensor outside of the index is an ordinary
entry.

Cost: one pass over each tensor; decoding takes at most 64 times the file's bytes (a mask over all-zero int64).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import InputError, escape
from ..widths import WIDTHS, Width, is_mixed, is_width, letters_of, levels_of, of_letter
from . import planes

INDEX_KEY = "hcompress.packed"
STREAM = "hcompress.stream"
SCALES = "hcompress.scales"
GROUP_SCALES = "hcompress.group_scales"
OWN = (STREAM, SCALES, GROUP_SCALES)
VERSION = 1
MAX_DIMS = 64
MAX_ELEMENTS = 1 << 48  # Of a shape, zeros aside: torch multiplies strides in 64 bits.

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "C64": torch.complex64,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class QuantizedTensor:
    """A weight as small integers and their unit.

    Attributes:
        levels: int8 or int16, the weight's shape, each in ``[-2**(bits - 1), 2**(bits - 1) - 1]``.
        bits: 2 to 8; or ``channels:`` and a letter of ``widths.WIDTHS`` for each index of ``axis``.
        scale: float32, ``[c]`` for the channels of ``axis``, or ``[]`` where ``axis`` is None; ``[c, m]`` for the
            groups of each row, values of bfloat16; may be negative.
        axis: Dimension of ``levels`` that ``scale`` runs along.
        group_size: Elements of a row, in order, that share a scale, the last of them what is left; of a matrix with
            axis 0. None for one scale per channel.
    """

    levels: Tensor
    bits: Width
    scale: Tensor
    axis: int | None
    group_size: int | None = None

    def dequantize(self) -> Tensor:
        """``levels * scale`` in float32, the weight's shape."""
        if self.axis is None:
            return self.levels.float() * self.scale
        if self.group_size is not None:
            return self.levels.float() * self.scale.repeat_interleave(self.group_size, 1)[:, : self.levels.shape[1]]
        along = [1] * self.levels.dim()
        along[self.axis] = -1
        return self.levels.float() * self.scale.reshape(along)


def encode(tensors: Mapping[str, Tensor | QuantizedTensor], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file; equal tensors and metadata give equal bytes.

    Args:
        tensors: Name to tensor. Two names of one memory are stored once; a tensor whose zeros make a mask and the
            survivors smaller is stored so.
        metadata: Further entries of ``__metadata__``; an older index among them is replaced.

    Raises:
        InputError: A name is one that the layout needs for itself, or a dtype is none of ``DTYPES``.
        ValueError: A quantized tensor breaks the promises of ``QuantizedTensor``.
    """
    pack = _Packing()
    plain: dict[str, Tensor] = {}
    stored: dict[object, str] = {}
    for name, tensor in sorted(tensors.items()):
        if name in (*OWN, "__metadata__"):
            raise InputError(
                f"the tensor name {name} is reserved by the file format", hint="rename it in the checkpoint"
            )
        owner = stored.setdefault(_memory(name, tensor), name)
        if owner != name:
            pack.tied[name] = owner
        elif isinstance(tensor, QuantizedTensor):
            pack.add_quantized(name, tensor)
        elif tensor.dtype not in NAMES:
            raise InputError(f"{escape(name)} is {tensor.dtype}; a file holds {', '.join(DTYPES)}", hint="convert it")
        elif not pack.add_sparse(name, tensor):
            plain[name] = tensor
    texts = {key: text for key, text in metadata.items() if key != INDEX_KEY}
    if index := pack.index():
        texts[INDEX_KEY] = index
        chunks = [*pack.quantized_chunks, *pack.sparse_chunks, np.zeros(0, np.uint8)]
        plain[STREAM] = torch.from_numpy(np.concatenate(chunks))
        plain[SCALES] = torch.cat([*pack.scales, torch.zeros(0, dtype=torch.float32)])
        if pack.group_scales:
            plain[GROUP_SCALES] = torch.cat(pack.group_scales)
    return _safetensors(plain, texts)


def decode(state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, Tensor | QuantizedTensor]:
    """The tensors that ``encode`` was given, from the entries and metadata of an untrusted file.

    Tied names come back as one object. Entries come back in the file's order: ordinary, quantized, sparse, tied.

    Raises:
        InputError: The index doesn't describe the file; names the entry.
    """
    if INDEX_KEY not in metadata:
        return dict(state)
    index = _read_index(metadata[INDEX_KEY])
    tensors: dict[str, Tensor | QuantizedTensor] = {k: v for k, v in state.items() if k not in OWN}
    stream = _Cursor(_flat(state, STREAM, torch.uint8), STREAM)
    scales = _Cursor(_flat(state, SCALES, torch.float32), SCALES)
    none = {GROUP_SCALES: torch.zeros(0, dtype=torch.bfloat16)}
    group_scales = _Cursor(_flat({**none, **state}, GROUP_SCALES, torch.bfloat16), GROUP_SCALES)
    for name, entry in index["quantized"].items():
        _refuse_second(name, tensors)
        wide = name in index["wide"]
        dtype = torch.int16 if wide else torch.int8
        tensors[name] = _quantized(name, entry, stream, scales, group_scales, dtype)
    for name, entry in index["sparse"].items():
        _refuse_second(name, tensors)
        tensors[name] = _sparse(name, entry, stream)
    stream.finish()
    scales.finish()
    group_scales.finish()
    tied: dict[str, Tensor | QuantizedTensor] = {}
    for name, owner in index["tied"].items():
        _refuse_second(name, tensors)
        if not isinstance(owner, str) or owner not in tensors:
            raise _broken(f"{escape(name)} is tied to {_shown(owner)}, which the file doesn't hold")
        tied[name] = tensors[owner]
    return tensors | tied


@dataclass
class _Packing:
    """What ``encode`` gathers: the index's parts and the pieces of both streams."""

    quantized: dict[str, list[object]] = field(default_factory=dict)
    sparse: dict[str, list[object]] = field(default_factory=dict)
    wide: list[str] = field(default_factory=list)
    tied: dict[str, str] = field(default_factory=dict)
    quantized_chunks: list[planes.Bytes] = field(default_factory=list)
    sparse_chunks: list[planes.Bytes] = field(default_factory=list)
    scales: list[Tensor] = field(default_factory=list)
    group_scales: list[Tensor] = field(default_factory=list)

    def add_quantized(self, name: str, tensor: QuantizedTensor) -> None:
        _check(name, tensor)
        levels: NDArray[np.int16] = tensor.levels.cpu().numpy().astype(np.int16)
        parts = [(width, levels[places].reshape(-1)) for width, places in _places(tensor.bits, tensor.axis)]
        survivors = int(np.count_nonzero(levels))
        chunks = [planes.pack(planes.numbers_of(part, width), width) for width, part in parts]
        masked = [planes.pack(planes.numbers_of(part[part != 0], width), width) for width, part in parts]
        mask = planes.pack((levels.reshape(-1) != 0).astype(np.uint8), 1)
        is_masked = sum(chunk.size for chunk in [mask, *masked]) < sum(chunk.size for chunk in chunks)
        self.quantized_chunks += [mask, *masked] if is_masked else chunks
        if tensor.group_size is None:
            self.scales.append(tensor.scale.cpu().reshape(-1))
        else:
            self.group_scales.append(tensor.scale.cpu().reshape(-1).to(torch.bfloat16))
        if tensor.levels.dtype == torch.int16:
            self.wide.append(name)
        shape = list(tensor.levels.shape)
        groups = [] if tensor.group_size is None else [tensor.group_size]
        self.quantized[name] = [tensor.bits, tensor.axis, shape, survivors if is_masked else None, *groups]

    def add_sparse(self, name: str, tensor: Tensor) -> bool:
        """Store ``tensor`` under a mask if that is smaller; False if it isn't."""
        elements = _bytes(tensor).reshape(-1, tensor.element_size())
        alive = np.asarray(elements.any(axis=1))
        survivors = int(alive.sum())
        if planes.packed_size(len(elements), 1) + survivors * tensor.element_size() >= elements.size:
            return False
        self.sparse_chunks += [planes.pack(alive.astype(np.uint8), 1), elements[alive].reshape(-1)]
        self.sparse[name] = [NAMES[tensor.dtype], list(tensor.shape), survivors]
        return True

    def index(self) -> str:
        """The index's JSON without its empty parts; an empty text where every tensor is an ordinary one."""
        parts = {"quantized": self.quantized, "sparse": self.sparse, "wide": self.wide, "tied": self.tied}
        filled = {key: part for key, part in parts.items() if part}
        return _json({"version": VERSION, **filled}) if filled else ""


@dataclass
class _Cursor:
    """A stream of an untrusted file, read from its front."""

    rest: Tensor
    name: str

    def require(self, size: int, reader: str) -> None:
        if size > len(self.rest):
            raise _broken(
                f"{escape(reader)} needs {size} more elements of {self.name}, which has {len(self.rest)} left"
            )

    def take(self, size: int, reader: str) -> Tensor:
        self.require(size, reader)
        taken, self.rest = self.rest[:size], self.rest[size:]
        return taken

    def finish(self) -> None:
        if len(self.rest):
            raise _broken(f"{len(self.rest)} elements of {self.name} belong to no tensor")


def _quantized(
    name: str, entry: object, stream: _Cursor, scales: _Cursor, group_scales: _Cursor, dtype: torch.dtype
) -> QuantizedTensor:
    if not isinstance(entry, list) or len(entry) not in (4, 5):
        raise _broken(f"{escape(name)} has no entry of bits, axis, shape, survivors")
    bits, axis, shape, survivors = entry[:4]
    group_size = entry[4] if len(entry) == 5 else None
    if not is_width(bits):
        raise _broken(f"{escape(name)} has {_shown(bits)} bits; 2 to 8 are possible")
    num_elements = _num_elements(name, shape)
    if axis is not None and not (_is_count(axis) and axis < len(shape)):
        raise _broken(f"{escape(name)} has a scale along dimension {_shown(axis)} of {len(shape)}")
    if is_mixed(bits) and (axis is None or len(letters_of(bits)) != shape[axis]):
        raise _broken(f"{escape(name)} has bits for {len(letters_of(bits))} channels, not those of its axis")
    if group_size is not None and not (_is_count(group_size) and group_size and axis == 0 and len(shape) == 2):
        raise _broken(f"{escape(name)} has groups of {_shown(group_size)} in the shape {_shown(shape)}")
    if survivors is None:
        alive = None
        stream.require(planes.least_size(num_elements, bits), name)
    else:
        alive = _mask(name, num_elements, survivors, stream).reshape(shape)
    levels = np.zeros(shape, dtype=np.int16)
    for width, places in _places(bits, axis):
        part = levels[places]
        chosen = np.ones(part.shape, dtype=bool) if alive is None else alive[places]
        count = int(chosen.sum())
        numbers = planes.read(lambda size: stream.take(size, name).numpy(), width, count)
        if planes.stages_of(width) and count and int(numbers.max()) >= levels_of(width).count():
            raise _broken(f"{escape(name)} has a number beyond the {levels_of(width).count()} levels of width {width}")
        part[chosen] = planes.levels_from(numbers, width)
        levels[places] = part
    if group_size is not None:
        counts = [shape[0], -(-shape[1] // group_size)]
        scale = group_scales.take(math.prod(counts), name).float().reshape(counts)
    else:
        scale = scales.take(1 if axis is None else shape[axis], name).clone()
    return QuantizedTensor(
        levels=torch.from_numpy(levels).to(dtype).reshape(shape),
        bits=bits,
        scale=scale.reshape(()) if axis is None else scale,
        axis=axis,
        group_size=group_size,
    )


def _places(bits: Width, axis: int | None) -> list[tuple[Width, tuple[Any, ...]]]:
    """The widths in use, in the order of the stream, and where the levels of each are."""
    if not is_mixed(bits):
        return [(bits, (...,))]
    letters = letters_of(bits)
    before = (slice(None),) * (axis or 0)
    used = (letter for letter in WIDTHS if letter in letters and letter != "0")
    return [
        (
            of_letter(letter),
            (*before, [i for i, own in enumerate(letters) if own == letter]),
        )
        for letter in used
    ]


def _sparse(name: str, entry: object, stream: _Cursor) -> Tensor:
    if not isinstance(entry, list) or len(entry) != 3:
        raise _broken(f"{escape(name)} has no entry of dtype, shape, survivors")
    dtype_name, shape, survivors = entry
    if not isinstance(dtype_name, str) or dtype_name not in DTYPES:
        raise _broken(f"{escape(name)} has dtype {_shown(dtype_name)}; a file holds {', '.join(DTYPES)}")
    dtype = DTYPES[dtype_name]
    num_elements = _num_elements(name, shape)
    alive = _mask(name, num_elements, survivors, stream)
    data = stream.take(survivors * dtype.itemsize, name).numpy().reshape(survivors, dtype.itemsize)
    if dtype == torch.bool and (data > 1).any():
        raise _broken(f"{escape(name)} has a bool that is neither 0 nor 1")
    elements = torch.zeros(num_elements, dtype.itemsize, dtype=torch.uint8)
    elements.numpy()[alive] = data
    return elements.reshape(-1).view(dtype).reshape(shape)


def _mask(name: str, num_elements: int, survivors: object, stream: _Cursor) -> NDArray[np.bool_]:
    """A tensor's mask, shape ``[n]``, checked against its count."""
    bits = planes.unpack(stream.take(planes.packed_size(num_elements, 1), name).numpy(), 1, num_elements)
    if not _is_count(survivors) or int(bits.sum()) != survivors:
        raise _broken(f"{escape(name)} has {int(bits.sum())} ones in its mask and {_shown(survivors)} survivors")
    return bits.astype(bool)


def _read_index(text: str) -> dict[str, Any]:
    """The index with all its parts, each of the right kind; its entries are still unchecked."""
    try:
        index = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise _broken(f"it is not JSON ({error})") from None
    if not isinstance(index, dict) or index.get("version") != VERSION:
        found = _shown(index.get("version")) if isinstance(index, dict) else "none"
        raise _broken(f"its version is {found}, expected {VERSION}")
    kinds = {"quantized": dict, "sparse": dict, "wide": list, "tied": dict}
    for key, part in index.items():
        if key != "version" and not isinstance(part, kinds.get(key, ())):
            raise _broken(f"it has a part {escape(key)} that this version doesn't know")
    parts = {key: index.get(key, kind()) for key, kind in kinds.items()}
    if not all(isinstance(name, str) and name in parts["quantized"] for name in parts["wide"]):
        raise _broken("its part wide names a tensor that is not quantized")
    return {**parts, "wide": frozenset(parts["wide"])}


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name twice")
    return found


def _flat(state: Mapping[str, Tensor], name: str, dtype: torch.dtype) -> Tensor:
    stream = state.get(name)
    if stream is None or stream.dtype != dtype or stream.dim() != 1:
        raise _broken(f"the file has no one-dimensional {dtype} tensor {name}")
    return stream


def _num_elements(name: str, shape: object) -> int:
    if not isinstance(shape, list) or len(shape) > MAX_DIMS or not all(_is_count(size) for size in shape):
        raise _broken(f"{escape(name)} has the shape {_shown(shape)}")
    if math.prod(max(size, 1) for size in shape) > MAX_ELEMENTS:
        raise _broken(f"{escape(name)} has the shape {_shown(shape)}, more than {MAX_ELEMENTS} elements")
    return math.prod(shape)


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value <= MAX_ELEMENTS  # A JSON true is an int to isinstance.


def _refuse_second(name: str, tensors: Mapping[str, object]) -> None:
    if name in tensors:
        raise _broken(f"{escape(name)} is there twice")


def _shown(value: object) -> str:
    items = value if isinstance(value, list) else [value]
    is_flat = all(item is None or isinstance(item, int | float | str) for item in items)
    return escape(str(value), 60) if is_flat else "a nested value"  # str() of a deep value overflows the stack.


def _broken(what: str) -> InputError:
    return InputError(f"the index of the packed tensors is damaged: {what}", hint="write the file again with hcompress")


def _check(name: str, tensor: QuantizedTensor) -> None:
    if not is_width(tensor.bits) or tensor.levels.dtype not in (torch.int8, torch.int16):
        raise ValueError(f"{name}: {tensor.bits} bits in {tensor.levels.dtype}; 2 to 8 bits in int8 or int16")
    if is_mixed(tensor.bits) and (
        tensor.axis is None or len(letters_of(tensor.bits)) != tensor.levels.shape[tensor.axis]
    ):
        raise ValueError(f"{name}: {tensor.bits} isn't a width for each channel of axis {tensor.axis}")
    letters = letters_of(tensor.bits)
    found = tensor.levels.reshape(1, -1)
    if is_mixed(tensor.bits) and tensor.axis is not None:
        found = tensor.levels.movedim(tensor.axis, 0).reshape(len(letters), -1)
    for letter, row in zip(letters, found, strict=True):
        low, high = (-128, 127) if letter == "8" else (levels_of(letter).low, levels_of(letter).high)
        if row.numel() and not (low <= int(row.min()) and int(row.max()) <= high):
            what = f"{letter} bits" if letter.isdecimal() else f"{levels_of(letter).count()} levels"
            raise ValueError(f"{name}: a level is outside of [{low}, {high}], the range of {what}")
    if tensor.axis is not None and not 0 <= tensor.axis < tensor.levels.dim():
        raise ValueError(f"{name}: axis {tensor.axis} of {tensor.levels.dim()} dimensions")
    shape = [] if tensor.axis is None else [tensor.levels.shape[tensor.axis]]
    if tensor.group_size is not None:
        if tensor.axis != 0 or tensor.levels.dim() != 2 or tensor.group_size < 1:
            raise ValueError(f"{name}: groups of {tensor.group_size} are those of a matrix with axis 0")
        shape = [*shape, -(-tensor.levels.shape[1] // tensor.group_size)]
        if not torch.equal(tensor.scale.to(torch.bfloat16).to(tensor.scale.dtype), tensor.scale):
            raise ValueError(f"{name}: scales of groups are stored in bfloat16, which doesn't hold these")
    if tensor.scale.dtype != torch.float32 or list(tensor.scale.shape) != shape:
        raise ValueError(f"{name}: scale is {tensor.scale.dtype} {list(tensor.scale.shape)}, expected float32 {shape}")


def _memory(name: str, tensor: Tensor | QuantizedTensor) -> object:
    """Equal for tensors that are the same elements in the same memory; the name itself for an empty one."""
    if isinstance(tensor, QuantizedTensor):
        kind = (tensor.bits, tensor.axis, tensor.group_size)
        return (_memory(name, tensor.levels), _memory(name, tensor.scale), kind)
    if not tensor.numel():
        return name
    return (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())


def _bytes(tensor: Tensor) -> planes.Bytes:
    """The elements' bytes, row-major, shape ``[n * element size]``."""
    rows = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)  # A stride of 0 passes contiguous().
    flat: planes.Bytes = rows.reshape(-1).view(torch.uint8).numpy()
    return flat


def _safetensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """The file's bytes; ``safetensors.torch.save`` writes several metadata entries in a random order."""
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    chunks: list[bytes] = []
    start = 0
    for name in _aligned(tensors):
        chunks.append(_bytes(tensors[name]).tobytes())
        stop = start + len(chunks[-1])
        shape = list(tensors[name].shape)
        header[name] = {"dtype": NAMES[tensors[name].dtype], "shape": shape, "data_offsets": [start, stop]}
        start = stop
    text = _json(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + b"".join(chunks)


def _aligned(tensors: Mapping[str, Tensor]) -> Iterable[str]:
    """Names in the order of safetensors: widest elements first, so that each lies on a multiple of its size."""
    return sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))


def _json(value: object) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)
