"""Signals that wait until the state of a training is whole, so that it is saved before they stop the run."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def signals_held(save: Callable[[], None]) -> Iterator[Callable[[], None]]:
    """Hold back SIGINT and SIGTERM where they have handlers in Python; a second one isn't held.

    Yields:
        What is to be called where the state is whole: if a signal waits, it saves and calls the signal's own handler.
    """
    waiting: list[int] = []
    handlers: dict[int, Callable[[int, FrameType | None], object]] = {}

    def hold(signum: int, frame: FrameType | None) -> None:
        waiting.append(signum)
        if len(waiting) > 1:
            handlers[signum](signum, frame)

    def release() -> None:
        if waiting:
            save()
            handlers[waiting[0]](waiting[0], None)

    if threading.current_thread() is threading.main_thread():
        for signum in SIGNALS:
            if callable(handler := signal.getsignal(signum)):
                handlers[signum] = handler
                signal.signal(signum, hold)
    try:
        yield release
    finally:
        for held, own in handlers.items():
            if signal.getsignal(held) is hold:  # else the handler has set another one
                signal.signal(held, own)
