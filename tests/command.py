"""A command line in the process of the tests: one of its own takes seconds to import torch."""

from __future__ import annotations

import contextlib
import io
import json
import signal
from pathlib import Path
from typing import Any

import torch
from compress.cli.main import main

SIGNALS = (signal.SIGTERM, signal.SIGINT)


def hcompress(*arguments: object, code: int = 0, folder: Path | None = None) -> str:
    """What ``hcompress`` with ``arguments`` prints on standard output, run in ``folder``; it ends with ``code``."""
    out, err = io.StringIO(), io.StringIO()
    handlers, threads = [signal.getsignal(number) for number in SIGNALS], torch.get_num_threads()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), contextlib.chdir(folder or Path.cwd()):
            found = main([str(argument) for argument in arguments])
    finally:
        torch.set_num_threads(threads)
        for number, handler in zip(SIGNALS, handlers, strict=True):
            signal.signal(number, handler)
    assert found == code, err.getvalue()
    return out.getvalue()


def record(*arguments: object, code: int = 0, folder: Path | None = None) -> dict[str, Any]:
    """The document that a command prints with ``--json``."""
    found: dict[str, Any] = json.loads(hcompress(*arguments, "--json", code=code, folder=folder))
    return found
