"""The one error tree: what happened, what to do about it, and the exit code that a script sees."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


class HCompressError(Exception):
    """An error of the user's input or machine: two lines on stderr, no traceback.

    Args:
        message: One sentence that names the thing, the value that was wrong and what was allowed.
        hint: What to do next; empty where the message says it all.
        report: What was measured before, as the command's record has it.
    """

    exit_code = 1
    title = "internal error"

    def __init__(self, message: str, *, hint: str = "", report: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.report = report
        if hint:
            self.add_note(f"hint: {hint}")  # what a traceback shows of it


class UsageError(HCompressError):
    """The command line, the settings or the data don't fit together."""

    exit_code = 2
    title = "usage"


class InputError(HCompressError):
    """A file that can't be read, or must not be."""

    exit_code = 3
    title = "unreadable or unsafe input"


class GateError(HCompressError):
    """The result was made and measured, and a check failed."""

    exit_code = 4
    title = "gate failed"


class BudgetError(HCompressError):
    """No decision of the method meets the budget; the message gives the feasible minimum.

    Attributes:
        least: The minimum, where a caller may go on with it.
    """

    exit_code = 5
    title = "infeasible budget"

    def __init__(
        self, message: str, *, hint: str = "", report: dict[str, Any] | None = None, least: float | None = None
    ) -> None:
        super().__init__(message, hint=hint, report=report)
        self.least = least


class LockedError(HCompressError):
    """Another run writes the same folder."""

    exit_code = 6
    title = "locked"


class DiskError(HCompressError):
    """The output can't be written."""

    exit_code = 7
    title = "disk"


class OutOfMemoryError(HCompressError):
    """The work needs more memory than there is; the message gives the estimate and the levers."""

    exit_code = 8
    title = "out of memory"


def out_of_memory(error: BaseException) -> OutOfMemoryError | None:
    """Python's or torch's own error of this kind, in the user's words; None for any other.

    torch's classes are known by name only, as a failing command need not have imported torch.
    """
    words = ("can't allocate memory", "not enough memory")
    is_torch = type(error).__name__ == "OutOfMemoryError" or any(word in str(error) for word in words)
    if not isinstance(error, MemoryError) and not (isinstance(error, RuntimeError) and is_torch):
        return None
    message = f"not enough memory ({error})" if str(error) else "not enough memory"
    return OutOfMemoryError(message, hint="lower --num-calibration, or close other programs")


class NumericsError(HCompressError):
    """A number that can't be trusted; the message names the layer."""

    exit_code = 9
    title = "numerical failure"


@dataclass(frozen=True, slots=True)
class ExitCode:
    code: int
    meaning: str


EXIT_CODES = (
    ExitCode(0, "ok"),
    ExitCode(1, "a bug in hcompress; --debug shows where"),
    *(
        ExitCode(kind.exit_code, kind.title)
        for kind in (
            UsageError,
            InputError,
            GateError,
            BudgetError,
            LockedError,
            DiskError,
            OutOfMemoryError,
            NumericsError,
        )
    ),
    ExitCode(130, "interrupted (Ctrl-C)"),
    ExitCode(143, "terminated"),
)


def escape(name: str, limit: int = 120) -> str:
    """A name from an untrusted file, fit for a terminal: control characters escaped, overlong middles cut."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in name)
    return shown if len(shown) <= limit else f"{shown[: limit // 2]}...{shown[-limit // 4 :]}"
