"""Run folders: staged beside their place, synced, exchanged in one step, so that a folder that exists is complete."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import glob
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from filelock import FileLock, Timeout

from . import manifest
from .errors import DiskError, LockedError, UsageError, escape

RENAME_EXCHANGE = 2  # linux/fs.h
AT_FDCWD = -100
REJECTED_FILES = {"plan.json", "report.html", "report.json", "report.md"}  # of a run that failed a gate
SWEEP_FILES = {manifest.SWEEP, "report.html", "report.md"}
# A point of a sweep, and what a killed run leaves beside it.
BESIDE = r"\.rejected|\.journal(\.[0-9]+)?|\.lock|\.partial-.*|\.[0-9]+\.tmp"
POINT = re.compile(rf"\.?sparsity-[0-9.e-]+({BESIDE})*|\..*\.partial")
SET_ASIDE = ".old"  # suffix of the folder that is being replaced, where there is no exchange


def check_target(out: Path, force: bool, inputs: Iterable[Path] = ()) -> None:
    """Refuse a folder that exists without ``force``, that can't be written, or whose replacement would lose an input.

    Args:
        out: A link to a folder stands for that folder.
        force: Whether a folder that exists is replaced.
        inputs: The user's files, which must not lie in ``out``.

    Raises:
        UsageError: It exists, or mustn't be replaced.
        DiskError: Its parent isn't a folder that can be written.
    """
    try:
        exists, is_folder = out.exists() or out.is_symlink(), out.is_dir()
        target = out.resolve()
    except (OSError, RuntimeError) as error:  # a name that is too long; a loop of links
        raise disk_error(out, error) from error
    if exists and not force:
        raise UsageError(f"{out} already exists", hint="choose another --out, or pass --force to replace it")
    if out.exists() and not is_folder:
        raise UsageError(f"{out} is a file", hint="choose another --out, which names a folder")
    if is_folder:
        _check_replaceable(out)
    for kept in (*_own_folders(), *inputs):
        if is_folder and kept.resolve().is_relative_to(target):
            raise UsageError(
                f"{out} holds {kept}: replacing it would remove that too", hint="choose another --out, a new folder"
            )
    parent = target.parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise DiskError(f"{out}: {parent} is not a folder", hint="choose another --out")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise DiskError(f"{out}: {parent} can't be written", hint="choose another --out")


def _check_replaceable(out: Path) -> None:
    """Only an empty folder, a run folder or a rejected run is replaced, and only if it holds nothing of the user's."""
    names = {path.name for path in out.iterdir()}
    if not names:
        return
    ours = REJECTED_FILES
    if manifest.NAME in names:
        ours = {manifest.NAME, *manifest.read_manifest(out).files}
    foreign = sorted(names - ours)
    if manifest.SWEEP in names:
        raise UsageError(f"{out} holds a sweep, which no single run replaces", hint="choose another --out")
    if foreign:
        raise UsageError(
            f"{out} holds {escape(foreign[0])}, which no run of hcompress wrote: --force replaces run folders only",
            hint="choose another --out, or move your own files out of it",
        )


def check_gathered(out: Path, *, force: bool, resume: bool, inputs: Iterable[Path] = ()) -> None:
    """Refuse a folder for the runs of a sweep that exists without ``force`` or ``resume``, or holds anything else.

    Raises:
        UsageError: It exists, holds what no sweep wrote, or mustn't be replaced.
        DiskError: Its parent isn't a folder that can be written.
    """
    is_there = force or resume
    if not out.is_dir():
        check_target(out, is_there, inputs)
        return
    names = {path.name for path in out.iterdir()}
    if not is_there:
        hint = "choose another --out, or pass --force to replace it"
        if manifest.SWEEP in names:
            hint = "pass --resume to go on with the sweep there, --force to make it anew, or choose another --out"
        raise UsageError(f"{out} already exists", hint=hint)
    foreign = sorted(name for name in names - SWEEP_FILES if not POINT.fullmatch(name))
    if foreign or (names and manifest.SWEEP not in names):
        held = escape(foreign[0]) if foreign else f"no {manifest.SWEEP}"
        raise UsageError(f"{out} holds {held}: it isn't the folder of a sweep alone", hint="choose another --out")
    for path in sorted(out.iterdir()):
        if path.is_dir() and not path.name.startswith("."):
            _check_replaceable(path)
    target = out.resolve()
    for kept in (*_own_folders(), *inputs):
        if kept.resolve().is_relative_to(target):
            raise UsageError(f"{out} holds {kept}, which a sweep may replace", hint="choose another --out")


@contextlib.contextmanager
def gathered(out: Path, *, force: bool, resume: bool, inputs: Sequence[Path] = ()) -> Iterator[None]:
    """Hold ``out`` for the runs of a sweep, each of which is ``staged`` in it; it's removed where it stays empty.

    Raises:
        LockedError: Another sweep writes ``out``.
        DiskError: The folder can't be made.
    """
    check_gathered(out, force=force, resume=resume, inputs=inputs)
    target = out.resolve()
    with _made_parents(target), _locked(target, out):
        check_gathered(out, force=force, resume=resume, inputs=inputs)
        try:
            target.mkdir(exist_ok=True)
        except OSError as error:
            raise disk_error(out, error) from error
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                target.rmdir()


def remove(path: Path) -> None:
    """Take a folder or a file of ours away, where it is there."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _own_folders() -> Iterator[Path]:
    """Where the user is and lives; a container may have neither."""
    for find in (Path.cwd, Path.home):
        with contextlib.suppress(OSError, RuntimeError):
            yield find()


def journal_path(out: Path) -> Path:
    """Where the state of a training is kept while the run into ``out`` is under way."""
    return out.with_name(f"{out.name}.journal")


def check_unlocked(out: Path) -> None:
    """Answer at once where another run writes ``out``; the run itself takes the lock.

    Raises:
        LockedError: Another run writes ``out``.
    """
    target = out.resolve()
    if (target.parent / f".{target.name}.lock").exists():
        with _locked(target, out):
            pass


@contextlib.contextmanager
def staged(out: Path, force: bool, inputs: Sequence[Path] = ()) -> Iterator[Path]:
    """A new folder beside ``out``, to be filled and passed to ``publish``; removed if it wasn't published.

    Raises:
        LockedError: Another run writes ``out``.
        DiskError: The folder can't be made.
    """
    check_target(out, force, inputs)
    target = out.resolve()
    with _made_parents(target), _locked(target, out):
        _remove_stale(target)
        check_target(out, force, inputs)  # again under the lock: the other run may just have finished
        try:
            stage = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
        except OSError as error:
            raise disk_error(out, error) from error
        try:
            stage.chmod(0o755)
            yield stage
        finally:
            shutil.rmtree(stage, ignore_errors=True)


@contextlib.contextmanager
def _made_parents(target: Path) -> Iterator[None]:
    """The folders above ``target``; those that were made and stay empty are taken away again."""
    missing = [folder for folder in target.parents if not folder.exists()]
    try:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise disk_error(target, error) from error
        yield
    finally:
        with contextlib.suppress(OSError):
            for folder in missing:
                folder.rmdir()


@contextlib.contextmanager
def _locked(target: Path, shown: Path) -> Iterator[None]:
    lock_path = target.parent / f".{target.name}.lock"
    lock = FileLock(lock_path)
    try:
        lock_path.touch()  # FileLock waits where it can't make the file
        lock.acquire(timeout=0)
    except Timeout:
        raise LockedError(
            f"{shown}: another run writes this folder", hint="wait for it, or choose another --out"
        ) from None
    except OSError as error:
        raise disk_error(shown, error) from error
    try:
        yield
    finally:
        lock_path.unlink(missing_ok=True)
        lock.release()


def _remove_stale(out: Path) -> None:
    """Stages of runs that were killed; the lock says that none of them lives."""
    for path in out.parent.glob(f".{glob.escape(out.name)}.partial-*"):
        if path.name.endswith(SET_ASIDE) and not out.exists():
            path.rename(out)  # killed between the two renames of an exchange: this is the only copy
        else:
            shutil.rmtree(path, ignore_errors=True)


def publish(stage: Path, out: Path) -> None:
    """Sync every file and put the folder in its place in one step, taking out what was there.

    Raises:
        DiskError: The disk is full or refuses.
    """
    out = out.resolve()
    try:
        for path in stage.iterdir():
            _sync(path)
        _sync(stage)
        if out.exists():
            _exchange(stage, out)
        else:
            stage.rename(out)
        _sync(out.parent)
    except OSError as error:
        raise disk_error(out, error) from error


def _exchange(stage: Path, out: Path) -> None:
    """Swap two folders; the old one is then at ``stage`` and is removed with it."""
    libc = ctypes.CDLL(None, use_errno=True)
    if hasattr(libc, "renameat2"):
        done = libc.renameat2(AT_FDCWD, os.fsencode(stage), AT_FDCWD, os.fsencode(out), RENAME_EXCHANGE)
        if done == 0:
            return
        code = ctypes.get_errno()
        if code not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
            raise OSError(code, os.strerror(code), str(out))
    # No exchange on this system: two renames, the old folder set aside between them and put back on failure.
    aside = stage.with_name(f"{stage.name}{SET_ASIDE}")
    try:
        out.rename(aside)
        stage.rename(out)
    except BaseException:
        if aside.exists() and not out.exists():
            aside.rename(out)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL or not path.is_dir():  # some file systems don't sync folders
            raise
    finally:
        os.close(descriptor)


def write_file(path: Path, data: bytes | str) -> None:
    """Write a whole file by way of a temporary one in its folder.

    Raises:
        DiskError: The disk is full or refuses; the old file is still there.
    """
    content = data.encode() if isinstance(data, str) else data
    temporary = path.with_name(f".{path.name}.partial")
    try:
        with temporary.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except OSError as error:
        raise disk_error(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def disk_error(path: Path, error: OSError | RuntimeError) -> DiskError:
    """The error of a write, in the user's words."""
    if isinstance(error, RuntimeError):  # what pathlib makes of a loop of links
        error = OSError(errno.ELOOP, os.strerror(errno.ELOOP))
    hints = {
        errno.ENOSPC: "free space, or choose another --out",
        errno.EDQUOT: "free space in your quota, or choose another --out",
        errno.EFBIG: "the file is larger than this disk or ulimit -f allows",
        errno.ENAMETOOLONG: "choose a shorter --out",
        errno.ENOTDIR: "a part of the path is a file; choose another --out",
        errno.EACCES: "choose an --out that you may write",
        errno.ENOENT: "choose an --out in a folder that takes others",
        errno.EROFS: "the file system is read-only; choose another --out",
    }
    hint = hints.get(error.errno or 0, "check the disk")
    return DiskError(f"{path}: can't be written ({error.strerror or error})", hint=hint)
