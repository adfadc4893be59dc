"""``hcompress settings``."""

from __future__ import annotations

from typing import Any

import click

from ..settings import SETTINGS
from . import options
from .figures import NOTHING
from .options import command
from .output import print_json, print_table

EXAMPLES = """\
hcompress settings
hcompress settings --preset edge-int8
HCOMPRESS_THREADS=1 hcompress settings --json"""
SCHEMA = "hcompress.settings/1"


@command("settings", examples=EXAMPLES)
@click.option("--preset", metavar="NAME", help="As if this preset were given.")
def settings(preset: str | None, as_json: bool, quiet: bool) -> None:
    """Print every setting with its value and where that comes from: environment, config, preset or default."""
    resolved = options.resolve(preset)
    if as_json:
        entries = [
            {
                "name": setting.name,
                "key": setting.key,
                "flag": setting.flag,
                "environment": setting.environment,
                "help": setting.help,
                "value": resolved[setting.name].value,
                "origin": resolved[setting.name].origin,
            }
            for setting in SETTINGS
        ]
        print_json({"schema": SCHEMA, "settings": entries})
        return
    rows = [(s.key, s.flag, _text(resolved[s.name].value), resolved[s.name].origin) for s in SETTINGS]
    print_table(("key", "flag", "value", "origin"), rows)


def _text(value: Any) -> str:
    if value is None or value == ():
        return NOTHING
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
