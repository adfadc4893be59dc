"""Every error as a person and a script see it: two lines on stderr, an exit code, and a document with ``--json``."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from .. import __version__
from ..errors import DiskError, HCompressError, InputError, UsageError, out_of_memory

SCHEMA = "hcompress.error/1"
FULL = (errno.ENOSPC, errno.EDQUOT)
DENIED = (errno.EACCES, errno.EPERM, errno.EROFS)


class Terminated(BaseException):
    """SIGTERM came; raised from its handler so that ``finally`` blocks run."""


_received: list[int] = []
_journals: list[Path] = []
_sweeps: list[Path] = []


def note_signal(signum: int) -> None:
    """Remember a signal: whatever it makes of the code that it hits, the run was stopped."""
    _received.append(signum)


def note_journal(path: Path) -> None:
    """Remember where the state of this run's training is kept, if it comes to that."""
    _journals[:] = [path]


def note_sweep(folder: Path) -> None:
    """Remember where the points of this sweep are, once there are any."""
    _sweeps[:] = [folder]


def check_signals() -> None:
    """Raise again for a signal whose exception was lost, as in a callback that Python runs on its own."""
    if _received:
        raise Terminated if _received[0] == signal.SIGTERM else KeyboardInterrupt


@dataclass(frozen=True, slots=True)
class Failure:
    """What is printed and returned."""

    code: int
    kind: str
    message: str
    hint: str = ""
    report: dict[str, Any] | None = None


def report(error: BaseException, arguments: Sequence[str]) -> int:
    """Print ``error`` and return its exit code; ``arguments`` say whether ``--json`` or ``--debug`` was given."""
    if isinstance(error, BrokenPipeError):
        # The reader of stdout left, e.g. `hcompress show run | head`; it has what it wanted.
        _abandon_stdout()
        return 0
    failure = describe(error)
    _received.clear()
    _journals.clear()
    _sweeps.clear()
    flags = set(arguments[: arguments.index("--")] if "--" in arguments else arguments)
    with contextlib.suppress(OSError):  # A closed stderr must not hide the exit code.
        if failure.code == 1 or "--debug" in flags:
            _print_traceback(error)
        click.echo(f"error: {_one_line(failure.message)}", err=True)
        if failure.hint:
            click.echo(f"hint: {_one_line(failure.hint)}", err=True)
    try:
        _print_result(failure, as_json="--json" in flags)
    except OSError:
        # stdout itself is what fails: a full disk or a reader that left. The code above still says why.
        _abandon_stdout()
    return failure.code


def describe(error: BaseException) -> Failure:
    """The exit code and the words for any error.

    Anything that isn't known here is a bug of ours: exit 1, with a traceback.
    """
    if _received:
        error = Terminated() if _received[0] == signal.SIGTERM else KeyboardInterrupt()
    if isinstance(error, HCompressError):
        return Failure(error.exit_code, error.title, error.message, error.hint, error.report)
    if isinstance(error, click.ClickException):
        return _from_click(error)
    if isinstance(error, KeyboardInterrupt | click.Abort):
        return _stopped(130, "interrupted")
    if isinstance(error, Terminated):
        return _stopped(143, "terminated")
    if isinstance(error, OSError) and error.errno in (*FULL, *DENIED):
        return _from_disk(error)
    if (found := out_of_memory(error)) is not None:
        return Failure(found.exit_code, found.title, found.message, found.hint)
    return Failure(
        1,
        HCompressError.title,
        f"{type(error).__name__}: {error}",
        f"this is a bug in hcompress {__version__}; please report it with the lines above and the command",
    )


def _stopped(code: int, kind: str) -> Failure:
    for journal in _journals:
        if journal.is_file():
            hint = "the same command with --resume goes on from there"
            return Failure(code, kind, f"{kind}; the state of the training is in {journal}", hint)
    for folder in _sweeps:
        if finished := _finished_points(folder):
            hint = "the same command with --resume goes on from there"
            return Failure(code, kind, f"{kind}; {finished} of the sweep are finished, in {folder}", hint)
    return Failure(code, kind, f"{kind}; nothing was written")


def _finished_points(folder: Path) -> str:
    """How many of how many, in words; empty where there is no sweep."""
    from ..sweep_report import PENDING, read_sweep

    try:
        points = read_sweep(folder)["points"]
    except InputError:
        return ""
    return f"{sum(point['status'] != PENDING for point in points)} of {len(points)} points"


def _from_click(error: click.ClickException) -> Failure:
    context = error.ctx if isinstance(error, click.UsageError) else None
    command = context.command_path if context else "hcompress"
    hint = f"{command} --help shows examples and options"
    message = error.message if isinstance(error, click.NoSuchOption) else error.format_message()
    close = error.possibilities if isinstance(error, click.NoSuchOption) else None
    if close:
        hint = f"did you mean {' or '.join(close)}?"
    return Failure(UsageError.exit_code, UsageError.title, message[:1].lower() + message[1:].rstrip("."), hint)


def _from_disk(error: OSError) -> Failure:
    where = f"{error.filename}: " if error.filename is not None else ""
    if error.errno in FULL:
        return Failure(
            DiskError.exit_code,
            DiskError.title,
            f"{where}no space left on the device",
            "free some space, or choose another disk with --out; nothing was written",
        )
    reason = os.strerror(error.errno or errno.EACCES).lower()
    hint = "check its owner and mode, or choose another folder with --out"
    return Failure(DiskError.exit_code, DiskError.title, f"{where}{reason}", hint)


def _print_result(failure: Failure, *, as_json: bool) -> None:
    if as_json:
        from .. import canonical

        shown = {"code": failure.code, "kind": failure.kind, "message": failure.message, "hint": failure.hint}
        document: dict[str, Any] = {"schema": SCHEMA, "error": shown}
        if failure.report is not None:
            document["report"] = failure.report
        click.echo(canonical.dumps(document), nl=False)
    elif failure.report is not None:
        from .figures import print_measured

        print_measured(failure.report)


def _print_traceback(error: BaseException) -> None:
    import traceback

    click.echo("".join(traceback.format_exception(error)), err=True, nl=False)


def _one_line(text: str) -> str:
    return " ".join(line.strip() for line in text.splitlines())


def _abandon_stdout() -> None:
    # Python flushes stdout again at exit, which would fail again with a message of its own.
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError):
        return
