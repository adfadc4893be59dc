"""The state of a training that runs, in one file, so that it can go on after an interruption.

Written to a temporary file beside it, synced and renamed: the file is whole at any time. It is read as tensors and
plain values; nothing in it is run.
"""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn

from .. import canonical
from ..data import Data
from ..errors import DiskError, InputError, UsageError
from .recipe import Recipe

SCHEMA = "hcompress.training/2"


def training_digest(
    module: nn.Module, recipe: Recipe, *, data: Data, calibration: Data | None, teacher: object, surroundings: object
) -> str:
    """Hash of all that the weights of a training follow from.

    Args:
        surroundings: Plain values, such as the seed and what a method's hooks follow.
    """
    found = {
        "recipe": asdict(recipe),
        "start": state_digest(module),
        "dense": state_digest(teacher) if isinstance(teacher, nn.Module) else teacher is not None,
        "data": data.sha256(),
        "calibration": None if calibration is None else calibration.sha256(),
        "surroundings": surroundings,
    }
    return canonical.sha256_of(found)


def state_digest(module: nn.Module) -> str:
    """Hash of a network's parameters and buffers."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        if isinstance(value, Tensor):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write_journal(path: Path, digest: str, state: Mapping[str, Any]) -> None:
    """Replace the journal by the state of now.

    Raises:
        DiskError: It can't be written; the one before is whole.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as stream:
            torch.save({"schema": SCHEMA, "digest": digest, "state": dict(state)}, stream)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError) as error:  # torch's writer turns a full disk into a RuntimeError
        raise DiskError(f"{path}: the journal can't be written ({_line(error)})", hint="free some space") from error
    finally:
        temporary.unlink(missing_ok=True)


def journal_of_pass(path: Path, number: int) -> Path:
    """The journal of a run's ``number``-th training, counted from 1: a byte budget may take more than one."""
    return path if number == 1 else path.with_name(f"{path.name}.{number}")


def delete_journals(path: Path) -> None:
    """Those of all of a run's trainings."""
    number = 1
    while (journal := journal_of_pass(path, number)).is_file():
        journal.unlink()
        number += 1


def read_journal(path: Path, digest: str) -> Mapping[str, Any]:
    """The state in a journal of the training with this digest.

    Raises:
        InputError: It can't be read.
        UsageError: It is of another training.
    """
    hint = "delete it, or leave --resume out"
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch takes flipped bits for weights
        found = None if damaged else torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, LookupError, zipfile.BadZipFile, UnpicklingError) as error:
        raise InputError(f"{path}: the journal can't be read ({_line(error)})", hint=hint) from None
    if damaged:
        raise InputError(f"{path}: the journal can't be read ({damaged} is damaged)", hint=hint)
    if not isinstance(found, dict) or found.get("schema") != SCHEMA:
        raise InputError(f"{path} isn't a journal of a training", hint=hint)
    if found["digest"] != digest:
        raise UsageError(
            f"{path}: the journal is of another training: its checkpoint, plan, data, seed or settings differ",
            hint="give what the interrupted run was given, or leave --resume out",
        )
    state: Mapping[str, Any] = found["state"]
    return state


def _line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
