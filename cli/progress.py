"""Progress on stderr: a bar with the time left at a terminal, one line a finished stage elsewhere."""

from __future__ import annotations

import os
import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING

import click

from .failure import check_signals

if TYPE_CHECKING:
    from rich.progress import Progress as Bars
    from rich.progress import TaskID


class Progress:
    """The callback ``progress(stage, done, total)`` of the pipeline; ``total`` None has no end that is known.

    Example:
        >>> with Progress(quiet=False) as progress:
        ...     progress("calibrate", 1, 4)
    """

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._stage: str | None = None
        self._started_s = 0.0
        self._bars: Bars | None = None
        self._bar: TaskID | None = None

    def __enter__(self) -> Progress:
        if not self._quiet and sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
            self._bars = _bars()
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._finish_stage(failed=error is not None)
        if self._bars is not None:
            self._bars.stop()

    def __call__(self, stage: str, done: int, total: int | None) -> None:
        check_signals()
        if self._quiet:
            return
        if stage != self._stage:
            self._finish_stage(failed=False)
            self._stage, self._started_s = stage, time.monotonic()
            if self._bars is not None:
                self._bar = self._bars.add_task(stage, total=total)
        if self._bars is not None and self._bar is not None:
            self._bars.update(self._bar, completed=done, total=total)

    def say(self, text: str) -> None:
        """A line on stderr between two stages."""
        self._finish_stage(failed=False)
        if self._bars is not None:
            self._bars.console.print(text, markup=False, highlight=False)
        elif not self._quiet:
            click.echo(text, err=True)

    def _finish_stage(self, *, failed: bool) -> None:
        if self._stage is None:
            return
        took_s = time.monotonic() - self._started_s
        if self._bars is None:
            click.echo(f"{self._stage}: {'stopped after' if failed else 'done in'} {took_s:.1f} s", err=True)
        elif self._bar is not None and not failed:
            total = self._bars.tasks[self._bars.task_ids.index(self._bar)].total or 1
            self._bars.update(self._bar, completed=total, total=total)
        self._stage = None


def _bars() -> Bars:
    from rich import progress
    from rich.console import Console

    return progress.Progress(
        progress.SpinnerColumn(),
        progress.TextColumn("{task.description}"),
        progress.BarColumn(bar_width=30),
        progress.TaskProgressColumn(),
        progress.TimeRemainingColumn(elapsed_when_finished=True),
        console=Console(stderr=True),
        refresh_per_second=4,
    )
