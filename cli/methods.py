"""``hcompress methods``."""

from __future__ import annotations

from ..registry import METHODS
from .options import command
from .output import print_json, print_table

EXAMPLES = """\
hcompress methods
hcompress methods --json"""
SCHEMA = "hcompress.methods/1"


@command("methods", examples=EXAMPLES)
def methods(as_json: bool, quiet: bool) -> None:
    """List the methods of prune and quantize, with their budgets, settings and sources."""
    if as_json:
        print_json({"schema": SCHEMA, "methods": METHODS})
        return
    rows = [
        (m.name, f"hcompress {m.job}", ", ".join(m.budgets), ", ".join(m.options), m.summary, m.source) for m in METHODS
    ]
    print_table(("method", "command", "budgets", "settings", "what it does", "source"), rows)
