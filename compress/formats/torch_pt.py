"""State dicts of torch.save, zip and legacy, read without running their pickles.

The pickle gives inert records (``pickle_scan``); each is checked against the storage bytes that the file really has;
only then are tensors built, and only those of the state dict: optimizer state costs no memory.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from ..errors import InputError, escape
from .archive import DAMAGED, opened_archive, read_member
from .extents import check_extent
from .pickle_scan import (
    Placeholder,
    Scan,
    TensorRecord,
    Unsupported,
    check_opcodes,
    scan_pickle,
    walk_tree,
)

SUFFIXES = (".pt", ".pth", ".th", ".ckpt", ".bin", ".tar")
LEGACY_MAGIC = bytes.fromhex("80028a0a6cfc9c46f9206aa850192e")
# Searched in this order where the file's own dict holds no tensors; weights that were averaged come last.
NESTED_KEYS = (
    "state_dict",
    "model_state_dict",
    "model",
    "net",
    "network",
    "module",
    "weights",
    "params",
    "parameters",
    "state",
    "params_ema",
    "state_dict_ema",
    "ema_state_dict",
    "model_ema",
    "ema",
)
SAVE_AGAIN = "in the environment that made it, torch.save(model.state_dict(), 'weights.pt') and pass that file"


@dataclass(frozen=True, slots=True)
class Opened:
    """A scanned file: its data, the bytes of each storage, and how to read them."""

    label: str
    tree: object
    storage_bytes: Mapping[str, int]
    read_storage: Callable[[str], bytearray]


def read(path: Path) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The state dict in ``path`` on the CPU, and notes on what was picked and left out.

    Raises:
        InputError: Damaged, truncated, with classes beyond torch's safe list (named), with tensors that don't fit their
            storage (named), or without a state dict.
    """
    with path.open("rb") as stream:
        is_legacy = stream.read(len(LEGACY_MAGIC)) == LEGACY_MAGIC
        stream.seek(0)
        if is_legacy:
            opened = _open_legacy(stream, str(path))
            return _read_state(opened)
        with opened_archive(stream, str(path)) as archive:
            sizes = {name[5:]: entry.file_size for name, entry in archive.members.items() if name.startswith("data/")}
            if "byteorder" in archive:
                _check_byte_order(read_member(archive, "byteorder") == sys.byteorder.encode(), str(path))
            scan = scan_pickle(read_member(archive, "data.pkl"), str(path))
            _check_scan(scan, sizes, str(path))
            return _read_state(Opened(str(path), scan.tree, sizes, lambda key: read_member(archive, f"data/{key}")))


def read_tree(stream: BinaryIO, label: str) -> object:
    """The dicts, lists, tuples, plain values and tensors of a zip written by torch.save.

    Raises:
        InputError: As ``read``, or a value that is neither plain nor a dense tensor.
    """
    with opened_archive(stream, label) as archive:
        sizes = {name[5:]: entry.file_size for name, entry in archive.members.items() if name.startswith("data/")}
        scan = scan_pickle(read_member(archive, "data.pkl"), label)
        _check_scan(scan, sizes, label)
        storages: dict[str, Tensor] = {}
        opened = Opened(label, scan.tree, sizes, lambda key: read_member(archive, f"data/{key}"))
        try:
            return _build_tree(scan.tree, opened, storages)
        except RecursionError:
            raise InputError(f"{label}: its values are nested too deeply") from None


def pick_state(tree: object, label: str) -> tuple[dict[str, TensorRecord], tuple[str, ...]]:
    """The tensors of the first dict that holds some: the file's own, or one under ``NESTED_KEYS``, two levels deep.

    Raises:
        InputError: No such dict; gives the keys that were found.
    """
    found, where = _find_state(tree, depth=2)
    if found is None:
        what = "a single tensor" if isinstance(tree, TensorRecord) else f"a {type(tree).__name__}"
        if isinstance(tree, dict):
            what = f"a dict with the keys {[escape(str(key)) for key in list(tree)[:8]]}"
        raise InputError(f"{label}: holds no state dict but {what}", hint=SAVE_AGAIN)
    notes = []
    if where:
        notes.append(f"keys were nested under {'/'.join(where)!r}")
        outer = tree if isinstance(tree, dict) else {}
        others = [key for key in NESTED_KEYS if key != where[0] and _has_tensors(outer.get(key))]
        if others:
            notes.append(f"also found and not used: {', '.join(map(repr, others))}")
    tensors = {str(key): value for key, value in found.items() if isinstance(value, TensorRecord | Unsupported)}
    if len(tensors) < len(found):
        ignored = [escape(str(key)) for key in found if str(key) not in tensors]
        notes.append(f"{len(ignored)} entries that are not tensors were ignored: {', '.join(ignored[:4])}")
    for key, value in tensors.items():
        what = value.what if isinstance(value, Unsupported) else "a complex tensor" if value.dtype.is_complex else ""
        if what:
            raise InputError(
                f"{label}: {escape(key)!r} is {what}; hcompress reads dense tensors of real numbers",
                hint="save the float model's state dict",
            )
    return {key: value for key, value in tensors.items() if isinstance(value, TensorRecord)}, tuple(notes)


def _read_state(opened: Opened) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    records, notes = pick_state(opened.tree, opened.label)
    storages: dict[str, Tensor] = {}
    return {key: _build(record, opened, storages) for key, record in records.items()}, notes


def _find_state(tree: object, *, depth: int) -> tuple[dict[object, object] | None, tuple[str, ...]]:
    if not isinstance(tree, dict):
        return None, ()
    if _has_tensors(tree):
        return tree, ()
    for key in NESTED_KEYS if depth else ():
        found, where = _find_state(tree.get(key), depth=depth - 1)
        if found is not None:
            return found, (key, *where)
    return None, ()


def _has_tensors(value: object) -> bool:
    return isinstance(value, dict) and any(isinstance(item, TensorRecord | Unsupported) for item in value.values())


def _check_scan(scan: Scan, storage_bytes: Mapping[str, int], label: str) -> None:
    """Refuse names beyond torch's safe list, then tensors that don't fit the bytes of their storage."""
    if scan.refused:
        names = [escape(name) for name in scan.refused]
        classes = ", ".join([*names[:4], *(["..."] if len(names) > 4 else [])])
        if isinstance(scan.tree, Placeholder):
            module = next((name for name in names if not name.startswith(("torch.", "dill.", "_"))), names[0])
            raise InputError(
                f"{label}: holds a whole pickled module or object ({module}), which only running code would load",
                hint=SAVE_AGAIN,
            )
        kind = "a pickled optimizer object" if names[0].startswith("torch.optim.") else "pickled objects beside tensors"
        raise InputError(f"{label}: holds {kind} ({classes}), which only running code would load", hint=SAVE_AGAIN)
    for key, value in walk_tree(scan.tree):
        if isinstance(value, TensorRecord):
            stored = storage_bytes.get(value.storage.key)
            size = value.storage.dtype.itemsize
            declared = value.storage.num_stored * size
            if stored != declared:
                raise InputError(
                    f"{label}: {key!r} declares a storage of {declared} bytes, the file has {stored or 0}", hint=DAMAGED
                )
            # A storage can be typed in bytes while the tensor counts elements.
            num_stored = (value.storage.num_stored - value.storage.offset) * size // value.dtype.itemsize
            check_extent(value.shape, value.stride, value.offset, num_stored=num_stored, label=label, key=key)


def _build(record: TensorRecord, opened: Opened, storages: dict[str, Tensor]) -> Tensor:
    """The tensor of a checked record; records of one storage share memory, as tied weights did when they were saved."""
    shape = [size for size in record.shape if isinstance(size, int)]
    if 0 in shape:
        return torch.empty(shape, dtype=record.dtype)
    storage = record.storage
    if storage.key not in storages:
        storages[storage.key] = torch.frombuffer(opened.read_storage(storage.key), dtype=torch.uint8)
    offset_bytes = storage.offset * storage.dtype.itemsize
    elements = storages[storage.key][offset_bytes:]
    elements = elements[: elements.numel() // record.dtype.itemsize * record.dtype.itemsize].view(record.dtype)
    stride = [step for step in record.stride if isinstance(step, int)]
    offset = record.offset if isinstance(record.offset, int) else 0
    return elements.as_strided(shape, stride, elements.storage_offset() + offset)


def _build_tree(value: object, opened: Opened, storages: dict[str, Tensor]) -> object:
    if isinstance(value, TensorRecord):
        return _build(value, opened, storages)
    if isinstance(value, dict):
        return {key: _build_tree(item, opened, storages) for key, item in value.items()}
    if isinstance(value, list):
        return [_build_tree(item, opened, storages) for item in value]
    if isinstance(value, tuple):
        return tuple(_build_tree(item, opened, storages) for item in value)
    if value is None or isinstance(value, bool | int | float | str | torch.dtype):
        return value
    raise InputError(f"{opened.label}: holds a value that is neither a tensor nor plain ({type(value).__name__})")


def _open_legacy(stream: BinaryIO, label: str) -> Opened:
    """Files of torch before 1.6: pickles (magic, protocol, system, data, storage keys), then the storages' bytes."""
    pickles = []
    for _ in range(5):
        start = stream.tell()
        check_opcodes(stream, label)
        end = stream.tell()
        stream.seek(start)
        pickles.append(scan_pickle(stream.read(end - start), label))
    _, _, system, data, keys = pickles
    if isinstance(system.tree, dict):
        _check_byte_order(system.tree.get("little_endian", True) == (sys.byteorder == "little"), label)
    sizes: dict[str, int] = {}
    starts: dict[str, int] = {}
    file_bytes = stream.seek(0, 2)
    position = end
    if not data.refused:
        for key in keys.tree if isinstance(keys.tree, list) else ():
            stream.seek(position)
            header = stream.read(8)
            if len(header) < 8 or not isinstance(key, str) or key not in data.storages:
                raise InputError(f"{label}: the file is truncated: the bytes of its tensors end early", hint=DAMAGED)
            size = struct.unpack("<q", header)[0] * data.storages[key].dtype.itemsize
            if not 0 <= size <= file_bytes - position - 8:
                raise InputError(f"{label}: the file is truncated: the bytes of its tensors end early", hint=DAMAGED)
            sizes[key], starts[key] = size, position + 8
            position += 8 + size
    _check_scan(data, sizes, label)

    def read_storage(key: str) -> bytearray:
        stream.seek(starts[key])
        return bytearray(stream.read(sizes[key]))

    return Opened(label, data.tree, sizes, read_storage)


def _check_byte_order(is_native: bool, label: str) -> None:
    if not is_native:
        raise InputError(
            f"{label}: was written on a machine of the other byte order",
            hint="save it again on a machine like this one",
        )
