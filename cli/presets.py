"""``hcompress presets``."""

from __future__ import annotations

from typing import Any

import click

from .. import settings
from ..errors import UsageError
from .options import command
from .output import print_json, print_line, print_table

EXAMPLES = """\
hcompress presets
hcompress presets ci-gate
hcompress presets --json"""
SCHEMA = "hcompress.presets/1"


@command("presets", examples=EXAMPLES)
@click.argument("name", required=False)
def presets(name: str | None, as_json: bool, quiet: bool) -> None:
    """List the presets, or print the settings of the one called NAME."""
    known = settings.presets()
    if name is not None and name not in known:
        raise UsageError(f"preset {name!r} is unknown", hint=f"choices: {', '.join(known)}")
    shown = known if name is None else {name: known[name]}
    if as_json:
        print_json({"schema": SCHEMA, "presets": shown})
    elif name is None:
        print_table(("preset", "what it is for"), [(key, table["description"]) for key, table in known.items()])
    else:
        print_line(known[name]["description"])
        print_table(("setting", "value"), _rows(known[name]))


def _rows(table: dict[str, Any]) -> list[tuple[str, str]]:
    sections = {section: entries for section, entries in table.items() if isinstance(entries, dict)}
    return [(f"{section}.{key}", str(value)) for section, entries in sections.items() for key, value in entries.items()]
