"""Canonical JSON: sorted keys, two-space indent, no NaN, so that equal records are equal bytes and diffs are short."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import InputError, escape


def dumps(value: object) -> str:
    """Canonical text of plain JSON values, frozen dataclasses and mappings; ends with a newline."""
    return json.dumps(plain(value), sort_keys=True, indent=2, ensure_ascii=True, allow_nan=False) + "\n"


def plain(value: object) -> Any:
    """Dataclasses and tuples as the dicts and lists that JSON knows."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def sha256_of(value: object) -> str:
    """Hash of the canonical text."""
    return hashlib.sha256(dumps(value).encode()).hexdigest()


def sha256_of_bytes(data: bytes) -> str:
    """Hash of a file's bytes that are in memory."""
    return hashlib.sha256(data).hexdigest()


def sha256_of_file(path: Path) -> str:
    """Hash of a file's bytes, read in pieces."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_record(path: Path, schema: str) -> dict[str, Any]:
    """The JSON object in ``path``, whose ``schema`` key must equal ``schema`` (``name/version``).

    Raises:
        InputError: The file is missing, not JSON, or of another schema; names the file and the way out.
    """
    record = read_object(
        path, missing="pass a run folder that hcompress wrote", damaged="write it again with hcompress"
    )
    found = record.get("schema")
    if found != schema:
        shown = escape(str(found))
        raise InputError(
            f"{path}: schema is {shown}, expected {schema}",
            hint="use the hcompress version that wrote the file, or make the run again",
        )
    return record


def read_object(path: Path, *, missing: str, damaged: str) -> dict[str, Any]:
    """The JSON object in ``path``.

    Args:
        missing: Hint of the error where there is no such file.
        damaged: Where it isn't JSON, or no object.

    Raises:
        InputError: One of these; names the file and the way out.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file", hint=missing) from None
    except (OSError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not readable as JSON ({error})", hint=damaged) from None
    if not isinstance(record, dict):
        raise InputError(f"{path}: a JSON object is expected", hint=damaged)
    return record
