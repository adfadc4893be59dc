"""Write docs/reference.md from the command line, the settings table and the registry.

    python docs/generate.py            rewrite it
    python docs/generate.py --check    exit 1 if it is out of date

The text depends on the code and on click alone: no times, paths or terminal widths.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import click
from compress.cli.main import COMMANDS, PROGRAM, cli

from compress import settings
from compress.errors import EXIT_CODES
from compress.registry import MEASURES, METHODS, RUNTIMES, TASKS
from compress.settings import CONFIG, SETTINGS, Setting

OUT = Path(__file__).with_name("reference.md")
WIDTH = 100
HEAD = """# Reference

Written by `python docs/generate.py` (`make docs`) from the code; edit the code, not this page.

- [Commands](#commands)
- [Settings](#settings)
- [Methods](#methods)
- [Measures](#measures)
- [Tasks](#tasks)
- [Runtimes](#runtimes)
- [Presets](#presets)
- [Exit codes](#exit-codes)
"""


def render() -> str:
    """The whole page."""
    sections = [
        HEAD,
        _commands(),
        _settings(),
        _methods(),
        _measures(),
        _tasks(),
        _runtimes(),
        _presets(),
        _exit_codes(),
    ]
    return "\n".join(sections)


def _commands() -> str:
    parts = ["## Commands\n", _block(_help(cli, PROGRAM))]
    context = click.Context(cli, info_name=PROGRAM)
    for name in COMMANDS:
        command = cli.get_command(context, name)
        if command is None:
            raise RuntimeError(f"{name} is listed and can't be imported")
        parts += [f"### {PROGRAM} {name}\n", _block(_help(command, f"{PROGRAM} {name}"))]
    return "\n".join(parts)


def _help(command: click.Command, name: str) -> str:
    context = click.Context(command, info_name=name, terminal_width=WIDTH, max_content_width=WIDTH)
    context.help_option_names = ["-h", "--help"]
    return command.get_help(context)


def _block(text: str) -> str:
    lines = [line.rstrip() for line in text.strip().splitlines()]
    return "\n".join(["```text", *lines, "```", ""])


def _settings() -> str:
    rows = [
        (
            f"`{s.flag}`",
            f"`{s.environment}`",
            f"`{s.key}`",
            _values(s),
            _default(s),
            "yes" if s.in_preset else "no",
            s.help,
        )
        for s in SETTINGS
    ]
    head = ("flag", "environment", "key in the config", "value", "default", "in presets", "what it sets")
    text = (
        f"Precedence: flag, then environment, then `{CONFIG}` (or `[tool.hcompress]` in `pyproject.toml`) in the "
        "current folder, then preset, then default. Paths in a config file are relative to it. `hcompress settings` "
        "prints every value with its origin.\n"
    )
    return "\n".join(["## Settings\n", text, _table(head, rows)])


def _values(setting: Setting) -> str:
    return ", ".join(setting.choices) or settings.TYPES[setting.type]


def _default(setting: Setting) -> str:
    return "" if setting.default in (None, ()) else str(setting.default)


def _methods() -> str:
    rows = [
        (
            f"[{m.name}](methods/{m.name}.md)",
            f"`{PROGRAM} {m.job}`",
            ", ".join(m.budgets),
            ", ".join(m.options),
            ", ".join(m.measures),
            m.summary,
            m.source,
        )
        for m in METHODS
    ]
    head = ("method", "command", "budgets", "settings", "measures", "what it does", "source")
    return "\n".join(["## Methods\n", _table(head, rows)])


def _measures() -> str:
    return "\n".join(["## Measures\n", _table(("measure", "what it is"), [(m.name, m.summary) for m in MEASURES])])


def _tasks() -> str:
    rows = [(t.name, t.metric, t.unit, "higher" if t.higher_is_better else "lower", t.summary) for t in TASKS]
    return "\n".join(["## Tasks\n", _table(("task", "metric", "unit", "better is", "data"), rows)])


def _runtimes() -> str:
    rows = [(f"`{runtime.name}`", runtime.summary) for runtime in RUNTIMES]
    return "\n".join(["## Runtimes\n", _table(("runtime", "what model.onnx is"), rows)])


def _presets() -> str:
    rows = []
    for name, table in settings.presets().items():
        sections = {section: keys for section, keys in table.items() if isinstance(keys, dict)}
        values = [f"`{section}.{key} = {value}`" for section, keys in sections.items() for key, value in keys.items()]
        rows.append((name, table["description"], ", ".join(values)))
    return "\n".join(["## Presets\n", _table(("preset", "what it is for", "settings"), rows)])


def _exit_codes() -> str:
    return "\n".join(["## Exit codes\n", _table(("code", "meaning"), [(str(e.code), e.meaning) for e in EXIT_CODES])])


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


def main(arguments: Sequence[str]) -> int:
    """Write the page, or compare it with ``--check``."""
    if list(arguments) not in ([], ["--check"]):
        click.echo("usage: python docs/generate.py [--check]", err=True)
        return 2
    text = render()
    if not arguments:
        OUT.write_text(text, encoding="utf-8")
        return 0
    if OUT.is_file() and OUT.read_text(encoding="utf-8") == text:
        return 0
    click.echo(f"{OUT.name} is out of date: run make docs", err=True)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
