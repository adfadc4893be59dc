"""Zip archives of torch.save, torch.export.save and numpy, checked before a byte of them is used.

Only Python's ``zipfile`` parses the archive: readers get members from here, so no second parser can see other bytes.
"""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO

from ..errors import InputError, escape

MAX_MEMBERS = 200_000
END_BYTES = 22
# The count in the end record of an archive whose real count is in its zip64 record.
ZIP64_COUNT = 0xFFFF
# What zipfile raises on damaged archives, measured by flipping every byte of small ones.
ZIP_ERRORS = (zipfile.BadZipFile, EOFError, OSError, RuntimeError, ValueError, OverflowError, KeyError, struct.error)
DAMAGED = "copy or download the file again and compare its sha256 with the source's"


@dataclass(frozen=True, slots=True)
class Archive:
    """An open zip archive whose names, sizes and storage method passed the checks.

    Args:
        label: How messages call the file.
        members: Entries by name below the common top folder, if there is one.
    """

    label: str
    file: zipfile.ZipFile
    members: dict[str, zipfile.ZipInfo]

    def __contains__(self, name: str) -> bool:
        return name in self.members


@contextmanager
def opened_archive(stream: BinaryIO, label: str, *, compressed: bool = False) -> Iterator[Archive]:
    """The archive in ``stream``, with every entry's name, size and place checked.

    Args:
        label: How messages call the file.
        compressed: Whether deflated entries are allowed; the caller then caps what they inflate to.

    Raises:
        InputError: Truncated, encrypted, compressed, or with names that are doubled or leave the archive.
    """
    try:
        file = zipfile.ZipFile(stream)
    except ZIP_ERRORS:
        raise InputError(
            f"{label}: the file is truncated: it starts as a zip archive but has no readable end", hint=DAMAGED
        ) from None
    with file:
        _check_end(stream, len(file.infolist()), label)
        entries = [entry for entry in file.infolist() if not entry.filename.endswith("/")]
        check_entries(entries, stream.seek(0, 2), label, compressed=compressed)
        yield Archive(label, file, _below_root({entry.filename: entry for entry in entries}))


def read_member(archive: Archive, name: str) -> bytearray:
    """The bytes of one entry; its CRC-32 is checked as it is read."""
    if name not in archive.members:
        raise InputError(f"{archive.label}: the archive has no entry {escape(name)!r}", hint=DAMAGED)
    entry = archive.members[name]
    try:
        with archive.file.open(entry) as stream:
            # One byte more than declared: zipfile compares the CRC-32 only when it meets the end.
            content: bytearray | None = bytearray(stream.read(entry.file_size + 1))
    except (*ZIP_ERRORS, zlib.error):
        content = None
    if content is None or len(content) != entry.file_size:
        raise InputError(
            f"{archive.label}: the bytes of entry {escape(name)!r} were changed or cut short (its CRC-32 disagrees)",
            hint=DAMAGED,
        )
    return content


def check_entries(entries: list[zipfile.ZipInfo], file_bytes: int, label: str, *, compressed: bool) -> None:
    """Refuse what torch.save never writes: it stores entries once each, uncompressed and side by side."""
    if len(entries) > MAX_MEMBERS:
        raise InputError(f"{label}: the archive has {len(entries)} entries, more than {MAX_MEMBERS}")
    seen: set[str] = set()
    for entry in entries:
        name = escape(entry.filename)
        parts = entry.filename.split("/")
        if ".." in parts or "" in parts or "\\" in entry.orig_filename or not entry.orig_filename.isprintable():
            raise InputError(f"{label}: the archive has an entry with an unsafe name, {name!r}")
        # torch's own zip reader ignores case, so names that differ only in case are doubled too.
        if entry.filename.lower() in seen:
            raise InputError(f"{label}: the archive has two entries named {name!r}")
        seen.add(entry.filename.lower())
        if entry.flag_bits & 0x1:
            raise InputError(f"{label}: entry {name!r} is encrypted", hint="save it again without a password")
        if not compressed and entry.compress_type != zipfile.ZIP_STORED:
            raise InputError(
                f"{label}: entry {name!r} is compressed, which torch never writes: it may inflate without limit",
                hint="load it where you trust it and torch.save the state dict again",
            )
        if entry.compress_type == zipfile.ZIP_STORED and entry.compress_size != entry.file_size:
            raise InputError(f"{label}: entry {name!r} declares two different sizes", hint=DAMAGED)
    if sum(entry.compress_size for entry in entries) > file_bytes:
        raise InputError(f"{label}: the entries declare more bytes than the file has ({file_bytes})", hint=DAMAGED)


def _check_end(stream: BinaryIO, num_entries: int, label: str) -> None:
    """The end record must count the entries that were found: one changed length in the directory hides others."""
    stream.seek(-END_BYTES, 2)
    end = stream.read(END_BYTES)
    (declared,) = struct.unpack_from("<H", end, 10)
    if not end.startswith(b"PK\x05\x06") or declared not in (num_entries, ZIP64_COUNT):
        raise InputError(f"{label}: the archive's directory was changed: entries are missing or hidden", hint=DAMAGED)


def _below_root(entries: dict[str, zipfile.ZipInfo]) -> dict[str, zipfile.ZipInfo]:
    roots = {name.split("/", 1)[0] if "/" in name else "" for name in entries}
    if len(roots) != 1 or "" in roots:
        return entries
    return {name.split("/", 1)[1]: entry for name, entry in entries.items()}
