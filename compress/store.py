"""Run folders: staged beside their place, synced, exchanged in one step, so that a folder that exists is complete."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from .errors import DiskError, LockedError, UsageError

RENAME_EXCHANGE = 2  # linux/fs.h
AT_FDCWD = -100


def check_target(out: Path, force: bool) -> None:
    """Refuse a folder that exists without ``force``, or that can't be written.

    Raises:
        UsageError: It exists.
        DiskError: Its parent isn't a folder that can be written.
    """
    if (out.exists() or out.is_symlink()) and not force:
        raise UsageError(f"{out} already exists", hint="choose another --out, or pass --force to replace it")
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file", hint="--out names a folder")
    parent = out.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise DiskError(f"{out}: {parent} can't be written", hint="choose another --out")


@contextlib.contextmanager
def staged(out: Path, force: bool) -> Iterator[Path]:
    """A new folder beside ``out``, to be filled and passed to ``publish``; removed if it wasn't published.

    Raises:
        LockedError: Another run writes ``out``.
    """
    check_target(out, force)
    out = out.absolute()
    lock_path = out.parent / f".{out.name}.lock"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(lock_path)
        lock.acquire(timeout=0)
    except Timeout:
        raise LockedError(
            f"{out}: another run writes this folder", hint="wait for it, or choose another --out"
        ) from None
    except OSError as error:
        raise disk_error(out, error) from error
    try:
        check_target(out, force)  # again under the lock: the other run may just have finished
        _remove_stale(out)
        stage = Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-", dir=out.parent))
        stage.chmod(0o755)
        try:
            yield stage
        finally:
            shutil.rmtree(stage, ignore_errors=True)
    finally:
        lock_path.unlink(missing_ok=True)
        lock.release()


def _remove_stale(out: Path) -> None:
    """Stages of runs that were killed; the lock says that none of them lives."""
    for path in out.parent.glob(f".{out.name}.partial-*"):
        shutil.rmtree(path, ignore_errors=True)


def publish(stage: Path, out: Path) -> None:
    """Sync every file and put the folder in its place in one step, taking out what was there.

    Raises:
        DiskError: The disk is full or refuses.
    """
    out = out.absolute()
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
        if ctypes.get_errno() not in (errno.EINVAL, errno.ENOSYS):
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), str(out))
    # No exchange on this system: two renames, the old folder set aside between them and put back on failure.
    aside = stage.with_name(f"{stage.name}.old")
    out.rename(aside)
    try:
        stage.rename(out)
    except OSError:
        aside.rename(out)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
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
        temporary.unlink(missing_ok=True)
        raise disk_error(path, error) from error


def disk_error(path: Path, error: OSError) -> DiskError:
    """The error of a write, in the user's words."""
    hints = {
        errno.ENOSPC: "free space, or choose another --out",
        errno.EDQUOT: "free space in your quota, or choose another --out",
        errno.EACCES: "choose an --out that you may write",
        errno.EROFS: "the file system is read-only; choose another --out",
    }
    hint = hints.get(error.errno or 0, "check the disk")
    return DiskError(f"{path}: can't be written ({error.strerror or error})", hint=hint)
