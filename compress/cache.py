"""What took long to measure, kept by content: a record and its tensors under the hash of all that they depend on.

An entry is one JSON file, and a safetensors file beside it where there are tensors, in the user's cache folder. Each is
checked against its hash before it is used, so that a damaged entry costs a measurement and never a wrong figure.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from filelock import FileLock, Timeout
from torch import Tensor

from . import __version__, canonical, store
from .budget import format_bytes
from .errors import DiskError, InputError, escape
from .formats import safetensors as guarded

SCHEMA = "hcompress.cache/1"
FOLDER = "hcompress"
MAX_BYTES = 10**9
LOCK_TIMEOUT_S = 10.0
NO_TENSORS: Mapping[str, Tensor] = {}


def versions() -> dict[str, str]:
    """The programs that compute a record, for its key: this package by its code, which may change without a number."""
    return {"hcompress": __version__, "code": _code_sha256(), "torch": torch.__version__}


def read(kind: str, key: Mapping[str, Any], notes: list[str]) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """The record and the tensors that were written under ``key``; None where there are none, or damaged ones.

    Args:
        kind: What is kept, such as ``sensitivity``: the first part of the file's name.
        key: All that the record depends on, as plain JSON values.
        notes: Gets a sentence about a damaged entry.
    """
    folder = _folder()
    if folder is None:
        return None
    path = _path(folder, kind, key)
    try:
        os.utime(path)  # first, so that no other run takes it for the oldest
    except OSError:  # not there, or in a folder that can be read alone
        if not os.access(path, os.R_OK):
            return None
    try:
        return _checked(path, kind, key)
    except InputError as error:
        notes.append(f"a damaged cache entry was not used, and its figures measured again: {error.message}")
        return None


def write(
    kind: str,
    key: Mapping[str, Any],
    record: Mapping[str, Any],
    tensors: Mapping[str, Tensor] = NO_TENSORS,
    *,
    notes: list[str],
) -> None:
    """Keep a record of plain JSON values and its tensors; the entries that were not used for longest make room.

    Args:
        kind: As for ``read``.
        key: As for ``read``.
        notes: Gets a sentence where nothing could be written; the run goes on.
    """
    folder = _folder()
    if folder is None:
        notes.append("measurements are not cached: there is no home folder; set XDG_CACHE_HOME")
        return
    size_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if size_bytes > MAX_BYTES:
        most = format_bytes(MAX_BYTES)
        notes.append(f"measurements of {format_bytes(size_bytes)} are not cached: {most} is the most")
        return
    try:
        with _locked(folder):
            _write(_path(folder, kind, key), kind, key, record, tensors)
            _evict(folder)
    except (DiskError, OSError) as error:
        notes.append(f"measurements are not cached ({error}): set XDG_CACHE_HOME, or pass --cache off")


@functools.cache
def _code_sha256() -> str:
    """Hash of this package's source files."""
    root = Path(__file__).parent
    return canonical.sha256_of(
        {path.relative_to(root).as_posix(): canonical.sha256_of_file(path) for path in root.rglob("*.py")}
    )


def _folder() -> Path | None:
    """``$XDG_CACHE_HOME/hcompress``, else ``~/.cache/hcompress``; None where the user has no home."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if base.is_absolute():
        return base / FOLDER
    try:
        return Path.home() / ".cache" / FOLDER
    except RuntimeError:
        return None


def _path(folder: Path, kind: str, key: Mapping[str, Any]) -> Path:
    return folder / f"{kind}-{canonical.sha256_of(key)}.json"


def _checked(path: Path, kind: str, key: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The entry in ``path``.

    Raises:
        InputError: It isn't whole, isn't that of ``key``, or its tensors are not those that it names.
    """
    entry = canonical.read_record(path, SCHEMA)
    try:
        seal, record, tensors_sha256 = entry.pop("sha256"), entry["record"], entry["tensors_sha256"]
        is_whole = seal == canonical.sha256_of(entry) and isinstance(record, dict)
        is_asked = entry["kind"] == kind and canonical.dumps(entry["key"]) == canonical.dumps(key)
    except (KeyError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not a cache entry ({escape(str(error))})") from None
    if not is_whole or not is_asked:
        raise InputError(f"{path}: {'bytes were changed' if is_asked else 'the entry is of another measurement'}")
    if tensors_sha256 is None:
        return record, {}
    sidecar = path.with_suffix(".safetensors")
    try:
        if canonical.sha256_of_file(sidecar) != tensors_sha256:
            raise InputError(f"{sidecar}: bytes were changed")
        return record, guarded.read(sidecar)[0]
    except OSError as error:
        raise InputError(f"{sidecar}: can't be read ({error.strerror})") from None


def _write(
    path: Path, kind: str, key: Mapping[str, Any], record: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Tensors first: an entry that is there has them."""
    tensors_sha256 = None
    if tensors:
        data = safetensors.torch.save({name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)})
        store.write_file(path.with_suffix(".safetensors"), data)
        tensors_sha256 = canonical.sha256_of_bytes(data)
    entry = {"schema": SCHEMA, "kind": kind, "key": key, "record": record, "tensors_sha256": tensors_sha256}
    store.write_file(path, canonical.dumps({**entry, "sha256": canonical.sha256_of(entry)}))


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One writer at a time: two runs may measure the same thing at once."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    lock_path = folder / ".lock"
    lock_path.touch()  # FileLock waits where it can't make the file
    try:
        with FileLock(lock_path).acquire(timeout=LOCK_TIMEOUT_S):
            yield
    except Timeout:
        raise DiskError(f"{folder} is locked by another run") from None


def _evict(folder: Path) -> None:
    """Delete what killed runs left, and the least recently used entries beyond ``MAX_BYTES``."""
    for path in folder.glob(".*.partial"):
        path.unlink(missing_ok=True)
    entries: dict[str, list[Path]] = {}
    for path in folder.iterdir():
        if path.suffix in (".json", ".safetensors"):
            entries.setdefault(path.stem, []).append(path)
    used = {stem: max(path.stat().st_mtime_ns for path in paths) for stem, paths in entries.items()}
    total_bytes = 0
    for stem in sorted(entries, key=lambda stem: used[stem], reverse=True):
        total_bytes += sum(path.stat().st_size for path in entries[stem])
        if total_bytes > MAX_BYTES:
            for path in sorted(entries[stem]):  # the .json before its tensors
                path.unlink(missing_ok=True)
