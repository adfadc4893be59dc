"""Pickles of torch.save read as plain data: names become inert records, nothing is imported, called or built.

A pickle is a program. Its opcodes are checked first, then Python's own unpickler runs it with every global replaced:
torch's rebuild functions by records of their arguments, all other names by placeholders that swallow what is done to
them and make the reader refuse the file.
"""

from __future__ import annotations

import io
import pickle
import pickletools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch

from ..errors import InputError, escape
from .archive import DAMAGED

MAX_PICKLE_BYTES = 64 * 2**20
# Each would take a type or buffer from outside the pickle.
REFUSED_OPCODES = {"EXT1", "EXT2", "EXT4", "NEXT_BUFFER", "READONLY_BUFFER", "INST", "OBJ"}
PICKLE_ERRORS = (
    pickle.UnpicklingError,
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    RecursionError,
    TypeError,
    ValueError,
)


@dataclass(frozen=True, slots=True)
class StorageRecord:
    """One storage: its key in the file, element type and elements; a view of another starts at ``offset``."""

    key: str
    dtype: torch.dtype
    num_stored: int
    offset: int = 0


@dataclass(frozen=True, slots=True)
class TensorRecord:
    """What a dense tensor's pickle declares, unchecked."""

    storage: StorageRecord
    dtype: torch.dtype
    offset: object
    shape: tuple[object, ...]
    stride: tuple[object, ...]


@dataclass(frozen=True, slots=True)
class Unsupported:
    """A tensor that is not a dense array of numbers, such as a quantized one."""

    what: str


@dataclass(frozen=True, slots=True)
class Opaque:
    """A harmless value that no state dict needs, such as bytes, a device or a complex number."""

    def __setstate__(self, _: object) -> None:
        raise pickle.UnpicklingError("state set on a value")


@dataclass(frozen=True, slots=True)
class Scan:
    """What a pickle holds: containers, plain values and records; and the names that torch's safe loader refuses."""

    tree: object
    refused: tuple[str, ...]
    storages: dict[str, StorageRecord]


class Placeholder:
    """Stands for every name outside the list: takes any call, state or item, and keeps none."""

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __new__(cls, *_: object, **__: object) -> Placeholder:
        return super().__new__(cls)

    def _ignore(self, *_: object) -> None:
        pass

    def __call__(self, *_: object) -> Placeholder:
        return self

    __setstate__ = __setitem__ = append = extend = add = _ignore


class InertDict(dict[Any, Any]):
    """An OrderedDict without attributes: its state (torch's ``_metadata``) is dropped."""

    __slots__ = ()

    def __setstate__(self, _: object) -> None:
        pass


@dataclass(frozen=True, slots=True)
class Rebuild:
    """The name of a listed torch function; called, it records its arguments."""

    name: str

    def __call__(self, *arguments: Any) -> object:
        return _record(self.name, arguments)

    def __setstate__(self, _: object) -> None:
        raise pickle.UnpicklingError("state set on a function")


@dataclass(frozen=True, slots=True)
class StorageType:
    dtype: torch.dtype

    def __setstate__(self, _: object) -> None:
        raise pickle.UnpicklingError("state set on a storage type")


STORAGE_TYPES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
    "QInt8Storage": torch.int8,
    "QUInt8Storage": torch.uint8,
    "QInt32Storage": torch.int32,
    "UntypedStorage": torch.uint8,
}
REBUILDS = {
    "collections.OrderedDict": "dict",
    "collections.Counter": "dict",
    "builtins.set": "set",
    "builtins.bytearray": "value",
    "builtins.complex": "value",
    "_codecs.encode": "value",
    "torch.Size": "tuple",
    "torch.device": "value",
    "torch.serialization._get_layout": "value",
    "torch._utils._rebuild_tensor": "tensor",
    "torch._utils._rebuild_tensor_v2": "tensor",
    "torch._utils._rebuild_tensor_v3": "typed tensor",
    "torch._utils._rebuild_parameter": "parameter",
    "torch._utils._rebuild_parameter_with_state": "parameter",
    "torch._tensor._rebuild_from_type_v2": "from type",
    "torch.nn.parameter.Parameter": "type",
    "torch.Tensor": "type",
    "torch._utils._rebuild_qtensor": "a quantized tensor",
    "torch._utils._rebuild_sparse_tensor": "a sparse tensor",
    "torch._utils._rebuild_nested_tensor": "a nested tensor",
    "torch._utils._rebuild_meta_tensor_no_storage": "a meta tensor without values",
}
QSCHEMES = {"per_tensor_affine", "per_tensor_symmetric", "per_channel_affine", "per_channel_symmetric"}


class InertUnpickler(pickle.Unpickler):
    """Python's unpickler with no way out of the file."""

    def __init__(self, stream: BinaryIO) -> None:
        # Checkpoints of Python 2 hold byte strings; torch reads them as UTF-8 too.
        super().__init__(stream, encoding="utf-8")
        self.refused: dict[str, None] = {}
        self.storages: dict[str, StorageRecord] = {}

    def find_class(self, module: str, name: str, /) -> Any:
        full_name = f"{'builtins' if module == '__builtin__' else module}.{name}"
        if full_name in REBUILDS:
            return Rebuild(REBUILDS[full_name])
        if module in ("torch", "torch.storage") and name in STORAGE_TYPES:
            return StorageType(STORAGE_TYPES[name])
        # vars, not getattr: torch imports some submodules when they are asked for.
        if module == "torch" and (name in QSCHEMES or isinstance(vars(torch).get(name), torch.dtype)):
            return vars(torch)[name]
        self.refused[full_name] = None
        return type("Placeholder", (Placeholder,), {})

    def persistent_load(self, saved_id: Any, /) -> object:
        if isinstance(saved_id, tuple) and saved_id[:1] == ("module",):
            return saved_id[1]
        kind, storage_type, key, _, num_stored, *view = saved_id
        if kind != "storage" or not isinstance(storage_type, StorageType) or not isinstance(key, str):
            raise pickle.UnpicklingError("not a storage")
        if type(num_stored) is not int or num_stored < 0:
            raise pickle.UnpicklingError("not a storage size")
        offset = 0
        if view and view[0] is not None:
            _, offset, view_size = view[0]
            if type(offset) is not int or type(view_size) is not int or not 0 <= offset <= offset + view_size:
                raise pickle.UnpicklingError("not a storage view")
        record = StorageRecord(key, storage_type.dtype, num_stored, offset)
        self.storages[key] = record
        return record


def scan_pickle(content: bytes | bytearray, label: str) -> Scan:
    """The data of one pickle without running any of it.

    Args:
        label: How messages call the file.

    Raises:
        InputError: Not a well-formed pickle, too large, or with opcodes that torch never writes.
    """
    if len(content) > MAX_PICKLE_BYTES:
        raise InputError(f"{label}: its pickle has {len(content)} bytes, more than {MAX_PICKLE_BYTES}")
    check_opcodes(io.BytesIO(content), label)
    unpickler = InertUnpickler(io.BytesIO(content))
    try:
        tree = unpickler.load()
    except PICKLE_ERRORS:
        if not unpickler.refused:
            raise InputError(f"{label}: its pickle is damaged or not what torch.save writes", hint=DAMAGED) from None
        tree = Placeholder()
    return Scan(tree, tuple(unpickler.refused), unpickler.storages)


def check_opcodes(stream: BinaryIO, label: str) -> None:
    """Read one pickle of ``stream`` to its end; each opcode must be listed and within bounds."""
    try:
        for opcode, argument, position in pickletools.genops(stream):
            if opcode.name in REFUSED_OPCODES:
                raise InputError(f"{label}: its pickle has the opcode {opcode.name}, which torch.save never writes")
            # The unpickler allocates a memo as long as the largest index: 2^31 would take 32 GB.
            if "PUT" in opcode.name and isinstance(argument, int) and argument > (position or 0):
                raise InputError(f"{label}: its pickle asks for a memo of {argument} entries", hint=DAMAGED)
    except (*PICKLE_ERRORS, AssertionError):
        raise InputError(f"{label}: its pickle is damaged, truncated or not a pickle", hint=DAMAGED) from None


def walk_tree(tree: object) -> Iterator[tuple[str, object]]:
    """Every leaf with its keys joined by ``/``; a container met twice is walked once."""
    seen: set[int] = set()
    pending: list[tuple[str, object]] = [("", tree)]
    while pending:
        key, value = pending.pop()
        if isinstance(value, dict | list | tuple):
            if id(value) not in seen:
                seen.add(id(value))
                items = value.items() if isinstance(value, dict) else enumerate(value)
                prefix = f"{key}/" if key else ""
                pending += reversed([(f"{prefix}{escape(str(name))}", item) for name, item in items])
        else:
            yield key, value


def _record(name: str, arguments: tuple[Any, ...]) -> object:
    match name:
        case "dict":
            return InertDict(*arguments)
        case "set":
            return set(*arguments)
        case "tuple":
            return tuple(*arguments)
        case "tensor":
            storage, offset, shape, stride, *_ = arguments
            return _tensor(storage, storage.dtype, offset, shape, stride)
        case "typed tensor":
            storage, offset, shape, stride, _, _, dtype, *_ = arguments
            return _tensor(storage, dtype, offset, shape, stride)
        case "parameter":
            return arguments[0]
        case "from type":
            rebuild, kind, inner, *_ = arguments
            if not isinstance(rebuild, Rebuild) or not isinstance(kind, Rebuild) or kind.name != "type":
                return Unsupported("a tensor subclass")
            return rebuild(*inner)
        case "value" | "type":
            return Opaque()
    return Unsupported(name)


def _tensor(storage: Any, dtype: Any, offset: object, shape: Any, stride: Any) -> TensorRecord:
    if not isinstance(storage, StorageRecord) or not isinstance(dtype, torch.dtype):
        raise pickle.UnpicklingError("not a tensor")
    if storage.offset and storage.dtype != dtype:
        raise pickle.UnpicklingError("a view of another type")
    return TensorRecord(storage, dtype, offset, tuple(shape), tuple(stride))
