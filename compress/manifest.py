"""The manifest: every file of a run folder with its hash, written last, so that a folder that has one is complete."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import canonical
from .errors import InputError, escape

SCHEMA = "hcompress.manifest/1"
NAME = "manifest.json"
SWEEP = "sweep.json"  # of a folder that holds runs


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a run folder holds and where it came from.

    Attributes:
        files: ``{name: {"sha256": ..., "bytes": ...}}`` of every other file in the folder.
        parents: sha256 of the checkpoint and, for a run on a run, of that run's manifest.
        versions: Of hcompress, Python, torch, onnx and onnxruntime.
        command: The command line, file paths as given.
        created: UTC time, ISO 8601.
        host: Machine description: processor count, threads.
    """

    files: dict[str, dict[str, Any]]
    parents: dict[str, str]
    versions: dict[str, str]
    command: list[str]
    seed: int
    created: str
    host: dict[str, Any]
    schema: str = SCHEMA


def describe_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Hash and size of every file in ``folder`` but the manifest."""
    return {
        path.name: {"sha256": canonical.sha256_of_file(path), "bytes": path.stat().st_size}
        for path in sorted(folder.iterdir())
        if path.is_file() and path.name != NAME
    }


def read_manifest(folder: Path) -> Manifest:
    """Read a run folder's manifest.

    Raises:
        InputError: The folder has none, or it isn't one.
    """
    if (folder / SWEEP).is_file():
        raise InputError(
            f"{folder}: a sweep, not a run folder", hint=f"pass one of its points: hcompress show {folder} lists them"
        )
    if not (folder / NAME).is_file():
        raise InputError(
            f"{folder}: not a run folder ({NAME} is missing)", hint="pass the --out folder of a finished run"
        )
    record = canonical.read_record(folder / NAME, SCHEMA)
    try:
        return Manifest(**{key: record[key] for key in Manifest.__dataclass_fields__})
    except (KeyError, TypeError) as error:
        raise InputError(f"{folder / NAME}: key {error} is missing", hint="make the run again") from None


def check_files(folder: Path, manifest: Manifest) -> None:
    """Compare every file with its hash.

    Raises:
        InputError: A file is missing or its bytes were changed; names it.
    """
    for name, entry in manifest.files.items():
        path = folder / name
        if Path(name).name != name:
            raise InputError(f"{folder / NAME}: file name {escape(name)} leaves the folder", hint="make the run again")
        if not path.is_file():
            raise InputError(f"{path}: missing, though the manifest lists it", hint="make the run again")
        if canonical.sha256_of_file(path) != entry["sha256"]:
            raise InputError(f"{path}: bytes differ from the manifest", hint="the file was changed; make the run again")
