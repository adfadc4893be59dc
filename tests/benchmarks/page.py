"""What the sections of docs/benchmarks.md have in common: a table, the machine, and a place in the page."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

VERSIONS = ("hcompress", "torch", "onnx", "onnxruntime", "onnxscript", "safetensors", "numpy", "scipy")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows of Markdown."""
    return "".join(f"| {' | '.join(line)} |\n" for line in (head, ["---"] * len(head), *rows))


def machine() -> list[str]:
    """Where, and of which versions, something was measured."""
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in VERSIONS)
    return [
        f"- Machine: {_processor()}, {os.cpu_count()} cores, {platform.system()} {platform.machine()}",
        f"- Versions: Python {platform.python_version()}, {versions}",
    ]


def sections(page: Path) -> dict[str, str]:
    """The text of each section below its title; what stands before the first one is under the empty title."""
    found: dict[str, list[str]] = {"": []}
    title = ""
    for line in page.read_text(encoding="utf-8").splitlines(keepends=True) if page.is_file() else ():
        if line.startswith("## "):
            title = line[3:].strip()
            found[title] = []
        else:
            found[title].append(line)
    return {name: "".join(lines) for name, lines in found.items()}


def put_section(page: Path, title: str, text: str) -> None:
    """Replace the section of this title, or add it at the end."""
    found = sections(page)
    found[title] = f"\n{text}"
    parts = [body if not name else f"## {name}\n{body}" for name, body in found.items()]
    page.write_text("\n\n".join(part.strip("\n") for part in parts) + "\n", encoding="utf-8")


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "processor unknown"


def publish(page: Path | None, title: str, lines: Sequence[str]) -> None:
    """Print a section, and put it into the page where one is given."""
    print("\n".join(lines))
    if page is not None:
        put_section(page, title, "\n".join(lines))


def data_folder(what: str) -> str | None:
    """The folder of the real checkpoints; None, and a word on stderr, where HCOMPRESS_TEST_DATA names none.

    Args:
        what: Isn't measured without it.
    """
    folder = os.environ.get("HCOMPRESS_TEST_DATA")
    if not folder:
        print(f"HCOMPRESS_TEST_DATA names no folder: {what} are not measured", file=sys.stderr)
    return folder or None
